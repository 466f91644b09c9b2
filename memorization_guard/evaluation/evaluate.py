"""The literature's table for any model: how well each signal tells memorized prompts from ordinary ones.

Both lists are sampled once, unmitigated and watched. What is kept of an image is a handful of numbers, written to a file
after every batch, so that an interrupted evaluation goes on from there. ``evaluation_report`` draws the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from ..adapters.diffusers import guard
from ..core.profile import StabilityProfile
from ..core.trace import STATEMENT, Trace, numbers
from ..files import write_whole
from ..fingerprint import component_fingerprints, content_hash, file_hash
from ..prompts import stream_prompts
from .statistics import detection_with_intervals, rate_with_interval, roc_points

FORMAT = "memorization-guard.evaluation"
FORMAT_VERSION = 1

STATE_FORMAT = "memorization-guard.evaluation-state"

#: Seeds of the memorized and of the ordinary list lie this far above those of the reference prompts and of each other, so
#: that no noise is used twice and ``limit`` moves no seed.
SEED_STRIDE = 1_000_000

#: Fewer negatives than this, and 1 % FPR is not even one of them.
MIN_NEGATIVES = 100

#: The signals by which the least typical prompts are chosen, the first that there is: what the verdict goes by.
RANKING = ("tail probability, -log10", "joint score")


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _evidence(probability: float | None) -> float | None:
    return None if probability is None else -math.log10(max(probability, 1e-300))


#: What is read off a trace, by name; higher is to mean memorized. ``None`` or NaN where a run has no such value (there is no
#: guidance at scale 1); a signal that no image of a group has is left out of the table, and a warning says so.
SIGNALS: dict[str, Callable[[Trace], float | None]] = {
    "S_mem": lambda trace: trace.score,
    "joint score": lambda trace: trace.joint_score,
    "tail probability, -log10": lambda trace: _evidence(trace.tail_probability),
    "local score": lambda trace: trace.local_score,
    "uncalibrated score": lambda trace: trace.uncalibrated_score,
    "guidance norm, mean": lambda trace: _mean(trace.guidance_norm),
    "guidance norm, first step": lambda trace: _last(trace.guidance_norm[:1]),
    "alignment": lambda trace: _last(trace.alignment),
}


class EvaluationError(Exception):
    """An evaluation that cannot begin or go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A line of a prompt list.

    Attributes:
        text: the prompt.
        kind: what the line's key ``kind`` or ``group`` says (``"verbatim"``, ``"template"``), if it says anything.
        images: the training images that the prompt may reproduce.
    """

    text: str
    kind: str | None = None
    images: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is kept of one image.

    Attributes:
        memorized: which list its prompt is from. prompt, kind, seed: what it was made of.
        verdict, trigger_step, note: of its trace.
        signals: one number a name of :data:`SIGNALS`, ``None`` where there is none.
        copy_score: highest similarity with a training image of the prompt, or ``None`` where none was given.
    """

    memorized: bool
    prompt: str
    kind: str | None
    seed: int
    verdict: str
    trigger_step: int | None
    note: str | None
    signals: Mapping[str, float | None]
    copy_score: float | None = None


