"""Watching diffusers pipelines: the public name of :mod:`memorization_guard.adapters.diffusers`."""

from .adapters.diffusers import GuardedRun, calibrate, copy_sharing_weights, guard

__all__ = ["GuardedRun", "calibrate", "copy_sharing_weights", "guard"]
