"""The published method: Algorithm 1 triggers where it says, Algorithm 2 holds what it promises, for any latents."""

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memorization_guard import RunSettings, StabilityMonitor, StabilityProfile, Thresholds
from memorization_guard.core.noise_level import NoiseLevel
from memorization_guard.core.profile import Norms
from memorization_guard.core.published import Detector, correct, mild_limit

SHAPES = [(4, 4, 4), (4, 2, 4, 4)]
factors = st.floats(0.2, 5.0)


def latents(seed, shape, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for _ in range(3)]


def norms(x):
    return x.double().flatten(1).norm(dim=1)


def region(z_prev, z_next, x0, scales, width):
    """A band around the first sample's own norms, each scaled, so that some samples lie outside."""
    reference = [norms(z_next)[0], norms(z_next - z_prev)[0], norms(x0)[0]]
    mean = np.array([float(n) * s for n, s in zip(reference, scales, strict=True)])
    return mean, (mean * (1 - width), mean * (1 + width))


def corrected(z_prev, z_next, x0, *, bounds, strong, x0_norm, x0_coefficient):
    """:func:`correct` with bands given by their ends; that of x0 is its reference norm alone."""
    low, high = bounds
    middle, half = (low + high) / 2, (high - low) / 2
    mean, std = Norms(*middle[:2], np.asarray(x0_norm)), Norms(*half)
    return correct(z_prev, z_next, x0, x0_coefficient=x0_coefficient, mean=mean, std=std, gamma=1.0, strong=strong)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.sampled_from(SHAPES),
    st.tuples(factors, factors, factors),
    st.floats(0.001, 0.5),
    st.floats(0.0, 1.0),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_every_clamped_norm_lies_in_its_band(seed, shape, scales, width, coefficient, strong):
    z_prev, z_next, x0 = latents(seed, shape)
    mean, (low, high) = region(z_prev, z_next, x0, scales, width)
    strong = torch.tensor(strong)
    z = corrected(z_prev, z_next, x0, x0_coefficient=coefficient, x0_norm=float(mean[2]), bounds=(low, high), strong=strong)
    slack = 1e-5
    latent, update, start = norms(z).numpy(), norms(z - z_prev).numpy(), norms(z_prev).numpy()
    assert (latent >= low[0] * (1 - slack)).all()
    assert (latent <= high[0] * (1 + slack)).all()
    # Both norms can be had together only where the triangle of z_prev, z and the update closes.
    closes = np.maximum(low[1], np.abs(latent - start)) <= np.minimum(high[1], latent + start) * (1 - 1e-3)
    checked = strong.numpy() & closes & (np.abs(latent - start) * (1 + 1e-3) < high[1]) & (low[1] < (latent + start) * 0.999)
    assert (update[checked] >= low[1] * (1 - slack)).all()
    assert (update[checked] <= high[1] * (1 + slack)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from(SHAPES), st.tuples(factors, factors, factors))
def test_a_batch_gives_what_its_samples_give_one_by_one(seed, shape, scales):
    z_prev, z_next, x0 = latents(seed, shape)
    mean, bounds = region(z_prev, z_next, x0, scales, 0.1)
    strong = torch.tensor([True, False, True])
    keywords = {"x0_coefficient": 0.7, "x0_norm": float(mean[2]), "bounds": bounds}
    together = corrected(z_prev, z_next, x0, strong=strong, **keywords)
    for i in range(3):
        one = corrected(z_prev[i : i + 1], z_next[i : i + 1], x0[i : i + 1], strong=strong[i : i + 1], **keywords)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-5, atol=1e-5)


