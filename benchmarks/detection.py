"""How well memorized images are detected: the verdict and others' scores, on the same prompts, seeds and sampling runs.

    python benchmarks/detection.py --json docs/peers-detection.json
    python benchmarks/detection.py --model FOLDER --world FOLDER --sampler FlowMatchEuler:30 --json FILE

Every score is of one image, and higher is to mean memorized, as published. Nothing is fitted here: the verdict's references
are the lab's reference prompts, the others' constants are those published. Scores that do not apply to a model are left out,
and the file says why. Calls of the network are counted beyond those that guidance makes on its way to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import shots
import torch
from peers import Watched
from samplers import lab_arguments, sampled_lab, write_result
from shots import Calls, Shot
from torch import Tensor
from tqdm import tqdm

from memorization_guard import StabilityProfile
from memorization_guard.adapters.hooks import replaced
from memorization_guard.diffusers import calibrate, guard
from memorization_guard.statistics import detection_with_intervals

#: Images of each group, of as many prompts.
IMAGES = {"exact": 30, "template": 24, "settled": 30, "rare": 30, "ordinary": 200}

VERDICT = "ours, verdict"


@dataclass(frozen=True)
class Peer:
    """Another method's score.

    Attributes:
        score: of a run, ``[B]``. steps: how many of the run's steps it waits for; ``None`` for all.
        not_flow: why it does not apply to the transformer of a rectified flow, if it does not.
    """

    score: Callable[[Watched], Tensor]
    steps: int | None
    not_flow: str = ""


def sharpness(run: Watched) -> Tensor:
    first = run.steps[0]
    noise = peers.level_at(run.scheduler, first.t).noise
    return peers.sharpness(run.predicting(first.t), first.x, first.eps_c - first.eps_u, noise)


def hessian_difference(run: Watched) -> Tensor:
    first = run.steps[0]
    return peers.hessian_difference(run.predicting(first.t), first.x, peers.level_at(run.scheduler, first.t).noise)


def score_change(run: Watched, step: int) -> Tensor:
    return peers.score_change(run.steps[step].eps_c, run.steps[step + 1].eps_c)


@torch.no_grad()
def late_alignment(run: Watched) -> Tensor:
    """At the third last timestep of the run, where Asthana & Belagiannis take it, of the noise that the run begins in."""
    x, t = run.steps[0].x, float(run.scheduler.timesteps[-3])
    predicted = run.predicting(t)(x)
    if peers.prediction_type(run.scheduler) == "flow_prediction":
        # eps = x + (1 - t) v. Unlike at the beginning, there is something of a picture to tell it from x.
        predicted = tuple(x + peers.level_at(run.scheduler, t).signal * velocity for velocity in predicted)
    return peers.alignment(*predicted)


def anisotropy(run: Watched, *, scaled: bool) -> Tensor:
    kind, norm = peers.prediction_type(run.scheduler), run.mean_norm(1)
    if scaled:  # what the norm would be on the latents that the weights were chosen on
        norm = norm * (peers.PUBLISHED_LATENT[kind] / run.steps[0].x[0].numel()) ** 0.5
    return peers.anisotropy(norm, late_alignment(run), peers.ANISOTROPY_WEIGHTS[kind])


def first_entropy(run: Watched) -> Tensor:
    return peers.attention_entropy(peers.half_size_layer(run.steps[0].attention))


def late_entropy(run: Watched) -> Tensor:
    attention = torch.stack([torch.stack(list(step.attention.values())).mean(0) for step in run.steps])
    return peers.late_entropy(attention, run.lengths)


NO_WEIGHTS = "weights were published for Stable Diffusion 1 and 2 alone"
NO_CROSS_ATTENTION = "picture and text share one attention, so that no layer attends to the text alone"

PEERS = {
    "Wen, first step": Peer(lambda run: run.mean_norm(1), 1),
    "Wen, whole run": Peer(lambda run: run.mean_norm(), None),
    "Jeon, sharpness": Peer(sharpness, 1),
    "Asthana, alignment alone": Peer(late_alignment, 1),
    "Asthana, weights as published": Peer(lambda run: anisotropy(run, scaled=False), 1, NO_WEIGHTS),
    "Asthana, norm scaled to latent size": Peer(lambda run: anisotropy(run, scaled=True), 1, NO_WEIGHTS),
    "Hessian difference": Peer(hessian_difference, 1),
    "DSM, first to second step": Peer(lambda run: score_change(run, 0), 2),
    "DSM, second to third step": Peer(lambda run: score_change(run, 1), 3),
    "Ren, entropy, first step": Peer(first_entropy, 1, NO_CROSS_ATTENTION),
    "Ren, entropy, last fifth": Peer(late_entropy, None, NO_CROSS_ATTENTION),
}


@dataclass
class Scored:
    """One score of some images, ``[N]``, and what each cost in calls of the network beyond those of sampling."""

    values: np.ndarray
    calls: list[Calls]


def verdicts(pipe: Any, profile: StabilityProfile, images: Sequence[Shot], how: dict[str, Any]) -> Scored:
    """How rare an ordinary prompt with as much is, ``-log(p-value)``, from the first step of every run.

    One image at a time: whether the network is asked is decided for a batch. A guard that sees a prompt encoded looks for the
    words that call a copy up as well; that is no part of the verdict, so it does not see it here.
    """
    encode = pipe.encode_prompt

    def interrupt(pipe: Any, _step: int, _timestep: Any, latents: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return latents

    values, calls = [], []
    for shot in tqdm(images, desc=VERDICT, unit="image"):
        with shots.counted(pipe) as counted, guard(pipe, profile) as run, replaced(pipe, "encode_prompt", encode):
            shots.latents_of(pipe, [shot], **how, callback_on_step_end=interrupt)
        if run.error is not None:
            raise run.error
        (trace,) = run.traces
        assert trace.p_value is not None, trace.note
        values.append(-np.log(trace.p_value))
        calls.append(Calls(counted.forward - 1, counted.jvp, counted.backward))
    return Scored(np.array(values), calls)


def peer_scores(pipe: Any, images: Sequence[Shot], how: dict[str, Any], batch: int, names: Sequence[str]) -> dict[str, Scored]:
    """The named scores, all of the same runs."""
    found = {name: Scored(np.empty(0), []) for name in names}
    for start in tqdm(range(0, len(images), batch), desc="peers", unit="batch"):
        part = images[start : start + batch]
        with peers.watched(pipe, part) as run:
            shots.latents_of(pipe, part, **how)
        for name, scored in found.items():
            with shots.counted(pipe) as calls:
                values = PEERS[name].score(run)
            scored.values = np.concatenate([scored.values, values.double().numpy()])
            scored.calls += [calls] * len(part)
    return found


def inapplicable(pipe: Any) -> dict[str, str]:
    """The scores that do not apply to a model, and why."""
    flow = peers.prediction_type(pipe.scheduler) == "flow_prediction"
    return {name: peer.not_flow for name, peer in PEERS.items() if flow and peer.not_flow}


def figures(scores: dict[str, Scored], images: Sequence[Shot]) -> dict[str, Any]:
    """By group and score: median, extra calls an image, and against the ordinary images AUC and TPR at 1 % FPR."""
    groups = np.array([shot.group for shot in images])
    texts = np.array([shot.prompt for shot in images])
    ordinary = groups == "ordinary"
    result: dict[str, Any] = {}
    for group in dict.fromkeys(shot.group for shot in images):
        here = groups == group
        rows: dict[str, Any] = {}
        for name, scored in scores.items():
            of_group = [scored.calls[number] for number in np.flatnonzero(here)]
            rows[name] = {
                "median": float(np.median(scored.values[here])),
                "extra_calls": {kind: float(np.mean([getattr(c, kind) for c in of_group])) for kind in vars(of_group[0])},
            }
            if group != "ordinary":
                sides = (scored.values[here], scored.values[ordinary], texts[here].tolist(), texts[ordinary].tolist())
                rows[name] |= detection_with_intervals(*sides)
        result[group] = {"images": int(here.sum()), "prompts": len(set(texts[here])), "scores": rows}
    return result


def main() -> None:
    parser = lab_arguments(__doc__, batch=20)
    parser.add_argument("--split", default="evaluation", choices=["tuning", "evaluation"])
    parser.add_argument(
        "--images", nargs=len(IMAGES), type=int, default=[*IMAGES.values()], metavar="N", help=", ".join(IMAGES)
    )
    arguments = parser.parse_args()
    lab, pipe, steps = sampled_lab(arguments)
    how = {"num_inference_steps": steps, "guidance_scale": arguments.guidance}
    counts = dict(zip(IMAGES, arguments.images, strict=True))
    images = [shot for group, count in counts.items() for shot in shots.shots(lab, arguments.split, [group], count)]
    left_out = inapplicable(pipe)
    references = lab.prompts("reference")
    profile = calibrate(pipe, references, batch_size=arguments.batch, **how)
    scores = {VERDICT: verdicts(pipe, profile, images, how)}
    scores |= peer_scores(pipe, images, how, arguments.batch, [name for name in PEERS if name not in left_out])
    result = {
        "model": arguments.model.name,
        "prediction_type": peers.prediction_type(pipe.scheduler),
        "split": arguments.split,
        "sampler": arguments.sampler,
        "guidance": arguments.guidance,
        "references": len(references),
        "steps": {name: 1 if name == VERDICT else PEERS[name].steps or steps for name in scores},
        "left_out": left_out,
        "groups": figures(scores, images),
    }
    write_result(result, arguments.json)


if __name__ == "__main__":
    main()
