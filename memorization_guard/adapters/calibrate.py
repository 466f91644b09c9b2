"""Making a stability profile with a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from ..core.calibration import MIN_RUNS, CalibrationError, ReferenceRuns
from ..core.profile import StabilityProfile
from ..fingerprint import fingerprint
from ..prompts import read_prompts
from .diffusers import sample_references
from .network import denoisers


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | str | os.PathLike[str],
    *,
    batch_size: int = 4,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> StabilityProfile:
    """Makes a stability profile from reference prompts; those that the model seems to have memorized are left out.

    The first 50 are sampled to the end. Of the others one evaluation is taken, and two more in a noise of ours: 350 take the
    time of some twenty images.

    Args:
        pipe: as for :func:`guard`.
        prompts: prompts that are not memorized, a few hundred; a list, or a file that :func:`read_prompts` reads.
        batch_size: prompts sampled at once.
        seed: prompt i starts from the noise of seed ``seed + i``, drawn on the CPU.
        state: file that keeps the runs so far after every batch, so that an interrupted calibration goes on from there;
            delete it once the profile is saved.
        progress: whether to show a progress bar.
        pipe_kwargs: what the profile is to hold for (``num_inference_steps``, ``guidance_scale``, ``height``, ...); one
            text as ``negative_prompt`` serves all prompts.

    Raises:
        CalibrationError: if there are fewer than 8 prompts, or fewer than 8 runs are usable; if the pipeline cannot be
            watched; and if ``state`` belongs to another calibration.
    """
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else read_prompts(prompts)  # type: ignore[arg-type]
    if len(texts) < MIN_RUNS or not all(isinstance(text, str) for text in texts):
        raise CalibrationError(f"{len(texts)} reference prompts: give a list of at least {MIN_RUNS}, better a few hundred")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    arguments = {key: repr(value) for key, value in sorted(pipe_kwargs.items())}
    identity = [
        texts,
        seed,
        arguments,
        fingerprint(denoisers(pipe)[0]),
        type(pipe.scheduler).__name__,
        dict(pipe.scheduler.config),
    ]
    runs = ReferenceRuns(state, identity)

    with tqdm(total=len(texts), initial=len(runs.traces), desc="calibrating", unit="prompt", disable=not progress) as bar:
        while batch := runs.next_batch(len(texts), batch_size):
            start, end, serves = batch
            runs.add(sample_references(pipe, texts[start:end], seed + start, serves, **pipe_kwargs), end - start)
            bar.update(end - start)
    return runs.profile()[0]
