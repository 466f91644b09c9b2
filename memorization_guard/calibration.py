"""Estimating a stability profile from reference runs, one run at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from .profile import NORMS, RunSettings, StabilityProfile
from .trace import Trace

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


def _fill(settings: RunSettings, other: RunSettings) -> RunSettings:
    """``settings`` with what it does not know taken from ``other``."""
    missing = {f.name: getattr(other, f.name) for f in dataclasses.fields(settings) if getattr(settings, f.name) is None}
    return dataclasses.replace(settings, **missing)
