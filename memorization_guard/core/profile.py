"""The stability profile: how large the three norms are, step by step, for prompts that are not memorized."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import write_whole
from .reference import Reference

#: The three norms, in the order of the last axis wherever norms stand in one array.
NORMS = ("latent", "update", "denoised")

FORMAT = "memorization-guard.profile"
EXTENSION = ".safetensors"
FORMAT_VERSION = 2

#: Relative distance up to which two noise levels, or two guidance scales, count as the same.
SIGMA_TOLERANCE = 0.01
GUIDANCE_TOLERANCE = 0.1

#: Guidance scales that reference runs may be carried over to, as a multiple of their own; see docs/evaluation.md.
GUIDANCE_REACH = (0.4, 1.7)


class ProfileError(ValueError):
    """A profile file that cannot be used; the message says why and what to do."""


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
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSettings:
        """Reads what :meth:`to_dict` wrote; unknown keys are left to newer versions.

        Raises:
            ValueError: if a value does not have its field's type.
        """
        try:
            return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data})
        except TypeError as error:
            raise ValueError(f"settings do not have the expected types: {error}") from None


@dataclass(frozen=True)
class Mismatch:
    """One setting in which a run differs from the profile."""

    field: str
    profile: Any
    run: Any

    def __str__(self) -> str:
        if self.field == "sigmas":
            return "noise schedule: the run's noise levels are not those the profile was made with"
        return f"{self.field.replace('_', ' ')}: profile {self.profile}, run {self.run}"


@dataclass(frozen=True)
class ProfileCheck:
    """How well a profile fits a run: what makes it invalid, what it is carried over, and what merely weakens it."""

    invalid: tuple[Mismatch, ...] = ()
    carried: tuple[Mismatch, ...] = ()
    weakened: tuple[Mismatch, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the run may be scored with the profile's reference runs."""
        return not self.invalid

    @property
    def exact(self) -> bool:
        """Whether the published bands hold too: those of one solver, its noise levels and its guidance scale."""
        return not self.invalid and not self.carried

    def __str__(self) -> str:
        if self.invalid:
            reasons = "; ".join(map(str, self.invalid))
            return f"The profile does not fit this run ({reasons}). Calibrate a profile with the run's own settings."
        if self.carried:
            return f"The profile is carried over to this run ({'; '.join(map(str, (*self.carried, *self.weakened)))})."
        if self.weakened:
            return f"The profile fits this run with less certainty ({'; '.join(map(str, self.weakened))})."
        return "The profile fits this run."


