"""The WebUI half: for AUTOMATIC1111's WebUI, Forge and reForge. Imported by ``scripts/memorization_guard.py`` alone.

``scripts.py`` is what the host calls; ``controls.py`` what the user sees; ``session.py`` what one generation's images are told by;
``sampling.py`` puts the host's sampling in the core's terms; ``hosts.py`` knows where the hosts differ.
"""

from __future__ import annotations

from .scripts import MemorizationGuardAccordion, MemorizationGuardScript, register

__all__ = ["MemorizationGuardAccordion", "MemorizationGuardScript", "register"]
