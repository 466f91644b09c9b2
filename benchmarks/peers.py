"""What other methods compute, written from their papers, and how the benchmarks of this folder sample and measure.

Shapes: ``B`` images, latents and noise predictions ``[B, C, H, W]``, embeddings of prompts ``[B, tokens, width]``, one number
an image ``[B]``. ``eps_u`` and ``eps_c`` are the noise predicted without and with the prompt, whatever the network puts out.
``t`` is a training timestep. Latents are as the network is given them: on the VP scale, or those of a rectified flow.

A rectified flow begins in pure noise, where the noise to be predicted is the latent itself, whatever the prompt: the scores
with and without it are the same, and so is whatever is made of their difference. Of such a model the velocity ``v = eps - x0``
stands in the place of ``eps`` at every step (ours); no paper says what to do.

Where a paper leaves something to its code, the docstring says what was taken, and where this differs.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from memorization_guard.adapters.hooks import replaced
from memorization_guard.adapters.network import Call, answer, called_with, denoisers
from memorization_guard.core.noise_level import NoiseLevel, Timesteps, sample_norm
from memorization_guard.lab import Lab
from memorization_guard.lab.evaluate import FIRST_SEED

GUIDANCE = 7.5

#: Numbers in a latent of Stable Diffusion 1 and 2 at the sizes the published constants were chosen at, by prediction type.
#: The norm of a noise prediction grows with the root of this count, and so must a constant that it is held against.
PUBLISHED_LATENT = {"epsilon": 4 * 64 * 64, "v_prediction": 4 * 96 * 96}


# Formulas.


#: What the network predicts of latents without and with the prompt, ``eps_u`` and ``eps_c``, at one timestep.
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]


def prediction_type(scheduler: Any) -> str:
    """What the network of a scheduler predicts; those of rectified flows do not say."""
    return str(scheduler.config.get("prediction_type", "flow_prediction"))


def level_at(scheduler: Any, t: float) -> NoiseLevel:
    """The noise level of a training timestep."""
    if prediction_type(scheduler) == "flow_prediction":
        return NoiseLevel.from_flow(t / scheduler.config.num_train_timesteps)
    return Timesteps(scheduler.alphas_cumprod).level(t)


def as_noise(scheduler: Any, x: Tensor, t: float, output: Tensor) -> tuple[Tensor, Tensor]:
    """``eps_u`` and ``eps_c`` from the output for ``x``, which holds both in one batch: ``[2B, ...] -> [B, ...]`` each.

    A velocity is ``v = alpha eps - beta x0`` (Salimans & Ho 2022, appendix D), so ``eps = beta x + alpha v``. That of a
    rectified flow is left as it is: see the head of this file.
    """
    if prediction_type(scheduler) == "v_prediction":
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


def sharpness(predict: Predict, x: Tensor, delta: Tensor, noise: float) -> Tensor:
    """``|(H_c - H_u) s_delta|``, ``[B]`` (Jeon et al., ICML 2025).

    ``H`` is the Hessian of the log probability, the Jacobian of the score ``s = -eps / noise`` with
    ``noise = sqrt(1 - abar)``, and ``s_delta`` the difference of both scores. One product of Jacobian and vector in forward
    mode; ``delta`` is ``eps_c - eps_u`` at ``x``, which guidance has computed.
    """
    # Only torch's plain attention can be differentiated in forward mode.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        eps_u, eps_c = predict(forward_ad.make_dual(x, -delta / noise))
        product = forward_ad.unpack_dual(eps_u - eps_c).tangent / noise
    return sample_norm(product)


def hessian_difference(predict: Predict, x: Tensor, noise: float) -> Tensor:
    """``|H_c s_c - H_u s_u|``, ``[B]`` (anonymous, ICML 2026, github.com/randomnameforicml/icml-2026, "Metric 2").

    Scores and Hessians as for :func:`sharpness`, at the first step. A Hessian is symmetric, so ``H s`` is the gradient of
    ``|s|^2 / 2``: the score is ``|grad(|eps_c|^2 - |eps_u|^2)| / (2 noise^2)``, one pass backwards. The paper was not at
    hand; this follows the code, which squares the norm and leaves ``noise`` out: the order of the images is the same. What a
    network predicts need not be a gradient, nor its Jacobian symmetric: the pass backwards takes the transposed one, there and
    here.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        eps_u, eps_c = predict(x)
        (gradient,) = torch.autograd.grad((eps_c.square().sum() - eps_u.square().sum()) / 2, x)
    return sample_norm(gradient) / noise**2


