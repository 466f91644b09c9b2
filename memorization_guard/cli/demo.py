"""``memorization-guard demo``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .errors import writable
from .options import Seed
from .output import png, print_table, write_all

if TYPE_CHECKING:
    from ..core.settings import Mode
    from ..reports.html import Comparison


#: Each prompt is sampled once in each.
MODES: tuple[Mode, Mode] = ("trace", "mitigate")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and demo.png.")] = Path("demo"),
    seed: Seed = 0,
    prompts_per_group: Annotated[int, typer.Option(min=1, max=30, help="Exact, template and ordinary prompts each.")] = 3,
) -> None:
    """Watch the bundled model reproduce training images, and paint something else. Needs no download and no GPU."""
    output.mkdir(parents=True, exist_ok=True)
    page, sheet = output / "report.html", output / "demo.png"
    writable(page, sheet)
    from rich.progress import Progress

    from .. import lab
    from ..pipelines import quiet_libraries
    from ..reports.html import contact_sheet, html_report

    quiet_libraries()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=6 * prompts_per_group)
        comparisons = _compare(lab.pipeline(), prompts_per_group, seed, lambda count: progress.advance(task, count))
    content = html_report(
        comparisons,
        title="Memorization Guard: the demo",
        introduction="A small Stable Diffusion was trained on many images, and on some of them hundreds of times. Each "
        "prompt below was sampled twice from the same noise: as the model does by itself, and with mitigation. Beneath "
        "each image stands how unusual its prompt is among ordinary ones, and what was corrected; docs/graph.md says how to "
        "read it.",
        copy_threshold=lab.COPY_THRESHOLD,
    )
    write_all([(page, content), (sheet, png(contact_sheet(comparisons, copy_threshold=lab.COPY_THRESHOLD)))])
    columns = ("prompt", "group", "verdict", "#S_mem", "#trigger", "#copy score")
    print_table("without mitigation → with", columns, map(_row, comparisons))
    print(f"\n{page} shows the images and their stability graphs; {sheet} the same in one.")


def _compare(pipe: Any, count: int, seed: int, advance: Callable[[int], object]) -> list[Comparison]:
    """Samples ``count`` prompts of each group, without and with mitigation, from the same seeds."""
    import torch

    from .. import lab
    from ..adapters.diffusers import guard
    from ..reports.html import Comparison

    comparisons = []
    profile = lab.profile()
    for group in ("exact", "template", "ordinary"):
        prompts = lab.prompts(group)[:count]
        sides = []
        for mode in MODES:
            with guard(pipe, profile, mode) as run:
                generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
                images = pipe(prompts, num_inference_steps=50, guidance_scale=7.5, generator=generators).images
            sides.append((images, run.traces))
            advance(count)
        (plain_images, plain_traces), (mitigated_images, mitigated_traces) = sides
        for i, prompt in enumerate(prompts):
            duplicated = group != "ordinary"
            comparisons.append(
                Comparison(
                    prompt=prompt,
                    group=group,
                    training_image=lab.training_image(prompt) if duplicated else None,
                    plain_image=plain_images[i],
                    plain_trace=plain_traces[i],
                    mitigated_image=mitigated_images[i],
                    mitigated_trace=mitigated_traces[i],
                    plain_copy=lab.copy_score(plain_images[i], prompt) if duplicated else None,
                    mitigated_copy=lab.copy_score(mitigated_images[i], prompt) if duplicated else None,
                )
            )
    return comparisons


def _row(comparison: Comparison) -> Sequence[str | Text]:
    found = comparison.plain_trace
    copies = "-"
    if comparison.plain_copy is not None and comparison.mitigated_copy is not None:
        copies = f"{comparison.plain_copy:.2f} → {comparison.mitigated_copy:.2f}"
    return (
        comparison.prompt,
        comparison.group,
        Text(found.verdict, style="green" if found.verdict == "stable" else "red"),
        "-" if found.score is None else f"{found.score:.1f}",
        "-" if found.trigger_step is None else str(found.trigger_step),
        copies,
    )
