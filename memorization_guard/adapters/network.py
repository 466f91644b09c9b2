"""What a call of a diffusers network means: its two predictions as clean latents, and their noise level.

A pipeline hands its network the latents on the scale that the network knows, and a timestep; that is all that is needed,
whatever its scheduler does with the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.noise_level import NoiseLevel, Timesteps, widened


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    """The networks that a pipeline predicts with.

    Raises:
        TypeError: if it has none.
    """
    names = ("unet", "transformer", "transformer_2")
    found = [module for name in names if isinstance(module := getattr(pipe, name, None), torch.nn.Module)]
    if not found:
        raise TypeError(f"{type(pipe).__name__} has no unet and no transformer: only diffusion pipelines can be watched")
    return found


@dataclass
class Pair:
    """One evaluation: the latent, and what the network said of it with and without the prompt, if it was asked for both.

    Attributes:
        x: the latents ``[B, ...]``, as the network is given them.
        timestep: as the network is given it; a tensor may be on a device that is not to be waited for.
        cond, uncond: outputs of the network, ``[B, ...]``, parts of the very tensor that the pipeline goes on with.
        coefficients: ``x0 = a x + b output``.
        waits: whether the other prediction may come with the next call.
    """

    x: Tensor
    timestep: Any
    cond: Tensor
    uncond: Tensor | None
    coefficients: tuple[Any, Any]
    waits: bool = False

    def __post_init__(self) -> None:
        self.denoised_cond = self.denoised(self.cond)
        self.denoised_uncond = None if self.uncond is None else self.denoised(self.uncond)

    @property
    def sigma(self) -> Any:
        return self.timestep

    def denoised(self, output: Tensor) -> Tensor:
        """The clean latent that an output stands for."""
        a, b = self.coefficients
        return widened(self.x) * a + widened(output) * b

    def replace(self, denoised: Tensor) -> None:
        """Puts another conditional prediction into the network's output; samples that are as they were stay bit-identical."""
        a, b = self.coefficients
        changed = (denoised != self.denoised_cond).flatten(1).any(1).view(-1, *(1,) * (denoised.ndim - 1))
        value = ((denoised - widened(self.x) * a) / b).to(self.cond.dtype)
        self.cond.copy_(torch.where(changed, value, self.cond))


