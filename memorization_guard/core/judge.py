"""The reference method: which evaluations of a run are out of the ordinary, and from where on it counts as a likely copy
(ours)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .noise_level import NoiseLevel
from .reference import Region, Statistics
from .settings import Verdict
from .signals import Measurement, Signals, signals
from .trace import Evaluations

#: Deviation of every statistic below which a corrected image is back among ordinary ones.
BACK = 2.0

#: Noise level (VE sigma) above which an image that has triggered is corrected in any case: given back its prompt earlier, it
#: finds the way to the copy again (at 1, 19 to 62 % of exact images did on the lab models' tuning splits; at 0.5, none).
HOLD_SIGMA = 0.5


@dataclass
class Evaluation:
    """What is known of one evaluation, in host memory; every array ends in ``[B]``."""

    level: NoiseLevel
    signals: Signals
    patches: np.ndarray  # [patches, B], mean squares of x0
    statistics: np.ndarray  # [3, B], in the order of Statistics
    highest: np.ndarray  # [3, B], of the run so far
    corrected: np.ndarray | None = None  # [B] bool


class Judge:
    """Takes in the evaluations of one run; knows which samples have triggered.

    Args:
        region: where ordinary images are in this run; ``None`` where nothing is judged and the signals are kept alone.
        false_positive_rate: share of ordinary images that may trigger.
        guided: whether the profile was made with guidance: then one prediction says nothing of the two combined.
        level: the noise level that the host's own number stands for.
    """

    def __init__(
        self, region: Region | None, false_positive_rate: float, *, guided: bool, level: Callable[[float], NoiseLevel]
    ) -> None:
        self.evaluations: list[Evaluation] = []
        #: Evaluation at which each sample triggered, -1 if it has not: ``[B]``; empty before the first.
        self.trigger = np.zeros(0, dtype=int)
        #: Evaluation at which each sample was first NaN or infinite, likewise.
        self.broken = np.zeros(0, dtype=int)
        self._region = region
        self._critical = None if region is None else region.critical(false_positive_rate)[:, None]
        self._guided = guided
        self._level = level
        self._highest = np.zeros((len(Statistics._fields), 0))

    @np.errstate(divide="ignore", invalid="ignore")
    def take_in(self, measurement: Measurement, block: np.ndarray) -> None:
        """Judges the next evaluation, from its block ``[5 + patches, B]`` in host memory."""
        block = block.astype(np.float64)
        block[5:] /= measurement.depth
        sigma = measurement.sigma
        level = self._level(float(block[0, 0]) if isinstance(sigma, Tensor) else sigma)
        found = signals(block, level)
        if self._guided and measurement.guidance is None:
            found = Signals(*(np.full_like(values, np.nan) for values in found))
        if not self.evaluations:
            batch = block.shape[1]
            self.trigger, self.broken = np.full(batch, -1), np.full(batch, -1)
            self._highest = np.full((len(Statistics._fields), batch), -np.inf)
        # A sample that was NaN or infinite once has lost its trajectory: what comes later means nothing.
        self.broken[~np.isfinite(block[1:4]).all(axis=0) & (self.broken < 0)] = len(self.evaluations)
        if self._region is None or self._critical is None:
            statistics = np.full_like(self._highest, np.nan)
        else:
            statistics = np.where(self.broken < 0, np.array(self._region.statistics(level.angle, found)), np.nan)
            self._highest = np.fmax(self._highest, statistics)
            fresh = (self._highest > self._critical).any(axis=0) & (self.trigger < 0)
            self.trigger[fresh] = len(self.evaluations)
        self.evaluations.append(Evaluation(level, found, block[5:], statistics, self._highest))

    def to_correct(self) -> np.ndarray:
        """Samples ``[B]`` whose last evaluation is to be corrected: those that have triggered, and are not back for good."""
        last = self.evaluations[-1]
        away = (last.statistics > BACK).any(axis=0) | (math.tan(last.level.angle) > HOLD_SIGMA)
        return (self.trigger >= 0) & (self.broken < 0) & away

    def usual_norm(self) -> float:
        """The norm that ordinary images' x0 has at the last evaluation."""
        assert self._region is not None
        return self._region.band(self.evaluations[-1].level.angle, "denoised")[0]

    def verdict(self, sample: int, evaluation: int | None = None) -> Verdict:
        """The verdict up to an evaluation; by default the last one."""
        trigger = int(self.trigger[sample]) if len(self.trigger) else -1
        if trigger >= 0 and (evaluation is None or trigger <= evaluation):
            return "likely copy"
        return "stable" if self.judged and self.broken[sample] < 0 else "unscored"

    @property
    def judged(self) -> bool:
        """Whether anything could be judged so far."""
        return bool(self.evaluations) and bool(np.isfinite(self.evaluations[-1].highest).any())

    @property
    def alone(self) -> int:
        """Number of evaluations that could not be judged, since there was one prediction only."""
        return sum(bool(np.isnan(one.signals.velocity).all()) for one in self.evaluations) if self._guided else 0

    def p_values(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Share of ordinary images that get as far in a whole run, for the evaluations ``start`` to ``end``: ``[E, B]``."""
        chosen = self.evaluations[start:end]
        if not chosen:
            return np.zeros((0, len(self.trigger)))
        highest = np.stack([one.highest for one in chosen], axis=1)
        if self._region is None:
            return np.full(highest.shape[1:], np.nan)
        values = self._region.p_value(highest.reshape(len(highest), -1)).reshape(highest.shape[1:])
        return np.where(np.isfinite(highest).any(axis=0), values, np.nan)

    def traced(self, sample: int, of_step: np.ndarray, p_values: np.ndarray, kind: str | None) -> Evaluations:
        """The evaluations of a sample as a trace has them.

        Args:
            of_step: the step of each. p_values: as from :meth:`p_values`. kind: the model's prediction type.
        """
        if not self.evaluations:
            return Evaluations()
        found = Signals(*np.array([[values[sample] for values in one.signals] for one in self.evaluations]).T)
        statistics = Statistics(*np.array([one.statistics[:, sample] for one in self.evaluations]).T)
        with np.errstate(divide="ignore", invalid="ignore"):
            patches = 0.5 * np.log(np.stack([one.patches[:, sample] for one in self.evaluations]))
        nothing = np.full(len(self.evaluations), np.nan)
        return Evaluations(
            step=of_step.astype(np.float64),
            sigma=np.array([one.level.model_sigma(kind) for one in self.evaluations]),
            **found._asdict(),
            patch_mean=patches.mean(axis=1) if patches.shape[1] else nothing,
            patch_std=patches.std(axis=1) if patches.shape[1] else nothing,
            **{f"{name}_deviation": values for name, values in statistics._asdict().items()},
            p_value=p_values[:, sample],
            corrected=np.array([one.corrected is not None and bool(one.corrected[sample]) for one in self.evaluations]),
        )

    def map(self, sample: int, grid: tuple[int, ...] | None) -> np.ndarray:
        """By how many standard deviations each patch is larger than ordinary ones, where the local statistic was largest."""
        local = np.array([Statistics(*one.statistics).local[sample] for one in self.evaluations])
        if self._region is None or grid is None or not np.isfinite(local).any():
            return np.zeros((0, 0))
        worst = self.evaluations[int(np.nanargmax(local))]
        mean, std = self._region.patch(worst.level.angle)
        return ((0.5 * np.log(worst.patches[:, sample]) - mean) / std).reshape(grid)
