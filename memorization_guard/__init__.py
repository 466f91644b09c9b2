"""Memorization Guard: tells while an image is being sampled whether the model is reproducing a training image.

The core in this package needs torch, numpy and safetensors, and knows no host. ``memorization_guard.diffusers`` watches
diffusers pipelines; ``memorization_guard.lab`` holds a small model that really memorizes.
"""

from .calibration import CalibrationError, Calibrator
from .detection import Thresholds
from .monitor import StabilityMonitor, StepEvent
from .parameterization import NoiseLevel
from .profile import Mismatch, ProfileCheck, ProfileError, RunSettings, StabilityProfile
from .trace import Trace, trace_schema

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "Calibrator",
    "Mismatch",
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
