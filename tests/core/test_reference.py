"""Reference runs: tails against scipy and simulation, and what carries over to other schedules and guidance scales."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from memorization_guard import Calibrator, RunSettings, StabilityMonitor, StabilityProfile, Thresholds
from memorization_guard.core.noise_level import NoiseLevel
from memorization_guard.core.reference import COLUMNS, SIGNALS, Reference, _single

SHAPE = (4, 8, 8)


class Denoiser:
    """Predicts noise of x ~ N(c, s^2) exactly, with and without a prompt: every solver follows the same curve."""

    def __init__(self, seed, memorized=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.mean = (
            torch.randn(1, *SHAPE, generator=generator) * (0.5 + 0.05 * torch.randn(1, generator=generator)) * memorized
        )
        self.scale = float(0.6 + 0.05 * torch.randn(1, generator=generator))

    def eps(self, z, level, prompt):
        mean = self.mean if prompt else 0 * self.mean
        variance = (level.alpha * self.scale) ** 2 + level.beta**2
        return level.beta * (z - level.alpha * mean) / variance


def sample(monitor, sigmas, *, seed, guidance=3.0, memorized=1.0, noise=0.0):
    """DDIM over ``sigmas`` (the last is the end), with ``noise`` of the variance added anew in each step."""
    denoiser, generator = Denoiser(seed, memorized), torch.Generator().manual_seed(10_000 + seed)
    z = torch.randn(1, *SHAPE, generator=generator)
    for start, end in pairwise(sigmas):
        level, after = NoiseLevel.from_sigma(start), NoiseLevel.from_sigma(end)
        uncond, cond = denoiser.eps(z, level, False), denoiser.eps(z, level, True)
        eps = uncond + guidance * (cond - uncond)
        x0 = (z - level.beta * eps) / level.alpha
        fresh = torch.randn(z.shape, generator=generator)
        z_next = after.alpha * x0 + after.beta * (math.sqrt(1 - noise) * eps + math.sqrt(noise) * fresh)
        z = monitor.step(z, z_next, x0, sigma=start, x0_coefficient=after.alpha, eps_cond=cond, eps_uncond=uncond)
    return monitor


def schedule(steps, start=14.0, end=0.03):
    return [*np.geomspace(start, end, steps).tolist(), 0.0]


def settings(sigmas, sampler="ddim", guidance=3.0):
    return RunSettings(
        model_hash="a", prediction_type="epsilon", sampler=sampler, steps=len(sigmas) - 1, guidance_scale=guidance,
        latent_shape=SHAPE, sigmas=tuple(sigmas[:-1]), end_sigma=sigmas[-1],
    )  # fmt: skip


def calibrated(steps=20, count=40, guidance=3.0):
    calibrator, sigmas = Calibrator(), schedule(steps)
    for seed in range(count):
        monitor = StabilityMonitor(settings=settings(sigmas, guidance=guidance))
        calibrator.add(sample(monitor, sigmas, seed=seed, guidance=guidance).traces[0])
    return calibrator.profile()


@pytest.fixture(scope="module")
def profile():
    return calibrated()


def traced(profile, sigmas, *, seed=500, sampler="ddim", guidance=3.0, thresholds=None, **kwargs):
    monitor = StabilityMonitor(profile, thresholds, settings=settings(sigmas, sampler, guidance))
    return sample(monitor, sigmas, seed=seed, guidance=guidance, **kwargs).traces[0]


@pytest.mark.parametrize("degrees", [2, 7, 49, 199])
def test_the_tail_is_students(degrees):
    runs, t = degrees + 1, np.array([0.0, 0.5, 1.0, 3.0, 6.0, 10.0])
    joint, guidance, local = _single(np.tile(t * math.sqrt(1 + 1 / runs), (3, 1)), runs)
    np.testing.assert_allclose(guidance, stats.t.sf(t, degrees), rtol=2e-3)
    np.testing.assert_allclose(joint, 2 * guidance, rtol=1e-6)
    np.testing.assert_array_equal(local, guidance)


def test_observed_false_alarms_are_near_the_nominal_where_logarithms_are_normal():
    """Correlated normal signals, 30 references: over many draws about as many new runs fall below a level as it says."""
    rng = np.random.default_rng(0)

    def draw(count):
        shared = rng.normal(size=(count, 1, 1))
        values = np.exp(3 + 0.1 * (0.8 * shared + 0.6 * rng.normal(size=(count, 12, 4))))
        return np.concatenate([values, np.ones((count, 12, len(COLUMNS) - 4))], axis=2)

    angles = np.linspace(1.5, 0.03, 13)
    tails = []
    for _ in range(60):
        region = Reference(draw(30), angles, None, np.zeros((12, 2))).region()
        new = np.log(draw(400)[:, :, :4])
        every = [region.statistics(angle, new[:, i].T)[1] for i, angle in enumerate(angles[:-1])]
        tails.append(region.tail(np.fmax.reduce(every)))
    for level in (0.1, 0.01, 0.001):
        assert level / 3 < (np.concatenate(tails) < level).mean() < 4 * level


def test_a_run_of_another_step_count_and_sampler_is_held_against_the_same_runs(profile):
    for steps in (7, 20, 45):
        for noise, sampler in ((0.0, "euler"), (0.3, "euler_ancestral")):
            ordinary = traced(profile, schedule(steps), sampler=sampler, noise=noise)
            copy = traced(profile, schedule(steps), sampler=sampler, noise=noise, memorized=2.0)
            assert (ordinary.verdict, copy.verdict) == ("stable", "mild"), (steps, sampler)
            assert copy.tail_probability < 1e-3 < ordinary.tail_probability
            assert "carried over" in ordinary.note
            assert ordinary.reference_count == 40


def test_bands_carried_over_are_those_of_a_calibration_there(profile):
    sigmas = schedule(30)
    own = calibrated(30)
    bands = StabilityMonitor(profile, settings=settings(sigmas)).outline()["bands"]
    # The update is that of a short step; these are long ones towards the end.
    for column, (name, tolerance) in enumerate({"latent": 0.02, "update": 0.2, "denoised": 0.02}.items()):
        np.testing.assert_allclose(bands[name]["mean"], own.mean[:, column], rtol=tolerance)


def test_another_guidance_scale_is_computed_from_the_same_predictions(profile):
    reference, own = profile.reference, calibrated(20, guidance=4.5).reference
    # The first step starts from the same noise: exact.
    carried, there = reference.region(guidance_scale=4.5).logs, own.region().logs
    np.testing.assert_allclose(carried[:, 0, :3], there[:, 0, :3], rtol=1e-3)
    plain = reference.region().logs
    assert np.abs(plain[:, 0, :2] - there[:, 0, :2]).min() > 0.1


def test_guidance_far_away_is_refused_and_the_published_method_is_not_carried_over(profile):
    assert not profile.check(settings(schedule(20), guidance=9.0)).valid
    carried = profile.check(settings(schedule(12)))
    assert carried.valid
    assert not carried.exact
    trace = traced(profile, schedule(12), memorized=2.0, thresholds=Thresholds(steering_guidance=None))
    assert trace.verdict == "unscored"
    assert "published method" in trace.note
    native = traced(profile, schedule(20), memorized=2.0, thresholds=Thresholds(steering_guidance=None))
    assert native.verdict != "unscored"
    assert native.tail_probability is None


def test_a_file_keeps_the_reference_runs(profile, tmp_path):
    again = StabilityProfile.load(profile.save(tmp_path / "p.safetensors"))
    np.testing.assert_allclose(again.reference.runs, profile.reference.runs, rtol=1e-6)
    np.testing.assert_array_equal(again.reference.angles, profile.reference.angles)
    assert traced(again, schedule(12)).tail_probability == pytest.approx(
        traced(profile, schedule(12)).tail_probability, rel=1e-3
    )


def test_the_map_shows_where_the_image_is_settled(profile):
    """A denoiser whose prompt fixes one corner alone."""
    sigmas = schedule(20)
    monitor = StabilityMonitor(profile, settings=settings(sigmas))
    original = Denoiser.__init__

    def cornered(self, seed, memorized=1.0):
        original(self, seed, memorized)
        self.mean = torch.zeros_like(self.mean)
        self.mean[:, :, :4, :4] = 3.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "__init__", cornered)
        trace = sample(monitor, sigmas, seed=900).traces[0]
    assert trace.local_map.shape == (4, 4)
    assert trace.local_map[:2, :2].min() > trace.local_map[2:].max() + 3
    assert trace.local_score > 3


def test_a_run_that_stops_is_known_to_as_soon_as_every_image_has_triggered(profile):
    sigmas = schedule(20)
    steps = []

    class Watch(StabilityMonitor):
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            steps.append(self.should_stop)
            return result

    sample(Watch(profile, settings=settings(sigmas), stop=True), sigmas, seed=500, memorized=2.0)
    assert steps[-1]
    assert steps.index(True) < 10
    steps.clear()
    sample(Watch(profile, settings=settings(sigmas), stop=True), sigmas, seed=500)
    assert not any(steps)
    steps.clear()
    sample(Watch(profile, settings=settings(sigmas)), sigmas, seed=500, memorized=2.0)
    assert not any(steps)


def test_what_does_not_fit_together_is_refused(profile):
    reference = profile.reference
    for change in ({"runs": reference.runs[:2]}, {"angles": reference.angles[1:]}, {"runs": reference.runs[:, :, :4]}):
        with pytest.raises(ValueError, match=r"must be|do not fit"):
            dataclasses.replace(reference, **change)
    broken = reference.runs.copy()
    broken[0, 0, SIGNALS.index("denoised")] = np.nan
    with pytest.raises(ValueError, match="finite"):
        dataclasses.replace(reference, runs=broken)
