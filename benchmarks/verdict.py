"""What the verdict is worth on a lab model: detection, false positives, and the copies that mitigation leaves, by sampler.

    python benchmarks/verdict.py --model FOLDER --world FOLDER --samplers PNDM:50 Euler:30 --images 50 100 30 16 --json FILE

A profile is made from reference prompts with the first sampler, or with ``--profile-per-sampler`` with each. Every ordinary,
exact and template prompt is then sampled twice from the same noise: traced, and mitigated. Detection and false positives are
those of the traced images. Nothing is fitted here, and no prompt or seed is used for two purposes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samplers import SAMPLERS, texts_of
from shots import interval, print_table
from tqdm import tqdm

from memorization_guard import Mode, StabilityProfile, Thresholds, Trace
from memorization_guard.diffusers import calibrate, guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.files import write_whole
from memorization_guard.lab import COPY_THRESHOLD, MODEL, Lab
from memorization_guard.lab.world import DATA
from memorization_guard.statistics import detection_with_intervals, exact_interval, rate_with_interval

GROUPS = ("reference", "ordinary", "exact", "template")
MEMORIZED = ("exact", "template")
#: False-positive rates at which the share of ordinary images that trigger is counted.
NOMINAL = (0.1, 0.01, 0.001)
FIRST_SEED = {"tuning": 7_000_000, "evaluation": 8_000_000}
#: Seeds of one group lie this far above those of the group before.
GROUP_STRIDE = 100_000


@dataclass
class Sampled:
    """The images of one group under one sampler, ``[N, H, W, 3]`` uint8, with the prompt and the trace of each."""

    prompts: list[str]
    images: np.ndarray
    traces: list[Trace]


def sample(
    pipe: Any,
    profile: StabilityProfile,
    texts: Sequence[str],
    first_seed: int,
    mode: Mode,
    batch: int,
    *,
    thresholds: Thresholds | None = None,
    **options: Any,
) -> Sampled:
    """Samples one image a prompt, in batches; the seeds count up from ``first_seed`` and are drawn on the CPU."""
    images: list[np.ndarray] = []
    traces: list[Trace] = []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, profile, mode, thresholds) as run:
            output = pipe(part, generator=generators, output_type="np", **options)
        images.append((output.images * 255).round().astype(np.uint8))
        traces += run.traces
    return Sampled(list(texts), np.concatenate(images), traces)


def detection(memorized: Sampled, ordinary: Sampled) -> dict[str, Any]:
    """By signal: AUC and TPR at 1 % FPR with intervals; ``None`` where images of either group lack the signal."""
    found: dict[str, Any] = {}
    for name, signal in SIGNALS.items():
        sides = [[signal(trace) for trace in sampled.traces] for sampled in (memorized, ordinary)]
        if any(value is None for side in sides for value in side):
            found[name] = None
            continue
        positive, negative = (np.array(side, dtype=float) for side in sides)
        found[name] = detection_with_intervals(positive, negative, memorized.prompts, ordinary.prompts)
    return found


def triggered(sampled: Sampled, rate: float) -> dict[str, Any]:
    """How many images trigger at a nominal false-positive rate, with an exact interval; unscored images do not."""
    count = sum(trace.p_value is not None and trace.p_value <= rate for trace in sampled.traces)
    of = len(sampled.traces)
    return {"count": count, "of": of, "rate": count / of, "rate_95": exact_interval(count, of)}


def copies(lab: Lab, sampled: Sampled) -> dict[str, Any]:
    """Share of images whose copy score with the training image of their prompt is over the threshold."""
    scores = np.array([lab.copy_score(image, text) for image, text in zip(sampled.images, sampled.prompts, strict=True)])
    rate = rate_with_interval(scores > COPY_THRESHOLD, sampled.prompts)
    return {"count": int((scores > COPY_THRESHOLD).sum()), "of": len(scores), **rate, "median": float(np.median(scores))}


def touched(sampled: Sampled) -> dict[str, Any]:
    """How many images mitigation corrected at all, with an exact interval."""
    count = sum(bool(trace.mitigated.any()) for trace in sampled.traces)
    of = len(sampled.traces)
    return {"count": count, "of": of, "rate": count / of, "rate_95": exact_interval(count, of)}


def figures(lab: Lab, traced: dict[str, Sampled], mitigated: dict[str, Sampled]) -> dict[str, Any]:
    """All figures of one sampler, of the groups traced and mitigated."""
    notes = {trace.note for sampled in traced.values() for trace in sampled.traces if trace.note}
    return {
        "detection": {group: detection(traced[group], traced["ordinary"]) for group in MEMORIZED},
        "triggered": {group: {f"{rate:g}": triggered(sampled, rate) for rate in NOMINAL} for group, sampled in traced.items()},
        "copies": {
            group: {"traced": copies(lab, traced[group]), "mitigated": copies(lab, mitigated[group])} for group in MEMORIZED
        },
        "touched": {group: touched(sampled) for group, sampled in mitigated.items()},
        "verdicts": {
            group: {
                verdict: [t.verdict for t in sampled.traces].count(verdict) for verdict in {t.verdict for t in sampled.traces}
            }
            for group, sampled in traced.items()
        },
        "notes": sorted(notes),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures by sampler; written to ``--json`` after each."""
    lab = Lab(arguments.model, arguments.world)
    pipe = lab.pipeline().to(arguments.device)
    config = dict(pipe.scheduler.config)
    counts = dict(zip(GROUPS, arguments.images, strict=True))
    texts = {group: texts_of(lab, group, arguments.split, count) for group, count in counts.items()}
    first = FIRST_SEED[arguments.split]
    seeds = {group: first + GROUP_STRIDE * number for number, group in enumerate(GROUPS)}
    result: dict[str, Any] = {
        "model": str(arguments.model),
        "split": arguments.split,
        "guidance": arguments.guidance,
        "images": counts,
        "samplers": {},
    }
    profile: StabilityProfile | None = None
    for sampler in arguments.samplers:
        name, _, steps = sampler.rpartition(":")
        pipe.scheduler = SAMPLERS[name](config)
        options = {"num_inference_steps": int(steps), "guidance_scale": arguments.guidance}
        began = time.perf_counter()
        if profile is None or arguments.profile_per_sampler:
            profile = calibrate(
                pipe, texts["reference"], batch_size=arguments.batch, seed=seeds["reference"], progress=True, **options
            )
        sides: dict[Mode, dict[str, Sampled]] = {"trace": {}, "mitigate": {}}
        for mode, groups in sides.items():
            for group in tqdm(GROUPS[1:], desc=f"{sampler}, {mode}", unit="group"):
                groups[group] = sample(pipe, profile, texts[group], seeds[group], mode, arguments.batch, **options)
        found = figures(lab, sides["trace"], sides["mitigate"])
        result["samplers"][sampler] = found | {"seconds": round(time.perf_counter() - began, 1)}
        if arguments.json:
            write_whole(arguments.json, json.dumps(result, indent=1) + "\n")
    return result


