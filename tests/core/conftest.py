"""A model that can be worked out by hand: predictions for images around a prompt's own mean, whatever the noise level."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from memorization_guard import Calibrator, RunSettings, StabilityMonitor
from memorization_guard.core.noise_level import NoiseLevel

SHAPE = (4, 8, 8)
GUIDANCE = 3.0
STEPS = 20


class World:
    """Prompt ``seed`` stands for images around a mean of its own; a memorized one, for a mean that is ``memorized`` times as
    far away."""

    shape, guidance, steps = SHAPE, GUIDANCE, STEPS

    def predictions(self, x, sigma, seeds, memorized, place=None):
        """Clean latents with and without the prompt, for images of ``x0 ~ N(mean, scale^2)``."""
        cond, uncond = [], []
        for one, seed, factor in zip(x, seeds, memorized, strict=True):
            generator = torch.Generator().manual_seed(seed)
            mean = torch.randn(SHAPE, generator=generator) * (0.5 + 0.05 * torch.randn(1, generator=generator)) * factor
            if place is not None:
                mean = torch.zeros(SHAPE)
                mean[:, place[0], place[1]] = 3.0
            variance = float(0.6 + 0.05 * torch.randn(1, generator=generator)) ** 2
            shrink = variance / (variance + sigma**2)
            cond.append(mean + shrink * (one.float() - mean))
            uncond.append(shrink * one.float())
        return torch.stack(cond).to(x.dtype), torch.stack(uncond).to(x.dtype)

    def schedule(self, steps=STEPS, start=14.0, end=0.03):
        return [*np.geomspace(start, end, steps).tolist(), 0.0]

    def settings(self, sigmas=None, sampler="euler", guidance=GUIDANCE, **more):
        sigmas = sigmas or self.schedule()
        return RunSettings(
            model_hash="a", prediction_type="epsilon", sampler=sampler, steps=len(sigmas) - 1, guidance_scale=guidance,
            latent_shape=SHAPE, sigmas=tuple(sigmas[:-1]), end_sigma=sigmas[-1], **more,
        )  # fmt: skip

    def sample(
        self, monitor, *, seeds=(500,), memorized=1.0, sigmas=None, guidance=GUIDANCE, guided=True, dtype=torch.float32,
        ancestral=0.0, place=None, stop=None, mix=None, ask=None,
    ):  # fmt: skip
        """Euler's method; yields the latents that it went through, and every prediction that it went on with."""
        sigmas = sigmas or self.schedule()
        factors = memorized if isinstance(memorized, (list, tuple)) else [memorized] * len(seeds)
        noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(9_000 + seed)) for seed in seeds])
        fresh = torch.Generator().manual_seed(1)
        x, latents, given = (noise * sigmas[0]).to(dtype), [], []
        for number, (sigma, following) in enumerate(pairwise(sigmas)):
            cond, uncond = self.predictions(x, sigma, seeds, factors, place)
            kept = monitor.predicted(x, torch.full((len(x),), sigma), cond, uncond if guided else None, ask=ask)
            monitor.latent(x, NoiseLevel.from_sigma(sigma), evaluated=True)
            latents.append(x)
            given.append((cond, uncond, kept))
            if stop is not None and number == stop:
                return latents, given
            denoised = (mix or (lambda c, u: u + guidance * (c - u)))(kept, uncond) if guided else kept
            down = following * (1 - ancestral) ** 0.5
            x = denoised + (x - denoised) * (down / sigma)
            x = (x + torch.randn(x.shape, generator=fresh) * (following**2 - down**2) ** 0.5).to(dtype)
        monitor.latent(x, NoiseLevel.from_sigma(sigmas[-1]), evaluated=False)
        return [*latents, x], given

    def trace(self, profile=None, mode="trace", thresholds=None, *, seed=500, sampler="euler", **more):
        """One image's trace."""
        settings = self.settings(more.get("sigmas"), sampler, more.get("guidance", GUIDANCE))
        monitor = StabilityMonitor(profile, thresholds, mode, settings=settings)
        self.sample(monitor, seeds=(seed,), **more)
        return monitor.traces[0]

    def calibrated(self, count=40, **more):
        calibrator = Calibrator()
        for seed in range(count):
            calibrator.add(self.trace(seed=seed, **more))
        return calibrator.profile()


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture(scope="session")
def profile(world):
    return world.calibrated()
