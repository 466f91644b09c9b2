"""How other methods avoid copies, written from their papers, with the shapes and names of ``peers.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from peers import as_noise, guidance_norm, noise_predictions
from shots import GUIDANCE, Shot
from torch import Tensor

from memorization_guard.core.noise_level import sample_norm


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


class _SummaryMasked:
    """An attention processor of :func:`attention_masked`."""

    def __init__(self, lengths: Tensor, begin: float) -> None:
        self._lengths, self._begin = lengths, begin

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            layer(given).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, given in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        prompted = len(key) // 2  # those without the prompt come first
        key[prompted:, :, 0] *= self._begin  # and its logits with it
        places = torch.arange(key.shape[2], device=key.device)
        kept = (places < self._lengths.to(key.device).repeat(2)[:, None])[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=attn.scale)
        return attn.to_out[0](found.transpose(1, 2).flatten(2))


@contextmanager
def attention_masked(pipe: Any, part: Sequence[Shot], *, begin: float = 1.25) -> Iterator[None]:
    """In the block no cross-attention looks at the padding behind a prompt, and its logits for the begin token are ``begin``
    times as large (Ren et al., ECCV 2024, with the constant of their code).

    The paper masks the end token too. Their published command does not, and the same mask is put on the empty prompt; so here.
    """
    tokens = pipe.tokenizer([shot.prompt for shot in part], truncation=True).input_ids
    processor = _SummaryMasked(torch.tensor([len(of_prompt) for of_prompt in tokens]), begin)
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: processor if ".attn2." in name else kept for name, kept in before.items()})
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)