def score_change(before: Tensor, after: Tensor) -> Tensor:
    """``|eps_c(x_1, t_1) - eps_c(x_0, t_0)|``, ``[B]`` (DSM; anonymous, ICML 2026, as above), in units of the noise.

    The change of the conditional prediction from one solver step to the next, along the guided run. The repository calls it
    the change of the score and takes that of the predicted noise, without the factor ``-1 / noise``, which differs between
    the steps; this does the same. It squares the norm: the order of the images is the same. Measured there with DDIM and 50
    steps, of the first step and the second, and of the second and the third, which did better; with fewer steps, as here,
    both are further apart.
    """
    return sample_norm(after - before)


def attention_entropy(attention: Tensor) -> Tensor:
    """``E = -sum_i a_i log a_i`` in nats, of the attention that each token gets: ``[..., tokens] -> [...]``.

    Ren et al., ECCV 2024, arXiv 2403.11052, and github.com/renjie3/MemAttn. ``a`` is the mean over heads, places and layers
    (not the mean of entropies), of the pass with the prompt, over all tokens, begin and padding among them. A memorized prompt
    has the higher entropy: an ordinary one looks at its begin token most. Two scores are made of it: this one at the first
    step of one layer, and :func:`late_entropy`. The layer: see :func:`half_size_layer`.
    """
    return torch.special.entr(attention).sum(-1)


def half_size_layer(attention: Mapping[str, Tensor]) -> Tensor:
    """Of a UNet's layers by name, the last one on the way down where the picture has half the latent's size.

    Ren et al. take the fourth of Stable Diffusion's six layers on the way down, which is that one. Of the lab's UNet, which
    has no attention at full size, it is the first of two: a guess of ours, made before anything was measured.
    """
    return [layer for name, layer in attention.items() if name.startswith("down_blocks.1.")][-1]


def late_entropy(attention: Tensor, lengths: Tensor) -> Tensor:
    """``mean_late(E + S) - S_first``, ``[B]``, in nats (Ren et al., as above): entropy, and how that of the summary grows.

    ``S`` is the part of ``E`` that the summary tokens have: the end token and the padding after it. ``late`` are the last
    fifth of the steps, 40 to 49 of 50 in their code, 24 to 29 of 30 here; all layers. The paper was not at hand; this follows
    the code.

    Args:
        attention: that of each step, the mean over layers, heads and places, ``[steps, B, tokens]``.
        lengths: tokens of each prompt, begin and end among them, ``[B]``.
    """
    steps, _, tokens = attention.shape
    summary = torch.arange(tokens, device=attention.device) >= lengths[:, None] - 1
    late = attention[-max(1, round(steps / 5)) :]
    of_summary = torch.special.entr(late).mul(summary).sum(-1)
    at_first = torch.special.entr(attention[0]).mul(summary).sum(-1)
    return (attention_entropy(late) + of_summary).mean(0) - at_first


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


@dataclass(frozen=True)
class Evaluation:
    """One call of the network in a run.

    Attributes:
        x, t: latent and timestep that it was given. eps_u, eps_c: what it predicted.
        attention: attention on each token with the prompt, the mean over heads and places, ``[B, tokens]``, by layer.
    """

    x: Tensor
    t: float
    eps_u: Tensor
    eps_c: Tensor
    attention: dict[str, Tensor]

    @property
    def norm(self) -> Tensor:
        return guidance_norm(self.eps_u, self.eps_c)


@dataclass
class Watched:
    """What a pipeline's network was given, and predicted, in one run.

    Attributes:
        lengths: tokens of each prompt, begin and end among them, ``[B]``.
        evaluations: by timestep, in the order of the run. PNDM evaluates its second timestep twice, and the second one counts.
        call: the first call, with its embeddings.
    """

    scheduler: Any
    lengths: Tensor
    evaluations: dict[float, Evaluation] = field(default_factory=dict)
    call: Any = None

    @property
    def steps(self) -> list[Evaluation]:
        return list(self.evaluations.values())

    def mean_norm(self, steps: int | None = None) -> Tensor:
        """Mean guidance norm over the first ``steps`` steps, or all: ``[B]``."""
        return torch.stack([evaluation.norm for evaluation in self.steps[:steps]]).mean(0)

    def predicting(self, t: float) -> Predict:
        """The network with the run's prompts, at a timestep."""

        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            _, timestep = called_with(self.call.arguments, self.call.keywords)
            output = self.call.again(torch.cat([x, x]), torch.full_like(timestep, t))
            return as_noise(self.scheduler, x, t, output)

        return predict


