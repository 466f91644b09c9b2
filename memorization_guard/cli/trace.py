"""``memorization-guard trace``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .errors import UsageError, sampling_errors, writable
from .options import Json, Mode, Model, Plot, Sampling
from .output import graph_file, json_text, printable, write_all

if TYPE_CHECKING:
    from ..core.trace import Trace


def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt of the image.")],
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Stability profile, or 'auto': that of the model, which is made first if there is none. Without one the run "
            "is traced, not scored."
        ),
    ] = None,
    mode: Mode = "trace",
    json_file: Json = None,
    plot: Plot = None,
    image: Annotated[Path | None, typer.Option(help="Write the image here (.png).")] = None,
    *,
    how: Sampling,
) -> None:
    """Sample one image and judge it."""
    writable(json_file, plot, image)
    is_graph(plot)
    if mode in ("mitigate", "stop") and profile is None:
        raise UsageError(f"--mode {mode} needs a --profile: 'auto', or one that 'memorization-guard calibrate' made")
    from ..automatic import AUTO
    from ..core.profile import StabilityProfile

    stability: StabilityProfile | Literal["auto"] | None = None
    if profile is not None:
        stability = AUTO if str(profile) == AUTO else StabilityProfile.load(profile)
    pipe = how.pipeline(model)
    import torch

    from .. import evidence
    from ..adapters.diffusers import guard

    with sampling_errors(), guard(pipe, stability, mode) as run:
        output = pipe(prompt, generator=torch.Generator().manual_seed(how.seed), **how.arguments())
    if not run.traces:
        raise UsageError("the run could not be watched; the log says why")
    found = run.traces[0]
    settings = {
        "prompt": prompt,
        "model": model.name,
        "loras": [Path(each).name for each in how.lora or ()],
        "profile": profile.name if profile is not None else None,
        "mode": mode,
        "seed": how.seed,
        **how.arguments(),
    }
    write_all(
        [
            (json_file, json_text(found.to_dict())),
            (plot, graph_file(found, plot)),
            (image, b"" if image is None else evidence.own_png(output.images[0], found, settings)),
        ]
    )
    _print(found, scored=stability is not None)
    if stability is not None and found.verdict == "unscored":
        # The image is kept, but what was asked for, a verdict or a correction, could not be given.
        raise UsageError(found.note or "the run could not be scored; the log says why")


def is_graph(plot: Path | None) -> None:
    """Refuses a graph in a format that cannot be drawn."""
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UsageError(f"{plot.name}: a graph is written as .svg or .png")


def _print(found: Trace, *, scored: bool) -> None:
    from ..core.trace import STATEMENT

    score = "none" if found.score is None else f"{found.score:.2f}"
    trigger = "none" if found.trigger_step is None else f"step {found.trigger_step} of {len(found.steps)}"
    print(f"verdict: {found.verdict}\nscore (S_mem): {score}\ntrigger: {trigger}\ncorrected steps: {found.mitigated.sum()}")
    if found.words is not None:
        print(f"called up by: {printable(', '.join(found.words.words))}\nwithout these words: {printable(found.words.text)}")
    if not scored:
        print("No profile was given, so the run is not scored: give --profile auto, or one made by 'calibrate'.")
    elif found.note:
        print(found.note)
    print(STATEMENT)
