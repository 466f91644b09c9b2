"""The trace: what one image's sampling run looked like, and what was concluded. ``docs/trace.md`` describes the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, get_args

import numpy as np

from .detection import Thresholds, Verdict
from .noise_level import MAX_SIGMA, NoiseLevel
from .profile import NORMS, RunSettings
from .reference import OPEN_SIGMA

FORMAT = "memorization-guard.trace"
FORMAT_VERSION = 2

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

#: What every trace, report and record says of itself: what was measured, and what that does not prove.
STATEMENT = (
    "Measured is how far the numbers of a run lie from those of ordinary images; that proves neither that an image is a copy, "
    "nor that it is none."
)

_WEIGHT: Mapping[Verdict, int] = {"stable": 0, "unscored": 1, "mild": 2, "strong": 3}

#: Uncalibrated score from which an image is suspected: no ordinary image of the lab models (tuning splits, samplers, guidance
#: 3 to 12) reaches 0.36, their exact ones reach 0.36 to 0.7. What large models do is not known.
SUSPICIOUS = 0.38

#: The fields of a trace that have one number a step.
STEP_FIELDS = (
    "sigma",
    "latent_norm",
    "update_norm",
    "denoised_norm",
    "update_score",
    "denoised_score",
    "tail",
    "joint_deviation",
    "guidance_deviation",
    "local_deviation",
    "velocity_norm",
    "local_norm",
    "guidance_norm",
    "uncond_norm",
    "alignment",
    "denoised_alignment",
    "patch_mean",
    "patch_std",
    "corrected_latent_norm",
    "corrected_update_norm",
)


def _empty() -> np.ndarray:
    return np.zeros(0)


@dataclass(kw_only=True, eq=False)
class Trace:
    """One image's run. Every per-step array is ``[steps]`` float64, with NaN where there is no value.

    Attributes:
        verdict: ``"stable"``, ``"mild"``, ``"strong"``, or ``"unscored"`` (no profile that fits, a latent that
            was NaN, or a run that was not watched to its end).
        trigger_step: first step at which update and x0 norm both left the region, or ``None``.
        nonfinite_step: first step at which the latent was NaN or infinite, or ``None``.
        note: one sentence for people on why a run is unscored or less certain, or ``None``.
        sigma: noise level before the step.
        latent_norm, update_norm, denoised_norm: ``|z_{i+1}|``, ``|z_{i+1} - z_i|`` and ``|x0_i|`` on the VP scale, as the
            sampler proposed them, before any correction.
        update_score, denoised_score: distance of the two norms from the reference, in standard deviations.
        tail: share of ordinary images that get as far in a whole run as this one did up to the step; what the verdict goes by,
            unless the published method was asked for. NaN without reference runs.
        joint_deviation: standard deviations by which both velocity and x0 norm are off ordinary images, in the logarithm.
            guidance_deviation, local_deviation: by which guidance and local norm are larger.
        velocity_norm: ``|alpha eps - beta x0|``, the update norm per angle of the VP circle, whatever the solver.
        local_norm: root mean square of x0 in the quarter of its patches where that is largest (geometric mean). patch_mean,
            patch_std: mean and standard deviation, over the patches, of the logarithm of the same.
        guidance_norm: ``|eps_cond - eps_uncond|`` (Wen et al. 2024). uncond_norm: ``|eps_uncond|``. alignment:
            ``cos(eps_cond - eps_uncond, eps_uncond)``. denoised_alignment: ``cos(eps_cond - eps_uncond, x0)``.
        local_map: ``[height, width]``, by how many standard deviations each patch of the latent was larger than patches of
            ordinary images are, at the step at which the latent's largest quarter was farthest off; empty if unknown.
        mitigated: ``[steps]`` bool, the steps that were corrected.
        corrected_latent_norm, corrected_update_norm: the norms after correction; NaN where nothing was corrected.
        bands: for each of ``latent``, ``update``, ``denoised`` the reference ``mean`` and ``std`` of the steps taken; empty
            without a profile.
        reference_count: number of reference runs behind the bands, or ``None``.
        settings: what the run was made with. thresholds: what it was judged by.
        mitigation: whether mitigation was switched on.
    """

    verdict: Verdict = "unscored"
    trigger_step: int | None = None
    nonfinite_step: int | None = None
    note: str | None = None
    sigma: np.ndarray = field(default_factory=_empty)
    latent_norm: np.ndarray = field(default_factory=_empty)
    update_norm: np.ndarray = field(default_factory=_empty)
    denoised_norm: np.ndarray = field(default_factory=_empty)
    update_score: np.ndarray = field(default_factory=_empty)
    denoised_score: np.ndarray = field(default_factory=_empty)
    tail: np.ndarray = field(default_factory=_empty)
    joint_deviation: np.ndarray = field(default_factory=_empty)
    guidance_deviation: np.ndarray = field(default_factory=_empty)
    local_deviation: np.ndarray = field(default_factory=_empty)
    velocity_norm: np.ndarray = field(default_factory=_empty)
    local_norm: np.ndarray = field(default_factory=_empty)
    guidance_norm: np.ndarray = field(default_factory=_empty)
    uncond_norm: np.ndarray = field(default_factory=_empty)
    alignment: np.ndarray = field(default_factory=_empty)
    denoised_alignment: np.ndarray = field(default_factory=_empty)
    patch_mean: np.ndarray = field(default_factory=_empty)
    patch_std: np.ndarray = field(default_factory=_empty)
    corrected_latent_norm: np.ndarray = field(default_factory=_empty)
    corrected_update_norm: np.ndarray = field(default_factory=_empty)
    local_map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    bands: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    reference_count: int | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    thresholds: Thresholds = field(default_factory=Thresholds)
    mitigation: bool = False

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.sigma)

    @property
    def mitigated(self) -> np.ndarray:
        """``[steps]`` bool, the steps that were corrected."""
        return np.isfinite(self.corrected_latent_norm)

    @property
    def score(self) -> float | None:
        """``S_mem``, the largest update score of all steps; ``None`` where no step was scored."""
        return _highest(self.update_score)

    @property
    def joint_score(self) -> float | None:
        """Largest value, of all steps, that update and x0 score both reach: above ``tau_mild`` the published trigger."""
        return _highest(np.minimum(self.update_score, self.denoised_score))

    @property
    def tail_probability(self) -> float | None:
        """Share of ordinary images that get as far: 0.00005 is one in 20,000. ``None`` without reference runs.

        Ours; how near the nominal share is to the observed one is in ``docs/evaluation.md``.
        """
        tails = self.tail[np.isfinite(self.tail)]
        return float(tails.min()) if len(tails) else None

    @property
    def local_score(self) -> float | None:
        """By how many standard deviations the largest quarter of the latent's patches is off at most; ``None`` if unknown."""
        return _highest(self.local_deviation)

    @property
    def uncalibrated_score(self) -> float | None:
        """How much of the image the prompt alone has settled while it is still noise; needs no profile, but guidance.

        Root mean square of ``x0_cond - x0_uncond = -sigma (eps_cond - eps_uncond)``, in units of clean latents (of variance
        1, as autoencoders are scaled to), as the mean over the steps at noise levels above :data:`OPEN_SIGMA`. Wen et al.
        (2024) in other units: those of eps depend on the size of the latent and on the noise level, these do not.
        """
        if self.settings.latent_shape is None:
            return None
        sigma = np.array([NoiseLevel.from_model(s, self.settings.prediction_type).sigma for s in self.sigma])
        chosen = (sigma > OPEN_SIGMA) & np.isfinite(self.guidance_norm) & (sigma < MAX_SIGMA)
        if not chosen.any():
            return None
        return float((sigma * self.guidance_norm)[chosen].mean() / math.sqrt(math.prod(self.settings.latent_shape)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, version 2; strict JSON, with ``null`` for what is not there."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "statement": STATEMENT,
            "verdict": self.verdict,
            "score": _number(self.score),
            "joint_score": _number(self.joint_score),
            "tail_probability": _number(self.tail_probability),
            "local_score": _number(self.local_score),
            "uncalibrated_score": _number(self.uncalibrated_score),
            "trigger_step": self.trigger_step,
            "nonfinite_step": self.nonfinite_step,
            "note": self.note,
            "mitigation": self.mitigation,
            "settings": self.settings.to_dict(),
            "thresholds": self.thresholds.to_dict(),
            "steps": {name: numbers(getattr(self, name).tolist()) for name in STEP_FIELDS}
            | {"mitigated": self.mitigated.tolist()},
            "local_map": [numbers(row) for row in self.local_map.tolist()],
            "bands": band_numbers(self.bands),
            "reference_count": self.reference_count,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: if it is not a trace, one of a newer version, or does not hold together.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"this is not a trace: its 'format' is not {FORMAT!r}")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"the trace has version {data.get('version')!r}, this version of Memorization Guard reads "
                f"{FORMAT_VERSION}: update it"
            )
        try:
            steps = {name: _array(data["steps"][name]) for name in STEP_FIELDS}
            bands = {
                name: {key: _array(data["bands"][name][key]) for key in ("mean", "std")}
                for name in NORMS
                if name in data["bands"]
            }
            trace = cls(
                verdict=data["verdict"],
                trigger_step=data["trigger_step"],
                nonfinite_step=data["nonfinite_step"],
                note=data["note"],
                mitigation=data["mitigation"],
                settings=RunSettings.from_dict(data["settings"]),
                thresholds=Thresholds.from_dict(data["thresholds"]),
                bands=bands,
                local_map=_map(data["local_map"]),
                reference_count=data["reference_count"],
                **steps,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the trace is incomplete or damaged: {type(error).__name__}: {error}") from None
        if trace.verdict not in VERDICTS:
            raise ValueError(f"the trace's verdict is {trace.verdict!r}; known: {', '.join(VERDICTS)}")
        if not isinstance(trace.note, (str, type(None))):
            raise ValueError(f"the trace's note is no text but {type(trace.note).__name__}")
        for name in ("trigger_step", "nonfinite_step"):
            step = getattr(trace, name)
            if step is not None and not (isinstance(step, int) and 0 <= step < trace.steps):
                raise ValueError(f"the trace's {name} is {step!r}; the trace has {trace.steps} steps")
        lengths = {len(values) for values in steps.values()}
        lengths |= {len(values) for band in bands.values() for values in band.values()}
        if len(lengths) != 1:
            raise ValueError(f"the trace's per-step lists have different lengths: {sorted(lengths)}")
        return trace


def worst(traces: Iterable[Trace]) -> Trace:
    """The trace that says most against an image that several runs made (a second pass, tiles).

    Triggered before unscored before stable; among equals the rarest, then the highest joint score.

    Raises:
        ValueError: if there is none.
    """

    def weight(trace: Trace) -> tuple[float, ...]:
        rarity = 1.0 if trace.tail_probability is None else trace.tail_probability
        return _WEIGHT[trace.verdict], -rarity, trace.joint_score or 0.0

    return max(traces, key=weight)


def rarity(share: float) -> str:
    """A share of ordinary images in words: 0.00005 is ``"1 in 20,000"``."""
    if share >= 0.5:
        return "most"
    if share < 1e-6:
        return "less than 1 in 1,000,000"
    return f"1 in {float(f'{1 / share:.2g}'):,.0f}"


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
        raise TypeError("a per-step list is text")
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    if array.ndim != 1:
        raise TypeError("a per-step list holds lists")
    return array
