"""The WebUI's timestep samplers (DDIM, PLMS, UniPC and their like), put in the core's terms.

They hold ``x`` on the VP scale, call the model with a timestep, get the noise back, and call back once a solver step, after
the update. What a timestep means only the model knows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.adapters.kdiffusion import SamplerRun
from ..memorization_guard.core.asking import Answer, Ask, Prompts
from ..memorization_guard.core.noise_level import widened


def timestep_levels(alphas_cumprod: Tensor) -> Callable[[float], NoiseLevel]:
    """The noise level of a timestep in ``[0, T - 1]``, and of one in between as UniPC's noise schedule has it.

    Args:
        alphas_cumprod: ``abar`` of every timestep the model was trained on, ``[T]``.
    """
    log_signal: list[float] = (0.5 * alphas_cumprod.detach().double().log()).tolist()

    def level(t: float) -> NoiseLevel:
        t = min(max(t, 0.0), len(log_signal) - 1)
        below = math.floor(t)
        above = min(below + 1, len(log_signal) - 1)
        between = log_signal[below] + (t - below) * (log_signal[above] - log_signal[below])
        return NoiseLevel.from_alpha_bar(math.exp(2 * between))

    return level


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Samples ``[B, 1, ...]`` in which two tensors ``[B, ...]`` differ.

    Going to another scale and back rounds, so that a sample that nobody changed has to be left as it came.
    """
    return (after != before).flatten(1).any(1).view(-1, *(1,) * (before.ndim - 1))


def _denoised(x: Tensor, level: NoiseLevel, eps: Tensor) -> Tensor:
    """The clean latent that noise ``eps`` in a latent ``x`` on the VP scale stands for."""
    return (x - level.beta * widened(eps)) / level.alpha


class _DenoisedPrompts:
    """Prompts of a network that predicts noise, with the clean latents that the predictions stand for.

    Args:
        prompts: the network's. level: that of a timestep. x, at: the latent of the run's present evaluation, and its level.
    """

    def __init__(self, prompts: Prompts, level: Callable[[float], NoiseLevel], x: Tensor, at: NoiseLevel) -> None:
        self._prompts, self._level, self._x, self._at = prompts, level, x, at

    @property
    def texts(self) -> Sequence[str]:
        return self._prompts.texts

    def ask(self, noise: Tensor, sample: int, texts: Sequence[str]) -> tuple[Tensor, Tensor | float, Tensor]:
        x, t, cond = self._prompts.ask(noise, sample, texts)
        return x, t, _denoised(x, self._level(float(t)), cond)

    def go_on(self, texts: Mapping[int, str]) -> Tensor:
        return _denoised(self._x, self._at, self._prompts.go_on(texts))


class TimestepRun(SamplerRun):
    """A run of a sampler that calls back after its update.

    Which noise level an update led to shows at the next evaluation. Where that is made from the very latent that was called
    back, it is the evaluation's own; a sampler that evaluates another one (UniPC, what it predicts) has done so there before.

    Args:
        monitor: takes in predictions and latents.
        levels: noise levels before every planned step and after the last.
        level: that of a timestep.
        x: the latent to begin with.
    """

    def __init__(
        self, monitor: StabilityMonitor, levels: Sequence[NoiseLevel], level: Callable[[float], NoiseLevel], x: Tensor
    ) -> None:
        super().__init__(monitor, levels, level)
        self._latent: Tensor | None = x  # called back, and not handed over yet
        self._last: NoiseLevel | None = None  # where the network was evaluated

    @contextlib.contextmanager
    def evaluations_of(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """While it is entered, the run hears of every evaluation ``denoiser(x, t, ...)`` before it is made."""
        hook = denoiser.register_forward_pre_hook(lambda _, arguments: self._evaluates(*arguments))
        try:
            yield
        finally:
            hook.remove()

    def predicted_noise(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        *,
        ask: Ask | None = None,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """As :meth:`predicted` for predictions of the noise; bit-identical in samples that are not corrected."""
        assert self._last is not None
        signal, noise = self._last.alpha, self._last.beta

        def asked(unit: Tensor | None, *, alone: bool = False) -> Answer:
            assert ask is not None
            x, t, cond, uncond = ask(unit, alone=alone)
            level = self._level(float(t))
            return x, t, _denoised(x, level, cond), None if uncond is None else _denoised(x, level, uncond)

        denoised = _denoised(x, self._last, cond)
        without = None if uncond is None else _denoised(x, self._last, uncond)
        others = None if prompts is None else _DenoisedPrompts(prompts, self._level, x, self._last)
        given = self.predicted(x, t, denoised, without, ask=None if ask is None else asked, prompts=others)
        if given is denoised:
            return cond
        return torch.where(changed(denoised, given), ((x - signal * given) / noise).to(cond.dtype), cond)

    def stepped(self, info: Mapping[str, Any]) -> None:
        if self._last is not None:
            self._hand_over(self._last, evaluated=True)
        self._latent = info["x"]

    def finished(self, result: Tensor) -> None:
        self.monitor.latent(result, self._levels[-1], evaluated=False)

    def _evaluates(self, x: Tensor, t: Tensor) -> None:
        level = self._level(float(t.flatten()[0]))  # the sampler itself waits for the device
        if self._last is None or x is self._latent:
            self._hand_over(level, evaluated=False)
        else:
            self._hand_over(self._last, evaluated=True)
        self._last = level

    def _hand_over(self, level: NoiseLevel, *, evaluated: bool) -> None:
        """Hands the latent that was called back last over, if that is still due."""
        latent, self._latent = self._latent, None
        if latent is not None:
            self.monitor.latent(latent, level, evaluated=evaluated)
