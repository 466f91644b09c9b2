"""The lab's figures: is the model a valid stand-in, and how well is memorization detected and mitigated on it?

    python -m memorization_guard.lab.evaluate [--model FOLDER --world FOLDER] [--split tuning] [--published] [--json FILE]

Every prompt is sampled with the same seeds without and with mitigation (PNDM, 50 steps, guidance 7.5), the exact ones without
mitigation by other samplers too. Nothing here is fitted: the profile comes from the reference prompts, which no other group
contains. Whatever was chosen by looking at results was chosen on ``--split tuning``, which shares no prompt and no seed with
the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import Mode, StabilityProfile, Thresholds, Trace
from ..adapters.diffusers import guard
from ..evaluation.signals import SIGNALS
from ..files import write_whole
from ..statistics import detection, detection_with_intervals, mean_with_interval, rate_with_interval
from . import COPY_THRESHOLD, MODEL, Lab
from .attributes import accuracy_on_renderings, attribute_accuracy
from .autoencoder import reconstruction
from .scene import render
from .world import DATA, DUPLICATED, SPLITS, captions, duplicates, to_uint8

STEPS, GUIDANCE = 50, 7.5

#: Images a prompt, by group, on either split.
SEEDS = {"exact": 1, "template": 1, "quarter": 2, "sixteenth": 2, "rare": 1, "near": 1, "settled": 1, "ordinary": 1}
#: Of the ordinary prompts, so many are sampled.
ORDINARY = 100
FIRST_SEED = {"evaluation": 1_000_000, "tuning": 2_000_000}


@dataclass
class Sampled:
    """The images of one group: ``[N, H, W, 3]`` uint8, with the prompt and the trace of each."""

    lab: Lab
    prompts: list[str]
    images: np.ndarray
    traces: list[Trace]

    def copy_scores(self, group: str) -> np.ndarray:
        """``[N]``: similarity with the prompt's training image; for groups without one, the highest with any."""
        own = group in DUPLICATED
        return np.array(
            [
                self.lab.copy_score(image, prompt) if own else self.lab.nearest_copy(image)[0]
                for image, prompt in zip(self.images, self.prompts, strict=True)
            ]
        )


#: Name, steps, and what makes the scheduler out of the model's own configuration.
SAMPLERS: tuple[tuple[str, int, Callable[[Any], Any]], ...] = (
    ("PNDM", 20, diffusers.PNDMScheduler.from_config),
    ("PNDM", 30, diffusers.PNDMScheduler.from_config),
    ("PNDM", 50, diffusers.PNDMScheduler.from_config),
    ("Euler", 30, diffusers.EulerDiscreteScheduler.from_config),
    ("DPM++ 2M", 30, diffusers.DPMSolverMultistepScheduler.from_config),
    ("Euler ancestral", 30, diffusers.EulerAncestralDiscreteScheduler.from_config),
)


