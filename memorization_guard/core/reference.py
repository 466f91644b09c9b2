"""What ordinary images do at every noise level, for any sampler, step count and guidance scale (ours).

The published bands hold for one solver and one list of noise levels, for the norm of an update grows with the step and takes
in the noise that a sampler adds. What the network says at a noise level does not depend on the solver that asked. So an image
is held against the reference runs by four signals of the network's prediction alone, in the logarithm, whose distribution
over ordinary images is close to normal where that of the norm has a heavy right side:

``velocity``
    ``|v|`` with ``v = alpha eps - beta x0`` (Salimans & Ho 2022, appendix D), ``|dz / d theta|`` for the angle
    ``theta = atan(sigma)`` of the VP circle: the update norm of a step of any solver per unit of angle, without history or
    added noise.
``denoised``
    ``|x0|``.
``guidance``
    ``|eps_cond - eps_uncond|`` (Wen et al. 2024).
``local``
    Root mean square of x0 in a patch of the latent, as the geometric mean of the quarter of all patches where it is largest.

Between the noise levels of the reference runs each is interpolated along theta. Another guidance scale gives another x0 and v
from the same two predictions, which is computed anew for every reference run (exact in the first step; later the latents
would differ a little too). ``docs/evaluation.md`` has what this was measured to be worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

SIGNALS = ("velocity", "denoised", "guidance", "local")

#: What is kept of each step of a reference run.
COLUMNS = (*SIGNALS, "latent", "uncond", "alignment", "denoised_alignment")

#: What an image is judged by: update and x0 both off at one step, guidance too large, x0 too large in part of the image.
STATISTICS = ("joint", "guidance", "local")

#: Noise level (VE sigma) above which an image is still open: an ordinary prompt has settled little of it there.
OPEN_SIGMA = 4.0

#: Share of the latent's patches that the local signal looks at.
LOCAL_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference runs of a profile.

    Attributes:
        runs: ``[runs, steps, 8]``, columns as in :data:`COLUMNS`: norms, then cosines; NaN for what a run without guidance, or
            a latent without places, does not have. ``latent`` is the norm after the step.
        angles: ``[steps + 1]``, the angle ``atan(noise / signal)`` before every step and after the last; falling.
        guidance_scale: what the runs were made with, or ``None`` if that is not known.
        patches: ``[steps, 2]``, mean and standard deviation of the logarithm of a patch's root mean square, over runs and
            places; NaN where latents have none.
    """

    runs: np.ndarray
    angles: np.ndarray
    guidance_scale: float | None
    patches: np.ndarray

    def __post_init__(self) -> None:
        runs, angles, patches = (np.asarray(x, dtype=np.float64) for x in (self.runs, self.angles, self.patches))
        if runs.ndim != 3 or runs.shape[2] != len(COLUMNS) or len(runs) < 3 or not runs.shape[1]:
            raise ValueError(f"runs must be [3 or more, steps, {len(COLUMNS)}]; they are {runs.shape}")
        if angles.shape != (runs.shape[1] + 1,) or patches.shape != (runs.shape[1], 2):
            raise ValueError(f"angles and patches do not fit runs of {runs.shape[1]} steps: {angles.shape}, {patches.shape}")
        if not (np.isfinite(angles).all() and np.isfinite(runs[:, :, :2]).all()):
            raise ValueError("angles and norms must be finite")
        for name, value in (("runs", runs), ("angles", angles), ("patches", patches)):
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def region(self, angles: np.ndarray | None = None, guidance_scale: float | None = None) -> Region:
        """Where ordinary images are in a run over ``angles`` (as :attr:`angles`; by default the same), with this guidance."""
        logs = self._logs(guidance_scale)
        if angles is None:
            return Region(logs, self.angles, self.patches)
        angles = np.asarray(angles, dtype=np.float64)
        starts, own = angles[:-1], self.angles[:-1]
        there = np.empty((*logs.shape[:1], len(starts), logs.shape[2]))
        for column in range(logs.shape[2]):
            # The latent's norm is that after the step.
            at, known = (angles[1:], self.angles[1:]) if column == len(SIGNALS) else (starts, own)
            there[:, :, column] = _interpolated(at, known, logs[:, :, column])
        return Region(there, angles, _interpolated(starts, own, self.patches.T).T)

    def _logs(self, guidance_scale: float | None) -> np.ndarray:
        """Signals and latent norm of every reference run as they would be at another guidance scale: ``[runs, steps, 5]``."""
        velocity, denoised, guidance, local, latent, uncond, alignment, denoised_alignment = np.moveaxis(self.runs, 2, 0)
        w, other = self.guidance_scale, guidance_scale
        if w is not None and other is not None and not math.isclose(w, other) and np.isfinite(guidance).all():
            alpha, beta = np.cos(self.angles[:-1]), np.sin(self.angles[:-1])
            # x0' = x0 - beta / alpha (w' - w) g and v' = v + (w' - w) / alpha g; at zero signal neither is told by g.
            share = np.where(alpha > 1e-3, (other - w) / np.maximum(alpha, 1e-3), 0.0)
            along_x0 = denoised_alignment * guidance * denoised
            along_eps = alignment * guidance * uncond + w * guidance**2
            along_v = alpha * along_eps - beta * along_x0
            squared = denoised**2 - 2 * beta * share * along_x0 + (beta * share * guidance) ** 2
            changed = np.sqrt(np.maximum(squared, 1e-12))
            local = local * changed / denoised
            denoised = changed
            velocity = np.sqrt(np.maximum(velocity**2 + 2 * share * along_v + (share * guidance) ** 2, 1e-12))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.stack([velocity, denoised, guidance, local, latent], axis=2))


