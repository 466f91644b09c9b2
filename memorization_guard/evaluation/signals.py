"""The scores that an evaluation compares: each is one number of a trace."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..core.trace import Trace


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _first(values: np.ndarray) -> float | None:
    return float(values[0]) if len(values) and np.isfinite(values[0]) else None


def _evidence(p_value: float | None) -> float | None:
    return None if p_value is None else -math.log10(max(p_value, 1e-300))


#: The signals by name. Higher means memorized. ``None`` where a run has no such value: there is no guidance at scale 1, for
#: instance. A signal that no image of a list has is left out of the table, and a warning says so.
SIGNALS: dict[str, Callable[[Trace], float | None]] = {
    "S_mem": lambda trace: trace.score,
    "joint score": lambda trace: trace.joint_score,
    "p-value, -log10": lambda trace: _evidence(trace.p_value),
    "detail": lambda trace: trace.detail,
    "uncalibrated score": lambda trace: trace.uncalibrated_score,
    "guidance norm, mean": lambda trace: _mean(trace.guidance_norm),
    "guidance norm, first evaluation": lambda trace: _first(trace.guidance_norm),
}

#: The signals by which the least typical prompts are chosen, the first of them that a run has.
RANKING = ("p-value, -log10", "joint score", *SIGNALS)
