"""Scales a latent can be carried in, what a network's output means, and the norm everything is measured with.

Every host writes a noisy latent as ``x = signal * x0 + noise * eps`` and differs only in the two coefficients:

=====================  ==================  =====================
convention             signal              noise
=====================  ==================  =====================
VP (DDPM, diffusers)   ``sqrt(abar)``      ``sqrt(1 - abar)``
VE (k-diffusion)       ``1``               ``sigma``
rectified flow         ``1 - t``           ``t``
=====================  ==================  =====================

The method is defined on the VP scale, ``signal**2 + noise**2 == 1``; dividing by ``hypot(signal, noise)`` takes any of
them there, so one stability profile means the same in every host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: The largest noise-to-signal ratio that is told apart from pure noise.
MAX_SIGMA = 4096.0

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample")


@dataclass(frozen=True)
class NoiseLevel:
    """The coefficients of ``x = signal * x0 + noise * eps`` at one point of the schedule, as plain floats.

    Plain floats, because a coefficient that lived on the device would have to be waited for at every step.
    """

    signal: float
    noise: float

    def __post_init__(self) -> None:
        if not (self.signal >= 0 and self.noise >= 0 and 0 < math.hypot(self.signal, self.noise) < math.inf):
            raise ValueError(
                f"NoiseLevel(signal={self.signal}, noise={self.noise}): both must be finite and non-negative, "
                "and not both zero"
            )

    @classmethod
    def from_sigma(cls, sigma: float) -> NoiseLevel:
        """VE scale, ``x = x0 + sigma * eps`` (k-diffusion; Karras et al. 2022)."""
        return cls(1.0, float(sigma))

    @classmethod
    def from_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """VP scale, ``x = sqrt(abar) x0 + sqrt(1 - abar) eps`` (Ho et al. 2020, eq. 4)."""
        alpha_bar = float(alpha_bar)
        if not 0.0 <= alpha_bar <= 1.0:
            raise ValueError(f"alpha_bar is {alpha_bar}; it is a share of variance and lies in [0, 1]")
        return cls(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))

    @classmethod
    def from_flow(cls, t: float) -> NoiseLevel:
        """Rectified flow, ``x = (1 - t) x0 + t eps`` (Liu et al. 2023; SD3, Flux), with t in [0, 1]."""
        t = float(t)
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"flow time is {t}; it lies in [0, 1]")
        return cls(1.0 - t, t)

    @classmethod
    def from_model(cls, sigma: float, prediction_type: str | None) -> NoiseLevel:
        """The level that a model of this prediction type calls ``sigma``: the time of a rectified flow, else VE sigma."""
        return cls.from_flow(sigma) if prediction_type == "flow_prediction" else cls.from_sigma(sigma)

    def model_sigma(self, prediction_type: str | None) -> float:
        """The inverse of :meth:`from_model`."""
        return self.noise if prediction_type == "flow_prediction" else self.sigma

    @property
    def scale(self) -> float:
        """What a latent of this convention is divided by to stand on the VP scale."""
        return math.hypot(self.signal, self.noise)

    @property
    def alpha(self) -> float:
        """Coefficient of x0 in the VP-scaled latent, ``sqrt(abar)``."""
        return self.signal / self.scale

    @property
    def beta(self) -> float:
        """Coefficient of the noise in the VP-scaled latent, ``sqrt(1 - abar)``."""
        return self.noise / self.scale

    @property
    def angle(self) -> float:
        """``atan(sigma)``, where on the VP circle the latent is: from 0, clean, to ``pi / 2``, pure noise."""
        return math.atan2(self.noise, self.signal)

    @property
    def sigma(self) -> float:
        """Noise-to-signal ratio, the VE sigma of the same point.

        At most 4096, which stands for "nothing of x0 is left" as in diffusers' Euler scheduler: infinity is no JSON.
        """
        return self.noise / max(self.signal, self.noise / MAX_SIGMA)

    def denoised_coefficients(self, prediction_type: str) -> tuple[float, float]:
        """``(a, b)`` such that the clean latent that a network output stands for is ``x0 = a x + b output``.

        Args:
            prediction_type: ``"epsilon"``; ``"v_prediction"``, ``v = alpha eps - beta x0`` on the VP scale (Salimans & Ho
                2022,
                appendix D); ``"flow_prediction"``, ``v = eps - x0`` (Liu et al. 2023); ``"sample"``, x0 itself.

        Raises:
            ValueError: for another prediction type, and for epsilon where ``signal`` is 0 (x0 is not in x then).
        """
        if prediction_type == "sample":
            return 0.0, 1.0
        if prediction_type == "flow_prediction":
            # x = signal x0 + noise (v + x0)
            return 1 / (self.signal + self.noise), -self.noise / (self.signal + self.noise)
        if prediction_type == "v_prediction":
            return self.alpha / self.scale, -self.beta
        if prediction_type == "epsilon":
            if self.signal == 0:
                raise ValueError("an epsilon prediction says nothing about x0 at zero signal (zero terminal SNR)")
            return 1 / self.signal, -self.noise / self.signal
        raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


class Timesteps:
    """The noise levels of a model with discrete timesteps, and in between, linear in the logarithm of sigma.

    Args:
        alphas_cumprod: ``abar`` of every timestep that the model was trained on, ``[T]``.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alpha_bar = alphas_cumprod.detach().double().cpu().clamp(1 / (1 + MAX_SIGMA**2), 1 - 1e-12)
        self._log_sigma: list[float] = (0.5 * ((1 - alpha_bar) / alpha_bar).log()).tolist()

    def level(self, t: float) -> NoiseLevel:
        """The noise level of timestep ``t``, held to ``[0, T - 1]``, on the VP scale."""
        t = min(max(t, 0.0), len(self._log_sigma) - 1)
        below = math.floor(t)
        above = min(below + 1, len(self._log_sigma) - 1)
        sigma = math.exp(self._log_sigma[below] + (t - below) * (self._log_sigma[above] - self._log_sigma[below]))
        return NoiseLevel.from_alpha_bar(1 / (1 + sigma * sigma))


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of half precision, which would round what is computed from it; otherwise itself."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A copy of ``x`` ``[B, C, ...]`` whose last axes have another size, by nearest values: of a latent, and of what stands
    beside one (a mask, an image to go by)."""
    return x.clone() if tuple(x.shape[2:]) == tuple(size) else functional.interpolate(x, size=tuple(size), mode="nearest")


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm over all axes but the first, in float32 whatever the dtype: ``[B, ...] -> [B]``."""
    # vector_norm widens as it sums, at some cost even where there is nothing to widen, and never narrows.
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype).float()


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row ``[B, N] -> [B]`` of a tensor that is not of half precision, in its own dtype."""
    return torch.linalg.vector_norm(x, dim=1)
