"""Makes the images of an audit: loads a model once, samples batch after batch, and gives a row for each image."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__, evidence
from ..adapters.calibrate import calibrate
from ..adapters.diffusers import guard
from ..core.profile import StabilityProfile
from ..core.settings import Mode, Serves, Thresholds
from ..core.trace import Trace
from ..fingerprint import component_fingerprints, file_fingerprint
from ..pipelines import Lora, load_pipeline, model_path
from . import AuditError, Keep
from .plan import Job
from .store import PNG

log = logging.getLogger(__name__)

#: A screened prompt is sampled whole up to this multiple of the p-value that triggers. A p-value depends a little on what else
#: is in a batch, by rounding, and it is the whole run that decides.
NEAR = 1.25


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the images of an audit are made; every worker has a copy.

    Attributes:
        model, config, loras, device, dtype: as for :func:`memorization_guard.pipelines.load_pipeline`.
        steps, guidance: of every run. height, width: in pixels; ``None`` for the model's own size.
        mode, thresholds: as for :func:`memorization_guard.diffusers.guard`.
        keep: which images are kept.
        screen: whether only those images are sampled whose first evaluation is suspicious.

    Raises:
        AuditError: if images are to be screened by the published method, which judges whole runs.
    """

    model: str
    config: str | None = None
    loras: tuple[Lora, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    steps: int = 50
    guidance: float = 7.5
    height: int | None = None
    width: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    mode: Mode = "trace"
    keep: Keep = "flagged"
    screen: bool = False

    def __post_init__(self) -> None:
        if self.screen and self.thresholds.method == "published":
            raise AuditError("the published method judges whole runs: an audit that uses it cannot screen")

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of a pipeline call."""
        size = {name: value for name, value in (("height", self.height), ("width", self.width)) if value is not None}
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, **size}

    def files(self) -> dict[str, str]:
        """Fingerprints of the model's files, by name; empty if the model is not on this machine."""
        path = model_path(self.model)
        if path.is_file():
            return {path.name: file_fingerprint(path)}
        chosen = (file for file in sorted(path.rglob("*")) if file.suffix in (".safetensors", ".json") and file.is_file())
        return {file.relative_to(path).as_posix(): file_fingerprint(file) for file in chosen}

    def lora_files(self) -> list[dict[str, Any]]:
        """Name, weight and fingerprint of every LoRA."""
        return [
            {"file": lora.file.name, "weight": lora.weight, "fingerprint": file_fingerprint(lora.file)} for lora in self.loras
        ]


class Worker:
    """A loaded model.

    Raises:
        ModelError: if it cannot be loaded.
        AuditError: if it is to screen images, and its runs cannot be stopped.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._pipe = load_pipeline(
            recipe.model, config=recipe.config, loras=recipe.loras, device=recipe.device, dtype=recipe.dtype
        )
        if recipe.screen and not hasattr(type(self._pipe), "interrupt"):
            raise AuditError(f"runs of {type(self._pipe).__name__} cannot be stopped: audit without --screen")
        # It would replace some images by black ones.
        if getattr(self._pipe, "safety_checker", None) is not None:
            self._pipe.safety_checker = None
        self._wanted: Callable[[], list[int]] = list
        if (vae := getattr(self._pipe, "vae", None)) is not None:
            self._decode_all, vae.decode = vae.decode, self._decode

    def describe(self) -> dict[str, Any]:
        """What was loaded, and on which device; JSON-ready."""
        import diffusers

        pipe = self._pipe
        scheduler = {"class": type(pipe.scheduler).__name__, **pipe.scheduler.config}
        on_cuda = pipe.device.type == "cuda"
        return {
            "pipeline": type(pipe).__name__,
            "components": component_fingerprints(pipe),
            "files": self._recipe.files(),
            "loras": self._recipe.lora_files(),
            "scheduler": json.loads(json.dumps(scheduler, default=repr)),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(pipe.device) if on_cuda else pipe.device.type,
            "versions": {
                "memorization-guard": __version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def calibrate(
        self, prompts: Sequence[str], *, batch_size: int, seed: int, state: Path | None = None, progress: bool = False
    ) -> StabilityProfile:
        """A profile for this recipe; arguments and errors as for :func:`memorization_guard.diffusers.calibrate`."""
        return calibrate(
            self._pipe,
            list(prompts),
            batch_size=batch_size,
            seed=seed,
            state=state,
            progress=progress,
            **self._recipe.sampling(),
        )

    def sample(self, jobs: Sequence[Job], profile: StabilityProfile) -> list[dict[str, Any]]:
        """Makes a batch of images. Returns a row of ``dataset.SCHEMA`` for each, with a kept image as PNG under ``store.PNG``.

        Raises:
            AuditError: if the profile does not fit, or if a run was not traced.
        """
        traces, _, images = self._run(jobs, profile)
        rows = []
        for number, (job, trace) in enumerate(zip(jobs, traces, strict=True)):
            row = _row(job, trace, screened_out=False)
            if self._keeps(trace):
                row[PNG] = self._png(job, trace, images[number])
            rows.append(row)
        return rows

    def screen(self, jobs: Sequence[Job], profile: StabilityProfile) -> list[dict[str, Any]]:
        """Judges a batch of images by the first evaluation of each. Returns a row for each that is not suspicious; the others
        are to be sampled. Where the device has no memory for all at once, the batch is halved.

        Raises:
            AuditError: as for :meth:`sample`.
        """
        traces: list[Trace] = []
        size = len(jobs)
        while len(traces) < len(jobs):
            try:
                traces += self._first_looks(jobs[len(traces) : len(traces) + size], profile)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                log.info("The device has no memory for %d first evaluations at once: %d are made.", 2 * size, size)
        pairs = zip(jobs, traces, strict=True)
        return [_row(job, trace, screened_out=True) for job, trace in pairs if not self._suspicious(trace)]

    def _first_looks(self, jobs: Sequence[Job], profile: StabilityProfile) -> list[Trace]:
        """The traces of runs that were stopped once they were judged."""
        traces, settled, _ = self._run(jobs, profile, "glance")
        # Asking takes two more evaluations, so only those are asked about that a whole run would be asked about.
        open_ones = [number for number, known in enumerate(settled) if not known]
        if open_ones:
            asked, _, _ = self._run([jobs[number] for number in open_ones], profile, "verdict")
            for number, trace in zip(open_ones, asked, strict=True):
                traces[number] = trace
        return traces

    def _suspicious(self, trace: Trace) -> bool:
        """Whether a run is to be sampled whole: it triggers, nearly does, or could not be judged."""
        if trace.verdict != "stable" or trace.p_value is None:
            return True
        return trace.p_value <= NEAR * max(self._recipe.thresholds.false_positive_rate, trace.p_value_floor or 0.0)

    def _run(
        self, jobs: Sequence[Job], profile: StabilityProfile, serves: Serves | None = None
    ) -> tuple[list[Trace], list[bool], Any]:
        """Traces, as ``GuardedRun.settled`` what of them is settled, and images, if ``serves`` is ``None``.

        Raises:
            AuditError: if the profile does not fit, or if a run was not traced.
        """
        recipe = self._recipe
        images = serves is None and recipe.keep != "none"
        with guard(self._pipe, profile, recipe.mode, recipe.thresholds, serves=serves) as run:
            self._wanted = lambda: [n for n, trace in enumerate(run.traces) if self._keeps(trace)]
            output = self._pipe(
                [job.prompt for job in jobs],
                generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
                output_type="pil" if images else "latent",
                **recipe.sampling(),
            )
            traces = run.traces
        if len(traces) != len(jobs):
            raise AuditError(f"{len(jobs)} prompts gave {len(traces)} traces: see the log for what went wrong")
        # Known after the first batch, so that nobody waits days for runs that cannot be scored.
        if not (check := profile.check(traces[0].settings)).valid:
            raise AuditError(str(check))
        return traces, run.settled, output.images

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        """Makes one image that is not kept, to check that runs can be scored with the profile.

        Raises:
            AuditError: if they cannot; or as for :meth:`sample`.
        """
        (row,) = self.sample([job], profile)
        if row["verdict"] == "unscored":
            raise AuditError(f"images cannot be scored with this profile: {row['note'] or 'see the log for what went wrong'}")

    def _keeps(self, trace: Trace) -> bool:
        return self._recipe.keep == "all" or (self._recipe.keep == "flagged" and trace.trigger_step is not None)

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replaces the autoencoder's method: decodes the images that are kept, and gives black ones for the others."""
        wanted = self._wanted()
        if len(wanted) == len(latents) or latents.ndim != 4:
            return self._decode_all(latents, *args, **kwargs)
        pixels = latents.new_zeros(len(latents), 3, 8, 8)
        if wanted:
            kwargs.pop("generator", None)  # a list for the whole batch; decoding draws no noise
            made = self._decode_all(latents[wanted], *args, **(kwargs | {"return_dict": False}))[0]
            pixels = made.new_zeros(len(latents), *made.shape[1:])
            pixels[wanted] = made
        if kwargs.get("return_dict", True):
            from diffusers.models.autoencoders.vae import DecoderOutput

            return DecoderOutput(sample=pixels)
        return (pixels,)

    @staticmethod
    def _png(job: Job, trace: Trace, image: Any) -> bytes:
        settings = {"prompt": job.prompt, "seed": job.seed, **trace.settings.to_dict()}
        return evidence.own_png(image, trace, settings)


def _row(job: Job, trace: Trace, *, screened_out: bool) -> dict[str, Any]:
    data = trace.to_dict()
    settings = data["settings"]
    numbers = ("score", "joint_score", "p_value", "detail", "uncalibrated_score")
    return {
        "image": job.image,
        "row": job.row,
        "prompt": job.prompt,
        "kind": job.kind,
        "seed": job.seed,
        "screened_out": screened_out,
        "verdict": trace.verdict,
        **{name: data[name] for name in numbers},
        "trigger_step": trace.trigger_step,
        "nonfinite_step": trace.nonfinite_step,
        "steps": len(trace.steps),
        "corrected_steps": int(trace.mitigated.sum()),
        "note": trace.note,
        "words": None if trace.words is None else list(trace.words.words),
        "prompt_without_words": None if trace.words is None else trace.words.text,
        "settings": settings,
        "trace": json.dumps(data, separators=(",", ":"), allow_nan=False),
    }