def sample(
    lab: Lab,
    pipe: Any,
    texts: Sequence[str],
    first_seed: int,
    stability: StabilityProfile | None,
    *,
    mode: Mode = "trace",
    thresholds: Thresholds | None = None,
    batch: int = 16,
    steps: int = STEPS,
    progress: Callable[[int], object] | None = None,
) -> Sampled:
    """Samples one image a prompt, seeds counted up from ``first_seed``, noise drawn on the CPU so that devices agree."""
    images, traces = [], []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, stability, mode, thresholds) as run:
            output = pipe(part, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, output_type="np")
        images.append((output.images * 255).round().astype(np.uint8))
        traces += run.traces
        if progress is not None:
            progress(len(part))
    return Sampled(lab, list(texts), np.concatenate(images), traces)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of the pixels of two image stacks, image by image: ``[N, H, W, 3]`` twice -> ``[N]``."""
    a, b = (x.reshape(len(x), -1).astype(float) for x in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def figures(plain: dict[str, Sampled], mitigated: dict[str, Sampled]) -> dict[str, Any]:
    """Detection and mitigation by group; every signal is compared with the ordinary images, where they were sampled.

    Rates and means have 95 % intervals over prompts, exact ones where a rate is 0 or 1.
    """
    result: dict[str, Any] = {}
    for group, before in plain.items():
        after = mitigated[group]
        texts = before.prompts
        triggers = [trace.trigger_step for trace in before.traces]
        steps = [step for step in triggers if step is not None]
        row: dict[str, Any] = {
            "images": len(texts),
            "prompts": len(set(texts)),
            "triggered": rate_with_interval(np.array([step is not None for step in triggers]), texts),
            "median_trigger_step": float(np.median(steps)) if steps else None,
            "touched": rate_with_interval(np.array([trace.mitigated.any() for trace in after.traces]), texts),
            "similarity_to_unmitigated": float(similarity(before.images, after.images).mean()),
            "medians": {},
            "quartiles": {},
            "detection": {},
        }
        for when, side in (("before", before), ("after", after)):
            scores = side.copy_scores(group)
            row[when] = {
                "copies": rate_with_interval(scores > COPY_THRESHOLD, texts),
                "correlated_above_0.9": rate_with_interval(scores > 0.9, texts),
                "median_copy_score": float(np.median(scores)),
                "attributes_seen": mean_with_interval(attribute_accuracy(side.images, texts, side.lab), texts),
            }
        for name, signal in SIGNALS.items():
            values = np.array([signal(trace) or 0.0 for trace in before.traces])
            row["medians"][name] = float(np.median(values))
            row["quartiles"][name] = np.quantile(values, [0.25, 0.75]).tolist()
            if group != "ordinary" and "ordinary" in plain:
                ordinary = np.array([signal(trace) or 0.0 for trace in plain["ordinary"].traces])
                row["detection"][name] = detection_with_intervals(values, ordinary, texts)
        result[group] = row
    return result


def by_sampler(
    lab: Lab, pipe: Any, exact: Sequence[str], ordinary: Sequence[str], first_seed: int, batch: int
) -> dict[str, Any]:
    """Copies of exact prompts by each of :data:`SAMPLERS`, and under Euler how much of ordinary captions is seen."""
    original, result = pipe.scheduler, {}
    for number, (name, steps, make) in enumerate(SAMPLERS):
        pipe.scheduler = make(original.config)
        keywords: dict[str, Any] = {"batch": batch, "steps": steps}
        scores = sample(lab, pipe, exact, first_seed + 1000 * number, None, **keywords).copy_scores("exact")
        row = {
            "correlated_above_0.9": rate_with_interval(scores > 0.9, exact),
            "median_copy_score": float(np.median(scores)),
        }
        if name == "Euler":
            images = sample(lab, pipe, ordinary, first_seed + 50_000, None, **keywords).images
            row["attributes_seen"] = mean_with_interval(attribute_accuracy(images, ordinary, lab), ordinary)
        result[f"{name} {steps}"] = row
    pipe.scheduler = original
    return result


def world_figures(lab: Lab, count: int = 200, renders: int = 16) -> dict[str, Any]:
    """How far captions fix an image, and whether the duplicated images stand out by plain statistics or by their captions.

    ``caption_variance_share`` is the share of pixel variance between captions, estimated without bias from ``renders`` images
    of each of ``count`` ordinary captions (one-way analysis of variance). ``plain_statistics`` are AUCs of a group's training
    images against ordinary ones; 0.5 is no difference.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = captions(lab.world)["ordinary/evaluation"][:count]
    within, means, ordinary = 0.0, [], []
    for caption in chosen:
        pixels = to_uint8(render([caption] * renders, generator))
        within += float(pixels.reshape(renders, -1).var(axis=0, ddof=1).sum()) / count
        means.append(pixels.reshape(renders, -1).mean(axis=0))
        ordinary += list(pixels[:5].astype(np.float32))
    between = float(np.stack(means).var(axis=0, ddof=1).sum()) - within / renders
    nearest = np.array([lab.nearest_copy(image)[0] for image in ordinary])

    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "norm": lambda image: float(np.linalg.norm(image / 127.5 - 1)),
        "contrast": lambda image: float(image.mean(2).std()),
        "colourfulness": lambda image: float((image - image.mean(2, keepdims=True)).std()),
        "edges": lambda image: float(np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean()),
    }
    groups: dict[str, Any] = {}
    for group in DUPLICATED:
        images = [duplicates(lab.world)[text][0].astype(np.float32) for split in SPLITS for text in lab.prompts(group, split)]
        groups[group] = {
            name: detection(np.array([f(i) for i in images]), np.array([f(i) for i in ordinary]))["auc"]
            for name, f in statistics.items()
        }
    words = {
        group: float(np.mean([len(text.split()) for split in SPLITS for text in lab.prompts(group, split)])) for group in SEEDS
    }
    return {
        "caption_variance_share": float(between / (between + within)),
        "plain_statistics": groups,
        "words_a_caption": words,
        "nearest_copy_of_fresh_images": dict(
            zip(("median", "p99", "highest"), np.quantile(nearest, (0.5, 0.99, 1)), strict=True)
        ),
    }


