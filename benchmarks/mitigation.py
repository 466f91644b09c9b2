"""How well, and at what cost, copies are avoided: ours and others' mitigation from the same prompts and seeds.

    python benchmarks/mitigation.py [--model FOLDER --world FOLDER] [--split evaluation] [--json FILE]

Every method is switched on for every image, memorized or not. Nothing is fitted here: the others' constants are those
published; constants that a norm is compared with are scaled to the size of this model's latents. Times are of one image at a
time on the CPU, alternating with plain sampling.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import countermeasures
import diffusers
import numpy as np
import peers
import shots
import torch
from shots import Shot
from tqdm import tqdm

from memorization_guard import StabilityProfile, Thresholds
from memorization_guard.diffusers import calibrate, guard
from memorization_guard.files import write_whole
from memorization_guard.lab import COPY_THRESHOLD, MODEL, Lab, attributes
from memorization_guard.lab.evaluate import similarity
from memorization_guard.lab.world import DATA
from memorization_guard.statistics import mean_with_interval, rate_with_interval

#: Wen et al. stop at this guidance norm. Their code takes it of the four images of a prompt together, half of it each; both
#: readings are measured.
WEN_TARGETS = (3.0, 1.5)
#: SAIL stops at this loss, in which the latent's norm has this weight (Jeon et al., appendix D and code, for SD 1.4).
SAIL_THRESHOLD, SAIL_WEIGHT = 8.2, 0.05

Method = Callable[[list[Shot]], np.ndarray]


def methods(pipe: Any, stability: Any, steps: int) -> dict[str, Method]:
    """Ways to sample images ``[B, H, W, 3]`` uint8 of some shots, by name; the first is plain sampling."""
    latent = pipe.unet.config.in_channels * pipe.unet.config.sample_size**2
    scale = (latent / peers.PUBLISHED_LATENT["epsilon"]) ** 0.5

    def plain(part: list[Shot]) -> np.ndarray:
        return shots.sample(pipe, part, steps)

    def ours(part: list[Shot], thresholds: Thresholds) -> np.ndarray:
        with guard(pipe, stability, "mitigate", thresholds):
            return shots.sample(pipe, part, steps)

    def first_step(part: list[Shot]) -> tuple[Any, ...]:
        """Pipeline, latents, timestep and embeddings that a run starts with."""
        pipe.scheduler.set_timesteps(steps)
        with torch.no_grad():
            uncond, cond = shots.embeddings(pipe, part)
        return pipe, shots.starting_latents(pipe, part), int(pipe.scheduler.timesteps[0]), uncond, cond

    def wen(part: list[Shot], target: float) -> np.ndarray:
        start = first_step(part)
        cond = countermeasures.optimised_prompt(*start, target=target * scale)
        return shots.sample(pipe, part, steps, prompt=None, prompt_embeds=cond, negative_prompt_embeds=start[3])

    def jeon(part: list[Shot]) -> np.ndarray:
        latents = countermeasures.sail(*first_step(part), threshold=SAIL_THRESHOLD * scale, weight=SAIL_WEIGHT)
        return shots.sample(pipe, part, steps, latents=latents)

    def jain(part: list[Shot], new_rule: Callable[[], countermeasures.GuidanceRule]) -> np.ndarray:
        with countermeasures.guided_by(pipe, new_rule()):
            return shots.sample(pipe, part, steps)

    def ren(part: list[Shot]) -> np.ndarray:
        with countermeasures.attention_masked(pipe, part):
            return shots.sample(pipe, part, steps)

    return {
        "plain": plain,
        "ours, prompt kept": functools.partial(ours, thresholds=Thresholds()),
        "ours, steered": functools.partial(ours, thresholds=Thresholds(correction="steer")),
        "published (Huang)": functools.partial(ours, thresholds=Thresholds(method="published")),
        **{f"Wen, prompt optimised to {target:g}": functools.partial(wen, target=target) for target in WEN_TARGETS},
        "Jeon, SAIL": jeon,
        "Jain, static transition": functools.partial(jain, new_rule=countermeasures.static_transition),
        "Jain, dynamic transition": functools.partial(jain, new_rule=countermeasures.dynamic_transition),
        "Ren, attention masked": ren,
    }


def fidelity(lab: Lab, images: np.ndarray, texts: list[str]) -> np.ndarray | None:
    """Share of the caption's attributes that each image is seen to have, ``[N]``; ``None`` without a trained classifier."""
    return attributes.attribute_accuracy(images, texts, lab) if (lab.model / attributes.FILE).is_file() else None


