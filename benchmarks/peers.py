"""How other methods tell copies: their scores, written from their papers, and what of a run they are computed from.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from shots import Shot
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from memorization_guard.adapters.network import Call, answer, called_with, denoisers
from memorization_guard.core.noise_level import NoiseLevel, Timesteps, sample_norm

#: Numbers in a latent of Stable Diffusion 1 and 2 at the sizes the published constants were chosen at, by prediction type.
#: The norm of a noise prediction grows with the root of this count, and so must a constant that it is held against.
PUBLISHED_LATENT = {"epsilon": 4 * 64 * 64, "v_prediction": 4 * 96 * 96}


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