def contact_sheet(group: str, *columns: Sampled, rows: int = 8, seeds: int = 4) -> Image.Image:
    """A row a prompt: its training image if it has one, then up to ``seeds`` images of each column."""
    blocks = []
    for text in list(dict.fromkeys(columns[0].prompts))[:rows]:
        row = [np.asarray(columns[0].lab.training_image(text))] if group in DUPLICATED else []
        for sampled in columns:
            row += [sampled.images[i] for i, prompt in enumerate(sampled.prompts) if prompt == text][:seeds]
        blocks.append(np.concatenate([np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255) for image in row], axis=1))
    return Image.fromarray(np.concatenate(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--split", default="evaluation", choices=SPLITS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--groups", nargs="+", default=list(SEEDS), choices=list(SEEDS))
    parser.add_argument("--published", action="store_true", help="judge and mitigate by the published method")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet of each group into this folder")
    arguments = parser.parse_args()
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)

    lab = Lab(arguments.model, arguments.world)
    pipe, stability = lab.pipeline().to(arguments.device), lab.profile()
    texts = {
        group: [text for text in lab.prompts(group, arguments.split)[:ORDINARY] for _ in range(count)]
        for group, count in SEEDS.items()
        if group in arguments.groups
    }
    thresholds = Thresholds(method="published" if arguments.published else "reference")
    # One more image of some ordinary prompts, from other seeds, to see how far two images of one caption differ.
    again = texts.get("ordinary", [])[:20]
    plain: dict[str, Sampled] = {}
    mitigated: dict[str, Sampled] = {}
    first_seed = FIRST_SEED[arguments.split]
    with tqdm(total=2 * sum(map(len, texts.values())) + len(again), unit="image") as bar:
        keywords: dict[str, Any] = {"thresholds": thresholds, "batch": arguments.batch, "progress": bar.update}
        for group, group_texts in texts.items():
            seed = first_seed + 10_000 * list(SEEDS).index(group)
            plain[group] = sample(lab, pipe, group_texts, seed, stability, **keywords)
            mitigated[group] = sample(lab, pipe, group_texts, seed, stability, mode="mitigate", **keywords)
        second = sample(lab, pipe, again, first_seed + 90_000, stability, **keywords) if again else None
    result: dict[str, Any] = {"thresholds": thresholds.to_dict(), "groups": figures(plain, mitigated)}
    if second is not None:
        alike = similarity(plain["ordinary"].images[: len(again)], second.images)
        exact = lab.prompts("exact", arguments.split)
        result |= {
            "world": world_figures(lab),
            "autoencoder": reconstruction(pipe.vae, lab.world, 0, arguments.device),
            "classifier": accuracy_on_renderings(lab),
            "two_seeds_of_an_ordinary_caption": float(alike.mean()),
            "samplers": by_sampler(lab, pipe, exact, texts["ordinary"][:60], first_seed + 200_000, arguments.batch),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        write_whole(arguments.json, text + "\n")
    if arguments.sheets:
        for group in texts:
            columns = [plain[group], mitigated[group], *([second] if group == "ordinary" and second else [])]
            contact_sheet(group, *columns).save(arguments.sheets / f"lab-{group}.jpg", quality=88)


if __name__ == "__main__":
    main()
