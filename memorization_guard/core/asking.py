"""Asking the network beside a run: what it says in noise to the run's prompts, and to others in their place.

The noise is the same for all prompts, and each is asked in it and in its negative: what the mean of the two answers has in
detail comes from the prompt and not from the noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .judge import Judge
from .signals import Meter
from .words import Memory, Words

#: Latent, noise level, and the predictions with and without the prompt, each as ``StabilityMonitor.predicted`` takes them.
Answer = tuple[Tensor, Tensor | float, Tensor, Tensor | None]


class Ask(Protocol):
    """What a host offers that can have the network evaluate something beside a run."""

    def __call__(self, noise: Tensor | None, /, *, alone: bool = False) -> Answer:
        """Evaluates Gaussian noise ``[B, ...]`` at the model's highest noise level, or with ``None`` the run's present latent
        once more; ``alone`` if the prediction with the prompt is enough, so that the other one need not be made."""
        ...


#: What this process has found.
_memory = Memory()


class Prompts(Protocol):
    """What a host offers that can have the network evaluate other prompts in the place of a run's own."""

    @property
    def texts(self) -> Sequence[str]:
        """The prompt of every sample, ``[B]``."""
        ...

    def ask(self, noise: Tensor, sample: int, texts: Sequence[str]) -> tuple[Tensor, Tensor | float, Tensor]:
        """Evaluates Gaussian noise, one latent without the batch axis, at the model's highest noise level with other prompts
        in the place of a sample's: gives latents ``[N, ...]``, noise level, and the predictions with those prompts."""
        ...

    def go_on(self, texts: Mapping[int, str]) -> Tensor:
        """From now on samples the given samples with other prompts; gives the predictions with the prompt ``[B, ...]`` of the
        run's present evaluation once more."""
        ...


def noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """The noise that prompts are asked in, one latent of a shape; from its own generator."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Some networks draw at random (merged tokens): the sampler is to draw what it would have drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def answered(ask: Ask, noise: Tensor, *, alone: bool) -> Answer:
    """As ``ask`` gives it, the mean of the predictions in the noise ``[B, ...]`` and in its negative."""
    (x, sigma, *first), (_, _, *second) = ask(noise, alone=alone), ask(-noise, alone=alone)
    cond, uncond = (None if a is None or b is None else (a + b) / 2 for a, b in zip(first, second, strict=True))
    assert cond is not None
    return x, sigma, cond, uncond


def words_of(
    samples: Iterable[int],
    prompts: Prompts,
    noise: Tensor,
    scale: float,
    judge: Judge,
    model: str | None,
) -> dict[int, Words]:
    """The words that call a copy up, of each sample where they can be told.

    Args:
        noise: one latent, without the batch axis. scale: the guidance scale that predictions are combined at.
        judge: of the run.
        model: fingerprint of the network's weights, where the words are to be remembered for further runs.
    """
    known: dict[str, Words | None] = {}
    found = {}
    assert judge.answers is not None
    for sample in samples:

        def details(texts: Sequence[str], sample: int = sample) -> np.ndarray:
            (x, sigma, first), (*_, second) = (prompts.ask(one, sample, texts) for one in (noise, -noise))
            return judge.detail(Meter().measure(x, sigma, (first + second) / 2, None, scale))

        text = prompts.texts[sample]
        if text not in known:
            known[text] = _memory.find(model and (model, tuple(noise.shape)), text, details, judge.answers)
        if (words := known[text]) is not None:
            found[sample] = words
    return found
