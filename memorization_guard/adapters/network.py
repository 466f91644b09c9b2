"""What a call of a diffusers network means: its two predictions as clean latents.

A pipeline hands its network the latents on the scale that the network knows, and goes on with the tensor that it gets: that
tensor is where a prediction is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.noise_level import resized, widened
from .schedule import Schedule


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


@dataclass(frozen=True)
class Call:
    """A call of the network, and what it answered."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Tensor

    def again(self, x: Tensor, timestep: Any) -> Tensor:
        """What the network answers to the same call with another latent and timestep; nobody who watches its calls sees it."""
        arguments, keywords = list(self.arguments), dict(self.keywords)
        if arguments:
            arguments[0] = x
        else:
            keywords["sample" if "sample" in keywords else "hidden_states"] = x
        if "timestep" in keywords:
            keywords["timestep"] = timestep
        else:
            arguments[1] = timestep
        return answer(self.module.forward(*arguments, **keywords))

    def part(self, number: int, parts: int) -> Call:
        """The same call with one of the equal parts of its batch alone."""
        x, _ = called_with(self.arguments, self.keywords)
        # Some networks are given the prompts of a video once a frame.
        lengths = (len(x), len(x) * x.shape[2]) if x.ndim == 5 else (len(x),)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.chunk(parts)[number] if tensor.ndim and len(tensor) in lengths else tensor

        arguments, keywords = (mapped(given, chosen) for given in (self.arguments, self.keywords))
        return replace(self, arguments=arguments, keywords=keywords)


class Evaluation:
    """The latent, and what the network said of it with and without the prompt, if it was asked for both.

    Args:
        number: counted from the beginning of the run.
        x: the latents ``[B, ...]``, as the network is given them.
        cond, uncond: outputs of the network, ``[B, ...]``, parts of the very tensors that the pipeline goes on with.
        coefficients: ``(a, b)`` with ``x0 = a x + b output``.
    """

    def __init__(self, number: int, x: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: tuple[float, float]) -> None:
        self.number, self.x, self.cond, self.uncond = number, x, cond, uncond
        self.coefficients = coefficients

    def denoised(self, output: Tensor) -> Tensor:
        """The clean latent that an output of the network stands for."""
        a, b = self.coefficients
        return (widened(self.x) * a).add_(own_part(self.x, output)[1], alpha=b)

    def replace(self, before: Tensor, after: Tensor) -> None:
        """Puts the conditional prediction ``after`` in the place of ``before``, both clean latents; samples in which they are
        the same stay bit-identical."""
        a, b = self.coefficients
        if b == 0.0:
            return  # the latent is clean, and the network has no say
        changed = (after != before).flatten(1).any(1).view(-1, *(1,) * (after.ndim - 1))
        output = ((after - widened(self.x) * a) / b).to(self.cond.dtype)
        self.cond.copy_(torch.where(changed, output, self.cond))


