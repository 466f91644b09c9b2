"""Options that several commands share, and what they mean to a pipeline."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..core import settings

if TYPE_CHECKING:
    from ..audit.worker import Recipe
    from ..pipelines import Lora


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for an option that takes one of these words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return parse


#: A command that guards nothing would have nothing to say.
_MODES = tuple(mode for mode in settings.MODES if mode != "off")

Mode = Annotated[
    settings.Mode,
    typer.Option(
        parser=one_of(*_MODES),
        metavar="|".join(_MODES),
        help="What to do with an image that triggers: record it, steer away from the copy, or end the run.",
    ),
]
Model = Annotated[
    Path, typer.Argument(help="A diffusers folder or .safetensors checkpoint on this machine, or lab: our own small model.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts sampled at once.")]
SeedsPerPrompt = Annotated[int, typer.Option(min=1, help="Images of each prompt.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial noise; prompts count up from it.")]
Side = Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own size if not given.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the traces here (.json).")]
Plot = Annotated[Path | None, typer.Option(help="Write the stability graph here: .svg or .png; of several runs the worst.")]


@dataclass(frozen=True)
class Sampling:
    """The options of every command that samples; see :func:`with_sampling_options`."""

    seed: Seed = 0
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 50
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 7.5
    height: Side = None
    width: Side = None
    config: Annotated[Path | None, typer.Option(help="For a checkpoint: a diffusers folder of the same kind of model.")] = None
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA to merge into the model: FILE or FILE:WEIGHT; any number of times.")
    ] = None
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto.")] = "auto"

    @property
    def loras(self) -> tuple[Lora, ...]:
        from ..pipelines import Lora

        return tuple(Lora.parse(text) for text in self.lora or ())

    def pipeline(self, model: Path) -> Any:
        """The pipeline of ``model``."""
        from ..pipelines import load_pipeline

        return load_pipeline(model, config=self.config, loras=self.loras, device=self.device, dtype=self.dtype)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a pipeline call."""
        size = {name: value for name, value in (("height", self.height), ("width", self.width)) if value is not None}
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, **size}

    def recipe(self, model: Path, **options: Any) -> Recipe:
        """How an audit makes its images. Paths are absolute, since workers on a cluster run in another folder."""
        from ..audit.worker import Recipe

        return Recipe(
            model=str(model.absolute() if model.exists() else model),
            config=None if self.config is None else str(self.config.absolute()),
            loras=self.loras,
            device=self.device,
            dtype=self.dtype,
            steps=self.steps,
            guidance=self.guidance,
            height=self.height,
            width=self.width,
            **options,
        )


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of :class:`Sampling` in place of a parameter of that type."""
    hints = get_type_hints(command, include_extras=True)
    place = next((name for name, kind in hints.items() if kind is Sampling), None)
    if place is None:
        return command
    shared = get_type_hints(Sampling, include_extras=True)
    options = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared[field.name]
        )
        for field in dataclasses.fields(Sampling)
    }
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != place
    ]

    def run(**values: Any) -> None:
        command(**{place: Sampling(**{name: values.pop(name) for name in options})}, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    parameters = [*own, *options.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
