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
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def to_vp(self, x: Tensor) -> Tensor:
        """A latent of this convention on the VP scale: the same object if it already is, otherwise at least float32."""
        return x if math.isclose(self.scale, 1.0, rel_tol=1e-7) else widened(x) / self.scale

    def from_vp(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`to_vp`."""
        return z if math.isclose(self.scale, 1.0, rel_tol=1e-7) else z * self.scale

    def denoised(self, x: Tensor, prediction: Tensor, prediction_type: str) -> Tensor:
        """Clean latent x0 that a network output stands for.

        Args:
            x: noisy latent of this convention, ``[B, ...]``.
            prediction: network output of the same shape.
            prediction_type: ``"epsilon"``; ``"v_prediction"``, ``v = alpha eps - beta x0`` on the VP scale (Salimans &
                Ho 2022, appendix D); ``"flow_prediction"``, ``v = eps - x0`` (Liu et al. 2023); ``"sample"``, x0 itself.

        Raises:
            ValueError: for another prediction type, and for epsilon where ``signal`` is 0 (x0 is not in x then).
        """
        if prediction_type == "sample":
            return prediction
        if prediction_type == "flow_prediction":
            # x = signal x0 + noise (v + x0)
            return (x - self.noise * prediction) / (self.signal + self.noise)
        if prediction_type == "v_prediction":
            return (self.alpha / self.scale) * x - self.beta * prediction
        if prediction_type == "epsilon":
            if self.signal == 0:
                raise ValueError("an epsilon prediction says nothing about x0 at zero signal (zero terminal SNR)")
            return (x - self.noise * prediction) / self.signal
        raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")

    def epsilon(self, x: Tensor, prediction: Tensor, prediction_type: str) -> Tensor:
        """Noise that a network output stands for; arguments and errors as in :meth:`denoised`."""
        if prediction_type == "epsilon":
            return prediction
        if prediction_type == "flow_prediction":
            return (x + self.signal * prediction) / (self.signal + self.noise)
        if prediction_type == "v_prediction":
            return (self.beta / self.scale) * x + self.alpha * prediction
        if self.noise == 0:
            raise ValueError("x0 says nothing about the noise at noise level 0")
        return torch.sub(x, self.denoised(x, prediction, prediction_type), alpha=self.signal).div_(self.noise)

    def prediction(self, x: Tensor, denoised: Tensor, prediction_type: str) -> Tensor:
        """The network output that stands for a clean latent: the inverse of :meth:`denoised`, where there is noise in x."""
        if prediction_type == "sample":
            return denoised
        eps = self.epsilon(x, denoised, "sample")
        if prediction_type == "epsilon":
            return eps
        if prediction_type == "flow_prediction":
            return eps - denoised
        if prediction_type == "v_prediction":
            return self.alpha * eps - self.beta * denoised
        raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def where_changed(x: Tensor, before: Tensor, after: Tensor, value: Tensor) -> Tensor:
    """``x`` with ``value``, in its dtype, in the samples in which ``after`` differs from ``before``; the others bit-identical.

    Going to another scale and back rounds, so that a sample that nobody changed has to be taken as it came.
    """
    changed = (after != before).flatten(1).any(1).view(-1, *(1,) * (x.ndim - 1))
    return torch.where(changed, value.to(x.dtype), x)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of half precision, which would round what is computed from it; otherwise itself."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm over all axes but the first, in float32 whatever the dtype: ``[B, ...] -> [B]``."""
    # vector_norm widens as it sums, at some cost even where there is nothing to widen, and never narrows.
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype)
    return norm.float() if norm.dtype == torch.float64 else norm
