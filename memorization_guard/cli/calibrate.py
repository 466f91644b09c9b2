"""``memorization-guard calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import resumable, writable
from .options import BatchSize, Model, Sampling


def calibrate(
    model: Model,
    prompts: Annotated[
        Path, typer.Option(help="Reference prompts that are not memorized, a few hundred: .txt, .jsonl, .csv or .parquet.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write (.safetensors).")],
    batch_size: BatchSize = 4,
    *,
    how: Sampling,
) -> None:
    """Make a stability profile of a model. Interrupt it and call it again: it goes on where it stopped.

    The first 50 prompts are sampled to the end. Of the others the first
    evaluation is taken, and of every prompt two more, in a noise of ours: at
    50 steps 350 further prompts take the time of some twenty images.
    """
    from ..prompts import read_prompts

    writable(output)
    texts = read_prompts(prompts)
    pipe = how.pipeline(model)
    from ..adapters.calibrate import calibrate as make_profile

    state = output.with_name(output.name + ".partial.json")

    def kept() -> str:
        return f"; the runs so far are in {state}: call again to go on" if state.exists() else ""

    with resumable(kept, output.parent):
        profile = make_profile(pipe, texts, batch_size=batch_size, seed=how.seed, state=state, **how.arguments())
    profile.save(output)
    state.unlink(missing_ok=True)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in profile.left_out.items())
    further = 0 if profile.reference is None else len(profile.reference.probed)
    beside = f" and {further} further prompts" if further else ""
    print(f"{output}: {profile.steps} steps from {profile.count} reference runs{beside}{left_out}")
