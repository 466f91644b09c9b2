"""What other methods compute, written from their papers, and how the benchmarks of this folder sample and measure.

Shapes: ``B`` images, latents and noise predictions ``[B, C, H, W]``, embeddings of prompts ``[B, tokens, width]``, one number
an image ``[B]``. ``eps_u`` and ``eps_c`` are the noise predicted without and with the prompt, whatever the network puts out.
``t`` is a training timestep. Latents are on the VP scale, as with PNDM, DDIM and DPM-Solver.

Where a paper leaves something to its code, the docstring says what was taken, and where this differs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from memorization_guard import StabilityProfile
from memorization_guard.core.noise_level import NoiseLevel, sample_norm
from memorization_guard.diffusers import calibrate
from memorization_guard.lab import MODEL, Lab
from memorization_guard.lab.evaluate import FIRST_SEED
from memorization_guard.lab.world import DATA

GUIDANCE = 7.5

#: Numbers in a latent of Stable Diffusion 1 and 2 at the sizes the published constants were chosen at, by prediction type.
#: The norm of a noise prediction grows with the root of this count, and so must a constant that it is held against.
PUBLISHED_LATENT = {"epsilon": 4 * 64 * 64, "v_prediction": 4 * 96 * 96}


# Formulas.


def level_at(scheduler: Any, t: int) -> NoiseLevel:
    """The noise level of a training timestep."""
    return NoiseLevel.from_alpha_bar(float(scheduler.alphas_cumprod[t]))


def as_noise(scheduler: Any, x: Tensor, t: int, output: Tensor) -> tuple[Tensor, Tensor]:
    """``eps_u`` and ``eps_c`` from the output for ``x``, which holds both in one batch: ``[2B, ...] -> [B, ...]`` each.

    A velocity is ``v = alpha eps - beta x0`` (Salimans & Ho 2022, appendix D), so ``eps = beta x + alpha v``.
    """
    if scheduler.config.prediction_type == "v_prediction":
        level = level_at(scheduler, t)
        output = level.beta * torch.cat([x, x]) + level.alpha * output
    eps_u, eps_c = output.chunk(2)
    return eps_u, eps_c


def noise_predictions(pipe: Any, x: Tensor, t: int, uncond: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
    """``eps_u`` and ``eps_c`` of latents ``x``; one call of the network, as guidance makes it."""
    output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([uncond, cond]), return_dict=False)[0]
    return as_noise(pipe.scheduler, x, t, output)


def guidance_norm(eps_u: Tensor, eps_c: Tensor) -> Tensor:
    """``|eps_c - eps_u|``, ``[B]`` (Wen et al., ICLR 2024, section 3.3); their score is its mean over steps."""
    return sample_norm(eps_c - eps_u)


def sharpness(pipe: Any, x: Tensor, t: int, uncond: Tensor, cond: Tensor, delta: Tensor) -> Tensor:
    """``|(H_c - H_u) s_delta|``, ``[B]`` (Jeon et al., ICML 2025).

    ``H`` is the Hessian of the log probability, the Jacobian of the score ``s = -eps / sqrt(1 - abar)``, and ``s_delta``
    the difference of both scores. One product of Jacobian and vector in forward mode; ``delta`` is ``eps_c - eps_u`` at ``x``,
    which guidance has computed.
    """
    noise = level_at(pipe.scheduler, t).noise
    # Only torch's plain attention can be differentiated in forward mode.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        eps_u, eps_c = noise_predictions(pipe, forward_ad.make_dual(x, -delta / noise), t, uncond, cond)
        product = forward_ad.unpack_dual(eps_u - eps_c).tangent / noise
    return sample_norm(product)


def alignment(eps_u: Tensor, eps_c: Tensor) -> Tensor:
    """``cos(eps_u, eps_c - eps_u)``, ``[B]`` (Asthana & Belagiannis, ICLR 2026).

    As their code takes it: of the channels at each place, then the mean over places. To be given predictions for a late
    timestep, where little noise is expected, of a latent that is pure noise.
    """
    return F.cosine_similarity(eps_u, eps_c - eps_u, dim=1).mean((1, 2))


def anisotropy(norm: Tensor, cosine: Tensor, weights: tuple[float, float]) -> Tensor:
    """``g1 |eps_c - eps_u| + g2 cos``, ``[B]`` (Asthana & Belagiannis, ICLR 2026): the norm at the first timestep."""
    return weights[0] * norm + weights[1] * cosine


#: ``(g1, g2)`` of Asthana & Belagiannis for Stable Diffusion 1 and 2, by prediction type.
ANISOTROPY_WEIGHTS = {"epsilon": (1.0, 2.0), "v_prediction": (1.0, 0.1)}


def optimised_prompt(
    pipe: Any, x: Tensor, t: int, uncond: Tensor, cond: Tensor, *, target: float, iterations: int = 10, lr: float = 0.05
) -> Tensor:
    """Embeddings with a smaller guidance norm at the first step (Wen et al., ICLR 2024, mitigation at inference).

    AdamW on the embedding of each image for itself, at most ``iterations`` steps, none once its norm is at ``target`` or
    below; the first token gets no gradient, only the optimiser's slight decay. Their code takes one norm of all images of a
    prompt together.
    """
    embedding = cond.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([embedding], lr=lr)
    above = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        with torch.enable_grad():
            norm = guidance_norm(*noise_predictions(pipe, x, t, uncond, embedding))
        above &= norm.detach() > target
        if not above.any():
            break
        (embedding.grad,) = torch.autograd.grad(norm.sum(), embedding)
        embedding.grad[:, 0] = 0
        before = embedding.detach().clone()
        optimizer.step()
        with torch.no_grad():
            embedding.copy_(torch.where(above.view(-1, 1, 1), embedding, before))
    return embedding.detach()


def sail_loss(pipe: Any, x: Tensor, t: int, uncond: Tensor, cond: Tensor, weight: float) -> Tensor:
    """``|delta(x + delta(x) / |delta(x)|)| + weight |x|``, ``[B]``, with ``delta = eps_c - eps_u`` (Jeon et al., Algorithm 2).

    The first term stands for the sharpness at ``x``, the second keeps ``x`` a likely noise. As in their code, but for the
    direction: theirs stays that of the latent before the first iteration, this one follows the latent.
    """

    def delta(latent: Tensor) -> Tensor:
        eps_u, eps_c = noise_predictions(pipe, latent, t, uncond, cond)
        return eps_c - eps_u

    direction = delta(x)
    direction = direction / sample_norm(direction).view(-1, 1, 1, 1)
    return sample_norm(delta(x + direction)) + weight * sample_norm(x)


def sail(
    pipe: Any,
    x: Tensor,
    t: int,
    uncond: Tensor,
    cond: Tensor,
    *,
    threshold: float,
    weight: float,
    steps: int = 10,
    lr: float = 0.05,
) -> Tensor:
    """A starting latent of less sharpness (SAIL, Jeon et al., ICML 2025, Algorithm 2).

    Adam on each image's latent, at most ``steps`` steps, none once :func:`sail_loss` is at ``threshold`` or below. Their code
    goes on with other noises and a higher threshold until every image has got there; this keeps what it has after ``steps``,
    so that a seed stays that seed.
    """
    latent = x.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=lr)
    above = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        with torch.enable_grad():
            loss = sail_loss(pipe, latent, t, uncond, cond, weight)
        above &= loss.detach() > threshold
        if not above.any():
            break
        (latent.grad,) = torch.autograd.grad(loss.sum(), latent)
        before = latent.detach().clone()
        optimizer.step()
        with torch.no_grad():
            latent.copy_(torch.where(above.view(-1, 1, 1, 1), latent, before))
    return latent.detach()


#: Decides on the guidance scales ``[B]`` of one call from its timestep and guidance norms ``[B]``.
GuidanceRule = Callable[[int, Tensor], Tensor]


def static_transition(*, until: int = 500, before: float = 0.0, after: float = GUIDANCE) -> GuidanceRule:
    """Guidance ``before`` above timestep ``until``, then ``after`` (Jain et al., CVPR 2025, static transition point)."""
    return lambda t, norms: torch.full_like(norms, before if t > until else after)


def dynamic_transition(*, before: float = 1.0, after: float = GUIDANCE) -> GuidanceRule:
    """Guidance ``before`` until the guidance norm has passed a local minimum, then ``after`` (Jain et al., CVPR 2025).

    The rule serves one run. PNDM evaluates one timestep twice; only the second evaluation counts, since the two could form a
    minimum by themselves.
    """
    history: dict[int, Tensor] = {}

    def rule(t: int, norms: Tensor) -> Tensor:
        history[t] = norms
        passed = local_minimum_passed(torch.stack(list(history.values())))
        return torch.where(passed, after, before)

    return rule


def local_minimum_passed(norms: Tensor) -> Tensor:
    """Whether a series has a local minimum before its last value: ``[steps, B] -> [B]`` bool."""
    falls, rises = norms[1:-1] < norms[:-2], norms[1:-1] < norms[2:]
    return (falls & rises).any(0)


# Changing and recording a pipeline's run.


@contextmanager
def guided_by(pipe: Any, rule: GuidanceRule) -> Iterator[None]:
    """Every guided prediction in the block is made with the scales that ``rule`` gives, instead of the pipeline's own.

    The conditional prediction is moved so that the pipeline's own scale gives what the rule's scale would give. Where both
    scales are the same, nothing changes, not even by rounding.
    """

    def hook(_module: Any, arguments: Any, output: Any) -> Any:
        t = int(arguments[1])
        norms = guidance_norm(*as_noise(pipe.scheduler, arguments[0].chunk(2)[0], t, output[0]))
        share = (rule(t, norms) / pipe.guidance_scale).view(-1, 1, 1, 1)
        uncond, cond = output[0].chunk(2)
        return (torch.cat([uncond, torch.where(share == 1, cond, uncond + share * (cond - uncond))]), *output[1:])

    handle = pipe.unet.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Watched:
    """Inputs and outputs of the network in one run of a pipeline.

    Attributes:
        norms: guidance norm ``[B]`` by timestep, in the order of the run.
        x, t, eps_u, eps_c: latent, timestep and predictions of the first call. uncond, cond: the prompts' embeddings.
    """

    norms: dict[int, Tensor] = field(default_factory=dict)
    x: Any = None
    t: int = -1
    eps_u: Any = None
    eps_c: Any = None
    uncond: Any = None
    cond: Any = None

    def mean_norm(self, steps: int | None = None) -> Tensor:
        """Mean guidance norm over the first ``steps`` steps, or all: ``[B]``."""
        return torch.stack(list(self.norms.values())[:steps]).mean(0)


@contextmanager
def watched(pipe: Any) -> Iterator[Watched]:
    """Records what the scores need from the one run in the block, without further calls of the network."""
    run = Watched()

    def hook(_module: Any, arguments: Any, keywords: Any, output: Any) -> None:
        x, t = arguments[0].chunk(2)[0], int(arguments[1])
        eps_u, eps_c = as_noise(pipe.scheduler, x, t, output[0])
        run.norms[t] = guidance_norm(eps_u, eps_c)
        if run.x is None:
            run.x, run.t, run.eps_u, run.eps_c = x.clone(), t, eps_u, eps_c
            run.uncond, run.cond = keywords["encoder_hidden_states"].chunk(2)

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield run
    finally:
        handle.remove()


# What the benchmarks share: which images, how they are sampled, and what a way of sampling costs.

SCHEDULERS = ("PNDM", "DDIM", "DPMSolverMultistep")


#: Images a prompt, by group.
IMAGES = {"exact": 8, "template": 12, "rare": 4, "ordinary": 2}


@dataclass(frozen=True)
class Shot:
    """One image to be sampled."""

    group: str
    prompt: str
    seed: int


def shots(lab: Lab, split: str, groups: Sequence[str], per_group: int | None = None) -> list[Shot]:
    """Images of every prompt, seeds counted up from those of ``lab.evaluate``. With a limit a group, as many prompts as
    possible come first."""
    result = []
    for group in groups:
        count = IMAGES[group]
        first = FIRST_SEED[split] + 10_000 * list(IMAGES).index(group)
        texts = lab.prompts(group, split)
        members = [Shot(group, text, first + i * count + j) for j in range(count) for i, text in enumerate(texts)]
        result += members[:per_group]
    return result


def starting_latents(pipe: Any, part: Sequence[Shot]) -> Tensor:
    """The noise that a pipeline draws for these seeds: ``[B, C, H, W]``, drawn on the CPU so that devices agree."""
    size = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, size, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(shot.seed)) for shot in part]
    return torch.cat(noise).to(pipe.device)


def embeddings(pipe: Any, part: Sequence[Shot]) -> tuple[Tensor, Tensor]:
    """The empty prompt's and the prompts' embeddings, as the pipeline makes them."""
    cond, uncond = pipe.encode_prompt([shot.prompt for shot in part], pipe.device, 1, True)
    return uncond, cond


def sample(pipe: Any, part: Sequence[Shot], steps: int, **replaced: Any) -> np.ndarray:
    """Images ``[B, H, W, 3]`` uint8; ``replaced`` are arguments of the pipeline to use instead."""
    arguments = {"prompt": [shot.prompt for shot in part], "latents": starting_latents(pipe, part)} | replaced
    images = pipe(num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np", **arguments).images
    return (images * 255).round().astype(np.uint8)


def set_up(lab: Lab, scheduler: str, steps: int) -> tuple[Any, StabilityProfile]:
    """The lab's pipeline with another scheduler if asked for, and a profile that fits it, calibrated if the lab has none."""
    import diffusers

    pipe = lab.pipeline()
    if scheduler == "PNDM" and steps == 50:
        return pipe, lab.profile()
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    texts = lab.prompts("reference")[:50]
    return pipe, calibrate(pipe, texts, batch_size=10, num_inference_steps=steps, guidance_scale=GUIDANCE)


