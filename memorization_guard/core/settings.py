"""What a run is made with, and what it is judged by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

#: ``off``: nothing is watched. ``trace``: watched and judged, the image is bit-identical. ``mitigate``: corrected too, from
#: the evaluation that triggers. ``stop``: ended as soon as every image of the batch has triggered; of those that have, nothing
#: is handed on.
Mode = Literal["off", "trace", "mitigate", "stop"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: What a run is for that is sampled for no image. A reference: its ``whole`` way, or its ``first`` evaluation and what the
#: network answers in noise. A prompt that is screened: its first evaluation alone (``glance``), or its ``verdict``, for which
#: the network is asked only where that is needed. All but ``whole`` are stopped after one evaluation.
Serves = Literal["whole", "first", "glance", "verdict"]

#: ``reference``: ours, predictions held against those of ordinary prompts. ``published``: Huang et al. 2026, solver steps.
Method = Literal["reference", "published"]
METHODS: tuple[Method, ...] = get_args(Method)

#: How the reference method corrects. ``keep``: the image goes on with the prompt without the words that call the copy up,
#: where the host can tell them, and is steered where not. ``steer``: guidance leads away from the prompt.
Correction = Literal["keep", "steer"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)

#: ``likely copy`` is the reference method's word for an image that triggered, and ``corrected`` for one that was led elsewhere
#: from then on; ``mild`` and ``strong`` are the published one's.
Verdict = Literal["stable", "corrected", "likely copy", "mild", "strong", "unscored"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
TRIGGERED: tuple[Verdict, ...] = ("corrected", "likely copy", "mild", "strong")

#: The step count at which the published constants were reported.
PUBLISHED_STEPS = 50

#: Guidance scale that predictions are combined with for judging where neither a profile nor the host names one.
USUAL_GUIDANCE = 7.5


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is a whole number that a size in memory can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float holds; JSON has infinite ones and whole ones of any length too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_level(value: Any) -> bool:
    return _is_finite(value) and value >= 0


#: What stands in the fields of :class:`RunSettings`, or in their lists, where it is no text.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "steps": is_count,
    "guidance_scale": _is_finite,
    "latent_shape": is_count,
    "sigmas": _is_level,
    "end_sigma": _is_level,
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a sampling run was made with; ``None`` where the host does not know.

    Attributes:
        model: name of the model, for people.
        model_hash: fingerprint of the denoiser's weights, for comparison.
        prediction_type: what the network predicts (``"epsilon"``, ``"v_prediction"``, ``"flow_prediction"``, ...).
        sampler: solver of the reverse process (``"PNDM"``, ``"euler"``, ...).
        scheduler: how the noise levels are spaced (``"karras"``, ``"leading"``, ...).
        steps: number of solver steps taken.
        guidance_scale: classifier-free guidance scale.
        latent_shape: shape of one latent without the batch axis, ``(C, H, W)`` or ``(C, F, H, W)``.
        sigmas: noise level before every step, in the model's own convention: the k-diffusion sigma of epsilon and v
            models, the time of rectified flow models.
        end_sigma: noise level after the last step, in the same convention; above 0 where a run stops half way.
    """

    model: str | None = None
    model_hash: str | None = None
    prediction_type: str | None = None
    sampler: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    latent_shape: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    end_sigma: float | None = None

    def __post_init__(self) -> None:
        if self.latent_shape is not None:
            object.__setattr__(self, "latent_shape", tuple(int(n) for n in self.latent_shape))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; inverse of :meth:`from_dict`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSettings:
        """Reads what :meth:`to_dict` wrote; unknown keys are left to newer versions.

        Raises:
            ValueError: if a value does not have its field's type, or is infinite.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"settings are no mapping but {type(data).__name__}")
        values = {f.name: data[f.name] for f in dataclasses.fields(cls) if data.get(f.name) is not None}
        for name, value in values.items():
            fits = _KINDS.get(name, _is_text)
            parts = value if name in ("latent_shape", "sigmas") else [value]
            if not isinstance(parts, (list, tuple)) or not all(map(fits, parts)):
                raise ValueError(f"settings do not have the expected types: {name} is {value!r:.60}")
        return cls(**values)


def _constant(method: str, default: Any, bounds: tuple[float, float, float], about: str) -> Any:
    """A constant: the method it belongs to, and for a host's input its lowest and highest sensible value, step, and text."""
    return dataclasses.field(default=default, metadata={"method": method, "bounds": bounds, "about": about})


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The method, and the constants of detection and mitigation.

    Metadata of the fields has what a host's inputs show. ``docs/evaluation.md`` has what the constants were measured to do;
    the published ones are those reported at 50 steps.

    Attributes:
        method: by which an image is judged and corrected.
        false_positive_rate: share of ordinary images that may trigger, above 0 and below 1 (reference).
        correction: how an image is corrected (reference).
        steering_guidance: the guidance scale that a steered prediction has; below 0 leads away from the prompt (reference).
        tau_mild: score of update and x0 norm from which an image triggers. Positive (published).
        tau_strong: score of the x0 norm from which a trigger is strong. At least ``tau_mild`` (published).
        gamma: half width, in standard deviations, of the bands: those that are drawn, and that the published method clamps
            into.
        mild_steps: a mild image is corrected during this many steps from the start, of 50; scaled with the step count
            (published).

    Raises:
        ValueError: if a value is out of range.
    """

    method: Method = dataclasses.field(
        default="reference",
        metadata={
            "method": "both",
            "choices": METHODS,
            "about": "reference: predictions are held against those of ordinary prompts, under any sampler. published: Huang "
            "et "
            "al. (KDD 2026), solver steps against a profile of this very sampler, schedule and guidance scale.",
        },
    )
    false_positive_rate: float = _constant(
        "reference",
        0.005,
        (0.0001, 0.5, 0.0001),
        "Share of ordinary images that may be mistaken for copies: 0.005 is one in 200. A larger value finds more.",
    )
    correction: Correction = dataclasses.field(
        default="keep",
        metadata={
            "method": "reference",
            "choices": CORRECTIONS,
            "about": "keep: sample without the words of the prompt that call the copy up, and steer if they are not found. "
            "steer: guidance leads away from the whole prompt.",
        },
    )
    steering_guidance: float = _constant(
        "reference",
        -1.0,
        (-30.0, 30.0, 0.5),
        "Guidance scale of a steered prediction. A value below 0 leads away from the prompt, with strong contrasts. 0 is as "
        "without the prompt.",
    )
    tau_mild: float = _constant(
        "published",
        3.0,
        (0.1, 100.0, 0.1),
        "Standard deviations off, in update and predicted image, from which a run counts as memorized. Published value: 3.",
    )
    tau_strong: float = _constant(
        "published",
        14.0,
        (0.1, 1000.0, 0.5),
        "Standard deviations off, in the predicted image, from which it counts as strongly memorized. Published value: 14.",
    )
    gamma: float = _constant(
        "both",
        3.0,
        (0.1, 100.0, 0.1),
        "Half width, in standard deviations, of the band in the graph. Published value: 3.",
    )
    mild_steps: int = _constant(
        "published",
        10,
        (0, 1000, 1),
        "A mild run is corrected in this many first steps, counted as of 50. Published value: 10.",
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}; known: {', '.join(METHODS)}")
        if self.correction not in CORRECTIONS:
            raise ValueError(f"the correction is {self.correction!r}; known: {', '.join(CORRECTIONS)}")
        for name in ("tau_mild", "tau_strong", "gamma"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it counts standard deviations and must be a positive number")
        if self.tau_strong < self.tau_mild:
            raise ValueError(
                f"tau_strong ({self.tau_strong}) is below tau_mild ({self.tau_mild}): a strong trigger is a mild one and more"
            )
        if not (isinstance(self.false_positive_rate, (int, float)) and 0 < self.false_positive_rate < 1):
            raise ValueError(
                f"false_positive_rate is {self.false_positive_rate!r}; it is a share of images, above 0 and below 1"
            )
        if not (isinstance(self.steering_guidance, (int, float)) and math.isfinite(self.steering_guidance)):
            raise ValueError(f"steering_guidance is {self.steering_guidance!r}; it is a guidance scale")
        if not (isinstance(self.mild_steps, int) and self.mild_steps >= 0):
            raise ValueError(f"mild_steps is {self.mild_steps!r}; it is a number of steps, 0 or more")

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


#: The constants that a user of a host can set, in their order there: numbers, and behind them choices. The published method
#: edits latents between solver steps, which hosts do not allow.
HOST_CONSTANTS = sorted(
    (field for field in dataclasses.fields(Thresholds) if field.metadata["method"] != "published" and field.name != "method"),
    key=lambda field: "choices" in field.metadata,
)
