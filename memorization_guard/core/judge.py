"""The reference method: how rare what a prompt says in noise alone is among ordinary prompts (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .noise_level import NoiseLevel
from .reference import OPEN_SIGMA, Reference, Tail
from .settings import Verdict
from .signals import Measurement, Signals, signals
from .trace import Evaluations, Look

#: P-value of the first evaluation from which the network is asked about a prompt: ordinary images cost nothing as a rule.
SUSPICIOUS = 0.1

#: Noise level (VE sigma) above which an image that has triggered is corrected. Given back its prompt earlier, it finds the way
#: to the copy again: at 1, 19 to 62 % of exact images did on the lab models' tuning splits; at 0.5 none did there, and some of
#: a model whose memories are blurs.
HOLD_SIGMA = 0.2


#: Noise level (VE sigma) above which a run begins in noise alone. Below, the image that it starts from shows in the first
#: prediction, and the network is asked.
NOISE_SIGMA = 8.0


def counts(first: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Where the network's answers count: where the first evaluation is suspicious or has no p-value."""
    found: np.ndarray = ~(first > SUSPICIOUS) & ~np.isnan(asked)
    return found


def decided(first: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The p-values that count, of the first evaluation or of the network's answers."""
    found: np.ndarray = np.where(counts(first, asked), asked, first)
    return found


@dataclass
class Evaluation:
    """What is known of one evaluation, in host memory; every array ends in ``[B]``."""

    level: NoiseLevel
    signals: Signals
    patches: np.ndarray  # [patches, B], mean squares of the detail; empty where it was not taken
    grid: tuple[int, ...]  # the patches' rows and columns; (1, 1) where the latent has no places
    corrected: np.ndarray | None = None  # [B] bool


class Judge:
    """Takes in the evaluations of one run; knows which samples have triggered.

    Args:
        reference: what ordinary prompts do; ``None`` where nothing is judged and the signals are kept alone.
        false_positive_rate: share of ordinary images that may trigger.
        guided: whether the profile was made with guidance: then one prediction says nothing of the two combined.
        sized: whether the run's latents have the size of the references': of another, only what the network is asked tells.
        level: the noise level that the host's own number stands for.
    """

    def __init__(
        self,
        reference: Reference | None,
        false_positive_rate: float,
        *,
        guided: bool,
        sized: bool,
        level: Callable[[float], NoiseLevel],
    ) -> None:
        self.evaluations: list[Evaluation] = []
        #: Evaluation at which each sample triggered, -1 if it has not: ``[B]``; empty before the first.
        self.trigger = np.zeros(0, dtype=int)
        #: Evaluation at which each sample was first NaN or infinite, likewise.
        self.broken = np.zeros(0, dtype=int)
        #: Share of ordinary images with as much detail as each sample's, ``[B]``; NaN where nothing was judged.
        self.p_value = np.zeros(0)
        #: Whether what the network was asked made the p-value of each sample, ``[B]`` bool; else the first evaluation did.
        self.by_asked = np.zeros(0, dtype=bool)
        #: Where the detail can be shown: the run's first evaluation if it was judged, else what the network was asked.
        self.shown: Evaluation | None = None
        #: Detail of what the network was asked, ``[B]``; ``None`` if it was not.
        self.asked: np.ndarray | None = None
        #: Whether any evaluation of each sample was corrected, ``[B]``; empty before the first.
        self.corrected = np.zeros(0, dtype=bool)
        self._reference = reference
        #: Where ordinary prompts are in what the network is asked; ``None`` where nothing is judged by that.
        self.answers = None if reference is None else reference.answers
        self._rate = false_positive_rate
        self._in_noise = False  # whether the run began there
        self._guided = guided
        self._sized = sized
        self._level = level

    @property
    def wants_to_ask(self) -> bool:
        """Whether the first evaluation is not enough: suspicious, not in noise, of another size, or one prediction only."""
        if self.answers is None or len(self.evaluations) != 1:
            return False
        return not (self._in_noise and bool((self.p_value > SUSPICIOUS).all()))

    def take_in_asked(self, measurement: Measurement) -> None:
        """Judges the run by what the network was asked beside it: the prediction with the prompt alone, the mean of two
        opposite noises. Waits for the device."""
        self.asked = self.detail(measurement)
        if self.answers is not None:
            self._judge(self.asked, self.answers)

    def detail(self, measurement: Measurement) -> np.ndarray:
        """The detail of what the network was asked, ``[B]``. Waits for the device."""
        return self._evaluation(measurement, measurement.block().cpu().numpy()).signals.detail

    @property
    def shows_asked(self) -> bool:
        """Whether the map is to come from what the network was asked, since the run's own first evaluation has none."""
        return self.answers is not None and self._sized and self.shown is None

    def show(self, measurement: Measurement) -> None:
        """Takes the map from what the network was asked, of both predictions. Waits for the device."""
        self.shown = self._evaluation(measurement, measurement.block().cpu().numpy())

    def take_in(self, measurement: Measurement, block: np.ndarray) -> None:
        """Takes in the next evaluation, from its block ``[5 + patches, B]`` in host memory; judges the first."""
        evaluation = self._evaluation(measurement, block)
        if self._guided and measurement.guidance is None:
            nothing = np.full(block.shape[1], np.nan)
            evaluation.signals = Signals(*(nothing for _ in Signals._fields))
        if not self.evaluations and evaluation.level.sigma > OPEN_SIGMA:
            self._in_noise = self._begins_in_noise(evaluation.level)
            if self._sized and self._reference is not None:
                self.shown = evaluation
                self._judge(evaluation.signals.detail, self._reference.tail(evaluation.level.angle))
        # A sample that was NaN or infinite once has lost its trajectory: what comes later means nothing.
        self.broken[~np.isfinite(block[1:4]).all(axis=0) & (self.broken < 0)] = len(self.evaluations)
        self.evaluations.append(evaluation)

    def _begins_in_noise(self, level: NoiseLevel) -> bool:
        """Schedules of a few steps may begin lower: then the references, which began in noise, did too."""
        if level.sigma > NOISE_SIGMA or self._reference is None:
            return True
        return level.angle >= self._reference.angles[0] - 1e-6

    @np.errstate(divide="ignore", invalid="ignore")
    def _evaluation(self, measurement: Measurement, block: np.ndarray) -> Evaluation:
        block = block.astype(np.float64)
        block[5:] /= measurement.depth
        sigma = measurement.sigma
        level = self._level(float(block[0, 0]) if isinstance(sigma, Tensor) else sigma)
        if not len(self.trigger):
            batch = block.shape[1]
            self.trigger, self.broken, self.p_value = np.full(batch, -1), np.full(batch, -1), np.full(batch, np.nan)
            self.corrected, self.by_asked = np.zeros(batch, dtype=bool), np.zeros(batch, dtype=bool)
        grid = () if measurement.patches is None else tuple(measurement.patches.shape[1:])
        return Evaluation(level, signals(block, level), block[5:], grid)

    def _judge(self, detail: np.ndarray, tail: Tail) -> None:
        """Judges the samples that are suspicious, or not judged yet: what else is in a batch has no part in a verdict."""
        found = tail.p_value(detail)
        new = counts(self.p_value, found) if self._in_noise else ~np.isnan(found)
        self.p_value = np.where(new, found, self.p_value)
        self.by_asked = np.where(new, tail is self.answers, self.by_asked)
        # A rate that the references cannot tell would never trigger.
        self.trigger = np.where(self.p_value <= max(self._rate, tail.lowest), 0, -1)

    def to_correct(self) -> np.ndarray:
        """Samples ``[B]`` whose last evaluation is to be corrected: those that have triggered, while noise hides the image."""
        held = self.evaluations[-1].level.sigma > HOLD_SIGMA
        return (self.trigger >= 0) & (self.broken < 0) & held

    def corrects(self, chosen: np.ndarray) -> None:
        """The last evaluation of the chosen samples ``[B]`` is corrected."""
        self.evaluations[-1].corrected = chosen
        self.corrected |= chosen

    def verdict(self, sample: int) -> Verdict:
        """The verdict on a sample."""
        if len(self.trigger) and self.trigger[sample] >= 0:
            return "corrected" if self.corrected[sample] else "likely copy"
        judged = len(self.p_value) and np.isfinite(self.p_value[sample])
        return "stable" if judged and self.broken[sample] < 0 else "unscored"

    def look(self, sample: int) -> Look | None:
        """Which look at the prompt made the p-value of a sample; ``None`` where nothing was judged."""
        if not len(self.p_value) or not np.isfinite(self.p_value[sample]):
            return None
        return "asked" if self.by_asked[sample] else "first"

    @property
    def alone(self) -> bool:
        """Whether any evaluation could not be judged, since there was one prediction only."""
        return self._guided and any(np.isnan(one.signals.velocity).all() for one in self.evaluations)

    def traced(self, sample: int, of_step: np.ndarray, kind: str | None) -> Evaluations:
        """The evaluations of a sample as a trace has them.

        Args:
            of_step: the step of each. kind: the model's prediction type.
        """
        if not self.evaluations:
            return Evaluations()
        found = Signals(*np.array([[values[sample] for values in one.signals] for one in self.evaluations]).T)
        mean, std = np.full((2, len(self.evaluations)), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            for number, one in enumerate(self.evaluations):
                if len(one.patches):
                    patches = 0.5 * np.log(one.patches[:, sample])
                    mean[number], std[number] = patches.mean(), patches.std()
        return Evaluations(
            step=of_step.astype(np.float64),
            sigma=np.array([one.level.model_sigma(kind) for one in self.evaluations]),
            **found._asdict(),
            patch_mean=mean,
            patch_std=std,
            corrected=np.array([one.corrected is not None and bool(one.corrected[sample]) for one in self.evaluations]),
        )

    def map(self, sample: int) -> np.ndarray:
        """By how many standard deviations each patch has more detail than ordinary ones, where the prompt was judged."""
        at = self.shown
        if self._reference is None or at is None or len(at.patches) < 2:
            return np.zeros((0, 0))
        mean, std = self._reference.patch(at.level.angle)
        with np.errstate(divide="ignore", invalid="ignore"):
            return ((0.5 * np.log(at.patches[:, sample]) - mean) / std).reshape(at.grid)
