"""What ordinary images do at every noise level, and how rare it is to get as far from that as a given run does (ours).

The published bands hold for one solver and one list of noise levels: the norm of an update grows with the step and takes in
the noise that a sampler adds. What the network says at a noise level does not depend on the solver that asked. So a run is
held against reference runs by the :class:`Signals` of its predictions, in the logarithm, whose distribution over ordinary
images is close to normal where that of a norm has a heavy right side. Between the noise levels of the reference runs each is
interpolated along the angle ``atan(sigma)``. ``docs/evaluation.md`` has what this was measured to be worth.
"""

from __future__ import annotations

import math
from bisect import bisect_left
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

#: How many runs are drawn to estimate the exponents of :class:`_Counts`, and how many of these, the rarest, are used.
_DRAWS = 2000
_RAREST_DRAWS = 200

#: How many schedules are kept ready.
_KEPT_REGIONS = 8


class _Counts(NamedTuple):
    """What turns the p-value q of a single test into that of a run; see :meth:`Region.p_value`.

    Attributes:
        exponents: ``[3]``, g: the p-value of the maximum over a run falls like ``q ** g``. NaN where a statistic is missing.
        tests: ``[3]``, effective number of independent tests in a run, each with the p-value ``q ** g``. NaN likewise.
        statistics: effective number of independent statistics.
    """

    exponents: np.ndarray
    tests: np.ndarray
    statistics: float


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
        norms = np.stack([signals.velocity, signals.denoised])
        if not (np.isfinite(angles).all() and np.isfinite(norms).all() and (norms > 0).all()):
            raise ValueError("angles and norms must be finite, and norms positive")
        if (np.diff(angles) >= 0).any():
            raise ValueError("the noise levels of reference runs must fall")
        for values in (*signals, angles, patches):
            values.setflags(write=False)
        object.__setattr__(self, "signals", signals)
        object.__setattr__(self, "angles", angles)
        object.__setattr__(self, "patches", patches)

    def region(self, angles: np.ndarray | None = None) -> Region:
        """Where ordinary images are in a run that is evaluated at ``angles``; by default at those of the reference runs.

        The last few are kept: what follows from the reference runs is computed once a schedule.
        """
        there = self.angles if angles is None else np.unique(np.asarray(angles, dtype=np.float64))[::-1]
        if (region := self._regions.pop(there.tobytes(), None)) is None:
            logs = _interpolated(there, self.angles, self._logs.transpose(0, 2, 1)).transpose(0, 2, 1)
            region = Region(logs, there, _interpolated(there, self.angles, self.patches.T).T)
        self._regions[there.tobytes()] = region
        if len(self._regions) > _KEPT_REGIONS:
            self._regions.pop(next(iter(self._regions)), None)
        return region

    @cached_property
    def _regions(self) -> dict[bytes, Region]:
        return {}

    @cached_property
    def _logs(self) -> np.ndarray:
        """Logarithms of the signals, ``[runs, evaluations, 4]``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.stack(self.signals, axis=-1))
        logs[~np.isfinite(logs)] = np.nan
        return logs


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

    @cached_property
    def _rising(self) -> tuple[list[float], np.ndarray]:
        return self.angles[::-1].tolist(), self._moments[::-1]

    def moments(self, angle: float) -> np.ndarray:
        """Mean and standard deviation of the logarithms of the signals at ``angle``, ``[2, 4]``; held constant outside."""
        angles, moments = self._rising
        after = bisect_left(angles, angle)
        if after == len(angles) or after == 0 or angles[after] == angle:
            here: np.ndarray = moments[min(after, len(angles) - 1)]
        else:
            share = (angle - angles[after - 1]) / (angles[after] - angles[after - 1])
            here = (1 - share) * moments[after - 1] + share * moments[after]
        return here

    def band(self, angle: float, signal: str) -> tuple[float, float]:
        """Mean and standard deviation of a signal at ``angle``, to be drawn."""
        mean, std = self.moments(angle)[:, Signals._fields.index(signal)]
        return math.exp(mean), math.exp(mean) * std

    def patch(self, angle: float) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of a patch's root mean square."""
        mean, std = _interpolated(np.array([angle]), self.angles, self.patches.T)[:, 0]
        return float(mean), float(std)

    @np.errstate(divide="ignore", invalid="ignore")
    def statistics(self, angle: float, signals: Signals) -> Statistics:
        """The statistics ``[B]`` of an evaluation at ``angle``."""
        mean, std = self.moments(angle)[:, :, None]
        return _statistics((np.log(np.array(signals)) - mean) / std, math.tan(angle) > OPEN_SIGMA)

    def p_value(self, highest: np.ndarray) -> np.ndarray:
        """Share of ordinary images that get as far in a whole run: of the highest statistics ``[3, B]``, ``[B]``.

        The highest of K independent tests exceeds a value with probability ``1 - (1 - q) ** K``, where q is the p-value of
        a single one. The same holds for the smallest p-value of several statistics. The tests of a run are not independent,
        so K is an effective number and q is raised to a power, both taken from the reference runs. A NaN is left out.
        """
        counts = self._counts
        rates = counts.tests[:, None] * _rates(highest, len(self.logs), counts.exponents)
        p_values: np.ndarray = -np.expm1(-counts.statistics * np.fmin.reduce(rates, axis=0))
        return p_values

    def critical(self, rate: float) -> np.ndarray:
        """The values ``[3]`` of the statistics above which the p-value is below ``rate``; infinite where there is none."""
        exponents, tests, statistics = self._counts
        runs = len(self.logs)
        single = (-np.expm1(math.log1p(-rate) / statistics / tests)) ** (1 / exponents)
        at, log_tail = _tail_table(runs - 1)
        angle = np.interp(-np.log(single / _SIDES), -log_tail, at)
        return np.where(np.isfinite(tests), np.tan(angle) * math.sqrt((runs - 1) * (1 + 1 / runs)), np.inf)

    @cached_property
    def _counts(self) -> _Counts:
        """The effective numbers of tests and of statistics, from the reference runs, each held against all others.

        ``-log(1 - q)`` of the largest of K independent tests is exponentially distributed with rate K, so K is estimated by
        maximum likelihood. It is not limited to the number of tests there are: p-values go by its inverse, whose estimate
        has no bias as long as nothing is cut off.
        """
        exponents = self._exponents
        there = np.isfinite(exponents)
        if not there.any():
            return _Counts(exponents, exponents, 1.0)
        rates = _rates(self._left_out, len(self.logs) - 1, exponents)
        tests = np.full(len(exponents), np.nan)
        tests[there] = [_rate(row) for row in rates[there]]
        return _Counts(exponents, tests, _rate(np.fmin.reduce(tests[:, None] * rates, axis=0)))

    @cached_property
    def _left_out(self) -> np.ndarray:
        """The highest statistics ``[3, runs]`` of every reference run, held against all others."""
        runs = len(self.logs)
        mean, std = self._moments[:, 0], self._moments[:, 1]
        off = self.logs - mean
        spread = np.sqrt(np.maximum(((runs - 1) * std**2 - off**2 * runs / (runs - 1)) / (runs - 2), 1e-12))
        deviations = (off * (runs / (runs - 1)) / spread).transpose(2, 0, 1)
        return self._highest(deviations)

    @cached_property
    def _exponents(self) -> np.ndarray:
        """How fast the p-value of the maximum over a run falls with that of a single test, for each statistic ``[3]``.

        It falls like the first power if the tests are independent or all the same. It falls more slowly if they are correlated
        normal variables, which depend on each other less the rarer the event is. The joint statistic asks for two signals at
        once, so that its p-value can fall as fast as the second power. Of such rare events the reference runs have too few.
        Normal runs with the same correlations are drawn instead: sums of the reference runs with random weights.
        """
        runs = len(self.logs)
        scaled = ((self.logs - self._moments[:, 0]) / self._moments[:, 1] / math.sqrt(runs - 1)).transpose(2, 1, 0)
        velocity, denoised, guidance, local = scaled.astype(np.float32)
        weights = _weights(runs)
        # The squared correlation of independent signals is 1 / (runs - 1) on average, by chance. The joint statistic depends
        # so much on the correlation of its two signals that this part is taken off: x0 gets weights that are partly its own.
        square = float(np.mean((velocity * denoised).sum(axis=1) ** 2))
        shared = math.sqrt(max(0.0, 1 - 1 / ((runs - 1) * max(square, 1e-9))))
        partly_own = shared * weights + math.sqrt(1 - shared**2) * np.roll(weights, 1, axis=1)
        drawn = np.stack([velocity @ weights, denoised @ partly_own, guidance @ weights, local @ weights]).swapaxes(1, 2)
        return np.array([_exponent(values, sides) for values, sides in zip(self._highest(drawn), _SIDES, strict=True)])

    def _highest(self, deviations: np.ndarray) -> np.ndarray:
        """The highest statistics ``[3, ...]`` of runs with the deviations ``[4, ..., evaluations]``."""
        statistics = _statistics(deviations, np.tan(self.angles) > OPEN_SIGMA)
        return np.stack([np.fmax.reduce(values, axis=-1) for values in statistics])


