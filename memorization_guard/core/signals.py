"""What one prediction of the network says: four signals that no solver, guidance method or sampler has a part in.

They are taken from the latent x, and from the clean latents that the network predicts with and without the prompt, before
guidance mixes them. x0 below is the two combined at the profile's own guidance scale, ``x0_uncond + w (x0_cond - x0_uncond)``.

``velocity``
    ``|v|`` with ``v = alpha eps - beta x0`` (Salimans & Ho 2022, appendix D), ``|dz / d theta|`` for the angle
    ``theta = atan(sigma)`` of the VP circle: the update norm of a step of any solver per unit of angle, without history or
    added noise.
``denoised``
    ``|x0|``.
``guidance``
    ``|v_cond - v_uncond| = |x0_cond - x0_uncond| / beta``. Times alpha it is ``|eps_cond - eps_uncond|`` (Wen et al. 2024),
    which says nothing at pure noise, where flow models begin.
``detail``
    Root mean square of what ``x0_cond - x0_uncond`` holds finer than an eighth of the latent's shorter side; of ``x0_cond``
    where there is no other prediction. In pure noise the network predicts the mean of all images that the prompt allows: of
    an open prompt that mean is a blur, and only of one remembered image it is sharp. Webster (2023) told copies by the edges
    that one step shows; this is the same in a number. Later predictions are sharp by themselves, so it is taken where a run
    begins, and of all evaluations only in runs that serve as references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .noise_level import NoiseLevel, row_norm, widened

#: The latent is looked at in at most this many patches a side.
PATCHES = 16

#: What is finer than the latent's shorter side over this is detail.
LAYOUT = 8


class Signals(NamedTuple):
    """The signals, each of the same shape; NaN for what there is not."""

    velocity: np.ndarray
    denoised: np.ndarray
    guidance: np.ndarray
    detail: np.ndarray


class Measurement(NamedTuple):
    """What is taken of one evaluation on the device; nothing of it depends on the noise level, which need not be known yet.

    Attributes:
        sigma: the host's own noise level: a float, or a tensor on a device that is not to be waited for.
        latent, product, denoised: ``|x|``, ``<x, x0>`` and ``|x0|``, each ``[B]`` float32.
        guidance: ``|x0_cond - x0_uncond|``, or ``None`` where there was one prediction only.
        patches: ``[B, height, width]`` float32, square of the detail in each patch: the mean over its places of the sum over
            channels and frames; one patch for latents without places (Flux packs its into a sequence), ``None`` where it was
            not taken.
        depth: number of channels times frames.
    """

    sigma: float | Tensor
    latent: Tensor
    product: Tensor
    denoised: Tensor
    guidance: Tensor | None
    patches: Tensor | None
    depth: int = 1

    def block(self) -> Tensor:
        """All numbers in one tensor, ``[5 + patches, B]`` float32: in the order of the attributes, NaN for what is missing."""
        missing = torch.full_like(self.latent, torch.nan)
        sigma = self.sigma.flatten()[0].float().expand_as(missing) if isinstance(self.sigma, Tensor) else missing
        rows = [sigma, self.latent, self.product, self.denoised, missing if self.guidance is None else self.guidance]
        block = torch.stack(rows)
        return block if self.patches is None else torch.cat([block, self.patches.flatten(1).T])


#: Elements that are gone through at a time on the CPU, so that they stay in its cache.
_CACHED = 1 << 18


class Meter:
    """Takes the measurements of one run, in memory that is used again for each, and without waiting for a device."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None

    def measure(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        guidance_scale: float,
        *,
        detail: bool = True,
    ) -> Measurement:
        """Measures one evaluation of the network.

        Args:
            x: the noisy latent ``[B, ...]``, in the host's own scale and any dtype.
            sigma: its noise level; a tensor on the CPU, or a float, is read at once.
            cond, uncond: clean latents predicted with and without the prompt; ``uncond`` may be ``None``.
            guidance_scale: what they are combined at.
            detail: whether the detail is taken too; it costs more than all else.
        """
        if not isinstance(sigma, Tensor):
            sigma = float(sigma)
        elif sigma.device.type == "cpu":
            sigma = float(sigma.flatten()[0])
        count = len(x)
        size = count if x.device.type != "cpu" else max(1, _CACHED * count // max(x.numel(), 1))
        depth = cond.shape[1] if cond.ndim == 4 else cond.shape[1] * cond.shape[2] if cond.ndim == 5 else 1
        if size >= count:
            return Measurement(sigma, *self._taken(x, cond, uncond, guidance_scale, detail), depth)
        parts = []
        for i in range(0, count, size):
            chosen = slice(i, i + size)
            without = None if uncond is None else uncond[chosen]
            parts.append(self._taken(x[chosen], cond[chosen], without, guidance_scale, detail))
        latent, product, denoised, distance, patches = zip(*parts, strict=True)
        joined = [torch.cat(rows) for rows in (latent, product, denoised)]
        return Measurement(sigma, joined[0], joined[1], joined[2], _joined(distance), _joined(patches), depth)

    def _taken(
        self, x: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float, detail: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        latent, denoised, distance = widened(x).flatten(1), widened(cond), None
        buffers = self._buffers
        if buffers is None or buffers[0].shape != denoised.shape or buffers[0].device != denoised.device:
            buffers = self._buffers = torch.empty_like(denoised), torch.empty_like(denoised)
        says = denoised
        if uncond is not None:
            without = widened(uncond)
            says = torch.sub(denoised, without, out=buffers[0])
            distance = row_norm(says.flatten(1))
        patches = None
        if detail and says.ndim in (4, 5):
            patches = _patches(_detail(says, buffers[1]).square_())
        elif detail:
            patches = says.flatten(1).square().mean(dim=1)[:, None, None]
        if uncond is not None:
            denoised = torch.lerp(without, denoised, guidance_scale, out=buffers[0])
        flat = denoised.flatten(1)
        norm = row_norm(flat)  # before the product, which is made in the same memory
        product = torch.mul(latent, flat, out=buffers[0].flatten(1)).sum(dim=1)
        return row_norm(latent), product, norm, distance, patches


def _detail(says: Tensor, out: Tensor) -> Tensor:
    """What is finer than an eighth of the shorter side; in ``out``."""
    frames = says if says.ndim == 4 else says.flatten(1, 2)
    *_, high, wide = frames.shape
    side = max(1, min(high, wide) // min(LAYOUT, max(1, min(high, wide) // 2)))
    coarse = functional.adaptive_avg_pool2d(frames, (max(1, round(high / side)), max(1, round(wide / side))))
    blurred = functional.interpolate(coarse, size=(high, wide), mode="bilinear")
    return torch.sub(says, blurred.view_as(says), out=out)


def _patches(squares: Tensor) -> Tensor:
    """Mean over the places of every patch of the sum over channels and frames, at most 16 patches a side of at least 2 x 2."""
    sums = squares.sum(dim=1 if squares.ndim == 4 else (1, 2), keepdim=squares.ndim == 4)
    if squares.ndim == 5:
        sums = sums[:, None]
    *_, high, wide = sums.shape
    height, width = min(PATCHES, max(1, high // 2)), min(PATCHES, max(1, wide // 2))
    if high % height == 0 and wide % width == 0:
        return functional.avg_pool2d(sums, (high // height, wide // width))[:, 0]
    return functional.adaptive_avg_pool2d(sums, (height, width))[:, 0]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def signals(block: np.ndarray, level: NoiseLevel) -> Signals:
    """The signals ``[B]`` of an evaluation from its block, as :class:`~memorization_guard.core.judge.Judge` has it, now that
    its noise level is known."""
    latent, product, denoised, distance = block[1:5]
    alpha, beta, scale = level.alpha, max(level.beta, 1e-6), level.scale
    # v = (alpha z - x0) / beta, from the products of x and x0: no tensor had to be made for it.
    squared = (alpha / scale * latent) ** 2 - (2 * alpha / scale) * product + denoised * denoised
    detail = np.sqrt(block[5:].mean(axis=0)) if len(block) > 5 else np.full_like(denoised, np.nan)
    return Signals(np.sqrt(np.maximum(squared, 0.0)) / beta, denoised, distance / beta, detail)


class Arrival:
    """A small tensor on its way to host memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    @property
    def arrived(self) -> bool:
        return bool(self._event.query())

    def numpy(self) -> np.ndarray:
        """Waits until it is there."""
        self._event.synchronize()
        return self._host.numpy()
