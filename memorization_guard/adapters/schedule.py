"""The evaluations of one run and their noise levels, read from the scheduler of a diffusers pipeline.

A pipeline walks through ``scheduler.timesteps``, from its beginning or a later place to its end or an earlier place: one
evaluation of the network and one call of ``scheduler.step`` each. Nothing here waits for a device after the first evaluation.
"""

from __future__ import annotations

import math
from typing import Any

from ..core import published
from ..core.noise_level import NoiseLevel, Timesteps

#: Relative distance up to which two timesteps are the same: pipelines round them to bfloat16.
_ROUNDING = 1 / 128


class Schedule:
    """What a run is going to do, known at its first evaluation.

    Args:
        scheduler: the scheduler, its timesteps set.
        timestep: what the network is given first, as a number.
        count: number of timesteps that the pipeline says it walks through; ``None`` where it says nothing.

    Attributes:
        prediction_type: what the network predicts.
        levels: noise level of the latent that the network is given, one an evaluation.
        coefficients: ``(a, b)`` with ``x0 = a x + b output``, one an evaluation.
        output_sign: -1 where the pipeline turns the sign of the network's output before the scheduler gets it.

    Raises:
        ValueError: if the noise levels cannot be known.
    """

    def __init__(self, scheduler: Any, timestep: float, count: int | None) -> None:
        config = scheduler.config
        timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        sigmas = [float(s) for s in getattr(scheduler, "sigmas", ())]
        self._trained = float(config.get("num_train_timesteps", 1000))
        self._sigma_data = float(config.sigma_data) if hasattr(scheduler, "precondition_outputs") else None
        self._flow = bool(config.get("use_flow_sigmas")) or (
            not hasattr(scheduler, "alphas_cumprod") and _are_times(sigmas, timesteps, self._trained)
        )
        inverted = self._inverted = bool(config.get("invert_sigmas"))
        self.prediction_type = "flow_prediction" if self._flow else str(config.get("prediction_type", "epsilon"))
        # Two-stage schedulers evaluate between their sigmas; their timesteps say where.
        two_stages = getattr(scheduler, "order", 1) > 1 and not self._flow
        alphas = self._alphas = getattr(scheduler, "alphas_cumprod", None)
        known = self._flow or self._sigma_data is not None or alphas is not None
        if known and len(sigmas) == len(timesteps) + 1 and not two_stages:
            every = [self._network_level(1 - sigma if inverted else sigma) for sigma in sigmas]
            every, last = every[:-1], every[-1]
        elif alphas is not None and not self._flow:
            table = Timesteps(alphas)
            every = [table.level(t) for t in timesteps]
            final = getattr(scheduler, "final_alpha_cumprod", None)
            last = NoiseLevel.from_alpha_bar(1.0 if final is None else float(final))
        else:
            raise ValueError(f"the noise levels of {type(scheduler).__name__} cannot be read: choose another scheduler")
        # Some networks are given flow times in [0, 1], and some count backwards.
        self._unit = self._trained if self._flow and timestep <= 1.0 and not inverted else 1.0
        start, self._reversed = self._place(scheduler, timesteps, timestep, count)
        end = len(timesteps) if count is None else min(start + count, len(timesteps))
        self._timesteps = timesteps[start:end]
        self.levels = every[start:end]
        self._after = [*every, last][start + 1 : end + 1]
        self.output_sign = -1.0 if self._reversed else 1.0
        turned = inverted != self._reversed
        self.coefficients = [self._denoised_coefficients(level, -1.0 if turned else 1.0) for level in self.levels]
        # Latents of a variance-exploding sampler are scaled down for the network only.
        self._exploding = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0
        # PNDM makes its first step in two calls; solvers of second order make every step in two.
        self._order = int(getattr(scheduler, "order", 1))
        steps = getattr(scheduler, "num_inference_steps", None) or len(timesteps)
        self._warmup = max(0, len(timesteps) - steps * self._order)

    def __len__(self) -> int:
        return len(self.levels)

    def begins(self, evaluation: int) -> bool:
        """Whether a solver step begins with this evaluation."""
        return evaluation == 0 or (evaluation > self._warmup and evaluation % self._order == 0)

    def in_noise(self) -> tuple[float, NoiseLevel, tuple[float, float]]:
        """The highest noise level of the model: the timestep that its network is given there, the level, its coefficients.

        Raises:
            ValueError: if it is not known.
        """
        if self._flow and not self._inverted:
            timestep = 0.0 if self._reversed else self._trained
            level = NoiseLevel.from_flow(1.0)
            return timestep / self._unit, level, self._denoised_coefficients(level, self.output_sign)
        if self._alphas is not None and not self._flow:
            level = NoiseLevel.from_alpha_bar(float(self._alphas[-1]))
            return len(self._alphas) - 1.0, level, self._denoised_coefficients(level, 1.0)
        raise ValueError("the highest noise level of this scheduler's model is not known")

    def after(self, evaluation: int) -> NoiseLevel:
        """Noise level of the latent that the scheduler makes from this evaluation, on the scheduler's own scale."""
        level = self._after[evaluation]
        return NoiseLevel.from_sigma(level.sigma) if self._exploding else level

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level before every solver step, and after the last, in the model's own convention."""
        begins = [level for number, level in enumerate(self.levels) if self.begins(number)]
        return tuple(level.model_sigma(self.prediction_type) for level in (*begins, self._after[-1]))

    def is_at(self, evaluation: int, timestep: float) -> bool:
        """Whether a network that is given ``timestep`` is at this evaluation."""
        return _near(self._planned(timestep, self._reversed), self._timesteps[evaluation])

    def _planned(self, timestep: float, reverse: bool) -> float:
        """The scheduler's timestep for that of the network."""
        return self._trained - timestep * self._unit if reverse else timestep * self._unit

    def _place(self, scheduler: Any, timesteps: list[float], timestep: float, count: int | None) -> tuple[int, bool]:
        """Where in ``timesteps`` a run begins, and whether its network counts backwards."""
        for reverse in (False, True) if self._flow else (False,):
            wanted = self._planned(timestep, reverse)
            distances = [abs(t - wanted) for t in timesteps]
            nearest = min(distances, default=math.inf)
            if not timesteps or not _near(wanted, timesteps[distances.index(nearest)]):
                continue
            places = [place for place, distance in enumerate(distances) if distance == nearest]
            # A timestep may stand there twice: then the scheduler knows, or the run begins where it gets to the end.
            hints = [getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)]
            hints.append(len(timesteps) - (count or 0))
            return next((hint for hint in hints if hint in places), places[0]), reverse
        raise ValueError(f"the network is given timestep {timestep:g}, which is none of the scheduler's")

    def _network_level(self, sigma: float) -> NoiseLevel:
        if self._flow:
            return NoiseLevel.from_flow(min(max(sigma, 0.0), 1.0))
        if self._sigma_data is not None:
            scale = math.hypot(sigma, self._sigma_data)
            return NoiseLevel(1 / scale, sigma / scale)
        return NoiseLevel.from_alpha_bar(1 / (1 + sigma * sigma))

    def _denoised_coefficients(self, level: NoiseLevel, sign: float) -> tuple[float, float]:
        if self._sigma_data is not None:
            # Karras et al. 2022, table 1, of a network that is given x / sqrt(sigma^2 + sigma_data^2).
            total = math.hypot(level.sigma, self._sigma_data)
            c_out = level.sigma * self._sigma_data / total
            return self._sigma_data**2 / total, -c_out if self.prediction_type == "v_prediction" else c_out
        a, b = level.denoised_coefficients(self.prediction_type)
        return a, sign * b


def _near(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=_ROUNDING, abs_tol=1e-3)


def _are_times(sigmas: list[float], timesteps: list[float], trained: float) -> bool:
    """Whether the sigmas are the times of a rectified flow: the timesteps are the same in thousandths."""
    return bool(timesteps) and all(_near(sigma * trained, t) for sigma, t in zip(sigmas, timesteps, strict=False))


def check_hands_out_steps(scheduler: Any) -> None:
    """Whether what a scheduler's ``step`` returns is on the VP scale, and is all that its next step starts from.

    Raises:
        ValueError: if it is not.
    """
    keeps_latents = any(hasattr(scheduler, name) for name in ("last_sample", "sample"))
    flow = not hasattr(scheduler, "alphas_cumprod") or bool(scheduler.config.get("use_flow_sigmas"))
    runge_kutta = not scheduler.config.get("skip_prk_steps", True)
    if keeps_latents or flow or runge_kutta or float(scheduler.init_noise_sigma) != 1.0:
        raise ValueError(f"{type(scheduler).__name__}: {published.REFUSED}, or a scheduler such as PNDM or DDIM")