def read_list(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Reads a prompt list with what its lines say besides the prompt.

    Args:
        path: as for :func:`memorization_guard.prompts.stream_prompts`.
        images: folder of training images. Those of a prompt are the files that its line's ``image`` names (one, or a list
            of them), or else every file whose name is the number of its line, from 1 (``17.png``, ``0017.jpg``).

    Raises:
        FileNotFoundError: if the list or a named image is missing.
        ValueError: if the list cannot be read, or the folder holds no image for any of its prompts.
    """
    path = Path(path)
    by_number: dict[int, list[Path]] = {}
    if images is not None:
        for file in sorted(Path(images).iterdir()):
            if file.is_file() and file.stem.isdecimal():
                by_number.setdefault(int(file.stem), []).append(file)
    prompts = []
    for listed in stream_prompts(path):
        files = by_number.get(listed.line, [])
        if images is not None and listed.images:
            files = [Path(images) / name for name in listed.images]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{path}, line {listed.line}: there is no image at {file}")
        prompts.append(Prompt(text=listed.text, kind=listed.kind, images=tuple(files)))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    if images is not None and not any(prompt.images for prompt in prompts):
        raise ValueError(
            f"{images} holds no training image for {path}: name each after the number of its prompt's line (1.png), or name "
            "it under the key 'image' of the .jsonl"
        )
    return prompts


class CopyScorer:
    """How near an image comes to training images: cosine similarity of SSCD descriptors (Pizzi et al., CVPR 2022).

    Args:
        file: SSCD as TorchScript (``sscd_disc_mixup.torchscript.pt`` and the like), or any other that makes descriptors
            ``[1, D]`` of ImageNet-normalised images ``[1, 3, H, W]``. **TorchScript is code**: open only what you trust.
        device: where to compute.
        threshold: similarity above which an image counts as a copy.

    Raises:
        EvaluationError: if the file cannot be opened, or makes no descriptors.
    """

    #: Length of the small edge that images are resized to, and ImageNet's mean and standard deviation, as SSCD's README says.
    SIDE = 288
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, file: str | os.PathLike[str], *, device: str | torch.device = "cpu", threshold: float = 0.5) -> None:
        from PIL import Image

        self.file, self.threshold, self._device = Path(file), threshold, device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which is what SSCD comes as
                self._model = torch.jit.load(str(file), map_location=device).eval()
            descriptor = self.descriptor(Image.new("RGB", (32, 32), "gray"))
        except Exception as error:
            # Whatever it is, it comes from a file that is not ours.
            raise EvaluationError(f"{file} cannot be used as SSCD in TorchScript: {type(error).__name__}: {error}") from error
        if descriptor.ndim != 1 or not descriptor.is_floating_point():
            raise EvaluationError(f"{file} makes {tuple(descriptor.shape)} of an image; SSCD makes a descriptor of numbers")
        self._of_file = lru_cache(maxsize=256)(self._read)

    @torch.no_grad()
    def descriptor(self, image: Any) -> Tensor:
        """The descriptor ``[D]`` of a PIL image, float32 on the CPU."""
        from PIL import Image

        image = image.convert("RGB")
        scale = self.SIDE / min(image.size)
        size = tuple(max(self.SIDE, int(edge * scale)) for edge in image.size)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        normalised = (pixels - np.array(self.MEAN, dtype=np.float32)) / np.array(self.STD, dtype=np.float32)
        batch = torch.from_numpy(normalised).permute(2, 0, 1)[None].to(self._device)
        return self._model(batch)[0].float().cpu()

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return self.descriptor(image)
        except OSError as error:
            raise EvaluationError(f"{file} cannot be read as an image: {error}") from None

    def __call__(self, image: Any, training_images: Sequence[Path]) -> float:
        """The highest similarity of a PIL image with any of ``training_images``, from -1 to 1."""
        descriptor = self.descriptor(image)
        return max(float(cosine_similarity(descriptor, self._of_file(file), dim=0)) for file in training_images)


def check_images(prompts: Sequence[Prompt]) -> None:
    """Looks whether every training image can be opened, before minutes of sampling and not after.

    Raises:
        EvaluationError: if one cannot be.
    """
    from PIL import Image

    for file in {file for prompt in prompts for file in prompt.images}:
        try:
            with Image.open(file) as image:
                image.verify()
        except (OSError, SyntaxError) as error:
            raise EvaluationError(f"{file} cannot be read as an image: {error}") from None


class _State:
    """The samples so far, in a file of JSON lines that grows batch by batch: a header, then one a sample.

    A last line that was cut off is forgotten, with what it held; anything else amiss is an :class:`EvaluationError`. The
    profile stands in the header as numbers, since one that is made again from a calibration's state differs by rounding.
    """

    def __init__(self, path: Path | None, identity: Any, profile: StabilityProfile) -> None:
        self._path = path
        self.samples: list[Sample] = []
        if path is None:
            return
        statistics = [profile.mean.tolist(), profile.std.tolist()]
        header = {"format": STATE_FORMAT, "key": content_hash(identity), "profile": statistics}
        if not path.exists():
            write_whole(path, json.dumps(header).encode() + b"\n")
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.split(b"\n")[:-1] or [b""]
        try:
            found = json.loads(first)
            if found["format"] != STATE_FORMAT:
                raise ValueError(found["format"])
            same = found["key"] == header["key"] and np.shape(found["profile"]) == np.shape(statistics)
            same = same and np.allclose(found["profile"], statistics, rtol=1e-4, atol=1e-6)
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(f"{path} is no state of an evaluation: delete it to begin anew") from None
        if not same:
            raise EvaluationError(
                f"{path} belongs to an evaluation with other prompts, settings, model or profile: delete it to begin anew"
            )
        for number, line in enumerate(lines, start=2):
            try:
                self.samples.append(Sample(**json.loads(line)))
            except (ValueError, TypeError) as error:
                if number < len(lines) + 1:
                    raise EvaluationError(f"{path}, line {number}, is damaged ({error}): delete it to begin anew") from None
                whole = whole[: -len(line) - 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def add(self, samples: Sequence[Sample]) -> None:
        self.samples += samples
        if self._path is not None:
            with open(self._path, "ab") as stream:
                for sample in samples:
                    stream.write(json.dumps(dataclasses.asdict(sample), allow_nan=False).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())


def evaluate(
    pipe: Any,
    memorized: Sequence[Prompt],
    ordinary: Sequence[Prompt],
    profile: StabilityProfile,
    *,
    copies: CopyScorer | None = None,
    seeds_per_prompt: int = 1,
    batch_size: int = 4,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> list[Sample]:
    """Samples every prompt of both lists, unmitigated, and keeps what :class:`Sample` holds of each image.

    Args:
        pipe: as for :func:`memorization_guard.diffusers.guard`.
        memorized, ordinary: the lists.
        profile: stability profile for these settings.
        copies: takes copy scores of prompts with training images. The images are decoded for it, without the pipeline's
            safety checker, which would hand out black ones.
        seeds_per_prompt: images a prompt.
        batch_size: images sampled at once; may differ when an evaluation goes on.
        seed: what the seeds of the noise count up from; it is drawn on the CPU, so that devices agree.
        state: file that keeps the samples so far after every batch; delete it once the report is written.
        progress: whether to show a progress bar.
        pipe_kwargs: ``num_inference_steps``, ``guidance_scale``, ``height``, ...

    Raises:
        EvaluationError: if the profile does not fit, ``state`` belongs to another evaluation, or a run was not watched.
    """
    jobs = [
        (prompt, is_memorized, seed + stride * SEED_STRIDE + index * seeds_per_prompt + repetition)
        for stride, is_memorized, prompts in ((1, True, memorized), (2, False, ordinary))
        for index, prompt in enumerate(prompts)
        for repetition in range(seeds_per_prompt)
    ]
    kept = _State(None if state is None else Path(state), _identity(pipe, jobs, copies, pipe_kwargs), profile)
    made = [(sample.prompt, sample.memorized, sample.seed) for sample in kept.samples]
    if made != [(prompt.text, *rest) for prompt, *rest in jobs[: len(made)]]:
        raise EvaluationError(f"{state} holds other images than this evaluation makes: delete it to begin anew")
    with (
        _without_safety_checker(pipe),
        tqdm(total=len(jobs), initial=len(made), desc="evaluating", unit="image", disable=not progress) as bar,
    ):
        for start in range(len(made), len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            decode = copies is not None and any(prompt.images for prompt, *_ in part)
            with guard(pipe, profile) as run:
                output = pipe(
                    [prompt.text for prompt, *_ in part],
                    generator=[torch.Generator().manual_seed(its_seed) for *_, its_seed in part],
                    output_type="pil" if decode else "latent",
                    **pipe_kwargs,
                )
            if len(run.traces) != len(part):
                raise EvaluationError(f"{len(part)} prompts gave {len(run.traces)} traces: see the log for what went wrong")
            # The first batch tells: no hours of runs that cannot be scored.
            if not (check := profile.check(run.traces[0].settings)).valid:
                raise EvaluationError(str(check))
            samples = []
            for number, ((prompt, is_memorized, its_seed), trace) in enumerate(zip(part, run.traces, strict=True)):
                similarity = None
                if copies is not None and prompt.images:
                    similarity = copies(output.images[number], prompt.images)
                samples.append(_sample(prompt, is_memorized, its_seed, trace, similarity))
            kept.add(samples)
            bar.update(len(part))
    return kept.samples


def _sample(prompt: Prompt, memorized: bool, seed: int, trace: Trace, similarity: float | None) -> Sample:
    return Sample(
        memorized=memorized,
        prompt=prompt.text,
        kind=prompt.kind,
        seed=seed,
        verdict=trace.verdict,
        trigger_step=trace.trigger_step,
        note=trace.note,
        signals=dict(zip(SIGNALS, numbers([signal(trace) for signal in SIGNALS.values()]), strict=True)),
        copy_score=numbers([similarity])[0],
    )


def _identity(
    pipe: Any,
    jobs: Sequence[tuple[Prompt, bool, int]],
    copies: CopyScorer | None,
    pipe_kwargs: Mapping[str, Any],
) -> list[Any]:
    """All that the samples depend on, besides the profile."""
    files = {file for prompt, *_ in jobs for file in prompt.images} if copies is not None else set()
    return [
        [
            (prompt.text, prompt.kind, memorized, seed, [file.name for file in prompt.images])
            for prompt, memorized, seed in jobs
        ],
        {key: repr(value) for key, value in pipe_kwargs.items()},
        component_fingerprints(pipe),
        str(pipe.dtype),
        [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)],
        list(SIGNALS),
        [] if copies is None else [file_hash(file) for file in [copies.file, *sorted(files)]],
    ]


@contextmanager
def _without_safety_checker(pipe: Any) -> Iterator[None]:
    checker = getattr(pipe, "safety_checker", None)
    if checker is None:
        yield
        return
    pipe.safety_checker = None
    try:
        yield
    finally:
        pipe.safety_checker = checker


def summarize(
    samples: Sequence[Sample],
    *,
    settings: Mapping[str, Any],
    copy_threshold: float | None = None,
    reference: Sequence[str] = (),
    draws: int = 400,
) -> dict[str, Any]:
    """The result of an evaluation, JSON-ready: what the report shows, and every number behind it.

    Args:
        samples: of both lists.
        settings: what to write into the report about how they were made.
        copy_threshold: similarity above which an image counts as a copy, where copy scores were taken.
        reference: prompts that the profile is of, to warn of those that are evaluated too.
        draws: of the bootstrap over prompts from which the 95 % intervals come.

    Returns:
        ``"settings"``, ``"warnings"``, ``"ordinary"`` and ``"groups"`` (all memorized prompts first, then each kind) with
        counts, rates and, by signal, AUC, TPR at 1 % FPR and ROC curve against the ordinary images; and ``"samples"``, of
        which a group's ``"samples"`` are the numbers.

    Raises:
        EvaluationError: if one of the lists gave no image.
    """
    ordinary = [sample for sample in samples if not sample.memorized]
    memorized = [sample for sample in samples if sample.memorized]
    if not ordinary or not memorized:
        raise EvaluationError("an evaluation needs images of memorized and of ordinary prompts")
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "statement": STATEMENT,
        "settings": dict(settings) | {"copy_threshold": copy_threshold},
        "warnings": _warnings(memorized, ordinary, reference),
        "ordinary": {"name": "ordinary"} | _counts(ordinary, copy_threshold, draws) | {"signals": {}},
        "groups": [],
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }
    for name in ordinary[0].signals:
        if values := _values(ordinary, name)[0].tolist():
            result["ordinary"]["signals"][name] = _spread(values)
    for group, rows in _groups(samples, copy_threshold):
        members = [samples[row] for row in rows]
        signals: dict[str, Any] = {}
        for name in result["ordinary"]["signals"]:
            positive, positive_prompts = _values(members, name)
            negative, negative_prompts = _values(ordinary, name)
            if len(positive):
                signals[name] = (
                    _spread(positive.tolist())
                    | detection_with_intervals(positive, negative, positive_prompts, negative_prompts, draws=draws)
                    | {"roc": {axis: numbers(points) for axis, points in roc_points(positive, negative).items()}}
                )
        result["groups"].append(group | _counts(members, copy_threshold, draws) | {"signals": signals, "samples": rows})
    return result


def _groups(samples: Sequence[Sample], copy_threshold: float | None) -> list[tuple[dict[str, str], list[int]]]:
    """All memorized samples; each kind where there are several; those that are copies, where only some are.

    Each with its name and what makes it one (``"of"``), and its numbers in ``samples``.
    """
    memorized = [row for row, sample in enumerate(samples) if sample.memorized]
    groups = [({"name": "memorized", "of": "all"}, memorized)]
    kinds = list(dict.fromkeys(samples[row].kind for row in memorized))
    if len(kinds) > 1:
        for kind in kinds:
            rows = [row for row in memorized if samples[row].kind == kind]
            groups.append(({"name": kind or "no kind", "of": "kind"}, rows))
    if copy_threshold is not None:
        copied = [row for row in memorized if (samples[row].copy_score or -1.0) > copy_threshold]
        if 0 < len(copied) < len(memorized):
            groups.append(({"name": f"copies (similarity over {copy_threshold:g})", "of": "copies"}, copied))
    return groups


def _counts(samples: Sequence[Sample], copy_threshold: float | None, draws: int) -> dict[str, Any]:
    prompts = [sample.prompt for sample in samples]
    triggered = np.array([sample.trigger_step is not None for sample in samples], dtype=float)
    counts: dict[str, Any] = {
        "images": len(samples),
        "prompts": len(set(prompts)),
        "triggered": rate_with_interval(triggered, prompts, draws=draws),
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "copies": None,
    }
    compared = [sample for sample in samples if sample.copy_score is not None]
    if compared and copy_threshold is not None:
        similarity = np.array([sample.copy_score for sample in compared])
        rate = rate_with_interval((similarity > copy_threshold).astype(float), [s.prompt for s in compared], draws=draws)
        counts["copies"] = {"images": len(compared), "rate": rate, "median": float(np.median(similarity))}
    return counts


def _values(samples: Sequence[Sample], name: str) -> tuple[np.ndarray, list[str]]:
    """The values of a signal, where there are any, and the prompt of each."""
    found = [(value, sample.prompt) for sample in samples if (value := sample.signals[name]) is not None]
    return np.array([value for value, _ in found], dtype=np.float64), [prompt for _, prompt in found]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"images": len(values), "median": median, "quartiles": [low, high]}


def _warnings(memorized: Sequence[Sample], ordinary: Sequence[Sample], reference: Sequence[str]) -> list[str]:
    """What a reader of the figures should know before them."""
    said = []
    prompts = {sample.prompt for sample in ordinary}
    if len(prompts) < MIN_NEGATIVES:
        said.append(
            f"1 % FPR rests on {len(prompts)} ordinary prompts ({len(ordinary)} images): with fewer than {MIN_NEGATIVES} it "
            "means hardly any false alarm at all. Give more ordinary prompts."
        )
    if shared := len(prompts & {sample.prompt for sample in memorized}):
        said.append(f"Prompts that stand in the memorized and in the ordinary list: {shared}.")
    if known := len(prompts & set(reference)):
        said.append(f"Ordinary prompts that are reference prompts too: {known}. The profile knows them, so give others.")
    for name in ordinary[0].signals:
        for title, group in (("memorized", memorized), ("ordinary", ordinary)):
            missing = sum(sample.signals[name] is None for sample in group)
            if missing == len(group):
                said.append(f"{name}: no {title} image has a value, so that it is not in the table.")
            elif missing:
                said.append(f"{name}: {missing} of {len(group)} {title} images have no value and do not count.")
    notes = Counter(sample.note for sample in (*memorized, *ordinary) if sample.note)
    said += [f"{count} images: {note}" for note, count in notes.most_common(5)]
    return said


def write_report(result: Mapping[str, Any], page: Path, data: Path) -> None:
    """Writes ``result`` as HTML to ``page`` and as JSON to ``data``: both, or on an error neither.

    Raises:
        OSError: if they cannot be written.
    """
    from ..reports.evaluation import html_report

    # A lone surrogate, which a .jsonl can hold, must not cost the report.
    contents = {
        page: html_report(result).encode("utf-8", "replace"),
        data: json.dumps(result, indent=1, allow_nan=False).encode() + b"\n",
    }
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in contents}
    try:
        for path, content in contents.items():
            write_whole(staged[path], content)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def rank(result: Mapping[str, Any]) -> str | None:
    """The signal by which prompts are ranked: the first of :data:`RANKING` that there is, or else of all."""
    names = result["groups"][0]["signals"]
    return next((name for name in (*RANKING, *names) if name in names), None)
