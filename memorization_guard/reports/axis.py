"""The axis of a graph or chart: from values to pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` over pixels from ``start`` to ``end``. Values outside are put at the nearer end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: ArrayLike) -> np.ndarray:
        """The pixels of values, of the same shape; NaN for NaN."""
        transform: Callable[[ArrayLike], np.ndarray] = np.log if self.log else np.asarray
        low, high = transform(np.array([self.low, self.high]))
        share = (transform(np.clip(np.asarray(values, dtype=float), self.low, self.high)) - low) / (high - low)
        return self.start + (self.end - self.start) * share

    def ticks(self) -> list[float]:
        """Two to six round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [digit * 10.0**decade for decade in decades for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= 6:
                    break
            return ticks
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(step * n for n in (1, 0.5, 0.2, 0.1) if (self.high - self.low) / (step * n) >= 3)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def norm_axis(run: np.ndarray, mean: np.ndarray, inner: np.ndarray, top: float, bottom: float) -> Axis | None:
    """The axis for a run and its band; ``None`` if nothing is finite.

    It is logarithmic where the values stretch over more than a decade, as in some schedules: a linear axis would press the end
    of the run flat. The tails of the band have no part in it.
    """
    values = np.concatenate([run, mean, inner])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    known = np.concatenate([mean, inner])
    known = known[np.isfinite(known)]
    high = float(values.max())
    if len(known):
        high = min(high, 20 * float(known.max()))  # a latent that exploded must not hide the band
    high = high if high > 0 else 1.0
    # Values near zero in a few steps do not count: a last step that hardly moves, say.
    usual = known if len(known) else values
    if 0 < np.quantile(usual, 0.1) < usual.max() / 12:
        floor = float(values[values > 0].min())
        return Axis(max(floor, high / 1000) / 1.15, high * 1.15, bottom, top, log=True)
    low = float(values.min())
    low = 0.0 if low < high / 2 else low - 0.08 * (high - low) - 1e-3 * high
    return Axis(low, high + 0.08 * (high - low), bottom, top)
