"""Profiles that nobody has to make: the first run with a model makes one from our own prompts, the next ones find it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from .core.calibration import CalibrationError, ReferenceRuns
from .core.profile import EXTENSION, ProfileError, StabilityProfile
from .core.settings import Serves
from .core.trace import Trace
from .fingerprint import content_hash
from .prompts import reference_prompts

log = logging.getLogger(__name__)

#: What users choose in place of a profile's name.
AUTO: Literal["auto"] = "auto"

#: Of our prompts so many, of which so many are sampled to the end, in so few steps: what tells is the beginning.
PROMPTS, WHOLE, STEPS = 100, 10, 8

#: Guidance scale of the references where an image has none: both predictions are to be seen, and hardly mixed.
_WEAK_GUIDANCE = 1.5

#: Prompts sampled at once; half of them where the device has no memory for that.
BATCH = 4

#: So many profiles are kept, those used last; a profile takes 40 kB.
KEPT = 100

#: Samples prompts, the seed of the first given, as long as they are needed: one trace each. Their number is at most ``BATCH``.
Sample = Callable[[list[str], int, Serves], Sequence[Trace]]

#: Is told how many prompts are done, and of how many.
Progress = Callable[[int, int], None]


def user_folder() -> Path:
    """Where profiles are kept that belong to no host: ``memorization-guard/profiles`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memorization-guard" / "profiles"


def prompts() -> list[str]:
    """Those of ours that a profile is made from."""
    every = reference_prompts()
    return every[:: len(every) // PROMPTS]


def guidance_of(scale: float) -> float:
    """The guidance scale to sample references with, for images that are sampled at ``scale``."""
    return scale if scale > 1.0 else _WEAK_GUIDANCE


def is_automatic(name: str) -> bool:
    """Whether a profile in a host's folder, by its name relative to it, is one that made itself: people know none by name."""
    return Path(name).parts[0] == AUTO


class AutomaticProfiles:
    """The profiles that made themselves, in a folder, by the fingerprint of the weights that they hold for.

    Args:
        folder: made when the first profile is.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._failed: dict[str, str] = {}

    def find(self, weights: str | None) -> tuple[StabilityProfile | None, str | None]:
        """The profile of these weights, or why there is none.

        Args:
            weights: what tells them from others: a fingerprint, and whatever else changes what the model predicts; ``None``
                where they have no fingerprint.
        """
        if weights is None:
            return None, "The model's weights have no fingerprint: calibrate a profile, and choose it."
        path = self._path(weights)
        try:
            profile = StabilityProfile.load(path)
            os.utime(path)
        except (OSError, ProfileError):
            return None, self._failed.get(weights, "None has been made yet: see the log.")
        return profile, None

    def make(
        self,
        weights: str | None,
        sample: Sample,
        progress: Progress = lambda done, of: None,
        *,
        cancelled: type[BaseException] | tuple[type[BaseException], ...] = KeyboardInterrupt,
    ) -> tuple[StabilityProfile | None, str | None]:
        """Makes the profile of these weights, if there is none yet, and gives what :meth:`find` gives.

        What has been sampled is kept: a making that was cancelled goes on from there. One that failed is not tried again in
        this process; :meth:`find` says why. No random number of anybody else is drawn.

        Args:
            weights: as for :meth:`find`.
            sample: samples with these weights. progress: shows how far it is.
            cancelled: what ``sample`` raises where it is not to go on for now, as when the user has cancelled. It alone is
                passed on.
        """
        found = self.find(weights)
        if weights is None or weights in self._failed or found[0] is not None:
            return found
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                self._make(weights, sample, progress)
        except cancelled:
            raise
        except Exception as error:
            log.warning("Memorization Guard could not make a profile of this model: %s", error, exc_info=True)
            self._failed[weights] = f"None could be made of this model by itself ({error}): calibrate one."
        return self.find(weights)

    def _make(self, weights: str, sample: Sample, progress: Progress) -> None:
        texts = prompts()
        log.info("Memorization Guard makes the profile of this model, once, from %d prompts.", len(texts))
        runs = ReferenceRuns.within(self.folder, [weights, texts, WHOLE, STEPS], whole=WHOLE)
        size = BATCH
        while batch := runs.next_batch(len(texts), size):
            start, end, serves = batch
            progress(start, len(texts))
            try:
                traces = sample(texts[start:end], start, serves)
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise CalibrationError("the device has no memory for another image") from None
                size //= 2
                continue
            runs.add(traces, end - start)
        progress(len(texts), len(texts))
        profile, _ = runs.profile()
        profile.save(self._path(weights))
        runs.forget()
        self._sweep()

    def _path(self, weights: str) -> Path:
        return self.folder / f"{content_hash(weights)[:16]}{EXTENSION}"

    def _sweep(self) -> None:
        """Deletes the profiles that were not used for longest."""
        found = sorted(self.folder.glob(f"*{EXTENSION}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found[KEPT:]:
            path.unlink(missing_ok=True)


#: Those of a folder: one object for each, which knows what could not be made.
profiles_in = functools.cache(AutomaticProfiles)
