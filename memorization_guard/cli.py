"""The console command: ``memorization-guard demo | calibrate | trace``.

What a user can get wrong ends in one line on standard error and exit code 2. diffusers is imported when a command runs, so
that ``--help`` need not wait for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit('memorization-guard: the command line needs more packages: pip install "memorization-guard[diffusers]"')

if TYPE_CHECKING:
    from .report import Comparison
    from .trace import Trace

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])


class UsageError(Exception):
    """Something the user can put right; the message says what and how."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from .calibration import CalibrationError
    from .profile import ProfileError

    try:
        yield
    except (UsageError, CalibrationError, ProfileError, FileNotFoundError) as error:
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
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.absolute().parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"{path.absolute().parent} cannot be written to")


def _load_pipeline(model: Path, device: str, dtype: str) -> Any:
    """A pipeline from a diffusers folder or a ``.safetensors`` checkpoint; nothing is fetched and nothing is unpickled."""
    if not model.exists():
        raise UsageError(f"there is no model at {model}: give a diffusers folder or a .safetensors checkpoint")
    if model.is_file() and model.suffix != ".safetensors":
        raise UsageError(f"{model.name} is no .safetensors file: other checkpoints can run code when opened, convert it first")
    if model.is_dir() and not (model / "model_index.json").is_file():
        raise UsageError(f"{model} holds no model_index.json: it is not a diffusers pipeline folder")
    import torch

    _quiet_libraries()
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    try:
        options = {"torch_dtype": getattr(torch, dtype), "local_files_only": True}
        if model.is_dir():
            pipe: Any = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **options)
        else:
            pipe = StableDiffusionPipeline.from_single_file(str(model), **options)
        pipe = pipe.to(device)
    except Exception as error:
        raise UsageError(f"{model} cannot be loaded as a pipeline: {type(error).__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _quiet_libraries() -> None:
    """Loading bars and advice of diffusers and transformers are for notebooks; errors still come through."""
    try:
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging
    except ImportError:
        raise UsageError('diffusers is missing: pip install "memorization-guard[diffusers]"') from None
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _size(height: int | None, width: int | None) -> dict[str, Any]:
    return {name: value for name, value in (("height", height), ("width", width)) if value is not None}


Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto.")]
Model = Annotated[Path, typer.Argument(help="A diffusers folder or a .safetensors checkpoint on this machine.")]
Side = Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own size if not given.")]


@app.command()
def calibrate(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="Reference prompts that are not memorized: .txt or .jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write (.safetensors).")],
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts sampled at once.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.")] = 0,
    height: Side = None,
    width: Side = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make a stability profile of a model. Interrupt it and call it again: it goes on where it stopped."""
    with _one_line_errors():
        _writable(output)
        texts = _read_prompts(prompts)
        pipe = _load_pipeline(model, device, dtype)
        from .diffusers import calibrate as make_profile

        state = output.with_name(output.name + ".partial.json")
        size = _size(height, width)
        try:
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
        except KeyboardInterrupt:
            print(f"memorization-guard: interrupted; the runs so far are in {state}", file=sys.stderr)
            raise typer.Exit(130) from None
        profile.save(output)
        left_out = "".join(f", {count} left out ({reason})" for reason, count in profile.left_out.items())
        print(f"{output}: {profile.steps} steps from {profile.count} reference runs{left_out}")


def _read_prompts(path: Path) -> list[str]:
    from .prompts import read_prompts

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
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    height: Side = None,
    width: Side = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Paint one image and judge it."""
    with _one_line_errors():
        for path in (json_file, plot, image):
            _writable(path)
        if plot is not None and plot.suffix not in (".svg", ".png"):
            raise UsageError(f"{plot.name}: a graph is written as .svg or .png")
        from .profile import StabilityProfile

        stability = StabilityProfile.load(profile) if profile is not None else None
        pipe = _load_pipeline(model, device, dtype)
        import torch

        from .diffusers import guard

        with guard(pipe, stability, mitigate=mitigate) as run:
            output = pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                **_size(height, width),
            )
        if not run.traces:
            raise UsageError("the run could not be watched; the log says why")
        _write_trace(run.traces[0], json_file, plot)
        if image is not None:
            _write_image(output.images[0], image)
        _print_trace(run.traces[0], scored=stability is not None)


def _write_trace(found: Trace, json_file: Path | None, plot: Path | None) -> None:
    from . import graph
    from .files import write_whole

    if json_file is not None:
        write_whole(json_file, json.dumps(found.to_dict(), indent=1) + "\n")
    if plot is not None and plot.suffix == ".svg":
        write_whole(plot, graph.svg(found))
    elif plot is not None:
        _write_image(graph.image(found), plot)


def _write_image(picture: Any, path: Path) -> None:
    import io

    from .files import write_whole

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def _print_trace(found: Trace, *, scored: bool) -> None:
    score = "none" if found.score is None else f"{found.score:.2f}"
    trigger = "none" if found.trigger_step is None else f"step {found.trigger_step} of {found.steps}"
    print(f"verdict: {found.verdict}\nscore (S_mem): {score}\ntrigger: {trigger}\ncorrected steps: {found.mitigated.sum()}")
    if not scored:
        print("No profile was given, so the run is not scored: make one with 'memorization-guard calibrate'.")
    elif found.note:
        print(found.note)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and demo.png.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    prompts_per_group: Annotated[int, typer.Option(min=1, max=30, help="Exact, template and ordinary prompts each.")] = 3,
) -> None:
    """Watch the bundled model reproduce training images, and steer it away from them. Needs no download and no GPU."""
    with _one_line_errors():
        output.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "demo.png"):
            _writable(output / name)
        from rich.progress import Progress

        from . import lab
        from .files import write_whole
        from .report import contact_sheet, html_report

        _quiet_libraries()
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
        write_whole(output / "report.html", page)
        _write_image(contact_sheet(comparisons, copy_threshold=lab.COPY_THRESHOLD), output / "demo.png")
        _print_table(comparisons)
        print(
            f"\n{output / 'report.html'} shows the images and their stability graphs; {output / 'demo.png'} the same in one."
        )


def _compare(pipe: Any, count: int, seed: int, advance: Callable[[int], object]) -> list[Comparison]:
    """Samples ``count`` prompts of each group, without and with mitigation, from the same seeds."""
    import torch

    from . import lab
    from .diffusers import guard
    from .report import Comparison

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


def main() -> None:
    """Entry point of the console command."""
    app(prog_name="memorization-guard")


if __name__ == "__main__":
    main()
