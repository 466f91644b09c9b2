"""Memorization Guard: tells while an image is being sampled whether the model is reproducing a training image.

The core in this package needs torch, numpy and safetensors, and knows no host. ``memorization_guard.diffusers`` watches
diffusers pipelines; ``memorization_guard.lab`` holds a small model that really memorizes.
"""

from .core.calibration import CalibrationError, Calibrator
from .core.errors import GuardError
from .core.monitor import StabilityMonitor
from .core.noise_level import NoiseLevel
from .core.profile import Mismatch, ProfileCheck, ProfileError, StabilityProfile
from .core.run import StepEvent
from .core.settings import Method, Mode, RunSettings, Thresholds
from .core.trace import Trace, trace_schema

__version__ = "0.1.0"


def _drawn(trace: Trace) -> str:
    from .reports.graph import svg  # the hosts that draw nothing do not load it

    return svg(trace)


Trace.drawn = _drawn

__all__ = [
    "CalibrationError",
    "Calibrator",
    "GuardError",
    "Method",
    "Mismatch",
    "Mode",
    "NoiseLevel",
    "ProfileCheck",
    "ProfileError",
    "RunSettings",
    "StabilityMonitor",
    "StabilityProfile",
    "StepEvent",
    "Thresholds",
    "Trace",
    "trace_schema",
]
