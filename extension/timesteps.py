"""The WebUI's timestep samplers (DDIM, PLMS, UniPC and their like), put in the core's terms.

They hold ``x`` on the VP scale, call the model with a timestep, get the noise back, and call back once a solver step, after
the update. The numbers of timesteps say nothing without the model, whose noise levels :class:`TimestepScale` knows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.adapters.kdiffusion import SamplerRun
from ..memorization_guard.core.noise_level import widened


class TimestepScale:
    """The noise levels of a model with discrete timesteps, and those in between as UniPC's noise schedule has them.

    Args:
        alphas_cumprod: ``abar`` of every timestep the model was trained on, ``[T]``.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self._log_signal = 0.5 * alphas_cumprod.detach().double().log()
        self._on_host: list[float] = self._log_signal.tolist()
        self._on_device: dict[torch.device, Tensor] = {}

    def level(self, t: float) -> NoiseLevel:
        """The noise level of timestep ``t``, in ``[0, T - 1]``."""
        t = min(max(t, 0.0), len(self._on_host) - 1)
        below = math.floor(t)
        above = min(below + 1, len(self._on_host) - 1)
        log_signal = self._on_host[below] + (t - below) * (self._on_host[above] - self._on_host[below])
        return NoiseLevel.from_alpha_bar(math.exp(2 * log_signal))

    def denoised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean latent that a noise prediction stands for, at least in float32.

        Args:
            x: the latent it was made from, ``[B, ...]``, on the VP scale. t: its timesteps, ``[B]``.
        """
        signal_level, noise_level = self._coefficients(t, x.ndim)
        return (x - noise_level * widened(noise)) / signal_level

    def noise(self, x: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
        """The inverse of :meth:`denoised`."""
        signal_level, noise_level = self._coefficients(t, x.ndim)
        return (x - signal_level * denoised) / noise_level

    def _coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficient at the timesteps, ``[B, 1, ...]`` in float32; does not wait for the device."""
        if (table := self._on_device.get(t.device)) is None:
            # Some devices know no float64.
            table = self._on_device[t.device] = self._log_signal.float().to(t.device)
        t = t.float().clamp(0, len(table) - 1)
        below = t.long()
        above = (below + 1).clamp_(max=len(table) - 1)
        signal = torch.lerp(table[below], table[above], t - below).exp_().view(-1, *(1,) * (ndim - 1))
        return signal, (1 - signal**2).sqrt_()


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Samples ``[B, 1, ...]`` in which two tensors ``[B, ...]`` differ.

    Going to another scale and back rounds, so that a sample that nobody changed has to be left as it came.
    """
    return (after != before).flatten(1).any(1).view(-1, *(1,) * (before.ndim - 1))


class TimestepRun(SamplerRun):
    """A run of a sampler that calls back after its update.

    Which noise level an update led to shows at the next evaluation. Where that is made from the very latent that was called
    back, it is the evaluation's own; a sampler that evaluates another one (UniPC, what it predicts) has done so there before.

    Args:
        monitor: takes in predictions and latents.
        levels: noise levels before every planned step and after the last.
        scale: those of the model's timesteps.
        x: the latent to begin with.
    """

    def __init__(self, monitor: StabilityMonitor, levels: Sequence[NoiseLevel], scale: TimestepScale, x: Tensor) -> None:
        super().__init__(monitor, levels, scale.level)
        self._scale = scale
        self._latent: Tensor | None = x  # called back, and not handed over yet
        self._last: NoiseLevel | None = None  # where the network was evaluated

    @contextlib.contextmanager
    def following(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """While it is entered, the run hears of every evaluation of ``denoiser(x, t, ...)`` before it is made."""
        hook = denoiser.register_forward_pre_hook(lambda _, arguments: self._evaluates(*arguments))
        try:
            yield
        finally:
            hook.remove()

    def predicted_noise(self, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None = None) -> Tensor:
        """As :meth:`predicted` for predictions of the noise; bit-identical in samples that are not corrected."""
        denoised = self._scale.denoised(x, t, cond)
        given = self.predicted(x, t, denoised, None if uncond is None else self._scale.denoised(x, t, uncond))
        if given is denoised:
            return cond
        return torch.where(changed(denoised, given), self._scale.noise(x, t, given).to(cond.dtype), cond)

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