def count_of(found: dict[str, Any], name: str) -> str:
    """``3 of 100, 0.030 (0.006-0.085)``"""
    return f"{found['count']} of {found['of']}, {interval(found, name)}"


def print_figures(result: dict[str, Any]) -> None:
    """Three tables in Markdown."""
    rows = [
        [sampler, group, name, *([interval(row, "auc", 4), interval(row, "tpr_at_1_fpr")] if row else ["-", "-"])]
        for sampler, found in result["samplers"].items()
        for group, signals in found["detection"].items()
        for name, row in signals.items()
    ]
    print_table(["sampler", "group", "signal", "AUC", "TPR at 1 % FPR"], rows)
    print()
    rows = [
        [sampler, group, *(count_of(row, "rate") for row in rates.values())]
        for sampler, found in result["samplers"].items()
        for group, rates in found["triggered"].items()
    ]
    print_table(["sampler", "triggered at a nominal", *(f"{rate:.1%}" for rate in NOMINAL)], rows)
    print()
    rows = []
    for sampler, found in result["samplers"].items():
        for group, row in found["touched"].items():
            left = found["copies"].get(group)
            cells = [count_of(left[side], "mean") for side in ("traced", "mitigated")] if left else ["-", "-"]
            rows.append([sampler, group, *cells, count_of(row, "rate")])
    print_table(["sampler", "group", "copies", "copies left", "images corrected"], rows)
    for sampler, found in result["samplers"].items():
        for note in found["notes"]:
            print(f"\n{sampler}: {note}")


def sampler_name(text: str) -> str:
    """``NAME:STEPS``, checked."""
    name, _, steps = text.rpartition(":")
    if name not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:STEPS with a name out of {', '.join(SAMPLERS)}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a lab model's folder")
    parser.add_argument("--world", type=Path, default=DATA, help="the world it was trained on")
    parser.add_argument("--samplers", nargs="+", type=sampler_name, default=["PNDM:50"], metavar="NAME:STEPS")
    parser.add_argument("--images", nargs=4, type=int, default=(50, 100, 30, 16), metavar=GROUPS, help="of each group")
    parser.add_argument("--split", default="evaluation", choices=list(FIRST_SEED))
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--profile-per-sampler", action="store_true", help="not one profile for all samplers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    print_figures(measure(arguments))


if __name__ == "__main__":
    main()
