"""The console command: ``memorization-guard demo | calibrate | trace | evaluate | audit | report | compare | verify``.

What a user can get wrong ends in one line on standard error and exit code 2; ``verify`` has codes for its answers too.
diffusers is imported when a command runs, so that ``--help`` need not wait for it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit('memorization-guard: the command line needs more packages: pip install "memorization-guard[diffusers]"')

if TYPE_CHECKING:
    from ..core.profile import StabilityProfile
    from ..core.trace import Trace
    from ..evaluation.evaluate import Prompt
    from ..evidence import Verification
    from ..reports.html import Comparison

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])


#: Prompts that a comparison names in the terminal, of each sort.
LISTED = 10


class Images(str, Enum):
    """Which images an audit keeps."""

    none = "none"
    flagged = "flagged"
    all = "all"


class UsageError(Exception):
    """Something the user can put right; the message says what and how."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from ..audit import AuditError
    from ..core.calibration import CalibrationError
    from ..core.profile import ProfileError
    from ..evaluation.evaluate import EvaluationError
    from ..pipelines import ModelError

    try:
        yield
    except (UsageError, AuditError, CalibrationError, EvaluationError, ModelError, ProfileError, FileNotFoundError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("memorization-guard: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    print(f"memorization-guard: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def _writable(path: Path | None) -> None:
    """Refuses an output that cannot be written before minutes of sampling, not after."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}: name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.absolute().parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"{path.absolute().parent} cannot be written to")


@contextmanager
def _sampling_errors() -> Iterator[None]:
    """What a pipeline or the guard refuses (a size, a scheduler, a full GPU) in one line as well."""
    from ..core.calibration import CalibrationError
    from ..core.profile import ProfileError

    try:
        yield
    except (CalibrationError, ProfileError):
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError) as error:
        hint = " (a smaller --batch-size needs less)" if "memory" in f"{type(error).__name__} {error}".lower() else ""
        raise UsageError(f"sampling failed: {error or type(error).__name__}{hint}") from error


@contextmanager
def _resumable(kept: Callable[[], str]) -> Iterator[None]:
    """Says what is kept when sampling is interrupted or fails; ``kept`` ends the sentence."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"memorization-guard: interrupted{kept()}", file=sys.stderr)
        raise typer.Exit(130) from None
    except UsageError as error:
        raise UsageError(f"{error}{kept()}") from error


def _runs_in(*states: Path) -> str:
    files = " and ".join(str(state) for state in states if state.exists())
    return f"; the runs so far are in {files}: call again to go on" if files else ""


def _load(model: Path, config: Path | None, loras: list[str] | None, device: str, dtype: str) -> Any:
    from ..pipelines import Lora, load_pipeline

    merged = [Lora.parse(text) for text in loras or ()]
    return load_pipeline(model, config=config, loras=merged, device=device, dtype=dtype)


def _size(height: int | None, width: int | None) -> dict[str, Any]:
    return {name: value for name, value in (("height", height), ("width", width)) if value is not None}


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
Side = Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own size if not given.")]


@app.command()
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
    with _one_line_errors():
        _writable(output)
        texts = _read_prompts(prompts)
        pipe = _load(model, config, lora, device, dtype)
        from ..adapters.diffusers import calibrate as make_profile

        state = output.with_name(output.name + ".partial.json")
        size = _size(height, width)
        with _resumable(lambda: _runs_in(state)), _sampling_errors():
            profile = make_profile(
                pipe,
                texts,
                batch_size=batch_size,
                seed=seed,
                state=state,
                num_inference_steps=steps,
                guidance_scale=guidance,
                **size,
            )
        profile.save(output)
        state.unlink(missing_ok=True)
        left_out = "".join(f", {count} left out ({reason})" for reason, count in profile.left_out.items())
        print(f"{output}: {profile.steps} steps from {profile.count} reference runs{left_out}")


def _read_prompts(path: Path) -> list[str]:
    from ..prompts import read_prompts

    try:
        return read_prompts(path)
    except ValueError as error:
        raise UsageError(str(error)) from None


@app.command()
def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    profile: Annotated[Path | None, typer.Option(help="Stability profile; without one the run is traced, not scored.")] = None,
    mitigate: Annotated[bool, typer.Option("--mitigate", help="Steer away when the run leaves the stability region.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the trace here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the stability graph here: .svg or .png.")] = None,
    image: Annotated[Path | None, typer.Option(help="Write the image here (.png).")] = None,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    height: Side = None,
    width: Side = None,
    config: Config = None,
    lora: LoraFiles = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Paint one image and judge it."""
    with _one_line_errors():
        for path in (json_file, plot, image):
            _writable(path)
        _is_graph(plot)
        if mitigate and profile is None:
            raise UsageError("--mitigate needs a --profile: make one with 'memorization-guard calibrate'")
        from ..core.profile import StabilityProfile

        stability = StabilityProfile.load(profile) if profile is not None else None
        pipe = _load(model, config, lora, device, dtype)
        import torch

        from ..adapters.diffusers import guard

        with _sampling_errors(), guard(pipe, stability, mitigate=mitigate) as run:
            output = pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                **_size(height, width),
            )
        if not run.traces:
            raise UsageError("the run could not be watched; the log says why")
        found = run.traces[0]
        settings = {
            "prompt": prompt,
            "model": model.name,
            "loras": [Path(each).name for each in lora or ()],
            "profile": profile.name if profile is not None else None,
            "mitigate": mitigate,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            **_size(height, width),
        }
        _write_outputs(found, output.images[0], settings, json_file=json_file, plot=plot, image=image)
        _print_trace(found, scored=stability is not None)
        if stability is not None and not (check := stability.check(found.settings)).valid:
            # The image was made and is kept; what was asked for, a judgement or a correction, was not to be had.
            raise UsageError(str(check))


def _is_graph(plot: Path | None) -> None:
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UsageError(f"{plot.name}: a graph is written as .svg or .png")


def _write_outputs(
    found: Trace, picture: Any, settings: dict[str, Any], *, json_file: Path | None, plot: Path | None, image: Path | None
) -> None:
    """The trace, its graph, and the image with the evidence in it."""
    from .. import evidence

    contents: list[tuple[Path, bytes | str]] = []
    if json_file is not None:
        contents.append((json_file, _json(found.to_dict())))
    if plot is not None:
        contents.append((plot, _graph(found, plot)))
    if image is not None:
        contents.append((image, evidence.own_png(picture, found, settings)))
    _write_all(contents)


def _write_all(contents: list[tuple[Path, bytes | str]]) -> None:
    """Writes what has been made already: what cannot be made leaves nothing behind."""
    from ..files import write_whole

    for path, content in contents:
        write_whole(path, content)


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _graph(found: Trace, plot: Path) -> bytes | str:
    from ..reports import graph

    return graph.svg(found) if plot.suffix == ".svg" else _png(graph.image(found))


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _print_trace(found: Trace, *, scored: bool) -> None:
    score = "none" if found.score is None else f"{found.score:.2f}"
    trigger = "none" if found.trigger_step is None else f"step {found.trigger_step} of {found.steps}"
    print(f"verdict: {found.verdict}\nscore (S_mem): {score}\ntrigger: {trigger}\ncorrected steps: {found.mitigated.sum()}")
    if not scored:
        print("No profile was given, so the run is not scored: make one with 'memorization-guard calibrate'.")
    elif found.note:
        print(found.note)
    from ..core.trace import STATEMENT

    print(STATEMENT)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and demo.png.")] = Path("demo"),
    seed: Seed = 0,
    prompts_per_group: Annotated[int, typer.Option(min=1, max=30, help="Exact, template and ordinary prompts each.")] = 3,
) -> None:
    """Watch the bundled model reproduce training images, and steer it away from them. Needs no download and no GPU."""
    with _one_line_errors():
        output.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "demo.png"):
            _writable(output / name)
        from rich.progress import Progress

        from .. import lab
        from ..files import write_whole
        from ..pipelines import quiet_libraries
        from ..reports.html import contact_sheet, html_report

        quiet_libraries()
        pipe = lab.pipeline()
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("sampling", total=6 * prompts_per_group)
            comparisons = _compare(pipe, prompts_per_group, seed, lambda count: progress.advance(task, count))
        page = html_report(
            comparisons,
            title="Memorization Guard: the demo",
            introduction="A small Stable Diffusion was trained on many images, and on some of them hundreds of times. Each "
            "prompt below was sampled twice from the same noise: as the model does by itself, and with mitigation. Beneath "
            "each image stands how far the latent moved at every step, against the band in which ordinary prompts stay.",
            copy_threshold=lab.COPY_THRESHOLD,
        )
        sheet = _png(contact_sheet(comparisons, copy_threshold=lab.COPY_THRESHOLD))
        write_whole(output / "report.html", page)
        write_whole(output / "demo.png", sheet)
        _print_table(comparisons)
        print(
            f"\n{output / 'report.html'} shows the images and their stability graphs; {output / 'demo.png'} the same in one."
        )


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
        for mitigate in (False, True):
            with guard(pipe, profile, mitigate=mitigate) as run:
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


def _print_table(comparisons: list[Comparison]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="without mitigation → with")
    for name in ("prompt", "group", "verdict", "S_mem", "trigger", "copy score"):
        table.add_column(
            name, no_wrap=name != "prompt", justify="right" if name in ("S_mem", "trigger", "copy score") else "left"
        )
    for comparison in comparisons:
        found = comparison.plain_trace
        copies = "-"
        if comparison.plain_copy is not None and comparison.mitigated_copy is not None:
            copies = f"{comparison.plain_copy:.2f} → {comparison.mitigated_copy:.2f}"
        color = "green" if found.verdict == "stable" else "red"
        table.add_row(
            Text(comparison.prompt),
            comparison.group,
            Text(found.verdict, style=color),
            "-" if found.score is None else f"{found.score:.1f}",
            "-" if found.trigger_step is None else str(found.trigger_step),
            copies,
        )
    Console().print(table)


@app.command()
def evaluate(
    model: Model,
    memorized: Annotated[Path, typer.Option(help="Prompts known to be memorized: .txt, .jsonl, .csv or .parquet.")],
    ordinary: Annotated[Path, typer.Option(help="Ordinary prompts, 500 or so, in such a list.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="REPORT: writes REPORT.html and REPORT.json.")],
    reference: Annotated[
        Path | None, typer.Option(help="Prompts to calibrate a profile with, 50 or so, in neither of the other lists.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="In place of --reference: a profile for these settings.")] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Keep the profile of --reference here (.safetensors).")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many prompts of --memorized and --ordinary, not all.")
    ] = None,
    seeds_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    images: Annotated[
        Path | None, typer.Option(help="Folder of training images of the memorized prompts, for copy scores.")
    ] = None,
    sscd: Annotated[
        Path | None,
        typer.Option(help="SSCD as TorchScript, for copy scores. Such a file is code: give none that you do not trust."),
    ] = None,
    copy_threshold: Annotated[float, typer.Option(min=-1, max=1, help="Similarity above which an image is a copy.")] = 0.5,
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
    with _one_line_errors():
        base = output.with_suffix("") if output.suffix.lower() in (".html", ".json") else output
        page, data, state, reference_state = (
            base.with_name(base.name + end) for end in (".html", ".json", ".partial.jsonl", ".reference.partial.json")
        )
        for path in (page, data, state, reference_state, save_profile):
            _writable(path)
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

        from ..core.profile import StabilityProfile
        from ..evaluation.evaluate import CopyScorer, check_images, summarize, write_report
        from ..evaluation.evaluate import evaluate as sample_lists
        from ..prompts import enough

        known = enough(_read_prompts(reference)) if reference is not None else []
        bad, good = _read_list(memorized, images)[:limit], _read_list(ordinary)[:limit]
        check_images(bad)
        stability = StabilityProfile.load(profile) if profile is not None else None
        pipe = _load(model, config, lora, device, dtype)
        copies = CopyScorer(sscd, device=pipe.device, threshold=copy_threshold) if sscd is not None else None

        from ..adapters.diffusers import calibrate as make_profile

        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, **_size(height, width)}
        options |= {"num_inference_steps": steps, "guidance_scale": guidance}
        with _resumable(lambda: _runs_in(state, reference_state)), _sampling_errors():
            if stability is None:
                stability = make_profile(pipe, known, state=reference_state, **options)
            samples = sample_lists(
                pipe, bad, good, stability, copies=copies, seeds_per_prompt=seeds_per_prompt, state=state, **options
            )
        settings = {
            "model": model.name,
            **_described(pipe, stability),
            "steps": steps,
            "guidance_scale": guidance,
            "seeds_per_prompt": seeds_per_prompt,
            "first_seed": seed,
            "memorized_prompts": memorized.name,
            "ordinary_prompts": ordinary.name,
            "profile_from": str(profile) if reference is None else reference.name,
            "copies_by": None if sscd is None else sscd.name,
        }
        threshold = None if copies is None else copies.threshold
        result = summarize(samples, settings=settings, copy_threshold=threshold, reference=known)
        if save_profile is not None:
            stability.save(save_profile)
        write_report(result, page, data)
        state.unlink(missing_ok=True)
        if reference is not None:
            reference_state.unlink(missing_ok=True)
        _print_evaluation(result)
        print(f"\n{page} shows the curves and histograms; {data} holds every number.")


def _read_list(path: Path, images: Path | None = None) -> list[Prompt]:
    from ..evaluation.evaluate import read_list

    try:
        return read_list(path, images)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _described(pipe: Any, profile: StabilityProfile) -> dict[str, Any]:
    """What a report says of the model and the machine; a profile that fits knows most of it."""
    import diffusers
    import torch

    from .. import __version__

    known = profile.settings.to_dict()
    names = ("model_hash", "prediction_type", "sampler", "scheduler", "latent_shape")
    return {name: known[name] for name in names} | {
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "reference_runs": profile.count,
        "versions": f"memorization-guard {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}",
    }


def _print_evaluation(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    for warning in result["warnings"]:
        print(f"memorization-guard: {warning}", file=sys.stderr)
    table = Table(title=f"against {result['ordinary']['images']} ordinary images; in brackets 95 % intervals")
    for name in ("group", "signal", "AUC", "TPR at 1 % FPR"):
        table.add_column(name, justify="left" if name in ("group", "signal") else "right")
    for group in result["groups"]:
        for name, signal in group["signals"].items():
            auc, tpr = (
                f"{signal[key]:{form}} ({low:{form}}-{high:{form}})"
                for key, form in (("auc", ".4f"), ("tpr_at_1_fpr", ".3f"))
                for low, high in [signal[f"{key}_95"]]
            )
            table.add_row(Text(group["name"]), name, auc, tpr)
    Console().print(table)
    for group in (*result["groups"], result["ordinary"]):
        copies = group["copies"]
        share = f", {copies['rate']['mean']:.1%} of {copies['images']} compared are copies" if copies else ""
        print(f"{group['name']}: {group['triggered']['mean']:.1%} of {group['images']} images triggered{share}")


@app.command()
def audit(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="Prompts to audit with: .txt, .jsonl, .csv or .parquet; any number.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; a new one, or that of this audit.")],
    profile: Annotated[Path | None, typer.Option(help="Stability profile; without one, one is made first.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="In place of --profile: prompts to make one with; our own 64 if not given.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Key or column of the prompts, if it is not caption, prompt or text.")
    ] = None,
    seeds_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    images: Annotated[Images, typer.Option(help="Which images to keep; flagged are those that triggered.")] = Images.flagged,
    mitigate: Annotated[bool, typer.Option("--mitigate", help="Steer away from what triggers.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End a batch as soon as all of its images have triggered; saves steps.")
    ] = False,
    false_alarms: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Share of ordinary images that may trigger; each is a false alarm.")
    ] = 0.001,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster: its address, auto, or local to start one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: number of workers; one a GPU, or without GPUs one a node.")
    ] = None,
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
    """Find out which prompts of a list a model answers with a training image.

    Kill it whenever you like and call it again: it goes on where it stopped.
    A finished audit does nothing when called again. Several calls in one
    folder at once, on one machine, share the work.

    Writes a row an image as Parquet to OUTPUT/results, and OUTPUT/report.html.
    """
    with _one_line_errors(), _audit_packages():
        if profile is not None and reference is not None:
            raise UsageError("give either --profile or --reference, prompts to make a profile with")
        if workers is not None and ray is None:
            raise UsageError("--workers is for --ray; on one machine call the same command once a GPU")
        from ..audit.plan import Plan
        from ..audit.run import Local
        from ..audit.run import audit as run_audit
        from ..audit.worker import Recipe
        from ..core.detection import Thresholds
        from ..pipelines import Lora
        from ..prompts import enough, reference_prompts

        recipe = Recipe(
            # Workers on a cluster stand in another folder.
            model=str(model.absolute() if model.exists() else model),
            config=None if config is None else str(config.absolute()),
            loras=tuple(Lora.parse(text) for text in lora or ()),
            device=device,
            dtype=dtype,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            thresholds=Thresholds(false_alarms=false_alarms),
            mitigate=mitigate,
            stop=stop,
            keep=images.value,
        )
        known = [] if profile is not None else reference_prompts() if reference is None else _read_prompts(reference)
        plan = Plan.of(prompts, column=column, seeds_per_prompt=seeds_per_prompt, seed=seed)

        def hands() -> Any:
            if ray is None:
                return Local(recipe)
            from ..audit.cluster import Cluster

            return Cluster(recipe, address=ray, workers=workers)

        with _resumable(lambda: _images_in(output)), _disk_errors(output), _sampling_errors():
            worked = run_audit(
                recipe,
                plan,
                output,
                hands,
                profile=profile,
                reference=enough(known) if known else (),
                reference_from="ours" if reference is None else reference.name,
                batch_size=batch_size,
            )
        if not worked:
            print(f"{output} is finished: nothing was left to do")
        from ..audit.report import summarize

        _print_audit(output, summarize(output))


@contextmanager
def _audit_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        extra = {"pyarrow": "audit", "filelock": "audit", "ray": "cluster"}.get(str(error.name).split(".")[0])
        if extra is None:
            raise
        raise UsageError(f'{error.name} is missing: pip install "memorization-guard[{extra}]"') from None


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, and what else goes wrong with files, in one line as well."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename or folder}: {error.strerror or error}") from error


def _images_in(folder: Path) -> str:
    from ..audit.dataset import MANIFEST

    return f"; what was made is kept in {folder}: call again to go on" if (folder / MANIFEST).exists() else ""


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of an audit, finished or not.")]) -> None:
    """Make the report of an audit anew, from its results."""
    with _one_line_errors(), _audit_packages():
        from ..audit.report import write_report

        _print_audit(folder, write_report(folder))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="Folder of an audit: the base model, or without mitigation.")],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="Folder of another: the fine-tune, or with mitigation.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the comparison here: .html, .json, .csv or .parquet.")
    ] = None,
) -> None:
    """Find out which prompts became memorized from one audit to another."""
    with _one_line_errors(), _audit_packages():
        _writable(output)
        if output is not None and output.suffix not in (".html", ".json", ".csv", ".parquet"):
            raise UsageError(f"{output.name}: a comparison is written as .html, .json, .csv or .parquet")
        from ..audit.compare import compare as compare_audits
        from ..audit.compare import write_comparison

        result = compare_audits(a, b)
        if output is not None:
            write_comparison(result, output)
        _print_comparison(result)


def _print_comparison(result: dict[str, Any]) -> None:
    from rich.table import Table

    for warning in result["warnings"]:
        print(f"memorization-guard: {warning}", file=sys.stderr)
    pairs = result["pairs"]
    table = Table(title=f"{pairs['images']:,} images of {pairs['prompts']:,} prompts that are in both")
    for name in ("", "became memorized", "no longer", "stays", "never", "difference"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("images", "prompts"):
        found = result[name]
        change = "-"
        if found["difference"]["rate"] is not None:
            change = "{:+.2%} ({:+.2%} to {:+.2%})".format(found["difference"]["rate"], *found["difference"]["interval"])
        table.add_row(name, *(f"{found[sort]:,}" for sort in ("became", "no_longer", "stays", "never")), change)
    Console().print(table)
    for title, rows in (("became memorized", result["became"]), ("no longer", result["no_longer"])):
        for row in rows[:LISTED]:
            print(f"{title}: {_printable(row['prompt'])}")
        if len(rows) > LISTED:
            print(f"{title}: {len(rows) - LISTED:,} more; --output names them")
    for note in result["notes"]:
        print(note)


def _print_audit(folder: Path, summary: dict[str, Any]) -> None:
    from rich.table import Table

    from ..audit.dataset import REPORT, RESULTS

    for warning in summary["warnings"]:
        print(f"memorization-guard: {warning}", file=sys.stderr)
    table = Table(title="triggered; in brackets 95 % intervals")
    for name in ("", "of", "triggered", "rate", "by chance alone"):
        table.add_column(name, justify="left" if not name else "right")
    rates = [("images", summary["triggered"]), ("prompts", summary["prompts_triggered"])]
    rates += [(f"images, {kind['kind'] or 'no kind'}", kind["triggered"]) for kind in summary["kinds"][:8]]
    for name, rate in rates:
        interval = "-" if rate["interval"] is None else " ({:.2%}-{:.2%})".format(*rate["interval"])
        share = "-" if rate["rate"] is None else f"{rate['rate']:.2%}{interval}"
        chance = "-" if rate["chance"] is None else f"{rate['chance']:.1f}"
        table.add_row(name, f"{rate['of']:,}", f"{rate['count']:,}", share, chance)
    Console().print(table)
    print(f"{folder / REPORT} shows the worst prompts; {folder / RESULTS} holds a row an image.")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An image with a trace in it, or with its .stability.json beside it.")],
    plot: Annotated[
        Path | None, typer.Option(help="Write the stability graph here, .svg or .png: of several runs the worst.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the traces here, as a list.")] = None,
) -> None:
    """Check whether the trace that comes with an image belongs to it, and show it.

    Exit code 0: it belongs. 1: it does not, as the pixels, the settings or the
    trace itself have been changed. 3: nothing is known to have changed, but the
    pixels could not be compared, as of a JPEG. 2: no such image or trace.
    """
    with _one_line_errors():
        for path in (json_file, plot):
            _writable(path)
        _is_graph(plot)
        from .. import evidence
        from ..core.trace import STATEMENT, worst
        from ..reports.html import summary

        try:
            found = evidence.verify(file)
        except ValueError as error:
            raise UsageError(_printable(str(error))[:300]) from None
        contents: list[tuple[Path, bytes | str]] = []
        if json_file is not None:
            contents.append((json_file, _json([trace.to_dict() for trace in found.traces])))
        if plot is not None:
            contents.append((plot, _graph(worst(found.traces), plot)))
        _write_all(contents)
        _print_verification(file, found)
        for trace, run, image in zip(found.traces, found.runs, found.images, strict=True):
            title = "Every image" if image is None and found.batch != 1 else f"Image {(image or 0) + 1}"
            print(_printable(summary(trace, f"{title}, {run}" if run else title)))
        print(f"{STATEMENT}\n{evidence.NO_SIGNATURE}")
        if found.belongs != "match":
            raise typer.Exit(1 if found.belongs == "differ" else 3)


def _print_verification(file: Path, found: Verification) -> None:
    answer = {
        "match": "the trace belongs to this image",
        "differ": "the trace does NOT belong to this image as it is now",
        "unknown": "whether the trace belongs to this image cannot be told",
    }
    pixels = {
        "match": "as recorded",
        "differ": "not those that the trace was recorded for",
        "unknown": "none were recorded" if found.batch is None else "this format may have changed them: not compared",
    }
    settings = {
        "match": "as recorded",
        "differ": "not those that the trace was recorded for",
        "unknown": "none were recorded, or the file holds none",
    }
    beside = "" if found.found_in == file else f", in {found.found_in.name}"
    print(_printable(f"{file.name}: {answer[found.belongs]}"))
    print(f"pixels: {pixels[found.pixels]}\nsettings: {settings[found.settings]}")
    print(_printable(f"trace: {'unaltered' if found.unaltered else 'altered since it was recorded'}{beside}"))
    if found.image is not None and found.batch != 1:
        print(f"image {found.image + 1} of a batch of {found.batch}")


def _printable(text: str) -> str:
    """``text`` from a file, without what a terminal would obey."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def main() -> None:
    """Entry point of the console command."""
    app(prog_name="memorization-guard")


if __name__ == "__main__":
    main()
