"""How well, and at what cost, memorized images are detected: ours and others' scores of the same runs.

    python benchmarks/detection.py [--model FOLDER --world FOLDER] [--split evaluation] [--json FILE]

All scores are of one image, and of the same sampling run. Nothing is fitted here: our profile comes from the reference
prompts, the others' constants are those published. Times are of one image at a time on the CPU, alternating with plain
sampling. A score of the first steps would allow stopping the run there; its time does not count that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import peers
import torch
from peers import Shot, Watched
from torch import Tensor
from tqdm import tqdm

from memorization_guard.diffusers import guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.files import write_whole
from memorization_guard.lab import Lab
from memorization_guard.statistics import detection_with_intervals

#: Our scores, by name: of one trace, higher on memorized images.
OURS = {name: SIGNALS[name] for name in ("S_mem", "joint score", "p-value, -log10", "detail", "uncalibrated score")}


def late_timestep(pipe: Any) -> int:
    """The third last timestep of the run, which Asthana & Belagiannis take their alignment at."""
    return int(pipe.scheduler.timesteps[-3])


def sharpness(pipe: Any, run: Watched) -> Tensor:
    return peers.sharpness(pipe, run.x, run.t, run.uncond, run.cond, run.eps_c - run.eps_u)


@torch.no_grad()
def late_alignment(pipe: Any, run: Watched) -> Tensor:
    return peers.alignment(*peers.noise_predictions(pipe, run.x, late_timestep(pipe), run.uncond, run.cond))


def peer_scores(pipe: Any, run: Watched) -> dict[str, Tensor]:
    """The others' scores of one run, ``[B]`` each."""
    kind = str(pipe.scheduler.config.prediction_type)
    weights = peers.ANISOTROPY_WEIGHTS[kind]
    norm, cosine = run.mean_norm(1), late_alignment(pipe, run)
    # What the norm would be on the latents that the weights were chosen on.
    widened = norm * (peers.PUBLISHED_LATENT[kind] / run.x[0].numel()) ** 0.5
    return {
        "Wen, first step": norm,
        "Wen, 10 steps": run.mean_norm(10),
        "Wen, whole run": run.mean_norm(),
        "Jeon, sharpness": sharpness(pipe, run),
        "Asthana, alignment alone": cosine,
        "Asthana, weights as published": peers.anisotropy(norm, cosine, weights),
        "Asthana, norm scaled to latent size": peers.anisotropy(widened, cosine, weights),
    }


def all_scores(pipe: Any, stability: Any, images: list[Shot], steps: int, batch: int) -> dict[str, np.ndarray]:
    """Every score of every image, ``[N]`` each."""
    parts: dict[str, list[np.ndarray]] = {}
    for start in tqdm(range(0, len(images), batch), unit="batch"):
        with guard(pipe, stability) as run, peers.watched(pipe) as seen:
            peers.sample(pipe, images[start : start + batch], steps)
        values = {f"ours, {name}": np.array([score(trace) or 0.0 for trace in run.traces]) for name, score in OURS.items()}
        values |= {name: score.double().numpy() for name, score in peer_scores(pipe, seen).items()}
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: np.concatenate(values) for name, values in parts.items()}


def figures(scores: dict[str, np.ndarray], images: list[Shot]) -> dict[str, Any]:
    """AUC and TPR at 1 % FPR of each group against the ordinary images, with intervals, by group and score."""
    groups = np.array([shot.group for shot in images])
    texts = np.array([shot.prompt for shot in images])
    result: dict[str, Any] = {}
    for group in dict.fromkeys(shot.group for shot in images):
        here, ordinary = groups == group, groups == "ordinary"
        rows: dict[str, Any] = {}
        for name, values in scores.items():
            rows[name] = {"median": float(np.median(values[here]))}
            if group != "ordinary":
                sides = (values[here], values[ordinary], texts[here].tolist(), texts[ordinary].tolist())
                rows[name] |= detection_with_intervals(*sides)
        result[group] = {"images": int(here.sum()), "prompts": len(set(texts[here])), "scores": rows}
    return result


def ways(pipe: Any, stability: Any, steps: int) -> dict[str, Callable[[list[Shot]], object]]:
    """What is timed: plain sampling, and sampling with a score."""

    def plain(part: list[Shot]) -> None:
        peers.sample(pipe, part, steps)

    def ours(part: list[Shot]) -> None:
        with guard(pipe, stability) as run:
            peers.sample(pipe, part, steps)
        assert all(trace.score is not None for trace in run.traces)

    def seen(part: list[Shot], score: Callable[[Any, Watched], object]) -> None:
        with peers.watched(pipe) as run:
            peers.sample(pipe, part, steps)
        score(pipe, run)

    return {
        "plain": plain,
        "plain again": plain,
        "ours": ours,
        "Wen": lambda part: seen(part, lambda _pipe, run: run.mean_norm()),
        "Jeon": lambda part: seen(part, sharpness),
        "Asthana": lambda part: seen(part, late_alignment),
    }


def print_figures(result: dict[str, Any]) -> None:
    cost = result["costs"]
    rows = []
    for group, row in result["groups"].items():
        for name, values in row["scores"].items() if group != "ordinary" else ():
            ordinary = result["groups"]["ordinary"]["scores"][name]["median"]
            cells = [peers.interval(values, "auc", 4), peers.interval(values, "tpr_at_1_fpr")]
            cells += [f"{values['median']:.3g}", f"{ordinary:.3g}", *peers.describe(cost[name.split(",")[0]])]
            rows.append([group, name, *cells])
    head = ["group", "score", "AUC", "TPR at 1 % FPR", "median", "median, ordinary"]
    peers.print_table([*head, "extra network calls", "time / plain", "extra memory"], rows)
    print(f"\nplain again / plain: {peers.describe(cost['plain again'])[1]}; ", end="")
    print(f"plain takes {cost['plain']['seconds']:.3f} s and {cost['plain']['memory'] / 2**20:.1f} MiB an image")
    peers.print_counts(result["groups"])


def main() -> None:
    parser = peers.arguments_of(__doc__)
    parser.add_argument("--groups", nargs="+", default=["exact", "template", "rare"], choices=["exact", "template", "rare"])
    parser.add_argument("--ordinary", type=int, help="so many ordinary images, instead of as many as of other groups")
    parser.add_argument("--turns", type=int, default=12, help="images that times are taken on")
    arguments = parser.parse_args()

    lab = Lab(arguments.model, arguments.world)
    pipe, stability = peers.set_up(lab, arguments.scheduler, arguments.steps)
    images = peers.shots(lab, arguments.split, arguments.groups, arguments.per_group)
    images += peers.shots(lab, arguments.split, ["ordinary"], arguments.ordinary or arguments.per_group)
    scores = all_scores(pipe, stability, images, arguments.steps, arguments.batch)
    result: dict[str, Any] = {
        **peers.conditions(arguments, pipe),
        "groups": figures(scores, images),
        "costs": peers.costs(pipe, ways(pipe, stability, arguments.steps), images[: arguments.turns]),
    }
    print_figures(result)
    if arguments.json:
        write_whole(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
