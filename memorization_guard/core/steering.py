"""Steering: what a conditional prediction is replaced by, so that the image becomes another one (ours).

What a memorized prompt adds to a prediction is the training image, whatever its norm, so that rescaling does not lead away
from it; leaving the addition out does. Only the conditional prediction is replaced: whatever guidance the user has chosen
goes on from there, and neither it nor the solver ever sees the copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .noise_level import widened
from .published import rescale


def steered(cond: Tensor, uncond: Tensor, chosen: np.ndarray, *, guidance_scale: float, target: float) -> Tensor:
    """``cond`` with another prediction in the chosen samples: the one with which guidance at ``guidance_scale`` gives the
    image that guidance at ``target`` gives with ``cond``.

    Args:
        cond, uncond: clean latents predicted with and without the prompt, ``[B, ...]``.
        chosen: ``[B]`` bool.
        guidance_scale: the run's own. target: the scale wanted; below 0 leads away from the prompt.
    """
    # u + w (c' - u) = u + t (c - u)
    return _replaced(
        cond, chosen, lambda some: torch.lerp(widened(uncond[some]), widened(cond[some]), target / guidance_scale)
    )


def rescaled(cond: Tensor, chosen: np.ndarray, norm: float) -> Tensor:
    """``cond`` with the chosen samples brought to another norm, where there is no second prediction to steer by."""
    return _replaced(cond, chosen, lambda some: rescale(widened(cond[some]), norm))


def _replaced(cond: Tensor, chosen: np.ndarray, replacement: Callable[[Tensor], Tensor]) -> Tensor:
    index = torch.as_tensor(np.flatnonzero(chosen), device=cond.device)
    return cond.index_copy(0, index, replacement(index).to(cond.dtype))
