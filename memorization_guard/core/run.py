"""One run as far as it is known in host memory: its steps and evaluations, and what is told of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from . import published
from .judge import Judge
from .noise_level import NoiseLevel
from .profile import Norms, ProfileCheck, StabilityProfile
from .reference import OPEN_SIGMA, Reference, p_value_floor
from .settings import USUAL_GUIDANCE, Mode, RunSettings, Thresholds, Verdict
from .trace import SUSPICIOUS, Look, Steps, Trace, band_numbers, numbers
from .words import Words

#: A sampler adds noise if its first steps are this many times as long as the way that its predictions tell. On the lab model
#: samplers that add none reach 1.3, also while they are corrected; ancestral and SDE samplers begin at 4 and more.
NOISY = 2.0

#: What is said of an image that mode ``stop`` hands nothing on of.
WITHHELD = "Nothing of the image is handed on: if a picture comes out, it is a plain one."


@dataclass(frozen=True)
class StepEvent:
    """What a live graph needs of one solver step; every list has one entry a sample of the batch.

    A score or p-value is ``None`` where nothing was judged; ``state`` is the verdict so far. ``bands`` names those of the
    outline that hold, as far as is known by then.
    """

    step: int
    sigma: float
    latent_norm: list[float]
    update_norm: list[float]
    denoised_norm: list[float]
    guidance_norm: list[float]
    update_score: list[float] | None
    denoised_score: list[float] | None
    p_value: list[float] | None
    judged_by: list[Look | None]
    state: list[Verdict]
    mitigated: list[bool]
    bands: list[str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping, a few hundred bytes; ``null`` for what is no number."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in data.items():
            if value is not None and name.endswith(("_norm", "_score", "p_value")):
                data[name] = numbers(value)
        return data


@dataclass
class Step:
    """A solver step, with the evaluations ``first`` to ``last``.

    ``latent``, ``update`` and, with the published method, ``denoised`` are its norms ``[B]``, where they were computed, and
    ``scale`` is what the first two are divided by to stand on the VP scale.
    """

    start: NoiseLevel
    end: NoiseLevel
    first: int
    last: int
    latent: Tensor
    update: Tensor
    scale: float
    denoised: Tensor | None = None
    judgement: published.Judgement | None = None
    _stretch: float | None = None

    def norms(self, judge: Judge) -> Norms:
        """The norms in host memory; x0's, if the step has none of its own, is that of its first evaluation."""
        latent, update = (norm.double().cpu().numpy() / self.scale for norm in (self.latent, self.update))
        if self.denoised is not None:
            return Norms(latent, update, self.denoised.double().cpu().numpy())
        if self.first < len(judge.evaluations):
            return Norms(latent, update, judge.evaluations[self.first].signals.denoised)
        return Norms(latent, update, np.full(len(latent), np.nan))

    def stretch(self, judge: Judge) -> float:
        """How long the update is for a step without noise from its first evaluation, the samples' median; NaN if unknown."""
        if self._stretch is None:
            chord = 2 * math.sin(abs(self.start.angle - self.end.angle) / 2) * judge.evaluations[self.first].signals.velocity
            with np.errstate(divide="ignore", invalid="ignore"):
                self._stretch = float(np.median(self.norms(judge).update / chord))
        return self._stretch


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        profile, thresholds, mode, settings: as for :class:`~memorization_guard.core.monitor.StabilityMonitor`.
        level: the noise level that the host's own number stands for.
        missing: why there is no profile.
        check: how the profile fits the settings, or ``None`` without a profile.
        batch: number of samples; 0 before the first latent.
        taken: number of evaluations taken in, judged or not.
        error: what ended the watching early. ended: why the run came to no regular end.
        unasked: why a run that does not begin in noise could not be judged by a probe.
        words: of samples that triggered, the words that call the copy up, where they could be told.
    """

    profile: StabilityProfile | None
    thresholds: Thresholds
    mode: Mode
    settings: RunSettings
    level: Callable[[float], NoiseLevel]
    missing: str | None = None
    batch: int = 0
    taken: int = 0
    steps: list[Step] = field(default_factory=list)
    error: Exception | None = None
    ended: str | None = None
    unasked: str | None = None
    words: dict[int, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check = self.profile.check(self.settings) if self.profile is not None else None

    @cached_property
    def reference(self) -> Reference | None:
        """What this run is held against; ``None`` where nothing can be."""
        if self.profile is None or self.check is None or not self.check.valid or self.thresholds.method == "published":
            return None
        return self.profile.reference

    @cached_property
    def reference_shape(self) -> tuple[int, ...] | None:
        """Shape of one latent of the references; ``None`` if unknown."""
        return self.profile.settings.latent_shape if self.reference is not None and self.profile is not None else None

    @property
    def other_size(self) -> bool:
        """Whether the run's latents have another size than those of the references."""
        ours, theirs = self.settings.latent_shape, self.reference_shape
        return None not in (ours, theirs) and ours != theirs

    def usual_norm(self) -> float:
        """The norm that ordinary images' x0 has at the last evaluation."""
        assert self.reference is not None
        norm = self.reference.band(self.judge.evaluations[-1].level.angle, "denoised")[0]
        ours, theirs = self.settings.latent_shape, self.reference_shape
        return norm if ours is None or theirs is None else norm * math.sqrt(math.prod(ours) / math.prod(theirs))

    @cached_property
    def detector(self) -> published.Detector | None:
        """Who judges solver steps, where the published method was asked for and the profile holds for them."""
        if self.profile is None or self.check is None or not self.check.exact or self.thresholds.method != "published":
            return None
        return published.Detector(self.profile, self.thresholds)

    @cached_property
    def scale(self) -> float:
        """Guidance scale at which predictions are combined for judging, whatever guidance makes of them: the profile's own."""
        settings = self.profile.settings if self.profile is not None else self.settings
        return USUAL_GUIDANCE if settings.guidance_scale is None else settings.guidance_scale

    @cached_property
    def judge(self) -> Judge:
        rate = self.thresholds.false_positive_rate
        return Judge(self.reference, rate, guided=self.scale != 1.0, sized=not self.other_size, level=self.level)

    @cached_property
    def judges(self) -> bool:
        """Whether the run is judged at all."""
        return self.reference is not None or self.detector is not None

    @property
    def triggers(self) -> np.ndarray:
        """Step or evaluation at which each sample triggered, -1 if it has not; empty before the first."""
        return self.judge.trigger if self.detector is None else self.detector.trigger_step

    def verdict(self, sample: int) -> Verdict:
        """The verdict so far."""
        return self.judge.verdict(sample) if self.detector is None else self.detector.verdict(sample)

    @property
    def _unseen(self) -> int:
        """Number of steps that no evaluation was seen of; a step has at least one."""
        return max(0, len(self.steps) - self.taken) if self.detector is None else 0

    def judge_steps(self) -> None:
        """Judges the solver steps so far by the published method, waiting for the device."""
        for step in self.steps if self.detector is not None else ():
            if step.judgement is None and self.detector is not None:
                step.judgement = self.detector.judge(self._sigma(step.start), step.norms(self.judge))

    def _sigma(self, level: NoiseLevel) -> float:
        return level.model_sigma(self.settings.prediction_type)

    def outline(self) -> dict[str, Any]:
        """What is known before the first step, JSON-ready, for a live graph: planned ``steps`` and ``bands`` (as in a trace,
        for the planned steps), ``thresholds``, ``reference_count``, ``p_value_floor``, ``mode`` and ``note``."""
        sigmas, kind = self.settings.sigmas, self.settings.prediction_type
        levels = [NoiseLevel.from_model(sigma, kind) for sigma in (*(sigmas or ()), self.settings.end_sigma or 0.0)]
        return {
            "steps": self.settings.steps,
            "bands": band_numbers(self._bands(levels)),
            "thresholds": self.thresholds.to_dict(),
            "reference_count": self._reference_count,
            "p_value_floor": self._p_value_floor,
            "mode": self.mode,
            "note": self.note(),
        }

    def _bands(self, levels: Sequence[NoiseLevel]) -> dict[str, dict[str, np.ndarray]]:
        """Of steps, from the noise levels before each and after the last."""
        if not self.judges or self.profile is None or self.check is None or self.other_size or len(levels) < 2:
            return {}
        bands = self.profile.bands([self._sigma(level) for level in levels[:-1]], levels, exact=self.check.exact)
        return {name: bands[name] for name in self._holding if name in bands}

    @property
    def _holding(self) -> list[str]:
        """The bands that hold: of the run's own sampler all; else x0's, and without noise or other guidance the others."""
        if self.check is None or self.check.exact:
            return list(Norms._fields)
        other_scale = any(found.field == "guidance_scale" for found in self.check.transferred)
        early = self.steps[: max(3, (self.settings.steps or len(self.steps)) // 3)]
        known = [step.stretch(self.judge) for step in early if step.first < len(self.judge.evaluations)]
        stretches = [stretch for stretch in known if math.isfinite(stretch)]
        noisy = bool(stretches) and float(np.median(stretches)) > NOISY
        return ["denoised"] if other_scale or noisy else list(Norms._fields)

    @property
    def _reference_count(self) -> int | None:
        return self.profile.count if self.judges and self.profile is not None else None

    @property
    def _p_value_floor(self) -> float | None:
        return None if self.reference is None else p_value_floor(self.reference.count)

    def event(self, number: int) -> StepEvent:
        """What a live graph is told of a step."""
        self.judge_steps()
        step, known = self.steps[number], self.judge.evaluations
        norms, scores = step.norms(self.judge), step.judgement
        guidance = np.full(self.batch, np.nan)
        if step.first < len(known):
            guidance = known[step.first].signals.guidance * known[step.first].level.alpha
        return StepEvent(
            step=number,
            sigma=self._sigma(step.start),
            **{f"{name}_norm": norm.tolist() for name, norm in norms._asdict().items()},
            guidance_norm=guidance.tolist(),
            update_score=scores.update_score.tolist() if scores else None,
            denoised_score=scores.denoised_score.tolist() if scores else None,
            p_value=self.judge.p_value.tolist() if np.isfinite(self.judge.p_value).any() else None,
            state=[self.verdict(sample) for sample in range(self.batch)],
            mitigated=self._mitigated(step).tolist(),
            judged_by=[self.judge.look(sample) for sample in range(self.batch)],
            bands=self._holding,
        )

    def _mitigated(self, step: Step) -> np.ndarray:
        masks = [one.corrected for one in self.judge.evaluations[step.first : step.last + 1]]
        if self.mode == "mitigate" and step.judgement is not None:
            masks.append(step.judgement.correct)
        return np.logical_or.reduce([np.zeros(self.batch, dtype=bool), *(mask for mask in masks if mask is not None)])

    def traces(self) -> list[Trace]:
        """One trace a sample, in batch order."""
        judge = self.judge
        firsts = [step.first for step in self.steps]
        of_step = np.maximum(np.searchsorted(firsts, np.arange(len(judge.evaluations)), side="right") - 1, 0)
        norms = [step.norms(judge) for step in self.steps]
        scores, mitigated, note = self._scores(norms), [self._mitigated(step) for step in self.steps], self.note()
        bands = self._bands([step.start for step in self.steps] + [step.end for step in self.steps[-1:]])
        traces = []
        for sample in range(self.batch):
            verdict, trigger = self.verdict(sample), int(self.triggers[sample]) if len(self.triggers) else -1
            if verdict == "stable" and (self.error is not None or self.ended is not None or self._unseen):
                verdict = "unscored"  # what was not watched to its end cannot be called stable
            trace = Trace(
                verdict=verdict,
                trigger_step=None if trigger < 0 else trigger if self.detector is not None else int(of_step[trigger]),
                note=note,
                p_value=_finite(judge.p_value, sample),
                p_value_floor=self._p_value_floor if _finite(judge.p_value, sample) is not None else None,
                judged_by=judge.look(sample),
                asked=None if judge.asked is None else _finite(judge.asked, sample),
                words=self.words.get(sample),
                steps=self._traced(sample, norms, scores, mitigated),
                evaluations=judge.traced(sample, of_step, self.settings.prediction_type),
                local_map=judge.map(sample),
                bands=bands,
                reference_count=self._reference_count,
                settings=self.settings,
                thresholds=self.thresholds,
                mode=self.mode,
            )
            broken = np.flatnonzero(~np.isfinite(trace.steps.latent_norm + trace.steps.update_norm)).tolist()
            if len(judge.broken) and judge.broken[sample] >= 0:
                broken.append(int(of_step[judge.broken[sample]]))
            trace.nonfinite_step = min(broken, default=None)
            if self.mode == "stop" and trigger >= 0:
                trace.note = WITHHELD if note is None else f"{note.rstrip('.')}. {WITHHELD}"
            if not self.judges and (settled := trace.uncalibrated_score) is not None and settled > SUSPICIOUS:
                hint = (
                    f"The prompt alone had settled much of the image while it was still noise ({settled:.2f}; {SUSPICIOUS} "
                    "and more is suspicious): it may be memorized. Calibrate a profile to know."
                )
                trace.note = hint if trace.note is None else f"{trace.note} {hint}"
            traces.append(trace)
        return traces

    def _scores(self, norms: list[Norms]) -> list[Norms | None]:
        """Scores ``[B]`` of the steps against the profile's bands, where those are of the run's own sampler and schedule."""
        if self.profile is None or self.check is None or not self.check.exact:
            return [None] * len(norms)
        scores: list[Norms | None] = []
        row: int | None = None
        for number, (step, found) in enumerate(zip(self.steps, norms, strict=True)):
            row = self.profile.next_row(row, self._sigma(step.start), number) if row is not None or not number else None
            scores.append(None if row is None else self.profile.scores(row, found))
        return scores

    def _traced(
        self,
        sample: int,
        norms: list[Norms],
        scores: list[Norms | None],
        mitigated: list[np.ndarray],
    ) -> Steps:
        def column(values: list[Any]) -> np.ndarray:
            return np.array([np.nan if value is None else value[sample] for value in values], dtype=np.float64)

        return Steps(
            sigma=np.array([self._sigma(step.start) for step in self.steps], dtype=np.float64),
            latent_norm=column([norm.latent for norm in norms]),
            update_norm=column([norm.update for norm in norms]),
            denoised_norm=column([norm.denoised for norm in norms]),
            update_score=column([score and score.update for score in scores]),
            denoised_score=column([score and score.denoised for score in scores]),
            mitigated=column(mitigated).astype(bool),
        )

    def note(self) -> str | None:
        """One sentence on why the run is unscored or less certain, or ``None``."""
        if self.error is not None:
            return f"Watching ended early: {self.error}"
        if self.ended is not None:
            return f"The run ended early: {self.ended}"
        if self._unseen:
            return (
                f"In {self._unseen} of {len(self.steps)} steps no prediction of the network reached the guard, so that they "
                "were not judged: another extension may stand in its place."
            )
        if self.detector is not None and self.detector.off_schedule is not None:
            return f"The run is not scored: {self.detector.off_schedule}. Calibrate a profile with the run's own schedule."
        if self.check is None:
            nothing = f"nothing is judged, and mode {self.mode} does nothing" if self.mode != "trace" else "nothing is judged"
            if self.missing is not None:
                return f"There is no profile: {nothing}. {self.missing}"
            return f"No profile was given: {nothing}. Give one of this model." if self.mode != "trace" else None
        if self.check.valid and not self.judges:
            if self.thresholds.method == "published":
                reasons = "; ".join(map(str, self.check.transferred))
                return f"The published method holds for one sampler and schedule ({reasons})."
            return "The profile has the published bands alone: calibrate again for one that holds for any sampler."
        if self.reference is not None and self.judge.evaluations and np.isnan(self.judge.p_value).any():
            return self._unjudged()
        if self.check.invalid or (self.detector is not None and self.check != ProfileCheck()):
            return str(self.check)
        # Our verdict does not depend on what else differs.
        unsure = tuple(found for found in self.check.weakened if found.field == "model")
        return str(ProfileCheck(weakened=unsure)) if unsure else None

    def _unjudged(self) -> str:
        """Why a run with a profile could not be judged, and what to do."""
        begins = self.judge.evaluations[0].level.sigma
        asked = f", and what the prompt does could not be asked for ({self.unasked or 'this host has no way to ask'})"
        if self.other_size:
            sizes = f"latents of {self.settings.latent_shape}, the profile of {self.reference_shape}"
            return f"The run has {sizes}{asked}. Calibrate a profile with the run's size."
        if begins <= OPEN_SIGMA:
            below = (
                f"The run begins at noise level {begins:.2g}, below {OPEN_SIGMA:g}: what the prompt does cannot be seen there"
            )
            return f"{below}{asked}. Judge a run of the prompt that begins in noise."
        if self.judge.alone and not (self.judge.broken == 0).any():
            return f"The network gave one prediction only{asked}: the profile was made with guidance. Calibrate one without."
        return "The first prediction is NaN or infinite: run the model in float32 or bfloat16."


def _finite(values: np.ndarray, sample: int) -> float | None:
    return float(values[sample]) if len(values) and np.isfinite(values[sample]) else None
