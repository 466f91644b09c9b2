"""The stability profile: what a model does, at every noise level and step by step, for prompts that are not memorized."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import MAX_NAME, parse_json, write_whole
from .errors import GuardError
from .noise_level import NoiseLevel
from .reference import Reference
from .settings import RunSettings, is_count
from .signals import Signals

FORMAT = "memorization-guard.profile"
EXTENSION = ".safetensors"
FORMAT_VERSION = 5

#: Relative distance up to which two noise levels, or two guidance scales, count as the same.
SIGMA_TOLERANCE = 0.01
GUIDANCE_TOLERANCE = 0.1


#: Bytes of the largest file that is read, far more than a profile of thousands of prompts has.
MAX_FILE = 64 * 2**20

#: Of the reference, beside its signals.
_ARRAYS = ("angles", "patches", "probed", "asked")


class ProfileError(GuardError, ValueError):
    """A profile file that cannot be used."""


class Norms(NamedTuple):
    """The three norms of the published method, all of one shape, on the VP scale: ``|z_{i+1}|``, ``|z_{i+1} - z_i|``,
    ``|x0_i|``."""

    latent: np.ndarray
    update: np.ndarray
    denoised: np.ndarray


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
    """How well a profile fits a run: what makes it invalid, what it is transferred over, and what merely weakens it."""

    invalid: tuple[Mismatch, ...] = ()
    transferred: tuple[Mismatch, ...] = ()
    weakened: tuple[Mismatch, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the run may be judged with the profile's reference runs."""
        return not self.invalid

    @property
    def exact(self) -> bool:
        """Whether the published bands hold too: those of one solver, its noise levels and its guidance scale."""
        return not self.invalid and not self.transferred

    def __str__(self) -> str:
        if self.invalid:
            reasons = "; ".join(map(str, self.invalid))
            return f"The profile does not fit this run ({reasons}). Calibrate a profile with the run's own settings."
        if self.transferred:
            return f"The profile is transferred to this run ({'; '.join(map(str, (*self.transferred, *self.weakened)))})."
        if self.weakened:
            return f"The profile fits this run with less certainty ({'; '.join(map(str, self.weakened))})."
        return "The profile fits this run."


