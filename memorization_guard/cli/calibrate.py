"""``memorization-guard calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import resumable, writable
from .options import BatchSize, Config, Device, Dtype, Guidance, LoraFiles, Model, Seed, Side, Steps, load, sampling


def calibrate(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="Reference prompts that are not memorized: .txt, .jsonl, .csv or .parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write (.safetensors).")],
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    height: Side = None,
    width: Side = None,
    config: Config = None,
    lora: LoraFiles = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make a stability profile of a model. Interrupt it and call it again: it goes on where it stopped."""
    from ..prompts import read_prompts

    writable(output)
    texts = read_prompts(prompts)
    pipe = load(model, config, lora, device, dtype)
    from ..adapters.calibrate import calibrate as make_profile

    state = output.with_name(output.name + ".partial.json")
    with resumable(lambda: runs_kept(state)):
        profile = make_profile(
            pipe, texts, batch_size=batch_size, seed=seed, state=state, **sampling(steps, guidance, height, width)
        )
    profile.save(output)
    state.unlink(missing_ok=True)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in profile.left_out.items())
    print(f"{output}: {profile.steps} steps from {profile.count} reference runs{left_out}")


def runs_kept(*states: Path) -> str:
    """The end of a sentence that names the files in which runs are kept."""
    files = " and ".join(str(state) for state in states if state.exists())
    return f"; the runs so far are in {files}: call again to go on" if files else ""
