"""``memorization-guard evaluate``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError, resumable, writable
from .options import BatchSize, Model, Sampling, SeedsPerPrompt
from .output import print_table, warn


def evaluate(
    model: Model,
    memorized: Annotated[Path, typer.Option(help="Prompts known to be memorized: .txt, .jsonl, .csv or .parquet.")],
    ordinary: Annotated[Path, typer.Option(help="Ordinary prompts, 500 or so, in such a list.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="REPORT: writes REPORT.html and REPORT.json.")],
    reference: Annotated[
        Path | None, typer.Option(help="Prompts to calibrate a profile with, a few hundred, in neither of the other lists.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="In place of --reference: a profile for these settings.")] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Keep the profile of --reference here (.safetensors).")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many prompts of --memorized and --ordinary, not all.")
    ] = None,
    seeds_per_prompt: SeedsPerPrompt = 1,
    images: Annotated[
        Path | None, typer.Option(help="Folder of training images of the memorized prompts, for copy scores.")
    ] = None,
    sscd: Annotated[
        Path | None,
        typer.Option(help="SSCD as TorchScript, for copy scores. Such a file is code: give none that you do not trust."),
    ] = None,
    copy_threshold: Annotated[float, typer.Option(min=-1, max=1, help="Similarity above which an image is a copy.")] = 0.5,
    batch_size: BatchSize = 4,
    *,
    how: Sampling,
) -> None:
    """Measure how well memorized prompts are told from ordinary ones, on any model.

    Interrupt it and call it again: it goes on where it stopped.

    Samples both lists, unmitigated, and reports AUC and TPR at 1 % FPR of
    every score, ROC curves and histograms; with --images and --sscd also how
    many images are copies.

    Lists: a .txt holds a prompt a line. A line of a .jsonl is an object with a
    "caption" or "prompt", and perhaps a "kind" (verbatim, template), which the
    report tells apart.

    Training images of a prompt: the files in --images that its "image" names,
    one or a list, or else those called as the number of its line: 17.png
    belongs to line 17, in a .txt as well.
    """
    base = output.with_suffix("") if output.suffix.lower() in (".html", ".json") else output
    page, data, folder = (base.with_name(base.name + end) for end in (".html", ".json", ".partial"))
    writable(page, data, save_profile)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder: the evaluation would keep there what has been made so far")
    _consistent(reference, profile, save_profile, images, sscd)

    from ..core.profile import StabilityProfile
    from ..evaluation.copies import CopyScorer
    from ..evaluation.evaluate import conditions, evaluated_profile
    from ..evaluation.evaluate import evaluate as sample_lists
    from ..evaluation.lists import read_list
    from ..evaluation.summary import summarize
    from ..files import write_whole
    from ..prompts import enough, read_prompts
    from ..reports.evaluation import write_report

    known = enough(read_prompts(reference)) if reference is not None else []
    bad, good = read_list(memorized, images)[:limit], read_list(ordinary)[:limit]
    if profile is not None:
        StabilityProfile.load(profile)  # so that a file that is no profile is refused before the model is loaded
    recipe = how.recipe(model)
    copies = CopyScorer(sscd, device=how.device, threshold=copy_threshold) if sscd is not None else None
    source = reference.name if reference is not None else str(profile)

    def kept() -> str:
        return f"; what was made is kept in {folder}: call again to go on" if folder.exists() else ""

    with resumable(kept, folder):
        samples = sample_lists(
            recipe,
            bad,
            good,
            folder,
            profile=profile,
            reference=known,
            reference_from=source,
            copies=copies,
            seeds_per_prompt=seeds_per_prompt,
            batch_size=batch_size,
            seed=how.seed,
        )
    settings = {
        "model": model.name,
        **conditions(folder),
        "steps": how.steps,
        "guidance_scale": how.guidance,
        "seeds_per_prompt": seeds_per_prompt,
        "first_seed": how.seed,
        "memorized_prompts": memorized.name,
        "ordinary_prompts": ordinary.name,
        "profile_from": source,
        "copies_by": None if sscd is None else sscd.name,
    }
    threshold = None if copies is None else copies.threshold
    result = summarize(samples, settings=settings, copy_threshold=threshold, reference=known)
    if save_profile is not None:
        write_whole(save_profile, evaluated_profile(folder).read_bytes())
    write_report(result, page, data)
    shutil.rmtree(folder)
    _print(result)
    print(f"\n{page} shows the curves and histograms; {data} holds every number.")


def _consistent(
    reference: Path | None, profile: Path | None, save_profile: Path | None, images: Path | None, sscd: Path | None
) -> None:
    if (reference is None) == (profile is None):
        raise UsageError("give either --reference, prompts to calibrate a profile with, or --profile")
    if save_profile is not None and reference is None:
        raise UsageError("--save-profile keeps the profile of --reference: without that there is none to keep")
    if (images is None) != (sscd is None):
        raise UsageError("copy scores need both --images, a folder of training images, and --sscd, a TorchScript file")
    if sscd is not None and not sscd.is_file():
        raise UsageError(f"there is no TorchScript file at {sscd}")
    if images is not None and not images.is_dir():
        raise UsageError(f"there is no folder of images at {images}")


def _print(result: dict[str, Any]) -> None:
    warn(result["warnings"])
    title = f"against {result['ordinary']['images']} ordinary images; in brackets 95 % intervals"
    print_table(title, ("group", "signal", "#AUC", "#TPR at 1 % FPR"), _rows(result["groups"]))
    for group in (*result["groups"], result["ordinary"]):
        copies = group["copies"]
        share = f", {copies['rate']['mean']:.1%} of {copies['images']} compared are copies" if copies else ""
        print(f"{group['name']}: {group['triggered']['mean']:.1%} of {group['images']} images triggered{share}")


def _rows(groups: list[dict[str, Any]]) -> Iterator[list[str]]:
    for group in groups:
        for name, signal in group["signals"].items():
            row = [group["name"], name]
            for key, form in (("auc", ".4f"), ("tpr_at_1_fpr", ".3f")):
                low, high = signal[f"{key}_95"]
                row.append(f"{signal[key]:{form}} ({low:{form}}-{high:{form}})")
            yield row
