"""What a profile that made itself of our own prompts is worth on a lab model: its cost, what triggers, and what is left.

    python benchmarks/automatic.py --model FOLDER --world FOLDER --json FILE

The lab's prompts are captions of its own world, and ours are not, so this is the hard case. Every image is of the evaluation
split and begins from a noise of its own. Detection is that of the first evaluation; mitigated images are sampled to the end,
memorized ones beside the same without the guard.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from samplers import SAMPLERS
from verdict import Sampled, sample

from memorization_guard.automatic import PROMPTS, user_folder
from memorization_guard.core.profile import StabilityProfile
from memorization_guard.diffusers import guard
from memorization_guard.files import write_whole
from memorization_guard.lab import COPY_THRESHOLD, MODEL, Lab
from memorization_guard.lab.world import DATA
from memorization_guard.statistics import exact_interval

#: Images of each group that are judged, a number of seeds a prompt, and of how many prompts mitigated ones are sampled.
SEEDS = {"ordinary": 1, "settled": 4, "near": 4, "exact": 4, "template": 4}
MITIGATED = {"ordinary": 100, "exact": 30, "template": 24}
NOMINAL = (0.1, 0.01, 0.005, 0.001)
FIRST_SEED = 12_000_000


def profile_of(pipe: Any) -> StabilityProfile:
    """The profile that makes itself, in a folder of its own."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    with guard(pipe, "auto"):
        (file,) = user_folder().iterdir()
    return StabilityProfile.load(file)


def cost(pipe: Any, texts: list[str], turns: int = 3, **options: Any) -> dict[str, Any]:
    """Seconds that a profile and ten images of 30 and 50 steps take, the median of some turns."""
    taken: dict[str, list[float]] = {"profile": [], "30": [], "50": []}
    for _ in range(turns):
        for name, seconds in taken.items():
            started = time.perf_counter()
            if name == "profile":
                profile_of(pipe)
            else:
                pipe(texts, **(options | {"num_inference_steps": int(name)}), output_type="latent")
            seconds.append(time.perf_counter() - started)
    medians = {name: sorted(seconds)[turns // 2] for name, seconds in taken.items()}
    return {"profile": medians.pop("profile"), "ten_images_of_steps": medians}


def p_values(
    pipe: Any, profile: StabilityProfile, texts: list[str], first_seed: int, batch: int, **options: Any
) -> list[float]:
    found: list[float] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, profile, serves="first") as run:
            pipe(part, generator=generators, output_type="latent", **options)
        found += [float("nan") if trace.p_value is None else trace.p_value for trace in run.traces]
    return found


def share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "of": of, "interval": list(exact_interval(count, of))}


def copies(lab: Lab, made: Sampled) -> int:
    scores = (lab.copy_score(image, prompt) for image, prompt in zip(made.images, made.prompts, strict=True))
    return sum(score > COPY_THRESHOLD for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--sampler", default="Euler:30", help="NAME:STEPS")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    lab = Lab(arguments.model, arguments.world)
    pipe = lab.pipeline()
    name, _, steps = arguments.sampler.partition(":")
    if name in SAMPLERS:
        pipe.scheduler = SAMPLERS[name](pipe.scheduler.config)
    options = {"num_inference_steps": int(steps), "guidance_scale": arguments.guidance}
    seconds = cost(pipe, lab.prompts("reference")[:10], **options)
    profile = profile_of(pipe)
    groups: dict[str, Any] = {}
    for number, (group, seeds) in enumerate(SEEDS.items()):
        texts = [text for text in lab.prompts(group, "evaluation") for _ in range(seeds)]
        found = p_values(pipe, profile, texts, FIRST_SEED + 100_000 * number, arguments.batch, **options)
        below = {str(rate): share(sum(p <= rate for p in found), len(found)) for rate in NOMINAL}
        groups[group] = {"unscored": sum(p != p for p in found), "below": below}
        print(group, below, flush=True)
    mitigated: dict[str, Any] = {}
    for number, (group, count) in enumerate(MITIGATED.items()):
        texts, first = lab.prompts(group, "evaluation")[:count], FIRST_SEED + 1_000_000 + 100_000 * number
        made = sample(pipe, profile, texts, first, "mitigate", arguments.batch, **options)
        touched = sum(bool(trace.mitigated.any()) for trace in made.traces)
        mitigated[group] = {"touched": share(touched, len(texts))}
        if group != "ordinary":
            plain = sample(pipe, profile, texts, first, "off", arguments.batch, **options)
            mitigated[group] |= {
                "copies": share(copies(lab, plain), len(texts)),
                "left": share(copies(lab, made), len(texts)),
            }
        print(group, mitigated[group], flush=True)
    result = {
        "sampler": arguments.sampler,
        "prompts": PROMPTS,
        "seconds": seconds,
        "groups": groups,
        "mitigated": mitigated,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        write_whole(arguments.json, text + "\n")


if __name__ == "__main__":
    main()
