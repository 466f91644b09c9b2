"""``memorization-guard check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import UsageError, sampling_errors, writable
from .options import Model, Sampling
from .output import json_text, printable, write_all

if TYPE_CHECKING:
    from ..core.trace import Trace


def check(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="One prompt or several, each in quotes.")],
    profile: Annotated[
        Path, typer.Option(help="Stability profile, or 'auto': that of the model, which is made first if there is none.")
    ] = Path("auto"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the answers here (.json).")] = None,
    *,
    how: Sampling,
) -> None:
    """Tell whether the model remembers an image under a prompt, and which words call it up; no image is made."""
    writable(json_file)
    from ..automatic import AUTO
    from ..core.profile import StabilityProfile

    stability: StabilityProfile | Literal["auto"] = AUTO if str(profile) == AUTO else StabilityProfile.load(profile)
    pipe = how.pipeline(model)
    from ..adapters.diffusers import sample_references

    answers = []
    for prompt in prompts:
        with sampling_errors():
            (found,) = sample_references(pipe, [prompt], how.seed, "first", profile=stability, **how.arguments())
        if found.p_value is None:
            raise UsageError(found.note or "the prompt could not be judged; the log says why")
        answers.append(_answer(prompt, found))
        print(_told(answers[-1], found))
    write_all([(json_file, json_text(answers))])


def _answer(prompt: str, found: Trace) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "memorized": found.trigger_step is not None,
        "p_value": found.p_value,
        "p_value_floor": found.p_value_floor,
        "words": None if found.words is None else found.words.to_dict(),
    }


def _told(answer: dict[str, Any], found: Trace) -> str:
    """What is printed of one prompt."""
    from ..reports.words import explanation

    return "\n  ".join(map(printable, (answer["prompt"], *explanation(found))))
