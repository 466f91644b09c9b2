"""Detection: when does an image leave the stability region, and how far (Huang et al. 2026, Algorithm 1; or ours)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .noise_level import NoiseLevel
from .profile import NORMS, RunSettings, StabilityProfile
from .reference import STATISTICS, Region

Verdict = Literal["stable", "mild", "strong", "unscored"]

#: The step count at which the published constants were reported.
REFERENCE_STEPS = 50


def _constant(default: Any, bounds: tuple[float, float, float], about: str) -> Any:
    """A field with what an input for it should say: lowest and highest sensible value, step, and a sentence or two."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, "about": about})


@dataclass(frozen=True)
class Thresholds:
    """The constants of detection and mitigation.

    ``steering_guidance=None`` selects the published method, Algorithms 1 and 2 with the first four constants as reported at 50
    steps, which needs a profile of the run's own sampler and schedule. Otherwise (ours, measured in ``docs/evaluation.md``) an
    image triggers when fewer than ``false_alarms`` of ordinary images get as far, under any sampler and step count. Metadata
    of the fields has what a host's inputs show.

    Attributes:
        tau_mild: score of update and x0 norm from which an image triggers. Positive.
        tau_strong: score of the x0 norm from which a trigger is strong. At least ``tau_mild``.
        gamma: half width, in standard deviations, of the bands that a correction clamps into. Positive.
        mild_steps: a mild image is corrected during this many steps from the start, of 50; scaled with the step count.
        false_alarms: share of ordinary images that may trigger, above 0 and below 1.
        steering_guidance: the guidance scale that a steered step is made with; below 0 leads away from the prompt.
    """

    tau_mild: float = _constant(
        3.0,
        (0.1, 100.0, 0.1),
        "Published method only: standard deviations off, in update and predicted image, from which a run counts as memorized. "
        "Published value: 3.",
    )
    tau_strong: float = _constant(
        14.0,
        (0.1, 1000.0, 0.5),
        "Standard deviations off, in the predicted image, from which it counts as strongly memorized. Published value: 14.",
    )
    gamma: float = _constant(
        3.0,
        (0.1, 100.0, 0.1),
        "Half width, in standard deviations, of the band that a corrected latent is brought back into. Published value: 3.",
    )
    mild_steps: int = _constant(
        10,
        (0, 1000, 1),
        "Published method only: a mild run is corrected in this many first steps, counted as of 50. Published value: 10.",
    )
    false_alarms: float = _constant(
        0.001,
        (0.0001, 0.5, 0.0001),
        "Share of ordinary images that may be taken for memorized: 0.001 is one in a thousand. Larger finds more.",
    )
    steering_guidance: float | None = _constant(
        -1.0,
        (-30.0, 30.0, 0.5),
        "Guidance scale that a steered step is made with. Below 0 leads away from the prompt, with strong contrasts; 0 is as "
        "without the prompt, and calmer.",
    )

    def __post_init__(self) -> None:
        for name in ("tau_mild", "tau_strong", "gamma"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it counts standard deviations and must be a positive number")
        if self.tau_strong < self.tau_mild:
            raise ValueError(
                f"tau_strong ({self.tau_strong}) is below tau_mild ({self.tau_mild}): a strong trigger is a mild one and more"
            )
        if not (isinstance(self.false_alarms, (int, float)) and 0 < self.false_alarms < 1):
            raise ValueError(f"false_alarms is {self.false_alarms!r}; it is a share of images, above 0 and below 1")
        guidance = self.steering_guidance
        if guidance is not None and not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError(f"steering_guidance is {guidance!r}; it is a guidance scale, or None")
        if not (isinstance(self.mild_steps, int) and self.mild_steps >= 0):
            raise ValueError(f"mild_steps is {self.mild_steps!r}; it is a number of steps, 0 or more")

    @property
    def published(self) -> bool:
        """Whether the published method was asked for."""
        return self.steering_guidance is None

    def mild_limit(self, steps: int) -> int:
        """``k``, the number of first steps in which a mild image is corrected, for a run of ``steps`` steps."""
        return max(1, round(self.mild_steps * steps / REFERENCE_STEPS)) if self.mild_steps else 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Thresholds:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: if a value is missing, unknown or out of range.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"thresholds: {error}") from None


#: Deviation of every signal below which a steered image is back among ordinary ones.
BACK = 2.0

