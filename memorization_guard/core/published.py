"""The published method, whole: Huang et al., *Broken Memories*, KDD 2026, arXiv:2605.22050, Algorithms 1 and 2.

It judges solver steps by the norms of latent, update and predicted x0 against a profile of the same sampler, schedule and
guidance scale, and corrects by editing the latent after a step. So it needs both ends of a step, which only a host that hands
out its steps has. What the paper leaves open is marked (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .noise_level import sample_norm
from .profile import Norms, StabilityProfile
from .settings import PUBLISHED_STEPS, Thresholds, Verdict

#: What is said where steps cannot be had.
REFUSED = (
    "the published method edits latents between solver steps, which this host does not hand out: use it with diffusers, or "
    "choose "
    "the reference method"
)

#: Relative distance by which a clamp aims inside its band, so that rounding in float32 does not leave it again.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Judgement:
    """What one step was found to be, each ``[B]`` but the row.

    Attributes:
        row: the profile's row that the step was held against; ``None`` off the schedule.
        update_score, denoised_score: ``s_delta`` and ``s_x0``, NaN off the schedule.
        correct: whether the step is to be corrected.
    """

    row: int | None
    update_score: np.ndarray
    denoised_score: np.ndarray
    correct: np.ndarray


class Detector:
    """Algorithm 1: an image triggers at the first step where the scores of update and x0 are both above ``tau_mild``.

    Rows of the profile are found by noise level, so that a run over the last part of the schedule (image to image) is held
    against the right ones (ours). A run that leaves the profile's schedule is not judged any further.

    Args:
        profile, thresholds: what the run is held against.
    """

    def __init__(self, profile: StabilityProfile, thresholds: Thresholds) -> None:
        self._profile = profile
        self._thresholds = thresholds
        self._finite = np.ones(0, dtype=bool)
        self._row: int | None = None
        self._steps = 0
        #: Step at which each sample triggered, -1 if it has not: ``[B]``; empty before the first step.
        self.trigger_step = np.zeros(0, dtype=int)
        #: Whether the trigger was strong: ``[B]``. The kind is fixed at the trigger.
        self.strong = np.zeros(0, dtype=bool)
        #: Why the run is not judged, if it is not.
        self.off_schedule: str | None = None

    def corrected(self, judgement: Judgement, z_prev: Tensor, z_next: Tensor, x0: Tensor, x0_coefficient: float) -> Tensor:
        """The latent to go on with: samples that are not to be corrected are bit-identical. Arguments as for
        :func:`correct`."""
        chosen = np.flatnonzero(judgement.correct)
        if judgement.row is None or not len(chosen):
            return z_next
        index = torch.as_tensor(chosen, device=z_next.device)
        mean, std = self._profile.row(judgement.row)
        after = correct(
            z_prev[index],
            z_next[index],
            x0[index],
            x0_coefficient=x0_coefficient,
            mean=mean,
            std=std,
            gamma=self._thresholds.gamma,
            strong=torch.as_tensor(self.strong[chosen], device=z_next.device),
        )
        return z_next.index_copy(0, index, after)

    def judge(self, sigma: float, norms: Norms) -> Judgement:
        """Takes in the next step, from noise level ``sigma``, with norms ``[B]``."""
        batch = len(norms.latent)
        if not self._steps:
            self._finite, self.strong = np.ones(batch, dtype=bool), np.zeros(batch, dtype=bool)
            self.trigger_step = np.full(batch, -1)
        step, self._steps = self._steps, self._steps + 1
        if self.off_schedule is None:
            self._row = self._profile.next_row(self._row, sigma, step)
            if self._row is None:
                self.off_schedule = f"step {step}, at noise level {sigma:.4g}, is not in the profile's schedule"
        if self.off_schedule is not None or self._row is None:
            nothing = np.full(batch, np.nan)
            return Judgement(None, nothing, nothing, np.zeros(batch, dtype=bool))
        # A sample that was NaN or infinite once has lost its trajectory: later norms mean nothing.
        self._finite &= np.isfinite(np.stack(norms)).all(axis=0)
        scores, tau = self._profile.scores(self._row, norms), self._thresholds.tau_mild
        outside = self._finite & (scores.update > tau)
        fresh = outside & (scores.denoised > tau) & (self.trigger_step < 0)
        self.trigger_step[fresh] = step
        self.strong |= fresh & (scores.denoised > self._thresholds.tau_strong)
        early = self._row < mild_limit(self._thresholds, self._profile.steps)
        correct = outside & (self.trigger_step >= 0) & (self.strong | early)
        return Judgement(self._row, scores.update, scores.denoised, correct)

    def verdict(self, sample: int) -> Verdict:
        """The verdict so far."""
        if not self._steps:
            return "unscored"
        if self.trigger_step[sample] >= 0:
            return "strong" if self.strong[sample] else "mild"
        return "stable" if self._finite[sample] and self.off_schedule is None else "unscored"


def mild_limit(thresholds: Thresholds, steps: int) -> int:
    """``k``, the number of first steps in which a mild image is corrected, for a run of that many steps (ours: scaled)."""
    return max(1, round(thresholds.mild_steps * steps / PUBLISHED_STEPS)) if thresholds.mild_steps else 0


def correct(
    z_prev: Tensor, z_next: Tensor, x0: Tensor, *, x0_coefficient: float, mean: Norms, std: Norms, gamma: float, strong: Tensor
) -> Tensor:
    """Algorithm 2: the corrected ``z_next``, for samples that are all to be corrected.

    1. x0 is rescaled to the reference norm, which moves the latent by ``x0_coefficient * (x0' - x0)``;
    2. strong samples: the length of the update from ``z_prev`` is clamped into its band, direction kept;
    3. the norm of the latent is clamped into its band, direction kept.

    Step 3 can take the update of a strong sample out of its band again. Then (ours) the latent is turned towards or away from
    ``z_prev`` in the plane of the two, its own norm kept, until both norms lie in their bands; where no such point exists,
    the band of the latent wins.

    Args:
        z_prev, z_next, x0: latents on the VP scale, ``[B, ...]``.
        x0_coefficient: the coefficient of x0 in ``z_next``, ``sqrt(abar_{i+1})``.
        mean, std: the profile's row; each norm one number. A band is ``mean -+ gamma std``, never below 0.
        strong: ``[B]`` bool.

    Returns:
        ``[B, ...]`` in the dtype of ``z_next``. A sample whose correction is not finite is returned as it came.
    """
    start, proposal, denoised = z_prev.float(), z_next.float(), x0.float()

    def band(name: str) -> tuple[float, float]:
        centre, half = float(getattr(mean, name)), gamma * float(getattr(std, name))
        return max(centre - half, 0.0), centre + half

    z = proposal + x0_coefficient * (rescale(denoised, float(mean.denoised)) - denoised)
    strong = strong.view(-1, *(1,) * (z.ndim - 1))
    z = torch.where(strong, start + _clamp_norm(z - start, *band("update")), z)
    z = _clamp_norm(z, *band("latent"))
    z = torch.where(strong, _turn(start, z, *band("update")), z)
    finite = torch.isfinite(sample_norm(z)).view_as(strong)
    return torch.where(finite, z, proposal).to(z_next.dtype)


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