class Network:
    """How one run calls its network, from its first call on.

    Raises:
        ValueError: if the call is none that could be understood.
    """

    def __init__(self, pipe: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        scheduler = pipe.scheduler
        config = scheduler.config
        self._edm = float(config.sigma_data) if hasattr(scheduler, "precondition_outputs") else None
        flow = "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
        self.prediction_type = "flow_prediction" if flow else str(config.get("prediction_type", "epsilon"))
        self._trained = int(config.get("num_train_timesteps", 1000))
        self._table = None if flow or self._edm else Timesteps(scheduler.alphas_cumprod)
        self._device_tables: dict[torch.device, Tensor] = {}
        x, timestep = _inputs(arguments, keywords)
        # Both are read once a run; from then on no device is waited for.
        planned = [float(t) for t in scheduler.timesteps.tolist()]
        first = _first(timestep)
        self._unit = self._trained if flow and first <= 1.0 and max(planned, default=0.0) > 1.0 else 1
        start = min(range(len(planned)), key=lambda i: abs(planned[i] - first * self._unit)) if planned else 0
        count = getattr(pipe, "num_timesteps", None)  # a pipeline that stops early (denoising_end) says so
        self._planned = planned[start:][: count if isinstance(count, int) and count else None] or [first * self._unit]
        after = planned[start + len(self._planned) :][:1]
        self.end = self._level(after[0]) if after else self._clean(scheduler)
        self.levels = [*(self._level(t) for t in self._planned), self.end]
        self._calls = 0
        self._chunks = self._order(pipe, x)
        self.latent_shape = tuple(x.shape[1:])
        scale = getattr(pipe, "guidance_scale", None)
        guided = getattr(pipe, "do_classifier_free_guidance", len(self._chunks) > 1)
        self.guidance_scale = None if scale is None else float(scale) if guided else 1.0
        self._sequential = len(self._chunks) == 1 and (bool(guided) or hasattr(pipe, "true_cfg_scale") or flow)

    def _order(self, pipe: Any, x: Tensor) -> tuple[int, ...]:
        """Which parts of a batch are with the prompt, and without it: ``(cond, uncond)``, or ``(cond,)``, counted from 0;
        then their number is the length of the batch over that of one part."""
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
        wanted = (
            3
            if (guided and perturbed) or hasattr(pipe, "image_guidance_scale")
            else 1
            if guided is False and not perturbed
            else 2
        )
        for parts in (wanted, 2) if wanted > 1 else (1,):
            if parts > 1 and len(x) % parts == 0 and all(torch.equal(part, x[: len(x) // parts]) for part in x.chunk(parts)):
                self._parts = parts
                if parts == 3 and not perturbed:  # InstructPix2Pix: text and image, image, neither
                    return (0, 1)
                return (0,) if perturbed and not guided else (1, 0)
        self._parts = 1
        return (0,)

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level of what the network is given at a timestep of the network's own."""
        return self._level(float(timestep) * self._unit)

    def _level(self, timestep: float) -> NoiseLevel:
        if self._table is not None:
            return self._table.level(timestep)
        if self._edm is not None:
            sigma = math.exp(4 * timestep)
            scale = math.hypot(sigma, self._edm)
            return NoiseLevel(1 / scale, sigma / scale)
        return NoiseLevel.from_flow(min(max(timestep / self._trained, 0.0), 1.0))

    def _clean(self, scheduler: Any) -> NoiseLevel:
        last = getattr(scheduler, "final_alpha_cumprod", None)
        return NoiseLevel(1.0, 0.0) if last is None else NoiseLevel.from_alpha_bar(float(last))

    def step_ends(self, pair: Pair) -> tuple[NoiseLevel, NoiseLevel]:
        """Noise levels before and after the step of the last evaluation."""
        number = min(self._calls, len(self.levels) - 1) - 1
        return self.levels[number], self.levels[number + 1]

    def pair(self, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any, pending: Pair | None) -> Pair:
        """The evaluation of a call; where ``pending`` waits for this one, the evaluation of both."""
        x, timestep = _inputs(arguments, keywords)
        tensor = output[0] if isinstance(output, tuple) else output.sample
        # An inpainting model is given more channels than it predicts, some transformers predict their variance too.
        for axis in {1, x.ndim - 1}:
            length = min(x.shape[axis], tensor.shape[axis])
            x, tensor = x.narrow(axis, 0, length), tensor.narrow(axis, 0, length)
        if pending is not None and len(tensor) == len(pending.cond):
            return Pair(pending.x, pending.timestep, pending.cond, tensor, pending.coefficients)
        self._calls += 1
        parts = tensor.chunk(self._parts)
        timestep = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        if isinstance(timestep, Tensor) and timestep.device.type == "cpu":
            timestep = float(timestep)
        uncond = parts[self._chunks[1]] if len(self._chunks) > 1 else None
        coefficients = self._coefficients(timestep)
        return Pair(x[: len(parts[0])], timestep, parts[self._chunks[0]], uncond, coefficients, waits=self._sequential)

    def _coefficients(self, timestep: Any) -> tuple[Any, Any]:
        if not isinstance(timestep, Tensor):
            level = self.level(timestep)
            if self._edm is None:
                return level.denoised_coefficients(self.prediction_type)
            return _edm_coefficients(level.noise / level.signal, self._edm, self.prediction_type)
        # On a device that is not to be waited for: from a table there, as long as the timesteps.
        table = self._device_tables.get(timestep.device)
        if table is None:
            planned = [self._coefficients(t / self._unit) for t in self._planned]
            rows = [[t / self._unit, *pair] for t, pair in zip(self._planned, planned, strict=True)]
            table = self._device_tables[timestep.device] = torch.tensor(rows, device=timestep.device)
        row = table.index_select(0, (table[:, 0] - timestep).abs().argmin().view(1))
        return row[0, 1], row[0, 2]


def _edm_coefficients(sigma: float, sigma_data: float, prediction_type: str) -> tuple[float, float]:
    """Karras et al. 2022, table 1, for a network that is given ``x / sqrt(sigma^2 + sigma_data^2)``."""
    total = math.hypot(sigma, sigma_data)
    c_out = sigma * sigma_data / total
    return sigma_data**2 / total, -c_out if prediction_type == "v_prediction" else c_out


def _inputs(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Any]:
    x = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
    timestep = keywords["timestep"] if "timestep" in keywords else arguments[1] if len(arguments) > 1 else None
    if not isinstance(x, Tensor) or timestep is None:
        raise ValueError("this pipeline calls its network without a latent or a timestep that could be read")
    return x, timestep


def _first(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