def figures(lab: Lab, images: dict[str, np.ndarray], members: list[Shot]) -> dict[str, Any]:
    """Copies, fidelity and likeness to plain sampling of one group's images, by method."""
    texts = [shot.prompt for shot in members]
    own = members[0].group in ("exact", "template")
    result: dict[str, Any] = {}
    for name, made in images.items():
        scores = [
            lab.copy_score(image, text) if own else lab.nearest_copy(image)[0] for image, text in zip(made, texts, strict=True)
        ]
        row = {
            "copies": rate_with_interval(np.array(scores) > COPY_THRESHOLD, texts),
            "median_copy_score": float(np.median(scores)),
            "unchanged": rate_with_interval((made == images["plain"]).all((1, 2, 3)), texts),
            "similarity_to_plain": mean_with_interval(similarity(images["plain"], made), texts),
        }
        share = fidelity(lab, made, texts)
        if share is not None:
            row["fidelity"] = mean_with_interval(share, texts)
        result[name] = row
    return result


def print_figures(result: dict[str, Any]) -> None:
    rows = []
    for group, row in result["groups"].items():
        cost = result["costs"].get(group)
        for name, values in row["methods"].items():
            cells = [shots.interval(values["copies"], "mean"), f"{values['median_copy_score']:.2f}"]
            cells.append(shots.interval(values["fidelity"], "mean") if "fidelity" in values else "not measured")
            cells += [shots.interval(values["similarity_to_plain"], "mean"), f"{values['unchanged']['mean']:.3f}"]
            rows.append([group, name, *cells, *(shots.describe(cost[name]) if cost else [""] * 3)])
    head = ["group", "method", "copies", "median copy score", "fidelity", "similarity to plain", "share unchanged"]
    shots.print_table([*head, "extra network calls", "time / plain", "extra memory"], rows)
    print()
    for group, cost in result["costs"].items():
        plain = cost["plain"]
        print(f"{group}: plain takes {plain['seconds']:.3f} s and {plain['memory'] / 2**20:.1f} MiB an image, ", end="")
        print(f"a second time {shots.describe(cost['plain again'])[1]} of it")
    shots.print_counts(result["groups"])


def set_up(lab: Lab, scheduler: str, steps: int) -> tuple[Any, StabilityProfile]:
    """The lab's pipeline with another scheduler if asked for, and a profile that fits it, calibrated if the lab has none."""
    pipe = lab.pipeline()
    if scheduler == "PNDM" and steps == 50:
        return pipe, lab.profile()
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    texts = lab.prompts("reference")[:50]
    return pipe, calibrate(pipe, texts, batch_size=10, num_inference_steps=steps, guidance_scale=shots.GUIDANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a lab model's folder")
    parser.add_argument("--world", type=Path, default=DATA, help="the world it was trained on")
    parser.add_argument("--split", default="tuning", choices=["tuning", "evaluation"])
    parser.add_argument("--per-group", type=int, help="so many images a group, instead of all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="PNDM", choices=["PNDM", "DDIM", "DPMSolverMultistep"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    groups = ["exact", "template", "rare", "ordinary"]
    parser.add_argument("--groups", nargs="+", default=groups, choices=groups)
    parser.add_argument("--turns", type=int, default=8, help="exact, and ordinary, images that times are taken on")
    arguments = parser.parse_args()

    lab = Lab(arguments.model, arguments.world)
    pipe, stability = set_up(lab, arguments.scheduler, arguments.steps)
    ways = methods(pipe, stability, arguments.steps)
    result: dict[str, Any] = {
        "model": arguments.model.name,
        "prediction_type": peers.prediction_type(pipe.scheduler),
        "split": arguments.split,
        "scheduler": arguments.scheduler,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "groups": {},
        "costs": {},
    }
    for group in arguments.groups:
        members = shots.shots(lab, arguments.split, [group], arguments.per_group)
        parts = [members[start : start + arguments.batch] for start in range(0, len(members), arguments.batch)]
        images = {
            name: np.concatenate([way(part) for part in tqdm(parts, desc=f"{group}, {name}")]) for name, way in ways.items()
        }
        result["groups"][group] = {
            "images": len(members),
            "prompts": len({shot.prompt for shot in members}),
            "methods": figures(lab, images, members),
        }
        if group in ("exact", "ordinary"):
            timed = ways | {"plain again": ways["plain"]}
            result["costs"][group] = shots.costs(pipe, timed, members[: arguments.turns])
        if arguments.json:
            write_whole(arguments.json, json.dumps(result, indent=1) + "\n")
    print_figures(result)


if __name__ == "__main__":
    main()
