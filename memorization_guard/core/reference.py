"""What ordinary images do at every noise level, and how rare it is to get as far from that as a given run does (ours).

The published bands hold for one solver and one list of noise levels: the norm of an update grows with the step and takes in
the noise that a sampler adds. What the network says at a noise level does not depend on the solver that asked. So a run is
held against reference runs by the :class:`Signals` of its predictions, in the logarithm, whose distribution over ordinary
images is close to normal where that of a norm has a heavy right side. Between the noise levels of the reference runs each is
interpolated along the angle ``atan(sigma)``. ``docs/evaluation.md`` has what this was measured to be worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from .signals import Signals

#: Noise level (VE sigma) above which an image is still open: an ordinary prompt has settled little of it there.
OPEN_SIGMA = 4.0


class Statistics(NamedTuple):
    """What a run is judged by, in standard deviations of the reference runs; NaN for what there is not.

    Attributes:
        joint: the smaller deviation, to either side, of velocity and x0: both are off at one noise level.
        guidance: deviation of the guidance norm, while the image is open: later, solvers part ways, and so do ordinary images.
        local: deviation of the local signal: part of the image is too large.
    """

    joint: np.ndarray
    guidance: np.ndarray
    local: np.ndarray


#: How many sides of a deviation count, in the order of :class:`Statistics`.
_SIDES = np.array([2, 1, 1])


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference runs of a profile.

    Attributes:
        signals: of every evaluation of every run, each ``[runs, evaluations]``; NaN for what a run without guidance, or a
            latent without places, does not have.
        angles: ``[evaluations]``, ``atan(noise / signal)``, strictly falling.
        patches: ``[evaluations, 2]``, mean and standard deviation of the logarithm of a patch's root mean square, over runs
            and places; NaN where latents have none.

    Raises:
        ValueError: if the arrays do not fit, or what must be finite is not.
    """

    signals: Signals
    angles: np.ndarray
    patches: np.ndarray

    def __post_init__(self) -> None:
        signals = Signals(*(np.asarray(values, dtype=np.float64) for values in self.signals))
        angles, patches = (np.asarray(values, dtype=np.float64) for values in (self.angles, self.patches))
        shape = signals.velocity.shape
        if len(shape) != 2 or shape[0] < 3 or not shape[1] or any(values.shape != shape for values in signals):
            raise ValueError(f"signals must be [3 or more runs, evaluations] each; they are {[s.shape for s in signals]}")
        if angles.shape != shape[1:] or patches.shape != (shape[1], 2):
            raise ValueError(f"angles and patches do not fit runs of {shape[1]} evaluations: {angles.shape}, {patches.shape}")
        if not (np.isfinite(angles).all() and np.isfinite(signals.velocity).all() and np.isfinite(signals.denoised).all()):
            raise ValueError("angles and norms must be finite")
        if (np.diff(angles) >= 0).any():
            raise ValueError("the noise levels of reference runs must fall")
        for values in (*signals, angles, patches):
            values.setflags(write=False)
        object.__setattr__(self, "signals", signals)
        object.__setattr__(self, "angles", angles)
        object.__setattr__(self, "patches", patches)

    def region(self, angles: np.ndarray | None = None) -> Region:
        """Where ordinary images are in a run that is evaluated at ``angles``; by default at those of the reference runs."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.stack(self.signals, axis=-1))
        if angles is None:
            return Region(logs, self.angles, self.patches)
        angles = np.unique(np.asarray(angles, dtype=np.float64))[::-1]
        there = _interpolated(angles, self.angles, logs.transpose(0, 2, 1)).transpose(0, 2, 1)
        return Region(there, angles, _interpolated(angles, self.angles, self.patches.T).T)


@dataclass(frozen=True, eq=False)
class Region:
    """Where ordinary images are in one run, and the p-values that follow.

    Attributes:
        logs: ``[runs, evaluations, 4]``: logarithms of the signals of every reference run.
        angles: ``[evaluations]``, falling, as in :class:`Reference`.
        patches: ``[evaluations, 2]``, as in :class:`Reference`.
    """

    logs: np.ndarray
    angles: np.ndarray
    patches: np.ndarray

    @cached_property
    def _moments(self) -> np.ndarray:
        """Mean and standard deviation of the logarithms, ``[evaluations, 2, 4]``."""
        return np.stack([self.logs.mean(axis=0), np.maximum(self.logs.std(axis=0, ddof=1), 1e-6)], axis=1)

    def moments(self, angles: np.ndarray) -> np.ndarray:
        """Mean and standard deviation of the logarithms of the signals at ``angles`` ``[E]``, ``[E, 2, 4]``; held constant
        outside."""
        rising, moments = self.angles[::-1], self._moments[::-1]
        after = np.clip(np.searchsorted(rising, angles), 1, len(rising) - 1) if len(rising) > 1 else np.zeros(len(angles), int)
        before = np.maximum(after - 1, 0)
        width = rising[after] - rising[before]
        share = np.clip((angles - rising[before]) / np.where(width > 0, width, 1.0), 0.0, 1.0)[:, None, None]
        return (1 - share) * moments[before] + share * moments[after]

    def band(self, angle: float, signal: str) -> tuple[float, float]:
        """Mean and standard deviation of a signal at ``angle``, to be drawn."""
        mean, std = self.moments(np.array([angle]))[0, :, Signals._fields.index(signal)]
        return math.exp(mean), math.exp(mean) * std

    def patch(self, angle: float) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of a patch's root mean square."""
        mean, std = _interpolated(np.array([angle]), self.angles, self.patches.T)[:, 0]
        return float(mean), float(std)

    def statistics(self, angles: np.ndarray, signals: Signals) -> Statistics:
        """The statistics ``[E, B]`` of evaluations at ``angles`` ``[E]`` with signals ``[E, B]``."""
        moments = self.moments(angles)[:, :, :, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations = (np.log(np.stack(signals, axis=1)) - moments[:, 0]) / moments[:, 1]
            return _statistics(deviations.swapaxes(0, 1), np.tan(angles)[:, None] > OPEN_SIGMA)

    @cached_property
    def _effective_tests(self) -> tuple[np.ndarray, float]:
        """How many independent tests the maximum of each statistic over a run amounts to, ``[3]``, NaN where it has none; and
        how many independent statistics all of them together amount to.

        The largest of K independent tests has ``-log(1 - q)`` exponentially distributed with rate K, q being the p-value of a
        single one. So K follows from the reference runs, each held against all others.
        """
        runs = len(self.logs)
        mean, std = self._moments[:, 0], self._moments[:, 1]
        off = self.logs - mean
        spread = np.sqrt(np.maximum(((runs - 1) * std**2 - off**2 * runs / (runs - 1)) / (runs - 2), 1e-12))
        deviations = (off * (runs / (runs - 1)) / spread).transpose(2, 0, 1)
        every = np.stack(_statistics(deviations, np.tan(self.angles) > OPEN_SIGMA))
        highest = np.where(np.isnan(every), -np.inf, every).max(axis=2)
        single = _single(highest, runs - 1)
        tests = np.array(
            [_rate(row) if there.any() else math.nan for row, there in zip(single, np.isfinite(highest), strict=True)]
        )
        there = np.isfinite(tests)
        if not there.any():
            return tests, 1.0
        smallest = (-np.expm1(tests[there, None] * np.log1p(-single[there]))).min(axis=0)
        return tests, float(np.clip(_rate(smallest), 1.0, there.sum()))

    def p_value(self, highest: np.ndarray) -> np.ndarray:
        """Share of ordinary images that get as far in a whole run: of the highest statistics ``[3, B]``, ``[B]``.

        As far in any of the statistics, which count as so many independent ones as the reference runs show them to be.
        """
        tests, statistics = self._effective_tests
        there = np.isfinite(tests)
        if not there.any():
            return np.full(highest.shape[1], np.nan)
        each = -np.expm1(tests[there, None] * np.log1p(-_single(highest, len(self.logs))[there]))
        return -np.expm1(statistics * np.log1p(-np.minimum(each.min(axis=0), 1 - 1e-9)))

    def critical(self, rate: float) -> np.ndarray:
        """The values ``[3]`` of the statistics above which the p-value is below ``rate``; infinite where there is none."""
        tests, statistics = self._effective_tests
        smallest = -np.expm1(math.log1p(-rate) / statistics)
        at, log_tail = _tail_table(len(self.logs) - 1)
        single = -np.expm1(np.log1p(-smallest) / tests) / _SIDES
        angle = np.interp(-np.log(np.where(np.isfinite(single), single, 1.0)), -log_tail, at)
        t = np.tan(angle) * math.sqrt(len(self.logs) - 1)
        return np.where(np.isfinite(tests), t * math.sqrt(1 + 1 / len(self.logs)), np.inf)


def _statistics(deviations: np.ndarray, is_open: np.ndarray | np.bool_) -> Statistics:
    """The statistics from deviations ``[4, ...]`` of the signals; ``is_open`` fits their last axis."""
    velocity, denoised, guidance, local = deviations
    joint = np.minimum(np.abs(velocity), np.abs(denoised))
    return Statistics(joint, np.where(is_open, guidance, np.nan), local)


def _single(highest: np.ndarray, runs: int) -> np.ndarray:
    """Share of ordinary images whose statistic ``[3, B]`` is as high in a single test, with ``runs`` references: ``[3, B]``.

    A new image against R references follows Student's t with R - 1 degrees of freedom, times ``sqrt(1 + 1 / R)``.
    """
    t = np.maximum(np.nan_to_num(highest, nan=0.0) / math.sqrt(1 + 1 / runs), 0.0)
    at, log_tail = _tail_table(runs - 1)
    return np.minimum(np.exp(np.interp(np.arctan(t / math.sqrt(runs - 1)), at, log_tail)) * _SIDES[:, None], 1 - 1e-9)


def _rate(shares: np.ndarray) -> float:
    """Rate of the exponential distribution of ``-log(1 - share)``, by maximum likelihood."""
    return len(shares) / max(float(-np.log1p(-np.minimum(shares, 1 - 1e-9)).sum()), 1e-9)


def _interpolated(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` ``[..., evaluations]`` at other angles, held constant outside: ``[..., len(at)]``. ``known`` falls."""
    flat = values.reshape(-1, values.shape[-1])[:, ::-1]
    return np.stack([np.interp(at, known[::-1], row) for row in flat]).reshape(*values.shape[:-1], len(at))


@cache
def _tail_table(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of ``P(T > t)`` of Student's t, by ``atan(t / sqrt(degrees))``."""
    # With t = sqrt(nu) tan(phi) the density is proportional to cos(phi) ** (nu - 1); hosts do not come with SciPy.
    angle = np.linspace(0.0, math.pi / 2, 8193)
    density = np.cos(angle) ** (degrees - 1)
    parts = (density[1:] + density[:-1]) / 2
    tail = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
    return angle, np.log(np.maximum(tail / (2 * tail[0]), 1e-300))
