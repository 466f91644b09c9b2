"""Making a stability profile from reference runs, one run at a time."""

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
from .errors import GuardError
from .noise_level import NoiseLevel
from .profile import Norms, StabilityProfile
from .reference import Reference
from .settings import RunSettings
from .signals import Signals
from .trace import Evaluations, Trace

log = logging.getLogger(__name__)

#: Robust standard deviations, in update and x0 norm at the same step, from which a reference run is itself an outlier. Of the
#: lab model's 50 reference runs the farthest reaches 4.2; exact prompts mixed in among them reach 4.5 to 8.
OUTLIER_SCORE = 5.0

#: Fewer runs than this give a standard deviation that is off by more than a quarter as a rule.
MIN_RUNS = 8

#: Relative distance up to which two runs are evaluated at the same noise level.
_SAME_SIGMA = 1e-3


class CalibrationError(GuardError, ValueError):
    """Reference runs that give no profile."""


class Calibrator:
    """Collects the traces of reference runs.

    Args:
        settings: what the runs are made with; written into the profile. What it does not know is filled in from the first
            trace.
    """

    def __init__(self, settings: RunSettings | None = None) -> None:
        self.settings = settings or RunSettings()
        #: Number of runs left out so far, by reason.
        self.left_out: Counter[str] = Counter()
        self._traces: list[Trace] = []

    @property
    def count(self) -> int:
        """Number of runs taken in."""
        return len(self._traces)

    def add(self, trace: Trace) -> None:
        """Takes in one reference run.

        A run that is refused changes nothing but ``left_out``, so a caller may catch the error and go on.

        Raises:
            CalibrationError: if a norm is not finite, the run has other noise levels than those before it, or it was
                corrected (a corrected run does not show how the model behaves by itself).
        """
        if trace.mitigated.any() or trace.evaluations.corrected.any():
            self._refuse("mitigated", "a corrected run cannot be a reference: calibrate with mode trace")
        if not len(trace.steps) or not len(trace.evaluations):
            self._refuse("nothing seen", "the run has no steps or no prediction reached the guard: see the log")
        norms = _norms(trace)
        if not np.isfinite(norms).all():
            step = int(np.flatnonzero(~np.isfinite(norms).all(axis=0))[0])
            self._refuse(
                "not finite",
                f"the latent is NaN or infinite at step {step}: run the model in float32 or bfloat16, or leave the prompt out",
            )
        first = self._traces[0] if self._traces else trace
        expected = len(first.steps) if self._traces or self.settings.steps is None else self.settings.steps
        if len(trace.steps) != expected:
            self._refuse(
                "another step count",
                f"the run has {len(trace.steps)} steps, not {expected}: a profile holds for one number of steps, so calibrate "
                f"with one",
            )
        if not _same_levels(first.evaluations, trace.evaluations):
            self._refuse(
                "other noise levels",
                f"{trace.settings.sampler or 'the sampler'} keeps to no fixed schedule, so that no profile can be made for "
                "it: choose another sampler",
            )
        self._traces.append(trace)

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
        first = self._traces[0]
        settings = _fill(self.settings, dataclasses.replace(first.settings, steps=len(first.steps)))
        if settings.sigmas is None or len(settings.sigmas) != len(first.steps):
            settings = dataclasses.replace(settings, sigmas=tuple(first.steps.sigma))
        norms = np.stack([_norms(trace) for trace in self._traces])
        return StabilityProfile(
            mean=Norms(*norms.mean(axis=0)),
            std=Norms(*norms.std(axis=0, ddof=1)),
            count=self.count,
            settings=settings,
            left_out=dict(self.left_out),
            reference=_reference(self._traces, settings.prediction_type),
        )

    def _refuse(self, reason: str, message: str) -> None:
        self.left_out[reason] += 1
        raise CalibrationError(message)


def _norms(trace: Trace) -> np.ndarray:
    """``[3, steps]``, in the order of :class:`Norms`."""
    return np.stack([trace.steps.latent_norm, trace.steps.update_norm, trace.steps.denoised_norm])


def _same_levels(ours: Evaluations, theirs: Evaluations) -> bool:
    return len(ours) == len(theirs) and np.allclose(ours.sigma, theirs.sigma, rtol=_SAME_SIGMA, atol=1e-6)


def _reference(traces: Sequence[Trace], prediction_type: str | None) -> Reference | None:
    """The signals of the runs at each noise level; where a sampler evaluates one level twice, at the last time."""
    signals = Signals(*(np.stack([getattr(t.evaluations, name) for t in traces]) for name in Signals._fields))
    usable = np.isfinite(signals.velocity).all(axis=0) & np.isfinite(signals.denoised).all(axis=0)
    angles = np.array([NoiseLevel.from_model(sigma, prediction_type).angle for sigma in traces[0].evaluations.sigma])
    last = {round(angle, 6): index for index, angle in enumerate(angles) if usable[index]}
    if not last:
        return None
    chosen = [last[angle] for angle in sorted(last, reverse=True)]
    mean = np.stack([trace.evaluations.patch_mean for trace in traces])[:, chosen]
    std = np.stack([trace.evaluations.patch_std for trace in traces])[:, chosen]
    pooled = mean.mean(axis=0)
    spread = np.sqrt((std**2 + mean**2).mean(axis=0) - pooled**2)
    return Reference(
        signals=Signals(*(values[:, chosen] for values in signals)),
        angles=angles[chosen],
        patches=np.stack([pooled, spread], axis=1),
    )


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


def told_left_out(left_out: Mapping[int, str], prompts: Sequence[str]) -> list[str]:
    """Which reference prompts were left out and why, a line each."""
    return [f"Left out: {prompts[number]!r}: {reason}." for number, reason in left_out.items()]


def _outliers(traces: Sequence[Trace]) -> dict[int, float]:
    """Runs whose update and x0 norm are both far off at some step, and how far, in robust standard deviations."""
    steps = Counter(len(trace.steps) for trace in traces).most_common(1)[0][0] if traces else 0
    chosen = [number for number, trace in enumerate(traces) if len(trace.steps) == steps]
    if len(chosen) < MIN_RUNS or not steps:
        return {}
    norms = np.array([_norms(traces[number])[1:] for number in chosen])  # [runs, 2, steps]
    median = np.nanmedian(norms, axis=0)
    # 1.4826 makes it the standard deviation of a normal distribution; a norm that never varies is no yardstick.
    spread = np.maximum(1.4826 * np.nanmedian(np.abs(norms - median), axis=0), 1e-6 * median + 1e-12)
    joint = np.nan_to_num(np.abs(norms - median) / spread, nan=0.0).min(axis=1).max(axis=1)
    return {number: float(score) for number, score in zip(chosen, joint, strict=True) if score > OUTLIER_SCORE}


def _fill(settings: RunSettings, other: RunSettings) -> RunSettings:
    """``settings`` with what it does not know taken from ``other``."""
    missing = {f.name: getattr(other, f.name) for f in dataclasses.fields(settings) if getattr(settings, f.name) is None}
    return dataclasses.replace(settings, **missing)
