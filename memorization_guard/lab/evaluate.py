"""The lab's figures: how well memorization is detected and mitigated on the bundled model.

    python -m memorization_guard.lab.evaluate [--split tuning] [--device cuda] [--json FILE] [--images FOLDER]

Every prompt is sampled with the same seeds without and with mitigation (PNDM, 50 steps, guidance 7.5). Nothing here is
fitted: the profile comes from the reference prompts, which no other group contains, and whatever was chosen was chosen on
``--split tuning``, which shares no prompt and no seed with the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from tqdm import tqdm

from .. import StabilityProfile, Thresholds, Trace
from ..diffusers import guard
from . import COPY_THRESHOLD, copy_score, nearest_copy, pipeline, profile, prompts

STEPS, GUIDANCE = 50, 7.5

#: Images a prompt, by split and group: at least 200 exact, 400 ordinary, 100 rare and 200 template ones for the figures.
SEEDS = {
    "evaluation": {"exact": 5, "template": 7, "rare": 3, "ordinary": 1},
    "tuning": {"exact": 6, "template": 8, "rare": 3, "ordinary": 3},
}
FIRST_SEED = {"evaluation": 1_000_000, "tuning": 2_000_000}


@dataclass
class Sampled:
    """The images of one group: ``[N, H, W, 3]`` uint8, with the prompt and the trace of each."""

    prompts: list[str]
    images: np.ndarray
    traces: list[Trace]

    def copied(self, group: str) -> np.ndarray:
        """``[N]`` bool: whether each image copies its training image; for groups without one, any training image."""
        own = group in ("exact", "template")
        scores = [
            copy_score(image, prompt) if own else nearest_copy(image)[0]
            for image, prompt in zip(self.images, self.prompts, strict=True)
        ]
        return np.array(scores) > COPY_THRESHOLD


def sample(
    pipe: Any,
    texts: Sequence[str],
    first_seed: int,
    stability: StabilityProfile | None,
    *,
    mitigate: bool = False,
    thresholds: Thresholds | None = None,
    batch: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Sampled:
    """Samples one image a prompt, seeds counted up from ``first_seed``, noise drawn on the CPU so that devices agree."""
    images, traces = [], []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, stability, mitigate=mitigate, thresholds=thresholds) as run:
            output = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np")
        images.append((output.images * 255).round().astype(np.uint8))
        traces += run.traces
        if progress is not None:
            progress(len(part))
    return Sampled(list(texts), np.concatenate(images), traces)


def detection(positive: Sequence[float], negative: Sequence[float]) -> dict[str, float]:
    """AUC, and TPR at 1 % FPR with the last threshold below it (never the nearest, which may lie above)."""
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scores = np.r_[np.asarray(positive), np.asarray(negative)]
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {"auc": float(roc_auc_score(labels, scores)), "tpr_at_1_fpr": float(tpr[fpr <= 0.01].max())}


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of the pixels of two image stacks, image by image: ``[N, H, W, 3]`` twice -> ``[N]``."""
    a, b = (x.reshape(len(x), -1).astype(float) for x in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


SIGNALS: dict[str, Callable[[Trace], float]] = {
    "S_mem": lambda trace: trace.score or 0.0,
    "S_mem, first 10 steps": lambda trace: float(np.nanmax(trace.update_score[:10])),
    "max s_x0": lambda trace: float(np.nanmax(trace.denoised_score)),
    "guidance norm, mean": lambda trace: float(np.nanmean(trace.guidance_norm)),
    "guidance norm, first step": lambda trace: float(trace.guidance_norm[0]),
}


def figures(plain: dict[str, Sampled], mitigated: dict[str, Sampled]) -> dict[str, Any]:
    """Everything ``docs/lab.md`` reports, by group; every detector is held against the ordinary images."""
    result: dict[str, Any] = {}
    for group, before in plain.items():
        after = mitigated[group]
        triggers = [trace.trigger_step for trace in before.traces]
        steps = [step for step in triggers if step is not None]
        row: dict[str, Any] = {
            "images": len(before.images),
            "triggered": len(steps) / len(triggers),
            "median_trigger_step": float(np.median(steps)) if steps else None,
            "strong": float(np.mean([trace.verdict == "strong" for trace in before.traces])),
            "copies_before": float(before.copied(group).mean()),
            "copies_after": float(after.copied(group).mean()),
            "touched": float(np.mean([trace.mitigated.any() for trace in after.traces])),
            "similarity_to_unmitigated": float(np.mean(similarity(before.images, after.images))),
            "detection": {},
        }
        for name, signal in SIGNALS.items():
            values = [signal(trace) for trace in before.traces]
            row.setdefault("medians", {})[name] = float(np.median(values))
            if group != "ordinary":
                row["detection"][name] = detection(values, [signal(trace) for trace in plain["ordinary"].traces])
        result[group] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="evaluation", choices=list(SEEDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    pipe = pipeline().to(arguments.device)
    texts = {
        group: [text for text in prompts(group, arguments.split) for _ in range(count)]
        for group, count in SEEDS[arguments.split].items()
    }
    plain: dict[str, Sampled] = {}
    mitigated: dict[str, Sampled] = {}
    with tqdm(total=2 * sum(map(len, texts.values())), unit="image") as bar:
        for number, (group, group_texts) in enumerate(texts.items()):
            seed = FIRST_SEED[arguments.split] + 10_000 * number
            for mitigate, results in ((False, plain), (True, mitigated)):
                results[group] = sample(
                    pipe, group_texts, seed, profile(), mitigate=mitigate, batch=arguments.batch, progress=bar.update
                )
    text = json.dumps(figures(plain, mitigated), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