def _statistics(deviations: np.ndarray, is_open: np.ndarray | bool) -> Statistics:
    """The statistics from deviations ``[4, ...]`` of the signals; ``is_open`` fits their last axis."""
    velocity, denoised, guidance, local = deviations
    joint = np.minimum(np.abs(velocity), np.abs(denoised))
    return Statistics(joint, np.where(is_open, guidance, np.nan), local)


def _rates(highest: np.ndarray, runs: int, exponents: np.ndarray) -> np.ndarray:
    """``-log(1 - q ** g)`` of the highest statistics ``[3, B]``, with ``runs`` references and exponents g: ``[3, B]``.

    A new image against R references follows Student's t with R - 1 degrees of freedom, times ``sqrt(1 + 1 / R)``.
    """
    at, log_tail = _tail_table(runs - 1)
    log_single = np.interp(np.arctan(highest / math.sqrt((runs - 1) * (1 + 1 / runs))), at, log_tail)
    log_single += np.log(_SIDES)[:, None]
    rates: np.ndarray = -np.log1p(-np.minimum(np.exp(exponents[:, None] * log_single), 1 - 1e-12))
    return rates


def _rate(values: np.ndarray) -> float:
    """Rate of an exponential distribution by maximum likelihood, from the smaller half of ``values``: the rarer half."""
    smaller = np.sort(values)[: (len(values) + 1) // 2]
    return len(smaller) / max(float(smaller.sum() + (len(values) - len(smaller)) * smaller[-1]), 1e-12)


def _exponent(highest: np.ndarray, sides: int) -> float:
    """The exponent g in ``P(highest > x) ~ P(normal > x) ** g``, from 1/2 to 2, by Hill's (1975) estimator; NaN for NaN."""
    if np.isnan(highest).any():
        return math.nan
    rarest = np.partition(highest, -_RAREST_DRAWS - 1)[-_RAREST_DRAWS - 1 :].tolist()
    threshold, *logs = (math.log(max(sides * math.erfc(value / math.sqrt(2)) / 2, 1e-300)) for value in rarest)
    return 1 / min(max(threshold - math.fsum(logs) / len(logs), 0.5), 2.0)


@cache
def _weights(runs: int) -> np.ndarray:
    """Weights of the reference runs in each run that is drawn, ``[runs, draws]``; always the same."""
    return np.random.default_rng(0).standard_normal((runs, _DRAWS), dtype=np.float32)


def _interpolated(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` ``[..., evaluations]`` at other angles, held constant outside: ``[..., len(at)]``. ``known`` falls."""
    flat = values.reshape(-1, values.shape[-1])[:, ::-1]
    return np.stack([np.interp(at, known[::-1], row) for row in flat]).reshape(*values.shape[:-1], len(at))


@cache
def _tail_table(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of ``P(T > t)`` of Student's t, by ``atan(t / sqrt(degrees))``."""
    # With t = sqrt(nu) tan(phi) the density is proportional to cos(phi) ** (nu - 1); hosts do not come with SciPy.
    angle = np.linspace(-math.pi / 2, math.pi / 2, 16385)
    density = np.maximum(np.cos(angle), 0.0) ** (degrees - 1)
    parts = (density[1:] + density[:-1]) / 2
    tail = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
    return angle, np.log(np.maximum(tail / tail[0], 1e-300))
