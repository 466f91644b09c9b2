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
``local``
    Root mean square of x0 in a patch of the latent, as the geometric mean of the quarter of all patches where it is largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .noise_level import NoiseLevel, sample_norm, widened

#: The latent is looked at in at most this many patches a side.
PATCHES = 16

#: Share of the latent's patches that the local signal looks at.
LOCAL_SHARE = 0.25


class Signals(NamedTuple):
    """The signals, each of the same shape; NaN for what there is not."""

    velocity: np.ndarray
    denoised: np.ndarray
    guidance: np.ndarray
    local: np.ndarray


class Measurement(NamedTuple):
    """What is taken of one evaluation on the device; nothing of it depends on the noise level, which need not be known yet.

    Attributes:
        sigma: the host's own noise level: a float, or a tensor on a device that is not to be waited for.
        latent, product, denoised: ``|x|``, ``<x, x0>`` and ``|x0|``, each ``[B]`` float32.
        guidance: ``|x0_cond - x0_uncond|``, or ``None`` where there was one prediction only.
        patches: ``[B, height, width]`` float32, mean square of x0 in each patch; ``None`` for latents without places.
    """

    sigma: float | Tensor
    latent: Tensor
    product: Tensor
    denoised: Tensor
    guidance: Tensor | None
    patches: Tensor | None

    def block(self) -> Tensor:
        """Everything in one tensor, ``[5 + patches, B]`` float32: in the order of the attributes, NaN for what is missing."""
        missing = torch.full_like(self.latent, torch.nan)
        sigma = self.sigma.flatten()[0].float().expand_as(missing) if isinstance(self.sigma, Tensor) else missing
        rows = [sigma, self.latent, self.product, self.denoised, missing if self.guidance is None else self.guidance]
        block = torch.stack(rows)
        return block if self.patches is None else torch.cat([block, self.patches.flatten(1).T])


def measure(x: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Measurement:
    """Measures one evaluation of the network, without waiting for its device.

    Args:
        x: the noisy latent ``[B, ...]``, in the host's own scale and any dtype.
        sigma: its noise level; a tensor on the CPU, or a float, is read at once.
        cond, uncond: clean latents predicted with and without the prompt; ``uncond`` may be ``None``.
        guidance_scale: what they are combined at.
    """
    if not isinstance(sigma, Tensor):
        sigma = float(sigma)
    elif sigma.device.type == "cpu":
        sigma = float(sigma.flatten()[0])
    latent, denoised, distance = widened(x), widened(cond), None
    if uncond is not None:
        without = widened(uncond)
        distance = sample_norm(denoised - without)
        denoised = torch.lerp(without, denoised, guidance_scale)
    product = torch.linalg.vecdot(latent.flatten(1), denoised.flatten(1))
    return Measurement(sigma, sample_norm(latent), product, sample_norm(denoised), distance, _patches(denoised))


def _patches(x0: Tensor) -> Tensor | None:
    """Mean square of x0 in every patch, at most 16 a side of at least 2 x 2; over all channels and frames. ``None`` for
    latents without places (Flux packs its into a sequence)."""
    if x0.ndim not in (4, 5):
        return None
    squares = x0.square().mean(dim=tuple(range(1, x0.ndim - 2)))
    height, width = (min(PATCHES, max(1, side // 2)) for side in squares.shape[1:])
    return torch.nn.functional.adaptive_avg_pool2d(squares[:, None], (height, width))[:, 0].float()


def signals(blocks: np.ndarray, levels: Sequence[NoiseLevel]) -> Signals:
    """The signals ``[E, B]`` of the blocks ``[E, 5 + patches, B]`` of evaluations whose noise levels are known by now."""
    _, latent, product, denoised, distance = blocks[:, :5].astype(np.float64).swapaxes(0, 1)
    alpha, beta, scale = np.array([(level.alpha, max(level.beta, 1e-6), level.scale) for level in levels]).T[:, :, None]
    # v = (alpha z - x0) / beta, from the products of x and x0: no tensor had to be made for it.
    squared = (alpha * latent / scale) ** 2 - 2 * alpha / scale * product + denoised**2
    velocity = np.sqrt(np.maximum(squared, 0.0)) / beta
    return Signals(velocity, denoised, distance / beta, _local(patch_logs(blocks)))


def patch_logs(blocks: np.ndarray) -> np.ndarray:
    """Logarithm of the root mean square of x0 in each patch, ``[E, patches, B]``, of blocks as in :func:`signals`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 0.5 * np.log(blocks[:, 5:])


def _local(logs: np.ndarray) -> np.ndarray:
    """Geometric mean over the largest quarter of patches, ``[E, B]``, of ``[E, patches, B]``; NaN where there are too few."""
    count = logs.shape[1]
    if count < 1 / LOCAL_SHARE:
        return np.full((len(logs), logs.shape[2]), np.nan)
    first = count - round(count * LOCAL_SHARE)
    return np.exp(np.partition(logs, first, axis=1)[:, first:].mean(axis=1))
