"""The WebUI half: for AUTOMATIC1111's WebUI, Forge and reForge. Loaded by ``scripts/memorization_guard.py`` alone.

``scripts.py`` is what the host calls; ``controls.py`` what the user sees; ``session.py`` what is known of the images of one
generation, and ``record.py`` what a saved one carries; ``sampling.py`` watches the runs of a sampler, ``predictions.py``
stands between the network and guidance, with ``forge.py`` for its forks and ``prompts.py`` for other prompts in the place of a
run's own, and ``timesteps.py`` knows samplers that count in timesteps; ``profiles.py`` makes and
finds profiles; ``live.py`` is what the page asks; ``xyz.py`` the axes and cells of plots; ``hosts.py`` knows where the hosts
differ.
"""
