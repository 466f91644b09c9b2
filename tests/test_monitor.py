"""The monitor: what it records, when it triggers, what it returns."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorization_guard import Calibrator, RunSettings, StabilityMonitor, StabilityProfile, Thresholds, Trace
from memorization_guard.core.detection import Detector, Measures

STEPS = 20
SHAPE = (4, 8, 8)


def run(monitor, *, batch=1, seed=0, shape=SHAPE, dtype=torch.float32, steps=STEPS, guided=False, factors=None, hook=None):
    """A short synthetic run in which sample b's x0 is ``factors[b]`` times too large from step 5 on; yields what went in."""
    generators = [torch.Generator().manual_seed(seed + b) for b in range(batch)]

    def noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(dtype)

    factor = torch.tensor(factors or [1.0] * batch).view(-1, *[1] * len(shape))
    z, taken = noise(), []
    for i in range(steps):
        x0 = (noise() * (factor if i >= 5 else 1.0)).to(dtype)
        z_next = (0.9 * z + 0.3 * x0).to(dtype)
        if hook is not None:
            z_next = hook(i, z_next)
        predictions = {"eps_cond": noise(), "eps_uncond": noise()} if guided else {}
        given_back = monitor.step(z, z_next, x0, sigma=float(steps - i), x0_coefficient=0.3, **predictions)
        taken.append((z, z_next, x0, given_back, predictions))
        z = given_back
    return taken


@pytest.fixture(scope="module")
def profile():
    calibrator = Calibrator(RunSettings(model="synthetic", latent_shape=SHAPE))
    for seed in range(100, 140):
        monitor = StabilityMonitor()
        run(monitor, seed=seed)
        calibrator.add(monitor.traces[0])
    return calibrator.profile()


def norm(x):
    return x.double().flatten(1).norm(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPE, (16, 3, 4, 4)])
def test_what_is_traced_is_what_went_in(dtype, shape):
    monitor = StabilityMonitor()
    taken = run(monitor, batch=2, dtype=dtype, shape=shape, guided=True)
    traces = monitor.traces
    assert len(traces) == 2
    for b, trace in enumerate(traces):
        assert trace.steps == STEPS
        np.testing.assert_array_equal(trace.sigma, np.arange(STEPS, 0, -1.0))
        for i, (z, z_next, x0, _, predictions) in enumerate(taken):
            c, u = predictions["eps_cond"].double(), predictions["eps_uncond"].double()
            assert trace.latent_norm[i] == pytest.approx(norm(z_next)[b], rel=1e-5)
            assert trace.update_norm[i] == pytest.approx(norm(z_next.double() - z.double())[b], rel=1e-5)
            assert trace.denoised_norm[i] == pytest.approx(norm(x0)[b], rel=1e-5)
            assert trace.guidance_norm[i] == pytest.approx(norm(c - u)[b], rel=1e-5)
            cosine = torch.nn.functional.cosine_similarity((c - u).flatten(1), u.flatten(1))[b].item()
            assert trace.alignment[i] == pytest.approx(cosine, abs=1e-5)


def test_without_a_profile_a_run_is_traced_and_unscored():
    monitor = StabilityMonitor(mitigate=True)
    taken = run(monitor)
    trace = monitor.traces[0]
    assert (trace.verdict, trace.score, trace.trigger_step) == ("unscored", None, None)
    assert np.isnan(trace.guidance_norm).all()
    assert all(given_back is z_next for _, z_next, _, given_back, _ in taken)


def test_tracing_returns_the_very_same_tensor(profile):
    taken = run(StabilityMonitor(profile), factors=[5.0])
    assert all(given_back is z_next for _, z_next, _, given_back, _ in taken)


def test_scores_are_distances_in_standard_deviations(profile):
    monitor = StabilityMonitor(profile)
    run(monitor, factors=[2.0])
    trace = monitor.traces[0]
    np.testing.assert_allclose(trace.update_score, np.abs(trace.update_norm - profile.mean[:, 1]) / profile.std[:, 1])
    np.testing.assert_allclose(trace.denoised_score, np.abs(trace.denoised_norm - profile.mean[:, 2]) / profile.std[:, 2])
    assert trace.score == trace.update_score.max()
    np.testing.assert_array_equal(trace.bands["latent"]["mean"], profile.mean[:, 0])