def test_the_three_steps_are_those_of_the_paper():
    """One sample, written out: rescale x0, clamp the update, clamp the latent; no turn, since both bands are met."""
    z_prev, z_next, x0 = (x.double() for x in latents(0, (4, 4, 4), batch=1))
    c, mu_x0 = 0.6, float(norms(x0)) / 3
    moved = z_next + c * (x0 * (mu_x0 / norms(x0)) - x0)
    update = moved - z_prev
    limit = float(norms(update)) * 0.5
    clamped = z_prev + update * 0.5
    wide = (np.array([0.0, 0.0, 0.0]), np.array([1e6, limit, 1e6]))
    keywords = {"x0_coefficient": c, "x0_norm": mu_x0, "bounds": wide}
    arguments = [x.float() for x in (z_prev, z_next, x0)]
    mild = corrected(*arguments, strong=torch.tensor([False]), **keywords)
    strong = corrected(*arguments, strong=torch.tensor([True]), **keywords)
    torch.testing.assert_close(mild, moved.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(strong, clamped.float(), rtol=1e-5, atol=1e-5)
    ball = (np.zeros(3), np.array([float(norms(clamped)) * 0.8, 1e6, 1e6]))
    shrunk = corrected(*arguments, strong=torch.tensor([False]), x0_coefficient=c, x0_norm=mu_x0, bounds=ball)
    torch.testing.assert_close(shrunk, (moved * (ball[1][0] / norms(moved))).float(), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_a_turn_keeps_the_norm_and_the_plane(seed):
    """Where the latent's clamp takes the update out of its band, the result stays in the plane of z_prev and z."""
    z_prev, z_next, x0 = latents(seed, (4, 4, 4), batch=1)
    z_norm, start = float(norms(z_next)), float(norms(z_prev))
    d = float(norms(z_next - z_prev))
    low = np.array([z_norm * 1.3, 0.0, 0.0])
    high = np.array([z_norm * 1.3, d * 0.9, 1e6])
    assume(abs(z_norm * 1.3 - start) < d * 0.8)
    z = corrected(z_prev, z_next, x0, x0_coefficient=0.0, x0_norm=1.0, bounds=(low, high), strong=torch.tensor([True]))
    assert float(norms(z - z_prev)) <= d * 0.9 * (1 + 1e-5)
    basis = torch.linalg.qr(torch.stack([z_prev.flatten(), z_next.flatten()], 1).double())[0]
    flat = z.flatten().double()
    torch.testing.assert_close(basis @ (basis.T @ flat), flat, rtol=1e-4, atol=1e-4)


def test_degenerate_latents_stay_finite():
    zero, one = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    bounds = (np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    for z_prev, z_next, x0 in ((zero, zero, zero), (one, one, zero), (zero, one, one), (one, -one, one)):
        z = corrected(z_prev, z_next, x0, x0_coefficient=1.0, x0_norm=1.0, bounds=bounds, strong=torch.tensor([True]))
        assert torch.isfinite(z).all()


def test_half_precision_stays_half_precision():
    z_prev, z_next, x0 = (x.half() for x in latents(1, (4, 4, 4)))
    mean, bounds = region(z_prev, z_next, x0, (1, 0.5, 0.5), 0.1)
    z = corrected(
        z_prev, z_next, x0, x0_coefficient=0.5, x0_norm=float(mean[2]), bounds=bounds, strong=torch.tensor([True] * 3)
    )
    assert z.dtype == torch.float16
    assert (norms(z - z_prev).numpy() <= bounds[1][1] * 1.002).all()


STEPS, SHAPE = 20, (4, 8, 8)
SETTINGS = RunSettings(prediction_type="epsilon", steps=STEPS, sigmas=tuple(range(STEPS, 0, -1)), end_sigma=0.0)


def run(monitor, *, factor=1.0, batch=1, seed=0, steps=STEPS, hook=None):
    """A short synthetic run in which x0 of the last sample is ``factor`` times too large from step 5 on; yields what went
    in."""
    generators = [torch.Generator().manual_seed(seed + b) for b in range(batch)]

    def noise():
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

    z, taken = noise(), []
    for i in range(steps):
        x0 = noise()
        x0[-1] *= factor if i >= 5 else 1.0
        z_next = 0.9 * z + 0.3 * x0
        if hook is not None:
            z_next = hook(i, z_next)
        start, end = NoiseLevel.from_sigma(float(STEPS - i)), NoiseLevel.from_alpha_bar(0.09)
        given = monitor.step(z, z_next, x0, start=start, end=end)
        taken.append((z, z_next, x0, given))
        z = given
    return taken


def profile(count=40):
    rows = []
    for seed in range(100, 100 + count):
        taken = run(StabilityMonitor(), seed=seed)
        rows.append([[float(norms(t)) for t in (z_next, z_next - z, x0)] for z, z_next, x0, _ in taken])
    rows = np.array(rows)
    mean, std = rows.mean(axis=0).T, rows.std(axis=0, ddof=1).T
    return StabilityProfile(mean=Norms(*mean), std=Norms(*std), count=count, settings=SETTINGS)


PROFILE = profile()


def monitor(mode="trace", **constants):
    return StabilityMonitor(PROFILE, Thresholds(method="published", **constants), mode, settings=SETTINGS)


def test_tracing_returns_the_very_same_tensor_and_the_scores_are_standard_deviations():
    traced = monitor()
    taken = run(traced, factor=6.0)
    assert all(given is z_next for _, z_next, _, given in taken)
    trace = traced.traces[0]
    update = np.array([float(norms(z_next - z)) for z, z_next, _, _ in taken])
    denoised = np.array([float(norms(x0)) for _, _, x0, _ in taken])
    np.testing.assert_allclose(trace.steps.update_score, np.abs(update - PROFILE.mean.update) / PROFILE.std.update, rtol=1e-4)
    np.testing.assert_allclose(
        trace.steps.denoised_score, np.abs(denoised - PROFILE.mean.denoised) / PROFILE.std.denoised, rtol=1e-4
    )
    assert trace.score == trace.steps.update_score.max()
    assert (trace.verdict, trace.trigger_step) == ("strong", 5)
    assert trace.p_value is None


def test_each_sample_is_judged_on_its_own_and_its_kind_is_fixed_at_the_trigger():
    for factor, verdict in ((1.0, "stable"), (1.4, "mild"), (6.0, "strong")):
        both = monitor()
        run(both, batch=2, factor=factor, seed=7)
        assert [trace.verdict for trace in both.traces] == ["stable", verdict]


def test_a_trigger_needs_both_norms_at_one_step():
    """The update alone leaves its band here: x0 stays ordinary, so nothing triggers."""
    one = monitor()
    run(one, hook=lambda i, z_next: z_next * 3 if i == 8 else z_next)
    assert one.traces[0].steps.update_score[8] > 14
    assert one.traces[0].verdict == "stable"


def test_a_mild_image_is_corrected_during_the_first_steps_only():
    one = monitor("mitigate", tau_strong=1000.0, mild_steps=20)
    run(one, factor=4.0)
    trace = one.traces[0]
    assert trace.verdict == "mild"
    assert mild_limit(one.thresholds, STEPS) == 8
    assert set(np.flatnonzero(trace.steps.mitigated)) == {5, 6, 7}


def test_a_strong_image_is_corrected_to_the_end_and_stays_in_the_bands():
    one = monitor("mitigate")
    taken = run(one, batch=2, factor=6.0)
    stable, strong = one.traces
    assert not stable.steps.mitigated.any()
    assert strong.steps.mitigated[5:].all()
    for i, (_, z_next, _, kept) in enumerate(taken):
        assert torch.equal(kept[0], z_next[0])
        if i >= 5:
            low, high = (PROFILE.mean.latent[i] + sign * 3 * PROFILE.std.latent[i] for sign in (-1, 1))
            assert low * 0.9999 <= float(norms(kept)[1]) <= high * 1.0001


def test_a_run_over_the_last_part_of_the_schedule_is_held_against_the_right_rows():
    part = RunSettings(prediction_type="epsilon", steps=3, sigmas=(3.0, 2.0, 1.0), end_sigma=0.0)
    one = StabilityMonitor(PROFILE, Thresholds(method="published"), settings=part)
    z = torch.randn(1, *SHAPE)
    for sigma in (3.0, 2.0, 1.0):
        one.step(z, 0.9 * z, z, start=NoiseLevel.from_sigma(sigma), end=NoiseLevel.from_sigma(sigma - 1))
    np.testing.assert_array_equal(one.traces[0].bands["update"]["mean"], PROFILE.mean.update[-3:])


def test_a_run_off_the_schedule_is_not_judged_any_further():
    one = monitor("mitigate")
    z = torch.randn(1, *SHAPE)
    one.step(z, 0.9 * z, z, start=NoiseLevel.from_sigma(20.0), end=NoiseLevel.from_sigma(18.0))
    for sigma in (18.0, 16.0):
        far = 9 * z
        assert one.step(z, far, far, start=NoiseLevel.from_sigma(sigma), end=NoiseLevel.from_sigma(sigma - 2)) is far
    trace = one.traces[0]
    assert np.isnan(trace.steps.update_score[1:]).all()
    assert "noise level 18" in trace.note
    assert trace.verdict == "unscored"


def test_another_sampler_is_not_judged():
    other = RunSettings(prediction_type="epsilon", steps=STEPS, sigmas=SETTINGS.sigmas, sampler="other")
    known = StabilityProfile(
        mean=PROFILE.mean, std=PROFILE.std, count=40, settings=RunSettings(**{**SETTINGS.to_dict(), "sampler": "PNDM"})
    )
    one = StabilityMonitor(known, Thresholds(method="published"), "mitigate", settings=other)
    taken = run(one, factor=6.0)
    assert all(given is z_next for _, z_next, _, given in taken)
    assert one.traces[0].verdict == "unscored"


def test_the_published_constants_are_the_defaults_and_scale_with_the_steps():
    thresholds = Thresholds()
    assert (thresholds.tau_mild, thresholds.tau_strong, thresholds.gamma, thresholds.mild_steps) == (3, 14, 3, 10)
    assert [mild_limit(thresholds, n) for n in (50, 100, 20)] == [10, 20, 4]


def test_before_the_first_step_nothing_is_known():
    detector = Detector(PROFILE, Thresholds(method="published"))
    assert detector.verdict(0) == "unscored"
    assert not len(detector.trigger_step)
