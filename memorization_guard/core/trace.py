"""The trace: what one image's sampling run looked like, and what was concluded. ``docs/trace.md`` describes the JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

from .noise_level import MAX_SIGMA, NoiseLevel
from .profile import Norms
from .reference import OPEN_SIGMA
from .settings import MODES, VERDICTS, Mode, RunSettings, Thresholds, Verdict, is_count
from .words import Words

FORMAT = "memorization-guard.trace"
FORMAT_VERSION = 8

#: Which look at a prompt was judged: a run's ``first`` evaluation, or what the network was ``asked`` beside the run.
Look = Literal["first", "asked"]

#: What every trace, report and record says of itself: what was measured, and what that does not prove.
STATEMENT = (
    "Measured is how far the numbers of a run lie from those of ordinary images; that proves neither that an image is a copy, "
    "nor that it is none."
)

#: How much each says against an image, the least first.
_WEIGHT: Mapping[Verdict, int] = {"stable": 0, "unscored": 1, "corrected": 2, "likely copy": 3, "mild": 3, "strong": 4}

#: Uncalibrated score from which an image is suspected: no ordinary image of the lab models (tuning splits, samplers, guidance
#: 3 to 12) reaches 0.36, their exact ones reach 0.36 to 0.7. What large models do is not known.
SUSPICIOUS = 0.38


def _numbers() -> np.ndarray:
    return np.zeros(0)


def _flags() -> np.ndarray:
    return np.zeros(0, dtype=bool)


@dataclass(kw_only=True, eq=False)
class Steps:
    """The solver steps of one image, each array ``[steps]``; NaN where there is no value.

    Attributes:
        sigma: noise level before the step.
        latent_norm, update_norm: ``|z_{i+1}|`` and ``|z_{i+1} - z_i|`` on the VP scale, of the latents that the sampler went
            through; with the published method as the sampler proposed them, before a correction.
        denoised_norm: ``|x0_i|``, the clean latent predicted at the start of the step, combined at the guidance scale of the
            profile (without one, of the run).
        update_score, denoised_score: distance of the two norms from the profile's, in standard deviations, where the profile
            was made with the same sampler and schedule.
        mitigated: whether the step was corrected.
    """

    sigma: np.ndarray = field(default_factory=_numbers)
    latent_norm: np.ndarray = field(default_factory=_numbers)
    update_norm: np.ndarray = field(default_factory=_numbers)
    denoised_norm: np.ndarray = field(default_factory=_numbers)
    update_score: np.ndarray = field(default_factory=_numbers)
    denoised_score: np.ndarray = field(default_factory=_numbers)
    mitigated: np.ndarray = field(default_factory=_flags)

    def __len__(self) -> int:
        return len(self.sigma)


@dataclass(kw_only=True, eq=False)
class Evaluations:
    """The evaluations of the network for one image, each array ``[evaluations]``; NaN where there is no value.

    Attributes:
        step: the solver step that the evaluation is part of, from 0.
        sigma: its noise level.
        velocity, denoised, guidance, detail: the signals, see ``core/signals.py``.
        patch_mean, patch_std: mean and standard deviation, over the patches, of the logarithm of the root mean square of the
            detail.
        corrected: whether its conditional prediction was replaced.
    """

    step: np.ndarray = field(default_factory=_numbers)
    sigma: np.ndarray = field(default_factory=_numbers)
    velocity: np.ndarray = field(default_factory=_numbers)
    denoised: np.ndarray = field(default_factory=_numbers)
    guidance: np.ndarray = field(default_factory=_numbers)
    detail: np.ndarray = field(default_factory=_numbers)
    patch_mean: np.ndarray = field(default_factory=_numbers)
    patch_std: np.ndarray = field(default_factory=_numbers)
    corrected: np.ndarray = field(default_factory=_flags)

    def __len__(self) -> int:
        return len(self.sigma)


@dataclass(kw_only=True, eq=False)
class Trace:
    """One image's run.

    Attributes:
        verdict: ``"stable"``; of an image that triggered ``"likely copy"``, ``"corrected"`` if it was led elsewhere from then
            on, or with the published method ``"mild"`` or ``"strong"``; or ``"unscored"`` (no profile that fits, a latent that
            was NaN, or a run that was not watched to its end).
        trigger_step: the step of the evaluation that triggered, or ``None``.
        nonfinite_step: first step at which the latent was NaN or infinite, or ``None``.
        note: one sentence for people on why a run is unscored or less certain, or ``None``.
        p_value: share of ordinary images whose prompt fixes as much detail in noise alone: 0.00005 is one in 20,000. Ours; how
            near the nominal share is to the observed one is in ``docs/evaluation.md``. ``None`` where nothing was judged.
        p_value_floor: the smallest p-value that the references can carry: one that is as small says "rarer than" it.
        asked: detail of what the network was asked beside the run, or ``None``.
        judged_by: which of the two looks the p-value is of, see :data:`Look`; ``None`` where nothing was judged.
        words: the words of the prompt that call the copy up, or ``None`` where nothing triggered or they could not be told.
        steps, evaluations: what the sampler did, and what the network said.
        local_map: ``[height, width]``, by how many standard deviations each patch of the latent had more detail than patches
            of ordinary images have, where the prompt was judged; empty if unknown.
        bands: for ``latent``, ``update`` and ``denoised`` the reference ``mean`` and ``std`` of the steps taken, each where
            the profile holds for it: latent and update are those of samplers that add no noise, at the profile's guidance
            scale. Empty without a profile.
        reference_count: number of reference runs behind the bands, or ``None``.
        settings: what the run was made with. thresholds: what it was judged by. mode: what was to be done.
    """

    verdict: Verdict = "unscored"
    trigger_step: int | None = None
    nonfinite_step: int | None = None
    note: str | None = None
    p_value: float | None = None
    p_value_floor: float | None = None
    asked: float | None = None
    judged_by: Look | None = None
    words: Words | None = None
    steps: Steps = field(default_factory=Steps)
    evaluations: Evaluations = field(default_factory=Evaluations)
    local_map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    bands: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    reference_count: int | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    thresholds: Thresholds = field(default_factory=Thresholds)
    mode: Mode = "trace"

    #: Draws a trace as SVG, for notebooks. The package sets it, since pictures stand above the core.
    drawn: ClassVar[Callable[[Trace], str] | None] = None

    def _repr_svg_(self) -> str | None:
        draw = type(self).drawn
        return None if draw is None else draw(self)

    @property
    def mitigated(self) -> np.ndarray:
        """``[steps]`` bool, the steps that were corrected."""
        return self.steps.mitigated

    @property
    def left_out(self) -> bool:
        """Whether the image was sampled without the words that call the copy up."""
        return self.words is not None and self.words.left_out

    @property
    def score(self) -> float | None:
        """``S_mem`` of the published method, the largest update score of all steps; ``None`` where no step was scored."""
        return _highest(self.steps.update_score)

    @property
    def joint_score(self) -> float | None:
        """Largest value, of all steps, that update and x0 score both reach: above ``tau_mild`` the published trigger."""
        return _highest(np.minimum(self.steps.update_score, self.steps.denoised_score))

    @property
    def rarity(self) -> str | None:
        """The p-value in words, see :func:`rarity`; ``None`` where nothing was judged."""
        return None if self.p_value is None else rarity(self.p_value, self.p_value_floor)

    @property
    def detail(self) -> float | None:
        """Detail at the first evaluation, if that is at a noise level above :data:`OPEN_SIGMA`; needs no profile."""
        if not len(self.evaluations) or math.tan(self._angles()[0]) <= OPEN_SIGMA:
            return None
        return _highest(self.evaluations.detail[:1])

    @property
    def guidance_norm(self) -> np.ndarray:
        """``|eps_cond - eps_uncond|`` (Wen et al. 2024) at every evaluation, ``[evaluations]``; NaN without guidance."""
        return self.evaluations.guidance * np.cos(self._angles())

    @property
    def uncalibrated_score(self) -> float | None:
        """How much of the image the prompt alone has settled while it is still noise; needs no profile, but guidance.

        Root mean square of ``x0_cond - x0_uncond``, in units of clean latents (of variance 1, as autoencoders are scaled to),
        as the mean over the evaluations at noise levels above :data:`OPEN_SIGMA`. Wen et al. (2024) in other units: those of
        eps depend on the size of the latent and on the noise level, these do not.
        """
        if self.settings.latent_shape is None:
            return None
        angles = self._angles()
        sigma = np.tan(angles)
        chosen = (sigma > OPEN_SIGMA) & np.isfinite(self.evaluations.guidance) & (sigma < MAX_SIGMA)
        if not chosen.any():
            return None
        distance = (self.evaluations.guidance * np.sin(angles))[chosen]
        return float(distance.mean() / math.sqrt(math.prod(self.settings.latent_shape)))

    def _angles(self) -> np.ndarray:
        kind = self.settings.prediction_type
        return np.array([NoiseLevel.from_model(sigma, kind).angle for sigma in self.evaluations.sigma])

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, version 8; strict JSON, with ``null`` for what is not there."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "statement": STATEMENT,
            "verdict": self.verdict,
            "score": _number(self.score),
            "joint_score": _number(self.joint_score),
            "p_value": _number(self.p_value),
            "p_value_floor": _number(self.p_value_floor),
            "detail": _number(self.detail),
            "asked": _number(self.asked),
            "judged_by": self.judged_by,
            "uncalibrated_score": _number(self.uncalibrated_score),
            "words": None if self.words is None else self.words.to_dict(),
            "trigger_step": self.trigger_step,
            "nonfinite_step": self.nonfinite_step,
            "note": self.note,
            "mode": self.mode,
            "settings": self.settings.to_dict(),
            "thresholds": self.thresholds.to_dict(),
            "steps": _written(self.steps),
            "evaluations": _written(self.evaluations),
            "local_map": [numbers(row) for row in self.local_map.tolist()],
            "bands": band_numbers(self.bands),
            "reference_count": self.reference_count,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: if it is not a trace, one of another version, or does not hold together.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"this is not a trace: its 'format' is not {FORMAT!r}")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"the trace has version {data.get('version')!r}, this version of Memorization Guard reads {FORMAT_VERSION}"
            )
        try:
            bands = {
                name: {key: _array(data["bands"][name][key]) for key in ("mean", "std")}
                for name in Norms._fields
                if name in data["bands"]
            }
            trace = cls(
                verdict=data["verdict"],
                trigger_step=data["trigger_step"],
                nonfinite_step=data["nonfinite_step"],
                note=data["note"],
                p_value=data["p_value"],
                p_value_floor=data["p_value_floor"],
                asked=data["asked"],
                judged_by=data["judged_by"],
                words=None if data["words"] is None else Words.from_dict(data["words"]),
                mode=data["mode"],
                settings=RunSettings.from_dict(data["settings"]),
                thresholds=Thresholds.from_dict(data["thresholds"]),
                bands=bands,
                local_map=_map(data["local_map"]),
                reference_count=data["reference_count"],
                steps=_read(Steps, data["steps"]),
                evaluations=_read(Evaluations, data["evaluations"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the trace is incomplete or damaged: {type(error).__name__}: {error}") from None
        if trace.verdict not in VERDICTS:
            raise ValueError(f"the trace's verdict is {trace.verdict!r}; known: {', '.join(VERDICTS)}")
        if trace.mode not in MODES:
            raise ValueError(f"the trace's mode is {trace.mode!r}; known: {', '.join(MODES)}")
        if trace.judged_by not in (None, *get_args(Look)):
            raise ValueError(f"the trace's judged_by is {trace.judged_by!r:.60}; known: {', '.join(get_args(Look))}")
        if not isinstance(trace.note, (str, type(None))):
            raise ValueError(f"the trace's note is no text but {type(trace.note).__name__}")
        for name in ("p_value", "p_value_floor"):
            share = getattr(trace, name)
            if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
                raise ValueError(f"the trace's {name} is {share!r}; it is a share of images")
        if trace.asked is not None and not (isinstance(trace.asked, (int, float)) and 0 <= trace.asked < 1e300):
            raise ValueError(f"the trace's asked is {trace.asked!r:.60}; it is a size")
        count = trace.reference_count
        if count is not None and not is_count(count):
            raise ValueError(f"the trace's reference_count is {count!r:.60}; it is a number of runs")
        for name in ("trigger_step", "nonfinite_step"):
            step = getattr(trace, name)
            if step is not None and not (type(step) is int and 0 <= step < max(len(trace.steps), 1)):
                raise ValueError(f"the trace's {name} is {step!r}; the trace has {len(trace.steps)} steps")
        if any(len(values) != len(trace.steps) for band in bands.values() for values in band.values()):
            raise ValueError("the trace's bands and its steps have different lengths")
        return trace


_Record = TypeVar("_Record", Steps, Evaluations)


def _written(record: Steps | Evaluations) -> dict[str, list[Any]]:
    columns = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {name: values.tolist() if values.dtype == bool else numbers(values.tolist()) for name, values in columns.items()}


def _read(kind: type[_Record], data: Mapping[str, Any]) -> _Record:
    flags = {f.name for f in dataclasses.fields(kind) if f.default_factory is _flags}
    columns = {f.name: _array(data[f.name]) for f in dataclasses.fields(kind)}
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError(f"the trace's lists in {kind.__name__.lower()} have different lengths")
    return kind(**{name: values.astype(bool) if name in flags else values for name, values in columns.items()})


def worst(traces: Iterable[Trace]) -> Trace:
    """The trace that says most against an image that several runs made (a second pass, tiles).

    Triggered before corrected before unscored before stable; among corrected ones those that were steered before those that
    went on with an ordinary prompt; among equals the rarest, then the highest joint score.

    Raises:
        ValueError: if there is none.
    """

    def weight(trace: Trace) -> tuple[float, ...]:
        p_value = 1.0 if trace.p_value is None else trace.p_value
        return _WEIGHT[trace.verdict], not trace.left_out, -p_value, trace.joint_score or 0.0

    return max(traces, key=weight)


def rarity(share: float, floor: float | None = None) -> str:
    """A share of ordinary images in words: 0.00005 is ``"1 in 20,000"``, or ``"rarer than 1 in 20,000"`` if the references can
    carry no smaller one than ``floor``."""
    if share >= 0.5:
        return "most"
    # A trace holds seven digits of both.
    beyond = floor is not None and share <= floor * (1 + 1e-6)
    return f"{'rarer than ' if beyond else ''}1 in {float(f'{1 / max(share, floor or 1e-12):.2g}'):,.0f}"


def trace_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a trace's JSON form."""
    return json.loads(resources.files(__package__).joinpath("trace.schema.json").read_text(encoding="utf-8"))


def _highest(scores: np.ndarray) -> float | None:
    finite = scores[np.isfinite(scores)]
    return float(finite.max()) if len(finite) else None


def _number(value: float | None) -> float | None:
    # Seven digits are what float32 holds; more would only make files larger.
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def numbers(values: Sequence[float | None]) -> list[float | None]:
    """``values`` as strict JSON holds them: seven significant digits, ``None`` for what is no number."""
    return [_number(value) for value in values]


def band_numbers(bands: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, list[float | None]]]:
    """The ``bands`` of a trace as strict JSON holds them."""
    return {name: {key: numbers(values.tolist()) for key, values in band.items()} for name, band in bands.items()}


def _map(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    if not isinstance(rows, list) or len({len(row) for row in rows}) > 1:
        raise TypeError("the local map is no rectangle of numbers")
    return np.array([_array(row) for row in rows]).reshape(len(rows), -1) if rows else np.zeros((0, 0))


def _array(values: Sequence[float | None]) -> np.ndarray:
    if isinstance(values, (str, bytes)):
        raise TypeError("a list of numbers is text")
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    if array.ndim != 1:
        raise TypeError("a list of numbers holds lists")
    return array
