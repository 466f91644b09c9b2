"""Which words call a copy up, and what is left of copy and prompt without them, beside steering away from the prompt.

    python benchmarks/words.py --model FOLDER --world FOLDER --sampler Euler:30 --json FILE

Prompts of the evaluation split are sampled from the same noise unguarded, steered, and without the words that were found.
Counted are copies, the share of the caption's attributes that an image shows (with a trained classifier beside the model), and
how many of the words found are the name that the captions of a duplicated image end in. The ``near`` group has the same
captions with other names: what the images would show if the model did not remember. Nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from samplers import lab_arguments, sampled_lab, texts_of, write_result
from tqdm import tqdm

from memorization_guard import StabilityProfile, Thresholds, Trace
from memorization_guard.core.settings import Correction
from memorization_guard.diffusers import calibrate, guard
from memorization_guard.lab import COPY_THRESHOLD, PROFILE, Lab, attributes
from memorization_guard.statistics import exact_interval, mean_with_interval

#: How many prompts of each group; one image each.
COUNTS = {"exact": 30, "template": 24, "near": 30, "settled": 30, "ordinary": 100}
#: Groups that have a training image.
DUPLICATED = ("exact", "template")
FIRST_SEED = 9_000_000


def sampled(
    pipe: Any, texts: Sequence[str], first_seed: int, batch: int, guarded: dict[str, Any] | None, **options: Any
) -> tuple[np.ndarray, list[Trace]]:
    """Images ``[N, H, W, 3]`` uint8, one a prompt, and their traces; unguarded without ``guarded``."""
    images, traces = [], []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        draws = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, **(guarded or {"mode": "off"})) as run:
            images.append((pipe(part, generator=draws, output_type="np", **options).images * 255).round().astype(np.uint8))
        traces += run.traces
    return np.concatenate(images), traces


def seen(lab: Lab, group: str, texts: Sequence[str], images: np.ndarray) -> dict[str, Any]:
    """Copies among the images of a group that has them, and attributes seen."""
    row: dict[str, Any] = {}
    if group in DUPLICATED:
        copies = sum(lab.copy_score(image, text) > COPY_THRESHOLD for image, text in zip(images, texts, strict=True))
        row["copies"] = {"count": int(copies), "of": len(texts), "interval": exact_interval(int(copies), len(texts))}
    if (lab.model / attributes.FILE).is_file():
        row["attributes_seen"] = mean_with_interval(attributes.attribute_accuracy(images, texts, lab), list(texts))
    return row


def told(texts: Sequence[str], traces: Sequence[Trace]) -> dict[str, Any]:
    """Of how many images that triggered words were told, how many, and how many of them are of the caption's name."""
    names = [set(text.split()[-2:]) for text in texts]
    triggered = [(name, trace.words) for name, trace in zip(names, traces, strict=True) if trace.trigger_step is not None]
    found = [(name, set(words.words)) for name, words in triggered if words is not None]
    return {
        "triggered": len(triggered),
        "told": len(found),
        "with_a_word_of_the_name": sum(bool(name & words) for name, words in found),
        "words": sum(len(words) for _, words in found),
        "words_of_the_name": sum(len(name & words) for name, words in found),
    }


def main() -> None:
    parser = lab_arguments(__doc__, batch=8)
    arguments = parser.parse_args()
    lab, pipe, steps = sampled_lab(arguments)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": arguments.guidance}
    own = lab.model / PROFILE.name
    if own.is_file():
        profile = StabilityProfile.load(own)
    else:
        profile = calibrate(pipe, lab.prompts("reference"), batch_size=arguments.batch, progress=True, **options)
    ways: dict[str, Correction] = {"steered": "steer", "kept": "keep"}
    groups: dict[str, Any] = {}
    for number, (group, count) in enumerate(tqdm(COUNTS.items(), unit="group")):
        texts, first = texts_of(lab, group, "evaluation", count), FIRST_SEED + 1000 * number
        images, _ = sampled(pipe, texts, first, arguments.batch, None, **options)
        row = groups[group] = {"images": count, "unguarded": seen(lab, group, texts, images)}
        for way, correction in ways.items():
            thresholds = Thresholds(correction=correction)
            guarded = {"profile": profile, "mode": "mitigate", "thresholds": thresholds}
            images, traces = sampled(pipe, texts, first, arguments.batch, guarded, **options)
            row[way] = seen(lab, group, texts, images)
            if way == "kept":
                row["words"] = told(texts, traces)
            if not any(trace.trigger_step is not None for trace in traces):
                break  # nothing is corrected, whichever way
    write_result({"sampler": arguments.sampler, "guidance": arguments.guidance, "groups": groups}, arguments.json)


if __name__ == "__main__":
    main()