class Network:
    """How one run calls its network.

    Args:
        pipe: the pipeline.
        keywords: of the run's first call. timestep: what the network is given in it.

    Attributes:
        batch: number of images; known from the first call on.

    Raises:
        ValueError: if the call is none that could be understood.
    """

    def __init__(self, pipe: Any, keywords: Mapping[str, Any], timestep: float) -> None:
        count = getattr(pipe, "num_timesteps", None)
        self.schedule = Schedule(pipe.scheduler, timestep, count if isinstance(count, int) and count > 0 else None)
        self.batch = 0
        self._pipe = pipe
        self._own_tokens = _own_tokens(keywords)
        #: Whether the network is told a guidance scale, and gives one prediction that is guided already.
        self.embeds_guidance = any(keywords.get(name) is not None for name in ("guidance", "timestep_cond"))

    def read(
        self,
        number: int,
        x: Tensor,
        tensor: Tensor,
        coefficients: tuple[float, float] | None = None,
        batch: int | None = None,
    ) -> Evaluation:
        """The evaluation of one call, the run's ``number``-th; ``coefficients`` are those of another noise level than its, and
        ``batch`` is the number of its images where that is not the run's."""
        x, tensor = own_part(x, tensor, self._own_tokens)
        if batch is None:
            batch = self.batch = len(x) // self._parts(x)
        parts = len(x) // batch
        cond, uncond = self._order(parts)
        split = tensor.chunk(parts)
        without = None if uncond is None else split[uncond]
        return Evaluation(number, x[:batch], split[cond], without, coefficients or self.schedule.coefficients[number])

    def asked(self, call: Call, noise: Tensor | None, *, alone: bool = False) -> Evaluation:
        """What the network says in Gaussian noise ``[B, ...]``, of the run's size or another, at its highest noise level, with
        the prompts of ``call``, which is for as many images; with ``None`` what it says to the very call.

        Args:
            alone: whether it may be asked for the prediction with the prompt alone.

        Raises:
            ValueError: if that noise level is not known.
        """
        timestep, _, coefficients = self.schedule.in_noise()
        given, at = called_with(call.arguments, call.keywords)
        if noise is None:
            return self.read(0, given, call.again(given, at))
        parts = len(given) // len(noise)
        if alone and parts > 1 and not self._perturbed:  # which takes a batch apart in the network
            call = call.part(self._order(parts)[0], parts)
            given, at = called_with(call.arguments, call.keywords)
        x = resized(given, noise.shape[2:])
        every = noise.repeat(len(x) // len(noise), *(1,) * (noise.ndim - 1))
        own_part(x, every, self._own_tokens)[0].copy_(every)
        number = torch.full_like(at, timestep) if isinstance(at, Tensor) else type(at)(timestep)
        return self.read(0, x, call.again(x, number), coefficients, len(noise))

    @property
    def guided(self) -> bool | None:
        """Whether the pipeline asks for a prediction without the prompt at present; ``None`` where it does not say."""
        found = getattr(self._pipe, "do_classifier_free_guidance", None)
        return None if found is None else bool(found)

    @property
    def _perturbed(self) -> bool:
        return bool(getattr(self._pipe, "do_perturbed_attention_guidance", False))

    def _parts(self, x: Tensor) -> int:
        """How many predictions of every image a batch holds. It may change in the middle of a run: callbacks can switch
        guidance off."""
        if self.batch:
            if len(x) % self.batch:
                raise ValueError(f"the batch went from {self.batch} images to {len(x)} latents within a run")
            return len(x) // self.batch
        wanted = 1 if self.guided is False else 2
        if self._perturbed:
            wanted += 1
        elif wanted == 2 and hasattr(self._pipe, "image_guidance_scale"):
            wanted = 3
        # Waits for the device, once a run. Copies of the same latents are told from images that are sampled side by side.
        copies = len(x) % wanted == 0 and all(torch.equal(part, x[: len(x) // wanted]) for part in x.chunk(wanted))
        return wanted if copies else 1

    def _order(self, parts: int) -> tuple[int, int | None]:
        """Which part of a batch is with the prompt, and which without it."""
        if parts == 1:
            return 0, None
        if parts == 2:
            return (0, None) if self._perturbed and self.guided is False else (1, 0)
        if parts == 3 and self._perturbed:
            return 1, 0
        if parts == 3 and hasattr(self._pipe, "image_guidance_scale"):
            return 0, 1  # InstructPix2Pix: text and image, image, neither
        raise ValueError(f"the network is given {parts} copies of every latent, and which is which is not known")


def answer(output: Any) -> Tensor:
    """The tensor that a network gives.

    Raises:
        ValueError: if there is not one.
    """
    tensor = output[0] if isinstance(output, tuple) else output.sample
    if not isinstance(tensor, Tensor):
        raise ValueError("this pipeline's network does not give one tensor that could be read")
    return tensor


def called_with(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The latent and the timestep that a network is given.

    Raises:
        ValueError: if they are not there.
    """
    x = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
    timestep = keywords["timestep"] if "timestep" in keywords else arguments[1] if len(arguments) > 1 else None
    if not isinstance(x, Tensor) or not isinstance(timestep, (Tensor, float, int)):
        raise ValueError("this pipeline calls its network without a latent or a timestep that could be read")
    return x, timestep


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested argument with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(one, change) for name, one in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(mapped(one, change) for one in value)
    return value


def number_of(timestep: Any) -> float:
    """A timestep as a number. Waits for its device. Frames that are given, not sampled, have a lower one than the others."""
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def own_part(x: Tensor, output: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """What input and output of a network have in common: the latent that is sampled.

    Inpainting models are given more channels than they predict, some networks predict their variance too, and some
    transformers are given reference images after the first ``tokens`` of a packed latent.
    """
    if x.ndim != output.ndim:
        raise ValueError(f"the network answers a latent {tuple(x.shape)} with {tuple(output.shape)}")
    if x.shape != output.shape:
        for axis in range(1, x.ndim):
            length = min(x.shape[axis], output.shape[axis])
            x, output = x.narrow(axis, 0, length), output.narrow(axis, 0, length)
    if tokens is not None and x.ndim == 3 and tokens < x.shape[1]:
        x, output = x[:, :tokens], output[:, :tokens]
    return x, output


def _own_tokens(keywords: Mapping[str, Any]) -> int | None:
    """How many tokens of a packed latent are sampled, where reference images follow them (Flux Kontext, Qwen Image Edit)."""
    places, shapes = keywords.get("img_ids"), keywords.get("img_shapes")
    if isinstance(places, Tensor):
        return int((places.reshape(-1, *places.shape[-2:])[0, :, 0] == 0).sum())
    if isinstance(shapes, list) and shapes and isinstance(shapes[0], list):
        return math.prod(shapes[0][0])
    return None