@dataclass
class Calls:
    """Calls of the network: evaluations alone, products of its Jacobian with a vector, and passes backwards through it."""

    forward: int = 0
    jvp: int = 0
    backward: int = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Calls]:
    """Counts the calls in a block. Two prompts in one batch, as guidance has them, are one call."""
    calls = Calls()

    def passed_back(_gradient: Tensor) -> None:
        calls.backward += 1

    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        if forward_ad.unpack_dual(output[0]).tangent is not None:
            calls.jvp += 1
        else:
            calls.forward += 1
        if output[0].requires_grad:
            output[0].register_hook(passed_back)

    handle = pipe.unet.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def peak_memory(call: Callable[[], object]) -> int:
    """The peak size of all CPU tensors during ``call``, in bytes, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def costs(pipe: Any, ways: dict[str, Callable[[list[Shot]], object]], images: Sequence[Shot]) -> dict[str, dict[str, Any]]:
    """What each way of sampling costs beyond the way named ``"plain"``, one image at a time.

    All ways take their turn at each image, in another order each time, so that other load on the machine affects all alike.

    Returns:
        By way ``time_ratio``, the median ratio to plain, and ``time_ratio_95``, its bootstrap interval over the images;
        ``extra_calls``, means an image; ``extra_memory``, of the first image, in bytes.
    """
    names = list(ways)
    for way in ways.values():
        way([images[0]])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, list[Calls]] = {name: [] for name in names}
    for turn, shot in enumerate(images):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with counted(pipe) as count:
                start = time.perf_counter()
                ways[name]([shot])
                seconds[name].append(time.perf_counter() - start)
            calls[name].append(count)
    memory = {name: peak_memory(lambda way=way: way([images[0]])) for name, way in ways.items()}
    rng = np.random.default_rng(0)
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        ratios = np.array(seconds[name]) / np.array(seconds["plain"])
        drawn = np.median(ratios[rng.integers(len(ratios), size=(400, len(ratios)))], axis=1)
        result[name] = {
            "time_ratio": float(np.median(ratios)),
            "time_ratio_95": np.quantile(drawn, [0.025, 0.975]).tolist(),
            "extra_calls": {
                kind: statistics.fmean(getattr(c, kind) for c in calls[name])
                - statistics.fmean(getattr(c, kind) for c in calls["plain"])
                for kind in ("forward", "jvp", "backward")
            },
            "extra_memory": memory[name] - memory["plain"],
        }
    result["plain"]["seconds"] = statistics.median(seconds["plain"])
    result["plain"]["memory"] = memory["plain"]
    return result


def describe(cost: dict[str, Any]) -> list[str]:
    """The cells of a table: extra calls, time, extra memory."""
    named = {"forward": "", "jvp": " JVP", "backward": " backward"}
    calls = [f"{count:.4g}{named[kind]}" for kind, count in cost["extra_calls"].items() if count]
    low, high = cost["time_ratio_95"]
    memory = max(0, cost["extra_memory"]) / 2**20
    return [", ".join(calls) or "0", f"{cost['time_ratio']:.3f} ({low:.3f}-{high:.3f})", f"{memory:.1f} MiB"]


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The options that ``detection.py`` and ``mitigation.py`` share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a lab model's folder")
    parser.add_argument("--world", type=Path, default=DATA, help="the world it was trained on")
    parser.add_argument("--split", default="tuning", choices=["tuning", "evaluation"])
    parser.add_argument("--per-group", type=int, help="so many images a group, instead of all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="PNDM", choices=SCHEDULERS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def conditions(arguments: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """What the figures were made with, for their file."""
    return {
        "model": arguments.model.name,
        "prediction_type": str(pipe.scheduler.config.prediction_type),
        "split": arguments.split,
        "scheduler": arguments.scheduler,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
    }


def print_counts(groups: dict[str, dict[str, Any]]) -> None:
    """How many images and prompts the figures rest on."""
    print(", ".join(f"{group}: {row['images']} images of {row['prompts']} prompts" for group, row in groups.items()))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def interval(values: dict[str, Any], name: str, digits: int = 3) -> str:
    """A figure of ``memorization_guard.statistics`` with its interval, as text."""
    low, high = values[f"{name}_95"]
    return f"{values[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
