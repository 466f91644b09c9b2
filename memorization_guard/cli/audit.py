"""``memorization-guard audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ..audit import Keep
from ..core.settings import Thresholds
from .errors import UsageError, resumable
from .options import BatchSize, Mode, Model, Sampling, SeedsPerPrompt, one_of
from .report import print_audit

if TYPE_CHECKING:
    from ..audit.run import Workers


def audit(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="Prompts to audit with: .txt, .jsonl, .csv or .parquet; any number.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; a new one, or that of this audit.")],
    profile: Annotated[Path | None, typer.Option(help="Stability profile; without one, one is made first.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="In place of --profile: prompts to make one with; our own 400 if not given.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Key or column of the prompts, if it is not caption, prompt or text.")
    ] = None,
    seeds_per_prompt: SeedsPerPrompt = 1,
    images: Annotated[
        Keep,
        typer.Option(
            parser=one_of(*get_args(Keep)),
            metavar="|".join(get_args(Keep)),
            help="Which images to keep; flagged are those that triggered.",
        ),
    ] = "flagged",
    mode: Mode = "trace",
    false_positive_rate: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Share of ordinary images that may trigger.")
    ] = Thresholds().false_positive_rate,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster: its address, auto, or local to start one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: number of workers; one a GPU, or without GPUs one a node.")
    ] = None,
    batch_size: BatchSize = 4,
    screen: Annotated[
        bool,
        typer.Option("--screen", help="Judge every image by its first evaluation, and sample only those that are suspicious."),
    ] = False,
    *,
    how: Sampling,
) -> None:
    """Find out which prompts of a list a model answers with a training image.

    Kill it whenever you like and call it again: it goes on where it stopped.
    A finished audit does nothing when called again. Several calls in one
    folder at once, on one machine, share the work.

    Without --profile or --reference a profile is made with 400 prompts of our
    own: the first 50 are sampled to the end; of the others the first
    evaluation is taken, and of every prompt two more, in a noise of ours.

    Writes a row an image as Parquet to OUTPUT/results, and OUTPUT/report.html.
    """
    if profile is not None and reference is not None:
        raise UsageError("give either --profile or --reference, prompts to make a profile with")
    if workers is not None and ray is None:
        raise UsageError("--workers is for --ray; on one machine call the same command once a GPU")
    if screen and images == "all":
        raise UsageError("--images all keeps every image, and --screen samples few of them: give one of the two")
    from ..audit.dataset import MANIFEST
    from ..audit.plan import Plan
    from ..audit.run import Local
    from ..audit.run import audit as run_audit
    from ..audit.summary import summarize
    from ..prompts import enough, read_prompts, reference_prompts
    from ..reports.audit import write_report

    thresholds = Thresholds(false_positive_rate=false_positive_rate)
    recipe = how.recipe(model, thresholds=thresholds, mode=mode, keep=images, screen=screen)
    known = [] if profile is not None else enough(reference_prompts() if reference is None else read_prompts(reference))
    plan = Plan.of(prompts, column=column, seeds_per_prompt=seeds_per_prompt, seed=how.seed)

    def start() -> Workers:
        if ray is None:
            return Local(recipe)
        from ..audit.cluster import Cluster

        return Cluster(recipe, address=ray, workers=workers)

    def kept() -> str:
        return f"; what was made is kept in {output}: call again to go on" if (output / MANIFEST).exists() else ""

    with resumable(kept, output):
        worked = run_audit(
            recipe,
            plan,
            output,
            start,
            profile=profile,
            reference=known,
            reference_from="ours" if reference is None else reference.name,
            batch_size=batch_size,
            report=write_report,
        )
    if not worked:
        print(f"{output} is finished: nothing was left to do")
    print_audit(output, summarize(output))
