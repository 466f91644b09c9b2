"""Samplers by name, and the prompts of a lab's groups, for the benchmarks of this folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from memorization_guard import StabilityProfile, Trace
from memorization_guard.core.settings import Serves
from memorization_guard.diffusers import guard
from memorization_guard.files import write_whole
from memorization_guard.lab import GROUPS, MODEL, Lab
from memorization_guard.lab.world import DATA, more_captions
from memorization_guard.statistics import exact_interval

#: Makes a scheduler of the configuration of a model's own.
SAMPLERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "PNDM": partial(diffusers.PNDMScheduler.from_config, skip_prk_steps=True),
    "DDIM": partial(diffusers.DDIMScheduler.from_config, clip_sample=False),
    "DDPM": partial(diffusers.DDPMScheduler.from_config, clip_sample=False),
    "Euler": diffusers.EulerDiscreteScheduler.from_config,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler.from_config,
    "Heun": diffusers.HeunDiscreteScheduler.from_config,
    "LMS": diffusers.LMSDiscreteScheduler.from_config,
    "KDPM2": diffusers.KDPM2DiscreteScheduler.from_config,
    "KDPM2 ancestral": diffusers.KDPM2AncestralDiscreteScheduler.from_config,
    "DEIS": diffusers.DEISMultistepScheduler.from_config,
    "DPM++ 2S": diffusers.DPMSolverSinglestepScheduler.from_config,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler.from_config,
    "DPM++ 2M SDE": partial(diffusers.DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++"),
    "UniPC": diffusers.UniPCMultistepScheduler.from_config,
    "SA-Solver": diffusers.SASolverScheduler.from_config,
    "LCM": diffusers.LCMScheduler.from_config,
    "TCD": diffusers.TCDScheduler.from_config,
    "FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler.from_config,  # of flow models alone
}


def lab_arguments(description: str | None, *, batch: int) -> argparse.ArgumentParser:
    """The arguments of a benchmark that samples one lab model with one sampler; :func:`sampled_lab` takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--sampler", default="Euler:30", help="NAME:STEPS")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--json", type=Path)
    return parser


def sampled_lab(arguments: argparse.Namespace) -> tuple[Lab, Any, int]:
    """The lab model that was asked for, its pipeline with the sampler, and the number of steps."""
    lab = Lab(arguments.model, arguments.world)
    pipe = lab.pipeline()
    name, _, steps = arguments.sampler.partition(":")
    if name in SAMPLERS:
        pipe.scheduler = SAMPLERS[name](pipe.scheduler.config)
    return lab, pipe, int(steps)


def write_result(result: Mapping[str, Any], path: Path | None) -> None:
    """Prints what was measured as JSON, and writes it where a path was given."""
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        write_whole(path, text + "\n")


def share(count: int, of: int) -> dict[str, Any]:
    """A count of images with its exact 95 % interval."""
    return {"count": count, "of": of, "interval": list(exact_interval(count, of))}


def texts_of(lab: Lab, group: str, split: str, count: int) -> list[str]:
    """``count`` prompts of a group. Beyond those that it has, they are new captions, or of memorized ones the same again."""
    found = lab.prompts(group, split)
    if group in ("reference", "ordinary") and count > len(found):
        found = found + [c.text for c in more_captions(count, GROUPS.index(group) + 10 * (split == "evaluation"), lab.world)]
    return [found[i % len(found)] for i in range(count)]


def reference_runs(
    pipe: Any,
    texts: Sequence[str],
    first_seed: int,
    serves: Serves,
    *,
    steps: int,
    guidance: float = 7.5,
    batch: int = 16,
    negative: Sequence[str] | None = None,
    profile: StabilityProfile | None = None,
) -> Iterator[list[Trace]]:
    """The traces of one run a text, as references are sampled, a batch at a time; seeds count up from ``first_seed``.

    Args:
        negative: a negative prompt for each text; none if left out.
        profile: judges the runs, if there is one.
    """
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        keywords: dict[str, Any] = {} if negative is None else {"negative_prompt": list(negative[start : start + batch])}
        draws = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, profile, serves=serves) as run:
            pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=draws, output_type="latent", **keywords)
        if run.error is not None:
            raise run.error
        yield run.traces
