"""Detection: when does an image leave the stability region, and how far (Huang et al. 2026, Algorithm 1)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .profile import StabilityProfile

Verdict = Literal["stable", "mild", "strong", "unscored"]

#: The step count at which the published constants were reported.
REFERENCE_STEPS = 50


def _constant(default: Any, bounds: tuple[float, float, float], about: str) -> Any:
    """A field with what an input for it should say: lowest and highest sensible value, step, and a sentence or two."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, "about": about})


@dataclass(frozen=True)
class Thresholds:
    """The constants of detection and mitigation; the first four are those reported at 50 steps.

    The last two are ours, and measured in ``docs/lab.md``. They are used where a host hands over the predictions with and
    without the prompt; ``steering_guidance=None`` selects the published mitigation there too. Metadata of the fields has what
    a host's inputs show.

    Attributes:
        tau_mild: score of update and x0 norm from which an image triggers. Positive.
        tau_strong: score of the x0 norm from which a trigger is strong. At least ``tau_mild``.
        gamma: half width, in standard deviations, of the bands that a correction clamps into. Positive.
        mild_steps: a mild image is corrected during this many steps from the start, of 50; scaled with the step count.
        tau_steer: score of update and x0 norm from which an image is steered by its guidance, then at every step at which
            its update is outside ``tau_mild``. At least ``tau_mild``; higher, since steering moves an image far.
        steering_guidance: the guidance scale that a steered step is made with; below 0 leads away from the prompt.
    """

    tau_mild: float = _constant(
        3.0,
        (0.1, 100.0, 0.1),
        "Standard deviations off, in update and predicted image, from which a run counts as memorized. Published value: 3.",
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
        "A mild run is corrected in this many first steps, counted as of 50. Published value: 10. Not used where a run is "
        "steered by its guidance.",
    )
    tau_steer: float = _constant(
        4.5,
        (0.1, 1000.0, 0.1),
        "Standard deviations off from which a run is steered by its guidance. At least tau_mild; measured on the bundled "
        "model: 4.5, and 3 for samplers that add noise in each step.",
    )
    steering_guidance: float | None = _constant(
        -1.0,
        (-30.0, 30.0, 0.5),
        "Guidance scale that a steered step is made with. Below 0 leads away from the prompt, with strong contrasts; 0 is as "
        "without the prompt, and calmer.",
    )

    def __post_init__(self) -> None:
        for name in ("tau_mild", "tau_strong", "gamma", "tau_steer"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it counts standard deviations and must be a positive number")
        if self.tau_strong < self.tau_mild:
            raise ValueError(
                f"tau_strong ({self.tau_strong}) is below tau_mild ({self.tau_mild}): a strong trigger is a mild one and more"
            )
        if self.tau_steer < self.tau_mild:
            raise ValueError(f"tau_steer ({self.tau_steer}) is below tau_mild ({self.tau_mild}): only a trigger is steered")
        guidance = self.steering_guidance
        if guidance is not None and not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError(f"steering_guidance is {guidance!r}; it is a guidance scale, or None")
        if not (isinstance(self.mild_steps, int) and self.mild_steps >= 0):
            raise ValueError(f"mild_steps is {self.mild_steps!r}; it is a number of steps, 0 or more")

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


@dataclass(frozen=True)
class Judgement:
    """What one step showed, per sample of the batch (each ``[B]``).

    Attributes:
        row: the row of the profile that the step was held against.
        update_score: ``s_delta``. ``denoised_score``: ``s_x0``. Not finite where the norm is not.
        correct: whether the step is to be corrected.
        steer: whether the next step is to be made with the steering guidance, where a host can give another prediction: from
            the trigger on and until update and x0 norm are both back inside.
        strong: whether the correction is the strong one.
        state: the verdict so far.
    """

    row: int
    update_score: np.ndarray
    denoised_score: np.ndarray
    correct: np.ndarray
    steer: np.ndarray
    strong: np.ndarray
    state: list[Verdict]


class Detector:
    """Holds the norms of a run against a profile, step by step; knows what has triggered, and forgets nothing else.

    The profile's rows are found by noise level, so that a run over the last part of the schedule (img2img) is held against
    the right ones. A run that leaves the profile's schedule is not judged any further.
    """

    def __init__(self, profile: StabilityProfile, thresholds: Thresholds, batch: int) -> None:
        self.profile = profile
        self.thresholds = thresholds
        #: Step at which each sample triggered, -1 if it has not: ``[B]``.
        self.trigger_step = np.full(batch, -1)
        #: Whether the trigger was strong: ``[B]``.
        self.strong = np.zeros(batch, dtype=bool)
        #: Why the run is not judged, if it is not.
        self.off_schedule: str | None = None
        self._finite = np.ones(batch, dtype=bool)
        self._steered = np.zeros(batch, dtype=bool)
        self._step = 0
        self._row: int | None = None

    def judge(self, sigma: float, norms: np.ndarray, *, steering: bool = False) -> Judgement | None:
        """Takes in the norms ``[3, B]`` of the next step, taken from noise level ``sigma``; ``None`` off the schedule.

        ``steering`` says that corrections of this step go by guidance, which have a start of their own and no end but the
        return into the region.
        """
        step, self._step = self._step, self._step + 1
        if self.off_schedule is not None:
            return None
        self._row = row = self.profile.next_row(self._row, sigma, step)
        if row is None:
            self.off_schedule = f"step {step}, at noise level {sigma:.4g}, is not in the profile's schedule"
            return None
        _, update_score, denoised_score = self.profile.scores(row, norms)
        # A sample that was NaN or infinite once has lost its trajectory: later norms mean nothing.
        self._finite &= np.isfinite(norms).all(axis=0)
        tau = self.thresholds.tau_mild
        outside = self._finite & (update_score > tau)
        fresh = outside & (denoised_score > tau) & (self.trigger_step < 0)
        self.trigger_step[fresh] = step
        self.strong |= fresh & (denoised_score > self.thresholds.tau_strong)
        self._steered |= outside & (np.minimum(update_score, denoised_score) > self.thresholds.tau_steer)
        steer = self._finite & self._steered & ((update_score > tau) | (denoised_score > tau)) & steering
        if steering:
            correct = outside & self._steered
        else:
            early = row < self.thresholds.mild_limit(self.profile.steps)
            correct = outside & (self.trigger_step >= 0) & (self.strong | early)
        state = [self.verdict(sample) for sample in range(len(outside))]
        return Judgement(row, update_score, denoised_score, correct, steer, self.strong.copy(), state)

    def copy(self) -> Detector:
        """A detector that has seen the same, and goes its own way from here."""
        other = copy.copy(self)
        for name in ("trigger_step", "strong", "_finite", "_steered"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def verdict(self, sample: int) -> Verdict:
        """``"stable"``, ``"mild"``, ``"strong"``; ``"unscored"`` if the sample or the run could not be judged throughout."""
        if self.trigger_step[sample] >= 0:
            return "strong" if self.strong[sample] else "mild"
        return "stable" if self._finite[sample] and self.off_schedule is None and self._step else "unscored"