def test_each_sample_is_judged_on_its_own(profile):
    monitor = StabilityMonitor(profile)
    run(monitor, batch=3, factors=[1.0, 1.4, 6.0], seed=7)
    verdicts = [trace.verdict for trace in monitor.traces]
    assert verdicts == ["stable", "mild", "strong"]
    assert monitor.traces[2].trigger_step == 5
    assert monitor.traces[0].trigger_step is None


def test_a_trigger_needs_both_norms_at_one_step(profile):
    """The update alone leaves its band here: x0 stays ordinary, so nothing triggers."""
    monitor = StabilityMonitor(profile)
    run(monitor, hook=lambda i, z_next: z_next * 3 if i == 8 else z_next)
    trace = monitor.traces[0]
    assert trace.update_score[8] > 14
    assert trace.verdict == "stable"


def test_a_mild_image_is_corrected_during_the_first_steps_only(profile):
    thresholds = Thresholds(tau_strong=1000.0, mild_steps=20)
    monitor = StabilityMonitor(profile, thresholds, mitigate=True)
    run(monitor, factors=[4.0])
    trace = monitor.traces[0]
    assert trace.verdict == "mild"
    limit = thresholds.mild_limit(STEPS)
    assert limit == 8
    assert set(np.flatnonzero(trace.mitigated)) == {5, 6, 7}


def test_the_published_mitigation_is_by_choice_and_ends_after_its_steps(profile):
    """A profile without reference runs: steering with predictions at hand, else, and with ``None``, the published step."""
    monitor = StabilityMonitor(profile, mitigate=True)
    run(monitor, batch=2, guided=True, factors=[1.0, 4.0])
    stable, far = monitor.traces
    assert not stable.mitigated.any()
    np.testing.assert_array_equal(far.mitigated[5:], far.update_score[5:] > 3)
    assert far.mitigated[5:].sum() > Thresholds().mild_limit(STEPS)
    for guided, guidance in ((True, None), (False, -1.0)):
        published = StabilityMonitor(profile, Thresholds(steering_guidance=guidance, tau_strong=100.0), mitigate=True)
        run(published, batch=2, guided=guided, factors=[1.0, 4.0])
        assert set(np.flatnonzero(published.traces[1].mitigated)) <= {5, 6, 7}
        assert not published.traces[0].mitigated.any()