@dataclass(frozen=True, eq=False)
class Region:
    """Where ordinary images are, step by step of one run.

    Attributes:
        logs: ``[runs, steps, 5]``: logarithms of the signals, and of the latent's norm after the step, of every reference run.
        angles: ``[steps + 1]``, as in :class:`Reference`.
        patches: ``[steps, 2]``, as in :class:`Reference`.
    """

    logs: np.ndarray
    angles: np.ndarray
    patches: np.ndarray

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.logs.mean(axis=0), np.maximum(self.logs.std(axis=0, ddof=1), 1e-6)

    @cached_property
    def _rising(self) -> tuple[np.ndarray, np.ndarray]:
        """Angles before the steps in rising order, and the moments there, ``[steps, 2, 5]``."""
        order = np.argsort(self.angles[:-1])
        return self.angles[:-1][order], np.stack(self._moments, axis=1)[order]

    def _row(self, angle: float) -> np.ndarray:
        """Mean and standard deviation of the logarithms at ``angle``, ``[2, 5]``: between two steps in proportion."""
        angles, moments = self._rising
        after = int(np.searchsorted(angles, angle))
        if after in (0, len(angles)):
            return moments[min(after, len(angles) - 1)]
        share = (angle - angles[after - 1]) / (angles[after] - angles[after - 1])
        return (1 - share) * moments[after - 1] + share * moments[after]

    def deviations(self, angle: float, logs: np.ndarray) -> np.ndarray:
        """How many standard deviations ``logs`` ``[4, B]`` are from ordinary images' at ``angle``, with sign: ``[4, B]``."""
        mean, std = self._row(angle)
        with np.errstate(invalid="ignore"):
            return (logs - mean[: len(SIGNALS), None]) / std[: len(SIGNALS), None]

    def bands(self, angle: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of latent, update and x0 norm ``[3]`` of a step from ``angle`` to ``end``.

        The update is that of a solver that adds no noise: a chord of the VP circle.
        """
        mean, std = self._row(angle)
        ends, known = np.array([end]), self.angles[1:]
        latent = [float(_interpolated(ends, known, x[:, len(SIGNALS)])[0]) for x in self._moments]
        center = np.exp([latent[0], mean[0], mean[1]]) * [1.0, 2 * math.sin(abs(angle - end) / 2), 1.0]
        return center, center * [latent[1], std[0], std[1]]

    def patch(self, angle: float) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of a patch's root mean square."""
        mean, std = _interpolated(np.array([angle]), self.angles[:-1], self.patches.T)[:, 0]
        return float(mean), float(std)

    def statistics(self, angle: float, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviations ``[4, B]`` of logarithms ``[4, B]`` at ``angle``, and the statistics ``[3, B]`` of that step."""
        deviations = self.deviations(angle, logs)
        return deviations, _statistics(deviations, np.array(angle))

    @cached_property
    def _looks(self) -> tuple[np.ndarray, float]:
        """How many independent looks each statistic's maximum over the run amounts to, ``[3]``, NaN where it has none; and how
        many independent statistics all of them together do.

        The largest of K independent looks has ``-log(1 - q)`` exponentially distributed with rate K, q being the tail of one
        look. So K follows from the reference runs, each held against all others.
        """
        runs = len(self.logs)
        mean, std = self._moments
        off = self.logs - mean
        spread = np.sqrt(np.maximum(((runs - 1) * std**2 - off**2 * runs / (runs - 1)) / (runs - 2), 1e-12))
        deviations = (off * (runs / (runs - 1)) / spread)[:, :, : len(SIGNALS)].transpose(2, 1, 0)
        every = _statistics(deviations, self.angles[:-1, None])
        highest = np.where(np.isnan(every), -np.inf, every).max(axis=1)
        single = _single(highest, runs - 1)
        looks = np.array(
            [_rate(row) if there.any() else math.nan for row, there in zip(single, np.isfinite(highest), strict=True)]
        )
        there = np.isfinite(looks)
        if not there.any():
            return looks, 1.0
        least = -np.expm1(looks[there, None] * np.log1p(-single[there])).min(axis=0)
        return looks, float(np.clip(_rate(least), 1.0, there.sum()))

    def tail(self, highest: np.ndarray) -> np.ndarray:
        """Share of ordinary images that get as far in a whole run: of the highest statistics ``[3, B]`` so far, ``[B]``.

        The share that gets as far in any of them, taken together as if they were as many independent ones as the reference
        runs show them to be.
        """
        looks, independent = self._looks
        there = np.isfinite(looks)
        if not there.any():
            return np.full(highest.shape[1], np.nan)
        each = -np.expm1(looks[there, None] * np.log1p(-_single(highest, len(self.logs))[there]))
        return -np.expm1(independent * np.log1p(-np.minimum(each.min(axis=0), 1 - 1e-9)))


#: Whether a deviation to both sides counts, in the order of ``STATISTICS``.
_SIDES = np.array([2, 1, 1])


def _statistics(deviations: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The statistics of single steps from deviations ``[4, ...]`` of the signals at ``angles``: ``[3, ...]``.

    Guidance counts while an image is open: later, solvers part ways, and so does the guidance of ordinary images.
    """
    velocity, denoised, guidance, local = deviations
    joint = np.minimum(np.abs(velocity), np.abs(denoised))
    return np.stack([joint, np.where(np.tan(angles) > OPEN_SIGMA, guidance, np.nan), local])


def _single(highest: np.ndarray, runs: int) -> np.ndarray:
    """Share of ordinary images whose statistic ``[3, B]`` is as high in one look, with ``runs`` references: ``[3, B]``.

    A new image against R references follows Student's t with R - 1 degrees of freedom, times ``sqrt(1 + 1 / R)``.
    """
    t = np.maximum(np.nan_to_num(highest, nan=0.0) / math.sqrt(1 + 1 / runs), 0.0)
    at, log_tail = _tail_table(runs - 1)
    return np.minimum(np.exp(np.interp(np.arctan(t / math.sqrt(runs - 1)), at, log_tail)) * _SIDES[:, None], 1 - 1e-9)


def _rate(shares: np.ndarray) -> float:
    """Rate of the exponential distribution of ``-log(1 - share)``, by maximum likelihood."""
    return len(shares) / max(float(-np.log1p(-np.minimum(shares, 1 - 1e-9)).sum()), 1e-9)


def _interpolated(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` ``[..., steps]`` at other angles, held constant outside: ``[..., len(at)]``. ``known`` falls or rises."""
    order = np.argsort(known)
    flat = values.reshape(-1, values.shape[-1])[:, order]
    return np.stack([np.interp(at, known[order], row) for row in flat]).reshape(*values.shape[:-1], len(at))


@cache
def _tail_table(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of ``P(T > t)`` of Student's t, by ``atan(t / sqrt(degrees))``."""
    # With t = sqrt(nu) tan(phi) the density is proportional to cos(phi) ** (nu - 1); nothing of scipy's is to be had here.
    angle = np.linspace(0.0, math.pi / 2, 8193)
    density = np.cos(angle) ** (degrees - 1)
    parts = (density[1:] + density[:-1]) / 2
    tail = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
    return angle, np.log(np.maximum(tail / (2 * tail[0]), 1e-300))