@dataclass(frozen=True, kw_only=True, eq=False)
class StabilityProfile:
    """What reference runs did.

    Attributes:
        mean, std: of the three norms at every solver step, each ``[steps]`` float64; the standard deviation over the
            reference runs
            (``ddof=1``). The bands of Huang et al. 2026.
        count: number of reference runs.
        settings: what the profile was made with.
        left_out: number of reference runs that were not used, by reason.
        reference: the signals of the reference runs, which hold for other samplers, step counts and guidance scales too;
            ``None`` in a profile that has only the published bands.

    Raises:
        ValueError: if the parts do not fit together.
    """

    mean: Norms
    std: Norms
    count: int
    settings: RunSettings = field(default_factory=RunSettings)
    left_out: Mapping[str, int] = field(default_factory=dict)
    reference: Reference | None = None

    def __post_init__(self) -> None:
        mean, std = (Norms(*(np.array(norm, dtype=np.float64) for norm in norms)) for norms in (self.mean, self.std))
        steps = mean.latent.size
        if not steps or any(norm.shape != (steps,) for norm in (*mean, *std)):
            shapes = [norm.shape for norm in (*mean, *std)]
            raise ValueError(f"mean and std must each hold three norms of [steps] numbers; they are {shapes}")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; a profile comes from at least one reference run")
        if not all(np.isfinite(norm).all() and (norm >= 0).all() for norm in (*mean, *std)):
            raise ValueError("mean and std of norms must be finite and non-negative")
        expected, sigmas = self.settings.steps, self.settings.sigmas
        if expected not in (None, steps) or (sigmas is not None and len(sigmas) != steps):
            raise ValueError(f"the settings speak of another number of steps than the {steps} of the statistics")
        for norm in (*mean, *std):
            norm.setflags(write=False)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def steps(self) -> int:
        """Number of solver steps."""
        return len(self.mean.latent)

    @property
    def reference_prompts(self) -> int | None:
        """Number of prompts that a run is held against; ``None`` in a profile that has only the published bands."""
        return None if self.reference is None else self.reference.count

    def row(self, step: int) -> tuple[Norms, Norms]:
        """Mean and standard deviation of the norms at a step."""
        return Norms(*(norm[step] for norm in self.mean)), Norms(*(norm[step] for norm in self.std))

    def scores(self, row: int, norms: Norms) -> Norms:
        """Standardised distance ``|norm - mu| / sd`` of ``norms`` ``[B]`` from row ``row``.

        A norm that never varied in the reference (the first latent of some schedules) would make any rounding error an
        alarm; its standard deviation is taken as a millionth of its mean.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return Norms(
                *(np.abs(norm - mean) / max(std, 1e-6 * mean) for norm, mean, std in zip(norms, *self.row(row), strict=True))
            )

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

    def bands(self, sigmas: Sequence[float], levels: Sequence[NoiseLevel], *, exact: bool) -> dict[str, dict[str, np.ndarray]]:
        """Mean and standard deviation of the norms of a run's steps, by name, to be drawn.

        Where the run keeps to the profile's own schedule they are the profile's; elsewhere those of a solver that adds no
        noise, whose update is a chord of the VP circle.

        Args:
            sigmas: noise level before every step, in the model's own convention, ``[steps]``.
            levels: noise levels before every step and after the last, ``[steps + 1]``.
            exact: whether the profile was made with the run's sampler, schedule and guidance scale.
        """
        reference = self.reference
        rows: list[tuple[Norms, Norms]] = []
        row: int | None = None
        for step, (sigma, start, end) in enumerate(zip(sigmas, levels[:-1], levels[1:], strict=True)):
            row = self.next_row(row, sigma, step) if exact and (row is not None or not step) else None
            if row is not None or reference is None:
                nothing = Norms(*np.full(len(Norms._fields), np.nan))
                rows.append((nothing, nothing) if row is None else self.row(row))
                continue
            chord = 2 * math.sin(abs(start.angle - end.angle) / 2)
            latent, velocity, denoised = (
                self._latent_band(end.angle),
                reference.band(start.angle, "velocity"),
                reference.band(start.angle, "denoised"),
            )  # fmt: skip
            rows.append(
                tuple(Norms(*map(np.asarray, (latent[i], velocity[i] * chord, denoised[i]))) for i in (0, 1))  # type: ignore[arg-type]
            )
        return {
            name: {
                "mean": np.array([float(getattr(mean, name)) for mean, _ in rows]),
                "std": np.array([float(getattr(std, name)) for _, std in rows]),
            }
            for name in Norms._fields
        }

    def _latent_band(self, angle: float) -> tuple[float, float]:
        if self._ends is None:
            return math.nan, math.nan
        angles, order = self._ends
        mean, std = (np.interp(angle, angles, norms.latent[order]) for norms in (self.mean, self.std))
        return float(mean), float(std)

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The angles at which the profile's steps end, rising, and the steps in that order."""
        sigmas, kind = self.settings.sigmas, self.settings.prediction_type
        if sigmas is None:
            return None
        ends = (*sigmas[1:], self.settings.end_sigma or 0.0)
        angles = np.array([NoiseLevel.from_model(sigma, kind).angle for sigma in ends])
        order = np.argsort(angles, kind="stable")
        return angles[order], order

    def check(self, settings: RunSettings) -> ProfileCheck:
        """Names every field in which a run differs from this profile; what either side does not know is no difference.

        Invalid (never judged): other weights or prediction type. Transferred, with the reference runs: another sampler, other
        noise levels, another guidance scale, and another size, where the network could be asked about the references; without
        reference runs they are invalid too. Guidance up to 10 % away, and a run over part of the profile's schedule in the
        same steps (image to image), only weaken. A model name or scheduler name that differs is a warning when what the name
        stands for (weights, noise levels) cannot be compared or agrees. Whether there is a prediction without the prompt is
        seen at each evaluation: a scale of 1 does not tell.
        """
        invalid: list[Mismatch] = []
        weakened: list[Mismatch] = []
        transferred: list[Mismatch] = [] if self.reference is not None else invalid

        def differs(name: str) -> Mismatch | None:
            ours, theirs = getattr(self.settings, name), getattr(settings, name)
            return Mismatch(name, ours, theirs) if None not in (ours, theirs) and ours != theirs else None

        for name in ("model_hash", "prediction_type"):
            if found := differs(name):
                invalid.append(found)
        if found := differs("latent_shape"):
            (transferred if self._resizable(found.run) else invalid).append(found)
        if found := differs("sampler"):
            transferred.append(found)
        same_weights = self.settings.model_hash is not None and self.settings.model_hash == settings.model_hash
        if not same_weights and (found := differs("model")):
            weakened.append(found)
        if found := differs("guidance_scale"):
            near = math.isclose(found.profile, found.run, rel_tol=GUIDANCE_TOLERANCE)
            (weakened if near else transferred).append(found)

        covered = None
        if self.settings.sigmas is not None and settings.sigmas is not None:
            covered = self._covers(settings.sigmas, settings.end_sigma)
            if not covered:
                transferred.append(Mismatch("sigmas", self.settings.sigmas, settings.sigmas))
        if found := differs("steps"):
            (weakened if covered else transferred).append(found)
        if found := differs("scheduler"):
            weakened.append(found)
        return ProfileCheck(tuple(invalid), () if self.reference is None else tuple(transferred), tuple(weakened))

    def _resizable(self, shape: tuple[int, ...]) -> bool:
        """Whether latents of this shape are the references' in another size."""
        ours = self.settings.latent_shape or ()
        asked = self.reference is not None and self.reference.answers is not None
        return asked and len(ours) == len(shape) >= 3 and ours[0] == shape[0]

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
        tensors = {f"mean.{name}": norm for name, norm in self.mean._asdict().items()}
        tensors |= {f"std.{name}": norm for name, norm in self.std._asdict().items()}
        if self.reference is not None:
            signals = self.reference.signals._asdict()
            tensors |= {f"reference.{name}": values.astype(np.float32) for name, values in signals.items()}
            tensors |= {f"reference.{name}": getattr(self.reference, name) for name in _ARRAYS}
        # What is written is an array's memory as it lies.
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        return write_whole(path, save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StabilityProfile:
        """Reads a profile written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ProfileError: if it is not a stability profile, or one of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no stability profile at {path}")
        if path.stat().st_size > MAX_FILE:
            raise ProfileError(f"{path} is larger than {MAX_FILE >> 20} MB, which no stability profile is")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ProfileError(f"{path} is a safetensors file, but not a stability profile")
                if metadata.get("version") != str(FORMAT_VERSION):
                    raise ProfileError(
                        f"{path} has profile format {metadata.get('version')}, this version reads {FORMAT_VERSION}: "
                        "calibrate again"
                    )

                def record(kind: Any, prefix: str) -> Any:
                    return kind(*(file.get_tensor(f"{prefix}.{name}") for name in kind._fields))

                reference = None
                if "reference.angles" in file.keys():  # noqa: SIM118 (no mapping)
                    arrays = (file.get_tensor(f"reference.{name}") for name in _ARRAYS)
                    reference = Reference(record(Signals, "reference"), *arrays)
                return cls(
                    mean=record(Norms, "mean"),
                    std=record(Norms, "std"),
                    reference=reference,
                    count=int(metadata["count"]),
                    settings=RunSettings.from_dict(parse_json(metadata["settings"])),
                    left_out=_counts(parse_json(metadata["left_out"])),
                )
        except ProfileError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ProfileError(f"{path} cannot be read as a stability profile ({error!s:.200}): calibrate again") from error


def _counts(data: Any) -> dict[str, int]:
    """Numbers of runs by reason, as they stand in a file."""
    if not isinstance(data, dict) or not all(map(is_count, data.values())):
        raise ValueError("left_out does not count runs by reason")
    return data


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
        or len(stem.encode("utf-8", "replace")) > MAX_NAME
    ):
        return (
            f"{name!r} cannot name a profile: give 1 to 120 characters, of at most {MAX_NAME} bytes, that do not begin or end "
            "with a dot"
        )
    if any(character in '/\\:*?"<>|' or ord(character) < 32 for character in stem):
        return f'{name!r} cannot name a profile: leave out / \\ : * ? " < > |; it is a name, and not a path'
    return None