def test_a_strong_image_is_corrected_to_the_end_and_stays_in_the_bands(profile):
    monitor = StabilityMonitor(profile, mitigate=True)
    taken = run(monitor, factors=[6.0])
    trace = monitor.traces[0]
    assert trace.mitigated[5:].all()
    for i in range(5, STEPS):
        z, z_next, _, given_back, _ = taken[i]
        low, high = profile.mean[i] - 3 * profile.std[i], profile.mean[i] + 3 * profile.std[i]
        assert given_back is not z_next
        assert trace.corrected_latent_norm[i] == pytest.approx(norm(given_back)[0], rel=1e-5)
        assert trace.corrected_update_norm[i] == pytest.approx(norm(given_back - z)[0], rel=1e-4)
        assert low[0] * 0.9999 <= trace.corrected_latent_norm[i] <= high[0] * 1.0001


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.sampled_from([1.0, 1.0, 1.5, 6.0]), min_size=1, max_size=4))
def test_a_stable_sample_is_untouched_and_a_batch_is_its_samples(profile, seed, factors):
    monitor = StabilityMonitor(profile, mitigate=True)
    taken = run(monitor, batch=len(factors), factors=factors, seed=seed)
    for b, trace in enumerate(monitor.traces):
        for i, (_, z_next, _, given_back, _) in enumerate(taken):
            if not trace.mitigated[i]:
                assert torch.equal(given_back[b], z_next[b])
            else:
                assert not torch.equal(given_back[b], z_next[b])
        alone = StabilityMonitor(profile, mitigate=True)
        run(alone, factors=[factors[b]], seed=seed + b)
        assert alone.traces[0].verdict == trace.verdict
        np.testing.assert_array_equal(alone.traces[0].mitigated, trace.mitigated)
        np.testing.assert_allclose(alone.traces[0].update_norm, trace.update_norm, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_sample_is_reported_and_left_alone(profile, value):
    def break_second(i, z_next):
        if i == 7:
            z_next = z_next.clone()
            z_next[1, 0, 0, 0] = value
        return z_next

    monitor = StabilityMonitor(profile, mitigate=True)
    taken = run(monitor, batch=2, factors=[6.0, 1.0], hook=break_second)
    healthy, broken = monitor.traces
    assert (broken.nonfinite_step, broken.verdict) == (7, "unscored")
    assert not broken.mitigated.any()
    assert healthy.nonfinite_step is None
    assert healthy.mitigated[5:].all()
    assert not torch.isfinite(taken[-1][3][1]).all()
    assert Trace.from_dict(broken.to_dict()).to_dict() == broken.to_dict()


def test_half_precision_is_corrected_in_its_own_dtype(profile):
    monitor = StabilityMonitor(profile, mitigate=True)
    taken = run(monitor, factors=[6.0], dtype=torch.bfloat16)
    assert monitor.traces[0].mitigated.any()
    assert all(given_back.dtype == torch.bfloat16 for *_, given_back, _ in taken)


def test_events_come_in_order_and_say_what_the_trace_says(profile):
    events = []
    monitor = StabilityMonitor(profile, mitigate=True, on_step=events.append)
    run(monitor, batch=2, factors=[1.0, 6.0], guided=True)
    traces = monitor.traces
    assert [event.step for event in events] == list(range(STEPS))
    for b, trace in enumerate(traces):
        np.testing.assert_allclose([e.update_norm[b] for e in events], trace.update_norm, rtol=1e-6)
        np.testing.assert_allclose([e.update_score[b] for e in events], trace.update_score, rtol=1e-6)
        assert [e.mitigated[b] for e in events] == trace.mitigated.tolist()
        assert events[-1].state[b] == trace.verdict
    assert [e.state[1] for e in events] == ["stable"] * 5 + ["strong"] * (STEPS - 5)


def test_a_failing_listener_is_dropped_and_said_once(profile, caplog):
    calls = []

    def listener(event):
        calls.append(event.step)
        raise RuntimeError("socket closed")

    monitor = StabilityMonitor(profile, on_step=listener)
    with caplog.at_level(logging.WARNING):
        run(monitor)
    assert calls == [0]
    assert len(caplog.records) == 1
    assert monitor.traces[0].verdict == "stable"


def test_a_failure_inside_ends_the_watching_not_the_sampling(profile, caplog):
    monitor = StabilityMonitor(profile, mitigate=True)
    run(monitor, steps=3)
    two = torch.zeros(2, *SHAPE)
    with caplog.at_level(logging.WARNING):
        assert monitor.step(two, two, two, sigma=1.0, x0_coefficient=0.5) is two
        assert monitor.step(two, two, two, sigma=1.0, x0_coefficient=0.5) is two
    assert len(caplog.records) == 1
    assert "1 to 2 samples" in str(monitor.error)
    assert "Watching ended early" in monitor.traces[0].note
    assert monitor.traces[0].verdict == "unscored"


def test_tracing_asks_the_device_for_nothing():
    """Tensors on ``meta`` have no values: whatever would wait for one, or copy one to the host, raises."""
    monitor = StabilityMonitor()
    z, z_next, x0, cond, uncond = (torch.empty(2, *SHAPE, device="meta") for _ in range(5))
    for _ in range(3):
        given_back = monitor.step(z, z_next, x0, sigma=1.0, x0_coefficient=0.5, eps_cond=cond, eps_uncond=uncond)
        assert given_back is z_next
    assert monitor.error is None
    with pytest.raises((RuntimeError, NotImplementedError)):
        z.norm().item()


def test_double_precision_is_traced_too():
    monitor = StabilityMonitor()
    run(monitor, dtype=torch.float64)
    assert monitor.error is None
    assert np.isfinite(monitor.traces[0].update_norm).all()


def test_a_run_over_the_last_part_of_the_schedule_is_held_against_the_right_rows(profile):
    monitor = StabilityMonitor(profile)
    z = torch.randn(1, *SHAPE)
    for sigma in (3.0, 2.0, 1.0):
        monitor.step(z, 0.9 * z, z, sigma=sigma, x0_coefficient=0.3)
    trace = monitor.traces[0]
    np.testing.assert_array_equal(trace.bands["update"]["mean"], profile.mean[-3:, 1])


def test_a_run_off_the_schedule_is_not_scored(profile):
    monitor = StabilityMonitor(profile, mitigate=True)
    z = torch.randn(1, *SHAPE)
    monitor.step(z, 0.9 * z, z, sigma=20.0, x0_coefficient=0.3)
    for sigma in (18.0, 16.0):
        far = 9 * z
        assert monitor.step(z, far, far, sigma=sigma, x0_coefficient=0.3) is far
    trace = monitor.traces[0]
    assert np.isnan(trace.update_score[1:]).all()
    assert "noise level 18" in trace.note


def test_a_profile_that_does_not_fit_is_not_used(profile):
    settings = RunSettings(latent_shape=(4, 99, 99))
    monitor = StabilityMonitor(profile, mitigate=True, settings=settings)
    taken = run(monitor, factors=[6.0])
    trace = monitor.traces[0]
    assert trace.verdict == "unscored"
    assert not trace.bands
    assert "latent shape" in trace.note
    assert all(given_back is z_next for _, z_next, _, given_back, _ in taken)


def test_no_random_numbers_are_drawn_and_inputs_are_not_written(profile):
    state = torch.get_rng_state()
    z, z_next, x0 = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(s)) for s in range(3))
    copies = [x.clone() for x in (z, z_next * 9, x0 * 9)]
    originals = [z, z_next * 9, x0 * 9]
    StabilityMonitor(profile, mitigate=True).step(*originals, sigma=20.0, x0_coefficient=0.3)
    assert all(torch.equal(a, b) for a, b in zip(originals, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau_mild": 0.0}, "tau_mild"),
        ({"false_alarms": 0.0}, "above 0 and below 1"),
        ({"false_alarms": math.nan}, "above 0 and below 1"),
        ({"steering_guidance": math.nan}, "or None"),
        ({"tau_mild": math.nan}, "tau_mild"),
        ({"tau_strong": 2.0}, "below tau_mild"),
        ({"gamma": -1.0}, "gamma"),
        ({"mild_steps": -1}, "mild_steps"),
        ({"mild_steps": 2.5}, "mild_steps"),
    ],
)
def test_thresholds_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**arguments)


