"""Options that several commands share, and what they mean to a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import settings


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for an option that takes one of these words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return parse


#: A command that guards nothing would have nothing to say.
_MODES = tuple(mode for mode in settings.MODES if mode != "off")

Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto.")]
Model = Annotated[
    Path, typer.Argument(help="A diffusers folder or .safetensors checkpoint on this machine, or lab: our own small model.")
]
Config = Annotated[Path | None, typer.Option(help="For a checkpoint: a diffusers folder of the same kind of model.")]
LoraFiles = Annotated[
    list[str] | None, typer.Option("--lora", help="A LoRA to merge into the model: FILE or FILE:WEIGHT; any number of times.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial noise; prompts count up from it.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts sampled at once.")]
SeedsPerPrompt = Annotated[int, typer.Option(min=1, help="Images of each prompt.")]
Side = Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own size if not given.")]
Mode = Annotated[
    settings.Mode,
    typer.Option(
        parser=one_of(*_MODES),
        metavar="|".join(_MODES),
        help="What to do with an image that triggers: record it, steer away from the copy, or end the run.",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the traces here (.json).")]
Plot = Annotated[Path | None, typer.Option(help="Write the stability graph here: .svg or .png; of several runs the worst.")]


def load(model: Path, config: Path | None, loras: list[str] | None, device: str, dtype: str) -> Any:
    """The pipeline that these options name."""
    from ..pipelines import Lora, load_pipeline

    return load_pipeline(model, config=config, loras=[Lora.parse(text) for text in loras or ()], device=device, dtype=dtype)


def sampling(steps: int, guidance: float, height: int | None, width: int | None) -> dict[str, Any]:
    """What these options are called by a pipeline; a size that is not given is left out."""
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    return {"num_inference_steps": steps, "guidance_scale": guidance, **size}
