"""Making a stability profile from reference runs, one run at a time."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import parse_json, read_whole, write_whole
from ..fingerprint import content_hash
from .errors import GuardError
from .noise_level import NoiseLevel
from .profile import Norms, StabilityProfile
from .reference import Reference, memorized
from .settings import RunSettings, Serves
from .signals import Signals
from .trace import Evaluations, Trace

log = logging.getLogger(__name__)

#: So many reference prompts, the first ones, are sampled to the end: the bands of the norms come from them. Of further ones
#: nothing is needed but their first evaluation.
WHOLE_RUNS = 50

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
        self._probes: list[Trace] = []

    @property
    def count(self) -> int:
        """Number of runs and probes taken in."""
        return len(self._traces) + len(self._probes)

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

    def probe(self, trace: Trace) -> None:
        """Takes in the first evaluation of a further prompt, whatever came after it.

        Raises:
            CalibrationError: if that is not at the noise level at which the runs begin, or has no finite detail.
        """
        if not self._traces:
            self._refuse("no run", "a profile begins with runs that were sampled to their end")
        ours, theirs = self._traces[0].evaluations, trace.evaluations
        if not len(theirs) or not np.isclose(ours.sigma[0], theirs.sigma[0], rtol=_SAME_SIGMA, atol=1e-6):
            self._refuse("other noise levels", "the prompt was not evaluated at the noise level at which the runs begin")
        detail = float(theirs.detail[0])
        if not (np.isfinite(detail) and detail > 0):
            self._refuse("not finite", "the prediction is NaN or infinite: run the model in float32 or bfloat16")
        self._probes.append(trace)

    def profile(self) -> StabilityProfile:
        """The profile of the runs and probes so far.

        Raises:
            CalibrationError: if there are fewer than 8 runs.
        """
        if len(self._traces) < MIN_RUNS:
            left_out = "".join(f", {n} left out ({reason})" for reason, n in self.left_out.items())
            raise CalibrationError(
                f"{len(self._traces)} usable reference runs{left_out}: a profile needs at least {MIN_RUNS}, and {WHOLE_RUNS} "
                "and a few hundred further prompts are recommended. Add reference prompts."
            )
        first = self._traces[0]
        settings = _fill(self.settings, dataclasses.replace(first.settings, steps=len(first.steps)))
        if settings.sigmas is None or len(settings.sigmas) != len(first.steps):
            settings = dataclasses.replace(settings, sigmas=tuple(first.steps.sigma))
        norms = np.stack([_norms(trace) for trace in self._traces])
        return StabilityProfile(
            mean=Norms(*norms.mean(axis=0)),
            std=Norms(*norms.std(axis=0, ddof=1)),
            count=len(self._traces),
            settings=settings,
            left_out=dict(self.left_out),
            reference=_reference(self._traces, self._probes, settings.prediction_type),
        )

    def _refuse(self, reason: str, message: str) -> None:
        self.left_out[reason] += 1
        raise CalibrationError(message)


def _norms(trace: Trace) -> np.ndarray:
    """``[3, steps]``, in the order of :class:`Norms`."""
    return np.stack([trace.steps.latent_norm, trace.steps.update_norm, trace.steps.denoised_norm])


def _same_levels(ours: Evaluations, theirs: Evaluations) -> bool:
    return len(ours) == len(theirs) and np.allclose(ours.sigma, theirs.sigma, rtol=_SAME_SIGMA, atol=1e-6)


def _reference(traces: Sequence[Trace], probes: Sequence[Trace], prediction_type: str | None) -> Reference | None:
    """The signals of the runs at each noise level; where a sampler evaluates one level twice, the last time, but for the first
    evaluation, which is the one that is judged."""
    signals = Signals(*(np.stack([getattr(t.evaluations, name) for t in traces]) for name in Signals._fields))
    needed = np.stack([signals.velocity, signals.denoised])
    usable = (np.isfinite(needed) & (needed > 0)).all(axis=(0, 1))
    detailed = (np.isfinite(signals.detail) & (signals.detail > 0)).all(axis=0)
    signals = signals._replace(detail=np.where(detailed, signals.detail, np.nan))
    angles = np.array([NoiseLevel.from_model(sigma, prediction_type).angle for sigma in traces[0].evaluations.sigma])
    last = {round(angle, 6): index for index, angle in enumerate(angles) if usable[index]}
    if not last:
        return None
    chosen = [last[angle] for angle in sorted(last, reverse=True)]
    if usable[0]:
        chosen[0] = 0
    if not detailed[chosen[0]]:
        return None
    mean = np.stack([trace.evaluations.patch_mean for trace in traces])[:, chosen]
    std = np.stack([trace.evaluations.patch_std for trace in traces])[:, chosen]
    pooled = mean.mean(axis=0)
    spread = np.sqrt((std**2 + mean**2).mean(axis=0) - pooled**2)
    asked = [trace.asked for trace in (*traces, *probes)]
    return Reference(
        signals=Signals(*(values[:, chosen] for values in signals)),
        angles=angles[chosen],
        patches=np.stack([pooled, spread], axis=1),
        probed=np.array([probe.evaluations.detail[0] for probe in probes]),
        asked=np.array([] if None in asked else asked, dtype=np.float64),
    )


class ReferenceRuns:
    """The traces of a calibration under way, kept in a file so that an interrupted one goes on from there.

    Args:
        state: the file, or ``None`` to keep nothing.
        identity: whatever the calibration depends on (prompts, settings, weights), JSON-ready or printable.
        whole: so many prompts, the first ones, are sampled to the end.

    Raises:
        CalibrationError: if the file belongs to a calibration of another identity, or is damaged.
    """

    def __init__(self, state: str | os.PathLike[str] | None, identity: Any, *, whole: int = WHOLE_RUNS) -> None:
        self._state = None if state is None else Path(state)
        self._whole = whole
        self.key = content_hash(identity)
        self.traces: list[Trace] = []
        if self._state is None or not self._state.exists():
            return
        try:
            content = parse_json(read_whole(self._state))
            self.traces = [Trace.from_dict(trace) for trace in content["traces"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{state} is no state of a calibration ({error}): delete it to begin anew") from None
        if content.get("key") != self.key:
            raise CalibrationError(
                f"{state} belongs to a calibration with other prompts, settings or model: delete it to begin anew"
            )

    @classmethod
    def within(cls, folder: Path, identity: Any, *, whole: int = WHOLE_RUNS) -> ReferenceRuns:
        """Kept in ``folder``, which is made if need be, under a name of its own for each identity.

        Raises:
            CalibrationError: if the file is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / f".calibration-{content_hash(identity)[:16]}.json", identity, whole=whole)

    def forget(self) -> None:
        """Deletes the file: the calibration is done."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def next_batch(self, count: int, size: int) -> tuple[int, int, Serves] | None:
        """What to sample next of ``count`` prompts, up to ``size`` at once.

        Returns:
            The first prompt, the one after the last, and what their runs serve for; ``None`` once all were sampled.
        """
        start = len(self.traces)
        if start >= count:
            return None
        end = min(start + size, count)
        return (start, end, "first") if start >= self._whole else (start, min(end, self._whole), "whole")

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

        Runs that are apart from all others are left out: the model has probably memorized something of their prompts.

        Raises:
            CalibrationError: if fewer than 8 runs are usable.
        """
        left_out: dict[int, str] = {}
        calibrator = Calibrator()
        details = [trace.asked or trace.detail or math.nan for trace in self.traces]
        known = [number for number, detail in enumerate(details) if math.isfinite(detail)]
        apart = {known[i] for i in memorized([details[number] for number in known])}
        for number, trace in enumerate(self.traces):
            if number in apart:
                left_out[number] = "the model seems to have memorized it"
                calibrator.left_out["memorized"] += 1
                continue
            try:
                (calibrator.add if number < self._whole else calibrator.probe)(trace)
            except CalibrationError as error:
                left_out[number] = str(error)
        for number, reason in left_out.items():
            log.warning("Reference prompt %d was left out: %s", number + 1, reason)
        return calibrator.profile(), left_out


def told_left_out(left_out: Mapping[int, str], prompts: Sequence[str]) -> list[str]:
    """Which reference prompts were left out and why, a line each."""
    return [f"Left out: {prompts[number]!r}: {reason}." for number, reason in left_out.items()]


def _fill(settings: RunSettings, other: RunSettings) -> RunSettings:
    """``settings`` with what it does not know taken from ``other``."""
    missing = {f.name: getattr(other, f.name) for f in dataclasses.fields(settings) if getattr(settings, f.name) is None}
    return dataclasses.replace(settings, **missing)
