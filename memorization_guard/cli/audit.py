"""``memorization-guard audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ..audit import Keep
from ..core.settings import Thresholds
from .copies import check_options, print_copies, training_audit
from .errors import UsageError, resumable
from .options import BatchSize, Mode, Model, Sampling, SeedsPerPrompt, one_of
from .report import print_audit

if TYPE_CHECKING:
    from ..audit.run import Workers
    from ..audit.worker import Recipe


def audit(
    model: Model,
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="Prompts: .txt, .jsonl, .csv or .parquet; any number. With --training its captions, if not given."
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; a new one, or that of this audit.")],
    training: Annotated[
        Path | None,
        typer.Option(
            help="Folder of training images with captions (kohya, Hugging Face, webdataset) to hold all images against."
        ),
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="With --training: SSCD as TorchScript (code: only what you trust) or a transformers folder (DINOv2, CLIP)."
        ),
    ] = None,
    copy_threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="With --training: similarity of a copy; from the folder's own images if not given."),
    ] = None,
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

    With --training, all images are kept and held against all training images.
    Those that trigger are sampled once more, with mitigation. OUTPUT/gallery.html
    shows training image, output and mitigated output; OUTPUT/pairs.csv holds a
    row an image.
    """
    check_options(prompts, training, encoder, copy_threshold, images, mode)
    if profile is not None and reference is not None:
        raise UsageError("give either --profile or --reference, prompts to make a profile with")
    if workers is not None and ray is None:
        raise UsageError("--workers is for --ray; on one machine call the same command once a GPU")
    if screen and images == "all":
        raise UsageError("--images all keeps every image, and --screen samples few of them: give one of the two")
    if screen and training is not None:
        raise UsageError("--training compares every image, and --screen samples few of them: give one of the two")
    from ..audit.dataset import MANIFEST
    from ..audit.plan import Plan
    from ..audit.run import Local
    from ..audit.run import audit as run_audit
    from ..audit.summary import summarize
    from ..prompts import enough, read_prompts, reference_prompts
    from ..reports.audit import write_report
    from ..reports.gallery import write_gallery

    keep: Keep = images if training is None else "all"
    thresholds = Thresholds(false_positive_rate=false_positive_rate)
    recipe = how.recipe(model, thresholds=thresholds, mode=mode, keep=keep, screen=screen)
    known = [] if profile is not None else enough(reference_prompts() if reference is None else read_prompts(reference))
    against = None
    if training is not None:
        named = column if prompts is None else None
        against = training_audit(training, output, encoder=encoder, column=named, threshold=copy_threshold, device=how.device)
        captions = against.begin()
        prompts, column = (captions, None) if prompts is None else (prompts, column)
    assert prompts is not None  # as check_options saw to
    plan = Plan.of(prompts, column=column, seeds_per_prompt=seeds_per_prompt, seed=how.seed)

    def start(recipe: Recipe = recipe) -> Workers:
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
        copies = None
        if against is not None:
            copies = against.finish(recipe, start, batch_size=batch_size, report=write_report, gallery=write_gallery)
    if not worked:
        print(f"{output} is finished: nothing was left to do")
    print_audit(output, summarize(output))
    if copies is not None:
        print_copies(output, copies)
