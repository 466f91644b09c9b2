"""Samplers in k-diffusion's form: every sampler of ComfyUI and of the WebUI is one function of this shape.

``sampler_function(model, x, sigmas, extra_args=..., callback=..., disable=..., **options) -> x`` calls ``model(x, sigma,
**extra_args)``, which gives the guided clean latent, and ``callback({"x", "i", "sigma", "denoised", ...})`` once a solver
step. Predictions are judged inside of ``model``, where a host has both of them (:meth:`SamplerRun.predicted`); around the
sampler function stands only what traces its steps and knows its end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.asking import Ask, Prompts
from ..core.monitor import STOPPED, StabilityMonitor
from ..core.noise_level import NoiseLevel

#: Relative distance up to which a noise level that the sampler names is the one that its schedule has: some samplers move
#: their first one by less than this.
_TOLERANCE = 2e-3


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Leaves a sampler function in the middle of a run; ``denoised`` is the clean latent as predicted there."""

    def __init__(self, run: SamplerRun, denoised: Tensor) -> None:
        super().__init__(STOPPED)
        self.run = run
        self.denoised = denoised


class SamplerRun:
    """One run of a sampler function, told to a monitor. Nothing is changed but predictions, and nothing is drawn from any
    generator.

    Args:
        monitor: takes in predictions and latents; its settings should have been made from the same schedule.
        levels: noise levels before every planned step and after the last.
        level: the noise level that a number of the sampler's stands for.
    """

    def __init__(
        self,
        monitor: StabilityMonitor,
        levels: Sequence[NoiseLevel],
        level: Callable[[float], NoiseLevel] = NoiseLevel.from_sigma,
    ) -> None:
        self.monitor = monitor
        self._levels = list(levels)
        self._level = level
        self._callbacks = 0
        self._calls = 0  # evaluations since the last callback
        self._evaluated: Tensor | None = None  # the latent of the last one
        self._denoised: Tensor | None = None  # what it predicted
        self._planned = True  # whether the sampler keeps to the levels

    def predicted(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Tensor,
        uncond: Tensor | None = None,
        *,
        ask: Ask | None = None,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """The conditional prediction to go on with; as :meth:`StabilityMonitor.predicted`."""
        self._calls += 1
        self._evaluated = x
        self._denoised = self.monitor.predicted(x, sigma, cond, uncond, ask=ask, prompts=prompts)
        return self._denoised

    def around(self, sampler_function: Callable[..., Tensor], model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs ``sampler_function`` with these arguments, and gives what it returns; in mode ``stop``, nothing of images
        that have triggered."""
        try:
            result = sampler_function(model, x, *args, **(kwargs | {"callback": self._callback(kwargs.get("callback"))}))
        except Stopped as stopped:
            self.monitor.end(STOPPED)
            if stopped.run is not self:
                raise  # another guard around the same sampler
            return self.monitor.withheld(stopped.denoised).to(x.dtype)
        except BaseException as error:
            name = type(error).__name__
            why = "interrupted" if "interrupt" in name.lower() else name
            self.monitor.end(f"{why} after {self.monitor.steps} of {self.monitor.settings.steps} steps")
            raise
        self.finished(result)
        return self.monitor.withheld(result)

    def finished(self, result: Tensor) -> None:
        """Takes in what the sampler function returned."""
        self.monitor.latent(result, self._levels[-1], evaluated=False)

    def _callback(self, callback: Callable[[dict[str, Any]], Any] | None) -> Callable[[dict[str, Any]], Any]:
        def stepped(info: dict[str, Any]) -> Any:
            try:
                self.stepped(info)
            except Exception as error:
                self.monitor.fail(error)
            if self.monitor.should_stop and self._denoised is not None:
                raise Stopped(self, self._denoised)
            return callback(info) if callback is not None else None

        return stepped

    def stepped(self, info: Mapping[str, Any]) -> None:
        """Takes in what the sampler calls back with."""
        number, calls = self._callbacks, self._calls
        self._callbacks, self._calls = number + 1, 0
        # A sampler that evaluates once a step may report a latent of before, or in another scale.
        x = self._evaluated if calls == 1 and self._evaluated is not None else info["x"]
        # The latent is at the second of the two where a sampler adds noise first, or reports where it is heading.
        self.monitor.latent(x, self._level_of(info.get("sigma_hat", info.get("sigma")), number), evaluated=True)

    def _level_of(self, sigma: Tensor | float | None, number: int) -> NoiseLevel:
        planned = self._levels[number] if number < len(self._levels) else self._levels[-1]
        on_device = isinstance(sigma, Tensor) and sigma.device.type != "cpu"
        # Reading it makes the host wait for a device: two looks tell a sampler with steps of its own.
        if sigma is None or (on_device and self._planned and number > 1):
            return planned
        named = self._level(float(torch.as_tensor(sigma).flatten()[0]))
        self._planned &= math.isclose(named.sigma, planned.sigma, rel_tol=_TOLERANCE, abs_tol=1e-6)
        return planned if self._planned else named


def watched(sampler_function: Callable[..., Tensor], new_run: Callable[..., SamplerRun | None]) -> Callable[..., Tensor]:
    """``sampler_function`` as part of a run.

    Args:
        sampler_function: ``(model, x, sigmas, *, extra_args, callback, ...) -> x``; what follows ``x`` may have other names.
        new_run: gives, from ``x`` and all that follows it, the run that begins, or ``None`` for none.
    """

    @functools.wraps(sampler_function)
    def sample(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        arguments = {name: value for name, value in kwargs.items() if name != "callback"}
        run = new_run(x, *args, **arguments)
        if run is None:
            return sampler_function(model, x, *args, **kwargs)
        return run.around(sampler_function, model, x, *args, **kwargs)

    return sample


def guarded(
    run: SamplerRun, predict: Callable[..., tuple[Tensor, Tensor | None]], guidance_scale: float
) -> Callable[..., Tensor]:
    """A model for k-diffusion's samplers, for whoever uses them without a host: classifier-free guidance, guarded.

    Args:
        run: takes in every prediction; :meth:`SamplerRun.around` runs the sampler.
        predict: ``predict(x, sigma, **extra_args)`` gives the clean latents predicted with and without the prompt.
        guidance_scale: of guidance.
    """

    def model(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        cond, uncond = predict(x, sigma, **extra_args)
        cond = run.predicted(x, sigma, cond, uncond)
        return cond if uncond is None else uncond + (cond - uncond) * guidance_scale

    return model


def sampler_name(function: str, options: Mapping[str, Any]) -> str:
    """A sampler as run settings name it: ``euler_ancestral(eta=0.5)``, with those ``options`` that are plain values."""
    plain = [f"{name}={value}" for name, value in sorted(options.items()) if isinstance(value, (bool, int, float, str))]
    return function.removeprefix("sample_") + (f"({', '.join(plain)})" if plain else "")