def test_the_published_constants_are_the_defaults_and_scale_with_the_steps():
    thresholds = Thresholds()
    assert (thresholds.tau_mild, thresholds.tau_strong, thresholds.gamma, thresholds.mild_steps) == (3, 14, 3, 10)
    assert [thresholds.mild_limit(n) for n in (50, 100, 20)] == [10, 20, 4]
    assert Thresholds.from_dict(thresholds.to_dict()) == thresholds


def guidance_like(x0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x0.shape, generator=generator) for _ in range(2)]


def test_steering_by_prediction_goes_on_until_both_norms_are_back():
    settings = RunSettings(prediction_type="epsilon", sigmas=(4.0, 3.0, 2.0, 1.0, 0.5))
    profile = StabilityProfile(mean=np.full((5, 3), 10.0), std=np.ones((5, 3)), count=50, settings=settings)
    detector = Detector(profile, Thresholds(), 1)
    seen = []
    for sigma, update, denoised in zip(settings.sigmas, (16, 10, 16, 10, 10), (16, 15, 10, 10, 15), strict=True):
        measures = Measures(np.array([[10.0], [update], [denoised]]), np.full((4, 1), np.nan))
        judgement = detector.judge(sigma, 0.0, measures, steering=True)
        seen.append((bool(judgement.steer[0]), bool(judgement.correct[0])))
    assert seen == [(True, True), (True, False), (True, True), (False, False), (True, False)]


