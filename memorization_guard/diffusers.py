"""Watching diffusers pipelines: the public names of what is in :mod:`memorization_guard.adapters`."""

from .adapters.calibrate import calibrate
from .adapters.diffusers import GuardedRun, copy_sharing_weights, guard

__all__ = ["GuardedRun", "calibrate", "copy_sharing_weights", "guard"]
