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