@dataclass(frozen=True, kw_only=True, eq=False)
class StabilityProfile:
    """Per-step mean and standard deviation of the three norms over reference runs (Huang et al. 2026, calibration).

    Attributes:
        mean: ``[steps, 3]`` float64, columns as in :data:`NORMS`: ``|z_{i+1}|``, ``|z_{i+1} - z_i|``, ``|x0_i|``, all on
            the VP scale.
        std: ``[steps, 3]`` float64, the standard deviation over the reference runs (``ddof=1``).
        count: number of reference runs.
        settings: what the profile holds for.
        left_out: number of reference runs that were not used, by reason.
        reference: the reference runs, from which the profile is carried over to other samplers, step counts and guidance
            scales; ``None`` in a profile that has only the published bands.
    """

    mean: np.ndarray
    std: np.ndarray
    count: int
    settings: RunSettings = field(default_factory=RunSettings)
    left_out: Mapping[str, int] = field(default_factory=dict)
    reference: Reference | None = None

    def __post_init__(self) -> None:
        mean, std = np.array(self.mean, dtype=np.float64), np.array(self.std, dtype=np.float64)
        if mean.ndim != 2 or mean.shape[1] != len(NORMS) or std.shape != mean.shape or not len(mean):
            raise ValueError(f"mean and std must both be [steps, 3]; they are {mean.shape} and {std.shape}")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; a profile comes from at least one reference run")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all() and (mean >= 0).all()):
            raise ValueError("mean and std of norms must be finite and non-negative")
        steps, sigmas = self.settings.steps, self.settings.sigmas
        if (steps not in (None, len(mean))) or (sigmas is not None and len(sigmas) != len(mean)):
            raise ValueError(f"the settings speak of another number of steps than the {len(mean)} of the statistics")
        mean.setflags(write=False)
        std.setflags(write=False)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def steps(self) -> int:
        """Number of solver steps."""
        return len(self.mean)

    def scores(self, row: int, norms: np.ndarray) -> np.ndarray:
        """Standardised distance ``|norm - mu| / sd`` of ``norms`` ``[3, B]`` from row ``row``: ``[3, B]``.

        A norm that never varied in the reference (the first latent of some schedules) would make any rounding error an
        alarm; its standard deviation is taken as a millionth of its mean.
        """
        mean = self.mean[row][:, None]
        std = np.maximum(self.std[row][:, None], 1e-6 * mean)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(norms - mean) / std

    def find(self, sigma: float) -> int | None:
        """The row whose noise level is ``sigma`` (within 1 %), or ``None``. Row 0 if the profile knows no noise levels."""
        if self.settings.sigmas is None:
            return 0
        sigmas = np.asarray(self.settings.sigmas)
        row = int(np.argmin(np.abs(sigmas - sigma)))
        return row if _same_sigma(sigmas[row], sigma) else None

    def next_row(self, row: int | None, sigma: float, step: int) -> int | None:
        """The row for step ``step`` of a run, taken from noise level ``sigma``, after ``row``; ``None`` off the schedule.

        A run is to visit every row from the one it begins at. Only its second step may leave one out: so does PNDM in
        image to image, whose first step counts twice.
        """
        if row is None:
            return self.find(sigma) if step == 0 else None
        for after in (row + 1, row + 2) if step == 1 and row > 0 else (row + 1,):
            if after < self.steps and (self.settings.sigmas is None or _same_sigma(self.settings.sigmas[after], sigma)):
                return after
        return None

    def check(self, settings: RunSettings) -> ProfileCheck:
        """Names every field in which a run differs from this profile; what either side does not know is no difference.

        Invalid (never scored): other weights, prediction type or latent shape. Carried over, with the reference runs: another
        sampler, other noise levels, and a guidance scale within :data:`GUIDANCE_REACH`; beyond it, or without reference runs,
        they are invalid too. Guidance up to 10 % away, and a run over part of the profile's schedule in the same steps
        (img2img), only weaken. A model name or scheduler name that differs is a warning when what the name stands for
        (weights, noise levels) cannot be compared or agrees.
        """
        invalid: list[Mismatch] = []
        weakened: list[Mismatch] = []
        carried: list[Mismatch] = [] if self.reference is not None else invalid

        def differs(name: str) -> Mismatch | None:
            ours, theirs = getattr(self.settings, name), getattr(settings, name)
            return Mismatch(name, ours, theirs) if None not in (ours, theirs) and ours != theirs else None

        for name in ("model_hash", "prediction_type", "latent_shape"):
            if found := differs(name):
                invalid.append(found)
        if found := differs("sampler"):
            carried.append(found)
        same_weights = self.settings.model_hash is not None and self.settings.model_hash == settings.model_hash
        if not same_weights and (found := differs("model")):
            weakened.append(found)
        if found := differs("guidance_scale"):
            far = not GUIDANCE_REACH[0] <= found.run / found.profile <= GUIDANCE_REACH[1]
            near = math.isclose(found.profile, found.run, rel_tol=GUIDANCE_TOLERANCE)
            (invalid if far else weakened if near else carried).append(found)

        covered = None
        if self.settings.sigmas is not None and settings.sigmas is not None:
            covered = self._covers(settings.sigmas, settings.end_sigma)
            if not covered:
                carried.append(Mismatch("sigmas", self.settings.sigmas, settings.sigmas))
        if found := differs("steps"):
            (weakened if covered else carried).append(found)
        if found := differs("scheduler"):
            weakened.append(found)
        return ProfileCheck(tuple(invalid), () if self.reference is None else tuple(carried), tuple(weakened))

    def _covers(self, sigmas: Sequence[float], end_sigma: float | None) -> bool:
        row = None
        for step, sigma in enumerate(sigmas):
            row = self.next_row(row, sigma, step)
            if row is None:
                return False
        if row is None:
            return False
        # A last step that is cut off, or goes straight to 0, is another step than the one the statistics are of.
        following = (*(self.settings.sigmas or ())[1:], self.settings.end_sigma)[row]
        return following is None or end_sigma is None or _same_sigma(following, end_sigma)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the profile as safetensors, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "count": str(self.count),
            "settings": json.dumps(self.settings.to_dict()),
            "left_out": json.dumps(dict(self.left_out)),
        }
        tensors = {"mean": self.mean, "std": self.std}
        if self.reference is not None:
            tensors |= {
                "reference.runs": self.reference.runs.astype(np.float32),
                "reference.angles": self.reference.angles,
                "reference.patches": self.reference.patches,
            }
        return write_whole(path, save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StabilityProfile:
        """Reads a profile written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ProfileError: if it is not a stability profile, or one of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no stability profile at {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ProfileError(f"{path} is a safetensors file, but not a stability profile")
                if metadata.get("version") != str(FORMAT_VERSION):
                    raise ProfileError(
                        f"{path} has profile format {metadata.get('version')}, this version reads {FORMAT_VERSION}: "
                        "update Memorization Guard, or calibrate again"
                    )
                settings = RunSettings.from_dict(json.loads(metadata["settings"]))
                reference = None
                if "reference.runs" in file.keys():  # noqa: SIM118 (no mapping)
                    arrays = {name: file.get_tensor(f"reference.{name}") for name in ("runs", "angles", "patches")}
                    reference = Reference(guidance_scale=settings.guidance_scale, **arrays)
                return cls(
                    mean=file.get_tensor("mean"),
                    std=file.get_tensor("std"),
                    reference=reference,
                    count=int(metadata["count"]),
                    settings=settings,
                    left_out=json.loads(metadata["left_out"]),
                )
        except ProfileError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ProfileError(f"{path} cannot be read as a stability profile ({error}): calibrate again") from error


def _same_sigma(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=SIGMA_TOLERANCE, abs_tol=1e-6)


def name_problem(name: str) -> str | None:
    """Why a profile's file cannot be called ``name``, on whatever system; ``None`` where it can. A name is never a path."""
    stem = name.strip().removesuffix(EXTENSION)
    reserved = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}
    if (
        not stem
        or stem.startswith(".")
        or stem.endswith((".", " "))
        or stem.split(".")[0].upper() in reserved
        or len(stem) > 120
    ):
        return f"{name!r} cannot name a profile: give 1 to 120 characters that do not begin or end with a dot"
    if any(character in '/\\:*?"<>|' or ord(character) < 32 for character in stem):
        return f'{name!r} cannot name a profile: leave out / \\ : * ? " < > |; it is a name, and not a path'
    return None
