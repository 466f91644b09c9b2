"""The WebUI half: for AUTOMATIC1111's WebUI, Forge and reForge. Loaded by ``scripts/memorization_guard.py`` alone.

``scripts.py`` is what the host calls; ``controls.py`` what the user sees; ``session.py`` what one generation's images are told by;
``sampling.py`` puts the host's sampling in the core's terms; ``hosts.py`` knows where the hosts differ.
"""