#: Noise level (VE sigma) above which an image that has triggered is steered in any case: given back its prompt earlier, it
#: finds the way to the copy again (at 1, 19 to 62 % of exact images did on the lab models' tuning splits; at 0.5, none).
HOLD_SIGMA = 0.5


@dataclass(frozen=True)
class Measures:
    """What one step showed, per sample of the batch, in host memory.

    Attributes:
        norms: ``[3, B]``, as in ``profile.NORMS``.
        signals: ``[4, B]``, as in ``reference.SIGNALS``; NaN for what there is not.
    """

    norms: np.ndarray
    signals: np.ndarray


@dataclass(frozen=True)
class Judgement:
    """What one step was found to be, per sample of the batch (each ``[B]``).

    Attributes:
        bands: mean and standard deviation ``[2, 3]`` of the norms that the step was held against.
        update_score: ``s_delta``. ``denoised_score``: ``s_x0``. Not finite where the norm is not, NaN where the bands are not
            those of the run's sampler.
        statistics: ``[3, B]`` as in ``reference.STATISTICS``, and tail: the share of ordinary images that get as far; NaN
            without reference runs.
        correct: whether the step is to be corrected.
        steer: whether the next step is to be made with the steering guidance, where a host can give another prediction: from
            the trigger on and until the signals are back among ordinary images'.
        strong: whether the correction is the strong one.
        state: the verdict so far.
    """

    bands: np.ndarray
    update_score: np.ndarray
    denoised_score: np.ndarray
    statistics: np.ndarray
    tail: np.ndarray
    correct: np.ndarray
    steer: np.ndarray
    strong: np.ndarray
    state: list[Verdict]

    def bounds(self, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """Stability region of the step, ``mu -+ gamma sd``, as lower and upper bounds ``[3]``; never below 0."""
        mean, std = self.bands
        return np.maximum(mean - gamma * std, 0.0), mean + gamma * std


class Detector:
    """Holds a run against a profile, step by step; knows what has triggered, and forgets nothing else.

    By the published rule (Algorithm 1) where that was asked for and where the profile has no reference runs: the profile's
    rows are found by noise level, so that a run over the last part of the schedule (img2img) is held against the right ones,
    and a run that leaves the profile's schedule is not judged any further. Else by its reference runs, at any noise level.

    Args:
        profile, thresholds: what the run is held against.
        batch: number of samples.
        region: where the profile's reference runs are in this run; ``None`` for the published rule.
        prediction_type: of the model, for what it calls a noise level.
        exact: whether the profile's bands are those of the run's sampler and schedule.
    """

    def __init__(
        self,
        profile: StabilityProfile,
        thresholds: Thresholds,
        batch: int,
        *,
        region: Region | None = None,
        prediction_type: str | None = None,
        exact: bool = True,
    ) -> None:
        self.profile = profile
        self.thresholds = thresholds
        #: Step at which each sample triggered, -1 if it has not: ``[B]``.
        self.trigger_step = np.full(batch, -1)
        #: Whether the trigger was strong: ``[B]``.
        self.strong = np.zeros(batch, dtype=bool)
        #: Why the run is not judged, if it is not.
        self.off_schedule: str | None = None
        self._kind = prediction_type
        self._exact = exact
        self._region = region
        self._highest = np.full((len(STATISTICS), batch), -np.inf)
        self._finite = np.ones(batch, dtype=bool)
        self._step = 0
        self._row: int | None = None

    def judge(self, sigma: float, end_angle: float, measures: Measures, *, steering: bool = False) -> Judgement | None:
        """Takes in the next step, from noise level ``sigma`` to ``end_angle`` (``atan(sigma)``); ``None`` off the schedule.

        ``steering`` says that corrections of this step go by guidance, which end with the return among ordinary images, and
        not before little noise is left.
        """
        step, self._step = self._step, self._step + 1
        if self.off_schedule is not None:
            return None
        # A sample that was NaN or infinite once has lost its trajectory: later norms mean nothing.
        self._finite &= np.isfinite(measures.norms).all(axis=0)
        if self._exact:
            self._row = self.profile.next_row(self._row, sigma, step)
            if self._row is None and self._region is None:
                self.off_schedule = f"step {step}, at noise level {sigma:.4g}, is not in the profile's schedule"
                return None
            self._exact = self._row is not None
        batch = len(self._finite)
        bands, scores = np.full((2, len(NORMS)), np.nan), np.full((len(NORMS), batch), np.nan)
        if self._row is not None:
            bands = np.stack([self.profile.mean[self._row], self.profile.std[self._row]])
            scores = self.profile.scores(self._row, measures.norms)
        if self._region is None:
            return self._published(step, bands, scores, steering)
        angle = NoiseLevel.from_model(sigma, self._kind).angle
        return self._by_reference(self._region, step, (angle, end_angle), bands, scores, measures, steering)

    def _published(self, step: int, bands: np.ndarray, scores: np.ndarray, steering: bool) -> Judgement:
        _, update_score, denoised_score = scores
        tau = self.thresholds.tau_mild
        outside = self._finite & (update_score > tau)
        fresh = outside & (denoised_score > tau) & (self.trigger_step < 0)
        self.trigger_step[fresh] = step
        self.strong |= fresh & (denoised_score > self.thresholds.tau_strong)
        triggered = self.trigger_step >= 0
        steer = self._finite & triggered & ((update_score > tau) | (denoised_score > tau)) & steering
        assert self._row is not None
        early = steering or self._row < self.thresholds.mild_limit(self.profile.steps)
        nothing = np.full((len(STATISTICS), len(outside)), np.nan)
        return Judgement(
            bands=bands,
            update_score=update_score,
            denoised_score=denoised_score,
            statistics=nothing,
            tail=nothing[0],
            correct=outside & triggered & (self.strong | early),
            steer=steer,
            strong=self.strong.copy(),
            state=self._verdicts(),
        )

    def _by_reference(
        self,
        region: Region,
        step: int,
        angles: tuple[float, float],
        bands: np.ndarray,
        scores: np.ndarray,
        measures: Measures,
        steering: bool,
    ) -> Judgement:
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations, statistics = region.statistics(angles[0], np.log(measures.signals))
        self._highest = np.fmax(self._highest, np.where(self._finite, statistics, np.nan))
        tail = region.tail(self._highest)
        fresh = self._finite & (tail < self.thresholds.false_alarms) & (self.trigger_step < 0)
        self.trigger_step[fresh] = step
        self.strong |= fresh & (deviations[1] > self.thresholds.tau_strong)
        if self._row is None:
            bands = np.stack(region.bands(*angles))
            _, _, scores[2] = np.abs(measures.norms - bands[0][:, None]) / np.maximum(bands[1], 1e-9)[:, None]
        away = (np.fmax.reduce(statistics[:2]) > BACK) | (steering and math.tan(angles[0]) > HOLD_SIGMA)
        outside = self._finite & (self.trigger_step >= 0) & away
        return Judgement(
            bands=bands,
            update_score=scores[1],
            denoised_score=scores[2],
            statistics=statistics,
            tail=tail,
            correct=outside,
            steer=outside & steering,
            # Bands of another sampler's update say nothing of how long one should be: only the latent is clamped.
            strong=np.zeros_like(self.strong),
            state=self._verdicts(),
        )

    def patch_region(self, sigma: float) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of an ordinary patch's root mean square at a noise level."""
        assert self._region is not None
        return self._region.patch(NoiseLevel.from_model(sigma, self._kind).angle)

    def copy(self) -> Detector:
        """A detector that has seen the same, and goes its own way from here."""
        other = copy.copy(self)
        for name in ("trigger_step", "strong", "_finite", "_highest"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def _verdicts(self) -> list[Verdict]:
        return [self.verdict(sample) for sample in range(len(self._finite))]

    def verdict(self, sample: int) -> Verdict:
        """``"stable"``, ``"mild"``, ``"strong"``; ``"unscored"`` if the sample or the run could not be judged throughout."""
        if self.trigger_step[sample] >= 0:
            return "strong" if self.strong[sample] else "mild"
        return "stable" if self._finite[sample] and self.off_schedule is None and self._step else "unscored"


def planned_angles(settings: RunSettings) -> np.ndarray | None:
    """Angles before every step of a run and after its last, as in :class:`Reference`; ``None`` if they are not known."""
    if settings.sigmas is None:
        return None
    ends = (*settings.sigmas, settings.end_sigma or 0.0)
    return np.array([NoiseLevel.from_model(sigma, settings.prediction_type).angle for sigma in ends])