def test_a_prediction_is_replaced_for_the_samples_that_left_and_for_no_other(profile):
    monitor = StabilityMonitor(profile, mitigate=True)
    replaced = []

    def hook(i, z_next):
        x0 = torch.ones_like(z_next)
        cond, uncond = guidance_like(x0, i)
        given = monitor.corrected_prediction(x0, cond, uncond)
        if given is not x0:
            assert torch.equal(given[0], x0[0])
            assert torch.allclose(given[1], uncond[1] - (cond[1] - uncond[1]))
            inner = monitor.corrected_prediction(2 * x0, cond, uncond, begins=False)
            assert torch.equal(inner[0], 2 * x0[0])
            assert torch.equal(inner[1], given[1])
            replaced.append(i)
        return z_next

    run(monitor, batch=2, factors=[1.0, 6.0], guided=True, hook=hook)
    assert replaced
    assert replaced[0] == monitor.traces[1].trigger_step + 1
    assert not monitor.traces[0].mitigated.any()
    assert set(replaced) <= set(np.flatnonzero(monitor.traces[1].mitigated))


def test_a_step_taken_back_leaves_no_trace(profile):
    plain, tried = (StabilityMonitor(profile, mitigate=True) for _ in range(2))
    run(plain, factors=[6.0])
    first = True

    def hook(i, z_next):
        nonlocal first
        if i == 6 and first:
            first = False
            tried.step(z_next, 3 * z_next, 5 * z_next, sigma=float(STEPS - i), x0_coefficient=0.3)
            tried.retract()
        return z_next

    run(tried, factors=[6.0], hook=hook)
    assert tried.traces[0].to_dict() == plain.traces[0].to_dict()


def test_the_outline_tells_what_is_to_come():
    settings = RunSettings(steps=5, sigmas=(5.0, 4.0, 3.0, 2.0, 1.0), end_sigma=0.0)
    profile = StabilityProfile(mean=np.arange(15.0).reshape(5, 3), std=np.ones((5, 3)), count=50, settings=settings)
    part = RunSettings(steps=2, sigmas=(2.0, 1.0), end_sigma=0.0)
    outline = StabilityMonitor(profile, settings=part, mitigate=True).outline()
    assert json.loads(json.dumps(outline)) == outline
    assert (outline["steps"], outline["mitigation"], outline["reference_count"]) == (2, True, 50)
    assert outline["bands"]["update"]["mean"] == [10.0, 13.0]
    assert "less certainty" in outline["note"]
    other = StabilityMonitor(profile, settings=RunSettings(steps=2, sigmas=(9.0, 1.0))).outline()
    assert (other["bands"], other["reference_count"]) == ({}, None)
    assert "does not fit" in other["note"]
    assert StabilityMonitor().outline()["bands"] == {}


def test_a_run_that_leaves_its_schedule_or_ends_early_is_said_to(profile):
    left, ended = StabilityMonitor(profile), StabilityMonitor(profile)
    for monitor in (left, ended):
        run(monitor, steps=8)
    left.leave_schedule()
    ended.end("after 8 of 20 steps")
    assert (left.traces[0].verdict, left.traces[0].score, left.traces[0].bands) == ("unscored", None, {})
    assert "no fixed schedule" in left.traces[0].note
    assert ended.traces[0].verdict == "unscored"
    assert ended.traces[0].note == "The run ended early: after 8 of 20 steps"
    assert ended.traces[0].score is not None


def test_an_event_is_strict_json_and_small(profile):
    events = []
    monitor = StabilityMonitor(profile, mitigate=True, on_step=events.append)
    run(monitor, batch=2, factors=[1.0, 6.0], hook=lambda i, z: z * (math.nan if i == 10 else 1.0))
    for event in events:
        text = json.dumps(event.to_dict(), allow_nan=False)
        assert len(text) < 900
    assert any(event.to_dict()["latent_norm"] == [None, None] for event in events)
    corrected = next(event for event in events if event.mitigated[1]).to_dict()
    assert corrected["corrected_latent_norm"][0] is None
    assert corrected["corrected_latent_norm"][1] > 0
