"""Watching samplers in CompVis' form, as the WebUI has them (DDIM, PLMS, UniPC).

``sampler_function(model, x, timesteps, extra_args=..., callback=..., ...) -> x`` holds ``x`` on the VP scale, calls ``model(x,
t, **extra_args)``, which gives the guided noise prediction, and calls back once a solver step, after the update. Seen through
:class:`TimestepWatch` it is a sampler in k-diffusion's form, whose noise levels are timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.monitor import StabilityMonitor
from ..core.noise_level import NoiseLevel, where_changed, widened
from .kdiffusion import ModelProxy, SamplerWatch


class TimestepScale:
    """The noise levels of a model with discrete timesteps, and, in between, as UniPC's noise schedule has them.

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

    def coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficient at the timesteps ``[B]``, ``[B, 1, ...]`` float32; does not wait for the device."""
        if (table := self._on_device.get(t.device)) is None:
            # Some devices know no float64.
            table = self._on_device[t.device] = self._log_signal.float().to(t.device)
        t = t.float().clamp(0, len(table) - 1)
        below = t.long()
        above = (below + 1).clamp_(max=len(table) - 1)
        signal = torch.lerp(table[below], table[above], t - below).exp_().view(-1, *(1,) * (ndim - 1))
        return signal, (1 - signal**2).sqrt_()


class TimestepWatch(SamplerWatch):
    """A :class:`SamplerWatch` for a sampler in CompVis' form.

    A step starts at the first model call after a callback; further ones before the next callback are inside it, unless
    ``every_call`` says that the sampler calls once a step, and ahead of the callback (UniPC's corrector).

    Args:
        timesteps: those at which steps start, in the sampler's order, and where the last one ends, ``[steps + 1]``.
        scale: noise levels of the model's timesteps.
        every_call: whether a step starts at every model call.
    """

    def __init__(
        self, monitor: StabilityMonitor, timesteps: Tensor, scale: TimestepScale, *, editable: bool, every_call: bool
    ) -> None:
        super().__init__(monitor, timesteps, scale.level, editable=editable)
        self.scale = scale
        self.every_call = every_call
        self._called_back = True
        self._call: tuple[Tensor, Tensor, Tensor] | None = None  # x, signal and noise of the call under way

    def model(self, model: Any) -> ModelProxy:
        return _TimestepModel(model, self)

    def callback(self, callback: Callable[[dict[str, Any]], Any] | None) -> Callable[[dict[str, Any]], Any]:
        def stepped(info: dict[str, Any]) -> Any:
            self._called_back = True
            return callback(info) if callback is not None else None

        return stepped

    def saw_noise(self, cond: Tensor, uncond: Tensor) -> None:
        """Takes in, from inside a model call, the noise predicted with and without the prompt."""
        if self._call is not None:
            x, signal, noise = self._call
            self.saw_guidance((x - noise * widened(cond)) / signal, (x - noise * widened(uncond)) / signal)

    def predict_noise(self, x: Tensor, t: Tensor, evaluate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Stands for the model: the noise that the sampler is to go on with, out of ``evaluate(x, t)``."""
        if self.monitor.error is not None:
            return evaluate(x, t)
        begins, self._called_back = self._called_back or self.every_call, False
        signal, noise = self.scale.coefficients(t, x.ndim)
        eps = denoised = x

        def evaluate_denoised(x: Tensor, t: Tensor) -> Tensor:
            nonlocal eps, denoised
            self._call = x, signal, noise
            eps = evaluate(x, t)
            denoised = (x - noise * widened(eps)) / signal
            return denoised

        given = self.predict(x, t, evaluate_denoised)
        self._call = None
        if begins:
            self.stepped({"x": x})
        if given is denoised:
            return eps
        return where_changed(eps, denoised, given, (x - signal * given) / noise)


class _TimestepModel(ModelProxy):
    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._watch.predict_noise(x, sigma, lambda x, t: self._model(x, t, *args, **kwargs))
