"""Mitigation: bringing a latent back into the stability region (Huang et al. 2026, Algorithm 2), or leading it elsewhere."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .noise_level import NoiseLevel, sample_norm

#: Relative distance by which a clamp aims inside its band, so that rounding in float32 does not leave it again.
_MARGIN = 1e-6


def correct(
    z_prev: Tensor,
    z_next: Tensor,
    x0: Tensor,
    *,
    x0_coefficient: float,
    x0_norm: float,
    bounds: tuple[np.ndarray, np.ndarray],
    strong: Tensor,
    steered: Tensor | None = None,
) -> Tensor:
    """The corrected ``z_next``, for samples that are all to be corrected.

    1. x0 is rescaled to the reference norm, which moves the latent by ``x0_coefficient * (x0' - x0)``; or (ours) the latent
       is moved to ``steered``, see :func:`steer`;
    2. strong samples: the length of the update from ``z_prev`` is clamped into its band, direction kept;
    3. the norm of the latent is clamped into its band, direction kept.

    Step 3 can take the update of a strong sample out of its band again. Then (ours; the paper leaves it open) the latent is
    turned towards or away from ``z_prev`` in the plane of the two, its own norm kept, until both norms lie in their bands;
    where no such point exists, the band of the latent wins.

    Args:
        z_prev, z_next, x0: latents on the VP scale, ``[B, ...]``.
        x0_coefficient: the coefficient of x0 in ``z_next``.
        x0_norm: reference norm of x0 at this step.
        bounds: lower and upper bounds of the three norms, each ``[3]`` as in ``profile.NORMS``.
        strong: ``[B]`` bool.
        steered: what :func:`steer` gave, in place of the first step.

    Returns:
        ``[B, ...]`` in the dtype of ``z_next``. A sample whose correction is not finite is returned as it came.
    """
    low, high = (side.tolist() for side in bounds)
    start, proposal, denoised = z_prev.float(), z_next.float(), x0.float()

    z = proposal + x0_coefficient * (rescale(denoised, x0_norm) - denoised) if steered is None else steered.float()

    strong = strong.view(-1, *(1,) * (z.ndim - 1))
    z = torch.where(strong, start + _clamp_norm(z - start, low[1], high[1]), z)
    z = _clamp_norm(z, low[0], high[0])
    z = torch.where(strong, _turn(start, z, low[1], high[1]), z)

    finite = torch.isfinite(sample_norm(z)).view_as(strong)
    return torch.where(finite, z, proposal).to(z_next.dtype)


def steer(
    z_prev: Tensor,
    z_next: Tensor,
    x0: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor,
    *,
    level: NoiseLevel,
    x0_coefficient: float,
    guidance: float,
) -> Tensor:
    """``z_next`` as the step would have come out with another guidance scale (ours; no further network call).

    What a memorized prompt adds to the prediction is the training image, whatever the norm, so rescaling does not lead away
    from it; leaving the addition out does. A first-order step is ``z_next = a x0 + b eps`` with ``eps = (z_prev - alpha x0)
    / beta`` (DDIM, Song et al. 2021, eq. 12): another noise prediction moves it by ``(b - a beta / alpha) (eps' - eps)``.
    Solvers of higher order weigh past predictions too, and are moved as if they did not.

    Args:
        z_prev, z_next, x0: as for :func:`correct`. eps_cond, eps_uncond: noise predictions with and without the prompt.
        level: noise level of ``z_prev``.
        x0_coefficient: ``a``, the coefficient of x0 in ``z_next``; on the VP scale ``b = sqrt(1 - a^2)``.
        guidance: the guidance scale.
    """
    wanted = torch.lerp(eps_uncond.float(), eps_cond.float(), guidance)
    taken = (z_prev.float() - level.alpha * x0.float()) / level.beta
    # Another noise prediction is another x0: d x0 = -beta / alpha d eps.
    moved = -level.beta / level.alpha * response(level, x0_coefficient)
    return z_next.float() + moved * (wanted - taken)


def response(level: NoiseLevel, x0_coefficient: float) -> float:
    """By how much ``z_next`` moves with the x0 that a first-order step from ``level`` is made with: ``a - b alpha / beta``."""
    return x0_coefficient - math.sqrt(max(0.0, 1.0 - x0_coefficient**2)) * level.alpha / level.beta


def rescale(x: Tensor, norm: float) -> Tensor:
    """``x`` ``[B, ...]`` at length ``norm``, direction kept; a zero vector stays zero."""
    return x * _ratio(norm, sample_norm(x), x)


def _ratio(target: Tensor | float, norm: Tensor, like: Tensor) -> Tensor:
    """``target / norm`` per sample, shaped to multiply ``like``; a zero vector has no direction to keep and stays zero."""
    ratio = torch.where(norm > 0, target / norm, torch.ones_like(norm))
    return ratio.view(-1, *(1,) * (like.ndim - 1))


def _clamp_norm(x: Tensor, low: float, high: float) -> Tensor:
    norm = sample_norm(x)
    inside = (norm >= low) & (norm <= high)
    target = torch.where(inside, norm, norm.clamp(*_inward(low, high)))
    return x * _ratio(target, norm, x)


def _inward(low: float, high: float) -> tuple[float, float]:
    low_in, high_in = low * (1 + _MARGIN), high * (1 - _MARGIN)
    return (low_in, high_in) if low_in <= high_in else ((low + high) / 2,) * 2


def _turn(start: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    """Turns ``z`` about the origin, within its plane with ``start``, until ``|z - start|`` lies in ``[low, high]``.

    With ``m = |start|`` and ``r = |z|`` fixed, a distance d asks for the component ``p = (r^2 + m^2 - d^2) / (2 m)`` of z
    along start (law of cosines). Samples that are inside already, that no turn can bring inside, or that are parallel to
    ``start`` are returned as they came.
    """
    m, r, distance = sample_norm(start), sample_norm(z), sample_norm(z - start)
    target = distance.clamp(*_inward(low, high))
    p = (r**2 + m**2 - target**2) / (2 * m)
    along = start * _ratio(1.0, m, start)
    component = (z * along).flatten(1).sum(1)
    across = z - along * component.view(-1, *(1,) * (z.ndim - 1))
    across_norm = sample_norm(across)
    outside = (distance < low) | (distance > high)
    possible = (p.abs() <= r) & (across_norm > 1e-4 * r) & (m > 0)
    q = (r**2 - p**2).clamp_min(0).sqrt()
    turned = along * _ratio(p, torch.ones_like(p), z) + across * _ratio(q, across_norm, z)
    return torch.where((outside & possible).view(-1, *(1,) * (z.ndim - 1)), turned, z)
