"""Estimating a stability profile from reference runs, one run at a time."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_whole
from ..fingerprint import content_hash
from .noise_level import NoiseLevel
from .profile import NORMS, RunSettings, StabilityProfile
from .reference import COLUMNS, Reference
from .trace import Trace

log = logging.getLogger(__name__)

#: Robust standard deviations, in update and x0 norm at the same step, from which a reference run is itself an outlier. Of the
#: lab model's 50 reference runs the farthest reaches 4.2; exact prompts mixed in among them reach 4.5 to 8.
OUTLIER_SCORE = 5.0

#: Fewer runs than this give a standard deviation that is off by more than a quarter as a rule.
MIN_RUNS = 8


class CalibrationError(ValueError):
    """Reference runs that give no profile; the message says why and what to do."""


class Calibrator:
    """Streaming mean and standard deviation of the three norms over reference runs.

    Uses the update of Welford (1962) and, to merge two calibrators, that of Chan, Golub & LeVeque (1983): stable however
    many runs there are, and independent of how they were split over machines, up to rounding.

    Args:
        settings: what the runs are made with; written into the profile. Steps and noise levels are filled in from the
            first trace if they are missing.
    """

    def __init__(self, settings: RunSettings | None = None) -> None:
        self.settings = settings or RunSettings()
        self.count = 0
        #: Number of runs left out so far, by reason.
        self.left_out: Counter[str] = Counter()
        self._mean = np.zeros((0, len(NORMS)))
        self._sum_of_squares = np.zeros((0, len(NORMS)))
        self._runs: list[np.ndarray] = []  # [steps, 8] of every run that came as a trace, as in Reference
        self._patches: list[np.ndarray] = []  # [steps, 2] of the same

    def add(self, run: Trace | np.ndarray) -> None:
        """Takes in one reference run: its trace, or its norms as ``[steps, 3]`` (columns as in ``profile.NORMS``).

        A run that is refused changes nothing but ``left_out``, so a caller may catch the error and go on.

        Raises:
            CalibrationError: if a norm is not finite, the run has another number of steps than those before it, or it was
                mitigated (a corrected run does not show how the model behaves by itself).
        """
        if isinstance(run, Trace):
            if run.mitigated.any():
                self._refuse("mitigated", "a corrected run cannot be a reference: calibrate with mitigation off")
            norms = np.stack([run.latent_norm, run.update_norm, run.denoised_norm], axis=1).astype(np.float64)
        else:
            norms = np.array(run, dtype=np.float64)
        if norms.ndim != 2 or norms.shape[1] != len(NORMS) or not len(norms):
            raise CalibrationError(f"norms of a run are [steps, {len(NORMS)}]; these are {norms.shape}")
        if not np.isfinite(norms).all():
            step = int(np.flatnonzero(~np.isfinite(norms).all(axis=1))[0])
            self._refuse(
                "not finite",
                f"the latent is NaN or infinite at step {step}: run the model in float32 or bfloat16, or leave the prompt out",
            )
        if self.count == 0:
            self._begin(norms.shape, run if isinstance(run, Trace) else None)
        if norms.shape != self._mean.shape:
            self._refuse(
                "another step count",
                f"the run has {len(norms)} steps, the ones before it {len(self._mean)}: a profile holds for one number of "
                "steps, so calibrate with one",
            )
        self.count += 1
        delta = norms - self._mean
        self._mean += delta / self.count
        self._sum_of_squares += delta * (norms - self._mean)
        if isinstance(run, Trace) and np.isfinite(run.velocity_norm).all() and len(run.velocity_norm) == len(norms):
            # Every column is a field of a trace, a cosine by its own name.
            columns = [name if name.endswith("alignment") else f"{name}_norm" for name in COLUMNS]
            self._runs.append(np.stack([getattr(run, name) for name in columns], axis=1))
            self._patches.append(np.stack([run.patch_mean, run.patch_std], axis=1))

    def merge(self, other: Calibrator) -> None:
        """Takes in all runs of ``other``, as if they had been added here.

        Raises:
            CalibrationError: if its runs have another number of steps.
        """
        if other.count and self.count and other._mean.shape != self._mean.shape:
            raise CalibrationError(
                f"cannot merge runs of {len(other._mean)} steps with runs of {len(self._mean)}: calibrate them apart"
            )
        expected = self.settings.steps
        if other.count and expected not in (None, len(other._mean)):
            raise CalibrationError(f"cannot merge runs of {len(other._mean)} steps: the settings say {expected}")
        self.left_out.update(other.left_out)
        if not other.count:
            return
        self._runs += other._runs
        self._patches += other._patches
        if not self.count:
            self.settings = _fill(self.settings, other.settings)
            self._mean, self._sum_of_squares = other._mean.copy(), other._sum_of_squares.copy()
        else:
            total = self.count + other.count
            delta = other._mean - self._mean
            self._mean += delta * (other.count / total)
            self._sum_of_squares += other._sum_of_squares + delta**2 * (self.count * other.count / total)
        self.count += other.count

    def profile(self) -> StabilityProfile:
        """The profile of the runs so far.

        Raises:
            CalibrationError: if there are fewer than 8.
        """
        if self.count < MIN_RUNS:
            left_out = "".join(f", {n} left out ({reason})" for reason, n in self.left_out.items())
            raise CalibrationError(
                f"{self.count} usable reference runs{left_out}: a profile needs at least {MIN_RUNS}, and 50 are "
                "recommended. Add reference prompts."
            )
        return StabilityProfile(
            mean=self._mean,
            std=np.sqrt(self._sum_of_squares / (self.count - 1)),
            count=self.count,
            settings=dataclasses.replace(self.settings, steps=len(self._mean)),
            left_out=dict(self.left_out),
            reference=self._reference(),
        )

    def _reference(self) -> Reference | None:
        settings = self.settings
        if len(self._runs) != self.count or settings.sigmas is None or settings.end_sigma is None:
            return None
        kind = settings.prediction_type
        mean, std = np.moveaxis(np.stack(self._patches), 2, 0)
        pooled = mean.mean(axis=0)
        spread = np.sqrt((std**2 + mean**2).mean(axis=0) - pooled**2)
        return Reference(
            runs=np.stack(self._runs),
            angles=np.array([NoiseLevel.from_model(s, kind).angle for s in (*settings.sigmas, settings.end_sigma)]),
            guidance_scale=settings.guidance_scale,
            patches=np.stack([pooled, spread], axis=1),
        )

    def _begin(self, shape: tuple[int, ...], trace: Trace | None) -> None:
        expected = self.settings.steps
        if expected is not None and expected != shape[0]:
            self._refuse(
                "another step count",
                f"the run has {shape[0]} steps, the settings say {expected}: give the number of steps really taken",
            )
        if trace is not None:
            self.settings = _fill(self.settings, trace.settings)
            if self.settings.sigmas is None:
                self.settings = dataclasses.replace(self.settings, sigmas=tuple(trace.sigma))
        self._mean, self._sum_of_squares = np.zeros(shape), np.zeros(shape)

    def _refuse(self, reason: str, message: str) -> None:
        self.left_out[reason] += 1
        raise CalibrationError(message)


class ReferenceRuns:
    """The traces of a calibration under way, kept in a file so that an interrupted one goes on from there.

    Args:
        state: the file, or ``None`` to keep nothing.
        identity: whatever the calibration depends on (prompts, settings, weights), JSON-ready or printable.

    Raises:
        CalibrationError: if the file belongs to a calibration of another identity, or is damaged.
    """

    def __init__(self, state: str | os.PathLike[str] | None, identity: Any) -> None:
        self._state = None if state is None else Path(state)
        self.key = content_hash(identity)
        self.traces: list[Trace] = []
        if self._state is None or not self._state.exists():
            return
        try:
            content = json.loads(self._state.read_text(encoding="utf-8"))
            self.traces = [Trace.from_dict(trace) for trace in content["traces"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{state} is no state of a calibration ({error}): delete it to begin anew") from None
        if content.get("key") != self.key:
            raise CalibrationError(
                f"{state} belongs to a calibration with other prompts, settings or model: delete it to begin anew"
            )

    @classmethod
    def within(cls, folder: Path, identity: Any) -> ReferenceRuns:
        """Kept in ``folder``, which is made if need be, under a name of its own for each identity.

        Raises:
            CalibrationError: if the file is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / f".calibration-{content_hash(identity)[:16]}.json", identity)

    def forget(self) -> None:
        """Deletes the file: the calibration is done."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def add(self, traces: Sequence[Trace], expected: int) -> None:
        """Takes in the traces of a batch of ``expected`` prompts, and keeps them.

        Raises:
            CalibrationError: if there is not one trace a prompt.
        """
        if len(traces) != expected:
            raise CalibrationError(f"{expected} prompts gave {len(traces)} traces: see the log for what went wrong")
        self.traces += traces
        if self._state is not None:
            write_whole(self._state, json.dumps({"key": self.key, "traces": [trace.to_dict() for trace in self.traces]}))

    def profile(self) -> tuple[StabilityProfile, dict[int, str]]:
        """The profile of the runs so far, and the runs that were left out: their number, from 0, and why.

        A run that is far outside of what the others do is left out: the model has probably memorized something of its
        prompt. How far is told by median and median absolute deviation, which outliers do not move.

        Raises:
            CalibrationError: if fewer than 8 runs are usable.
        """
        left_out: dict[int, str] = {}
        calibrator = Calibrator()
        outliers = _outliers(self.traces)
        for number, trace in enumerate(self.traces):
            if number in outliers:
                left_out[number] = f"it is an outlier itself, {outliers[number]:.1f} standard deviations off"
                calibrator.left_out["outlier"] += 1
                continue
            try:
                calibrator.add(trace)
            except CalibrationError as error:
                left_out[number] = str(error)
        for number, reason in left_out.items():
            log.warning("Reference prompt %d was left out: %s", number + 1, reason)
        return calibrator.profile(), left_out


def unscheduled(sampler: str) -> CalibrationError:
    """What is said of a sampler that takes noise levels of its own."""
    return CalibrationError(
        f"{sampler} keeps to no fixed schedule, so that no profile can be made for it: choose another sampler"
    )


def told_left_out(left_out: Mapping[int, str], prompts: Sequence[str]) -> list[str]:
    """Which reference prompts were left out and why, a line each."""
    return [f"Left out: {prompts[number]!r}: {reason}." for number, reason in left_out.items()]


def _outliers(traces: Sequence[Trace]) -> dict[int, float]:
    """Runs whose update and x0 norm are both far off at some step, and how far, in robust standard deviations."""
    steps = Counter(trace.steps for trace in traces).most_common(1)[0][0] if traces else 0
    chosen = [number for number, trace in enumerate(traces) if trace.steps == steps]
    if len(chosen) < MIN_RUNS or not steps:
        return {}
    norms = np.array([[traces[number].update_norm, traces[number].denoised_norm] for number in chosen])  # [runs, 2, steps]
    median = np.nanmedian(norms, axis=0)
    # 1.4826 makes it the standard deviation of a normal distribution; a norm that never varies is no yardstick.
    spread = np.maximum(1.4826 * np.nanmedian(np.abs(norms - median), axis=0), 1e-6 * median + 1e-12)
    joint = np.nan_to_num(np.abs(norms - median) / spread, nan=0.0).min(axis=1).max(axis=1)
    return {number: float(score) for number, score in zip(chosen, joint, strict=True) if score > OUTLIER_SCORE}


def _fill(settings: RunSettings, other: RunSettings) -> RunSettings:
    """``settings`` with what it does not know taken from ``other``."""
    missing = {f.name: getattr(other, f.name) for f in dataclasses.fields(settings) if getattr(settings, f.name) is None}
    return dataclasses.replace(settings, **missing)