@contextmanager
def watched(pipe: Any, part: Sequence[Shot]) -> Iterator[Watched]:
    """Records what the scores need from the one run of ``part`` in the block, without further calls of the network."""
    (network,) = denoisers(pipe)
    tokens = pipe.tokenizer([shot.prompt for shot in part], truncation=True).input_ids
    run = Watched(pipe.scheduler, torch.tensor([len(of_prompt) for of_prompt in tokens]))
    attention: dict[str, Tensor] = {}

    def attended(name: str, layer: Any, arguments: Any, keywords: Any) -> None:
        _, text = keywords["encoder_hidden_states"].chunk(2)
        _, places = arguments[0].chunk(2)
        query, key = (layer.head_to_batch_dim(part) for part in (layer.to_q(places), layer.to_k(text)))
        attention[name] = layer.get_attention_scores(query, key).unflatten(0, (len(text), -1)).mean((1, 2))

    def called(module: Any, arguments: Any, keywords: Any, output: Any) -> None:
        both, timestep = called_with(arguments, keywords)
        x, t = both.chunk(2)[0], float(timestep.max())
        run.call = run.call or Call(module, arguments, keywords, answer(output))
        run.evaluations[t] = Evaluation(x.clone(), t, *as_noise(pipe.scheduler, x, t, answer(output)), dict(attention))

    with ExitStack() as hooks:
        # A transformer's attention is joint, of picture and text; only a UNet's has layers for the text alone.
        layers = {name: layer for name, layer in network.named_modules() if name.endswith("attn2") and hasattr(pipe, "unet")}
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(functools.partial(attended, name), with_kwargs=True)
            hooks.callback(hook.remove)
        hooks.callback(network.register_forward_hook(called, with_kwargs=True).remove)
        yield run


# What the benchmarks share: which images, how they are sampled, and what a way of sampling costs.

#: Images a prompt, by group.
IMAGES = {"exact": 8, "template": 12, "rare": 4, "ordinary": 2, "settled": 2}


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
    config = denoisers(pipe)[0].config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(shot.seed)) for shot in part]
    return torch.cat(noise).to(pipe.device)


def embeddings(pipe: Any, part: Sequence[Shot]) -> tuple[Tensor, Tensor]:
    """The empty prompt's and the prompts' embeddings, as the pipeline makes them."""
    cond, uncond = pipe.encode_prompt([shot.prompt for shot in part], pipe.device, 1, True)
    return uncond, cond


def latents_of(pipe: Any, part: Sequence[Shot], **options: Any) -> Tensor:
    """Samples without decoding: the latents ``[B, C, H, W]`` that the pipeline hands on."""
    prompts = [shot.prompt for shot in part]
    return pipe(prompts, latents=starting_latents(pipe, part), output_type="latent", **options).images


def sample(pipe: Any, part: Sequence[Shot], steps: int, **instead: Any) -> np.ndarray:
    """Images ``[B, H, W, 3]`` uint8; ``instead`` are arguments of the pipeline to use instead."""
    arguments = {"prompt": [shot.prompt for shot in part], "latents": starting_latents(pipe, part)} | instead
    images = pipe(num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np", **arguments).images
    return (images * 255).round().astype(np.uint8)


@dataclass
class Calls:
    """Calls of the network: evaluations alone, products of its Jacobian with a vector, and passes backwards through it."""

    forward: int = 0
    jvp: int = 0
    backward: int = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Calls]:
    """Counts the calls in a block. Two prompts in one batch, as guidance has them, are one call, and so is a whole batch."""
    (network,) = denoisers(pipe)
    forward, calls = network.forward, Calls()

    def passed_back(_gradient: Tensor) -> None:
        calls.backward += 1

    def counting(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        if forward_ad.unpack_dual(output[0]).tangent is not None:
            calls.jvp += 1
        else:
            calls.forward += 1
        if output[0].requires_grad:
            output[0].register_hook(passed_back)
        return output

    # Not a hook: whoever has the network answer once more goes past the hooks.
    with replaced(network, "forward", counting):
        yield calls


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
