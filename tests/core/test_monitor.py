"""The monitor: what it measures, when an image triggers, and what is left once it was corrected."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorization_guard import RunSettings, StabilityMonitor, StabilityProfile, Thresholds, Trace
from memorization_guard.core.judge import Judge
from memorization_guard.core.noise_level import NoiseLevel
from memorization_guard.core.profile import Norms
from memorization_guard.core.signals import Measurement


def norm(x):
    return x.double().flatten(1).norm(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 3, 4, 4), (4, 32, 20), (48, 16)])
def test_what_is_traced_is_what_went_in(dtype, shape):
    level, end, w = NoiseLevel.from_sigma(2.0), NoiseLevel.from_sigma(0.5), 4.0
    x, cond, uncond, after = (torch.randn(3, *shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(4))
    monitor = StabilityMonitor(settings=RunSettings(guidance_scale=w))
    assert monitor.predicted(x, torch.full((3,), 2.0), cond, uncond) is cond
    monitor.latent(x, level, evaluated=True)
    monitor.latent(after, end, evaluated=False)
    z, c, u = (t.double() for t in (x / level.scale, cond, uncond))
    x0 = u + w * (c - u)
    tolerance = 1e-4 if dtype in (torch.float64, torch.float32) else 2e-2
    for b, trace in enumerate(monitor.traces):
        found = trace.evaluations
        assert found.denoised[0] == pytest.approx(norm(x0)[b], rel=tolerance)
        assert found.velocity[0] == pytest.approx(norm((level.alpha * z - x0) / level.beta)[b], rel=tolerance)
        assert found.guidance[0] == pytest.approx(norm((c - u) / level.beta)[b], rel=tolerance)
        assert trace.guidance_norm[0] == pytest.approx(norm((c - u) * level.alpha / level.beta)[b], rel=tolerance)
        assert trace.steps.latent_norm[0] == pytest.approx(norm(after / end.scale)[b], rel=tolerance)
        assert trace.steps.update_norm[0] == pytest.approx(norm(after.double() / end.scale - z)[b], rel=tolerance)
        assert trace.steps.denoised_norm[0] == found.denoised[0]
        assert (trace.steps.sigma[0], found.sigma[0], found.step[0]) == (2.0, 2.0, 0)


def test_a_large_batch_is_measured_a_part_at_a_time_and_alike():
    x, cond, uncond = (torch.randn(5, 8, 128, 128, generator=torch.Generator().manual_seed(s)) for s in range(3))
    together = StabilityMonitor(settings=RunSettings(guidance_scale=4.0))
    together.predicted(x, 3.0, cond, uncond)
    for b, trace in enumerate(together.traces):
        alone = StabilityMonitor(settings=RunSettings(guidance_scale=4.0))
        alone.predicted(x[b : b + 1], 3.0, cond[b : b + 1], uncond[b : b + 1])
        for name in ("velocity", "denoised", "guidance", "local"):
            ours, theirs = getattr(trace.evaluations, name), getattr(alone.traces[0].evaluations, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_without_a_profile_a_run_is_traced_and_unscored(world):
    monitor = StabilityMonitor(mode="mitigate", settings=world.settings())
    _, given_back = world.sample(monitor, memorized=2.0)
    trace = monitor.traces[0]
    assert (trace.verdict, trace.score, trace.trigger_step, trace.p_value) == ("unscored", None, None, None)
    assert all(kept is cond for cond, _, kept in given_back)


def test_tracing_returns_the_very_same_tensor(world, profile):
    monitor = StabilityMonitor(profile, settings=world.settings())
    _, given_back = world.sample(monitor, memorized=2.0)
    assert monitor.traces[0].verdict == "likely copy"
    assert all(kept is cond for cond, _, kept in given_back)


def test_each_sample_is_judged_on_its_own(world, profile):
    monitor = StabilityMonitor(profile, settings=world.settings())
    world.sample(monitor, seeds=(500, 501, 502), memorized=[1.0, 2.0, 1.0])
    assert [trace.verdict for trace in monitor.traces] == ["stable", "likely copy", "stable"]
    assert [trace.trigger_step is None for trace in monitor.traces] == [True, False, True]


def test_the_evaluation_that_triggers_is_corrected_itself(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    _, given_back = world.sample(monitor, memorized=2.0)
    trace = monitor.traces[0]
    first = trace.trigger_step
    assert trace.steps.mitigated[first]
    assert not trace.steps.mitigated[:first].any()
    for number, (cond, uncond, kept) in enumerate(given_back):
        if trace.evaluations.corrected[number]:
            # What guidance makes of it is what it would have made of the prompt at the steering scale.
            torch.testing.assert_close(uncond + 3.0 * (kept - uncond), uncond - (cond - uncond), rtol=1e-4, atol=1e-4)
        else:
            assert kept is cond


def test_what_is_left_after_mitigation_is_another_image(world, profile):
    """The memorized mean is gone from the result, whatever guidance mixes the predictions."""
    mixes = {
        "cfg": lambda c, u: u + 3.0 * (c - u),
        "rescaled": lambda c, u: (u + 3.0 * (c - u)) * 0.8,
        "other scale": lambda c, u: u + 5.0 * (c - u),
    }
    mean = torch.randn(world.shape, generator=torch.Generator().manual_seed(500))

    def likeness(x):
        return float(torch.cosine_similarity(x[0].flatten(), mean.flatten(), dim=0))

    for mix in mixes.values():
        traced, mitigated = (StabilityMonitor(profile, mode=mode, settings=world.settings()) for mode in ("trace", "mitigate"))
        copy = world.sample(traced, memorized=2.0, mix=mix)[0][-1]
        other = world.sample(mitigated, memorized=2.0, mix=mix)[0][-1]
        assert likeness(copy) > 0.95
        assert likeness(other) < 0.1
        assert traced.traces[0].trigger_step == mitigated.traces[0].trigger_step


def test_the_verdict_does_not_see_what_guidance_makes_of_the_predictions(world, profile):
    first = [
        world.trace(profile, guidance=guidance, memorized=factor).evaluations
        for guidance in (3.0, 7.0)
        for factor in (1.0, 2.0)
    ]
    for plain, other in ((first[0], first[2]), (first[1], first[3])):
        for name in ("velocity", "denoised", "guidance", "local", "p_value"):
            assert getattr(plain, name)[0] == pytest.approx(getattr(other, name)[0], rel=1e-6), name


def test_a_trigger_by_the_local_signal_alone_starts_mitigation(profile):
    """Part of the image is far off, and neither the whole image's norms nor guidance says so."""
    level = NoiseLevel.from_sigma(0.4)  # below the level down to which every triggered image is held
    region = profile.reference.region()
    mean, std = region.moments(level.angle)
    velocity, denoised, guidance, local = np.exp(mean)
    latent = 16.0 * level.scale
    product = ((level.alpha * 16.0) ** 2 + denoised**2 - (level.beta * velocity) ** 2) * level.scale / (2 * level.alpha)
    patches = np.full(16, (local * math.exp(8 * std[3])) ** 2)
    block = np.array([math.nan, latent, product, denoised, guidance * level.beta, *patches])[:, None]
    one = torch.ones(1)
    judge = Judge(region, 0.001, guided=True, level=NoiseLevel.from_sigma)
    judge.take_in(Measurement(0.4, one, one, one, one, None), block)
    joint, _, local_deviation = judge.evaluations[0].statistics[:, 0]
    assert joint < 0.1
    assert local_deviation == pytest.approx(8.0, abs=0.1)
    assert judge.verdict(0) == "likely copy"
    assert judge.to_correct().all()


def test_an_image_that_is_back_gets_its_prompt_back(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    world.sample(monitor, memorized=2.0)
    trace = monitor.traces[0]
    held = trace.evaluations.sigma > 0.5
    assert trace.evaluations.corrected[held][trace.trigger_step :].all()
    largest = np.nanmax([trace.evaluations.joint_deviation, trace.evaluations.local_deviation], axis=0)
    np.testing.assert_array_equal(trace.evaluations.corrected[~held], largest[~held] > 2)


def test_one_prediction_alone_is_judged_by_a_profile_without_guidance(world):
    profile = world.calibrated(guidance=1.0, guided=False)
    settings = world.settings(guidance=1.0)
    for factor, verdict in ((1.0, "stable"), (2.0, "likely copy")):
        monitor = StabilityMonitor(profile, settings=settings)
        world.sample(monitor, guided=False, memorized=factor)
        assert monitor.traces[0].verdict == verdict
        assert np.isnan(monitor.traces[0].evaluations.guidance_deviation).all()
    monitor = StabilityMonitor(profile, mode="mitigate", settings=settings)
    _, given_back = world.sample(monitor, guided=False, memorized=2.0)
    trace = monitor.traces[0]
    chosen = int(np.flatnonzero(trace.evaluations.corrected)[0])
    usual = profile.reference.region().band(math.atan(trace.evaluations.sigma[chosen]), "denoised")[0]
    assert float(norm(given_back[chosen][2])[0]) == pytest.approx(usual, rel=1e-4)


def test_one_prediction_alone_is_not_judged_by_a_profile_with_guidance(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings(guidance=1.0))
    world.sample(monitor, guided=False, memorized=2.0)
    assert monitor.traces[0].verdict == "unscored"
    assert monitor.traces[0].nonfinite_step is None
    assert "20 of 20 evaluations gave one prediction only" in monitor.traces[0].note
    partly = StabilityMonitor(profile, settings=world.settings())
    for number, sigma in enumerate((14.0, 10.0, 1.0)):
        x = torch.randn(1, *world.shape) * sigma
        cond, uncond = world.predictions(x, sigma, (500,), [1.0])
        partly.predicted(x, sigma, cond, None if number == 1 else uncond)
    assert partly.traces[0].verdict == "stable"
    assert "1 of 3 evaluations gave one prediction only" in partly.traces[0].note
    assert np.isnan(partly.traces[0].evaluations.joint_deviation).tolist() == [False, True, False]


def test_a_run_whose_predictions_never_arrive_says_so(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    for sigma in (14.0, 5.0, 0.0):
        monitor.latent(torch.randn(2, *world.shape), NoiseLevel.from_sigma(sigma), evaluated=False)
    for trace in monitor.traces:
        assert trace.verdict == "unscored"
        assert "In 2 of 2 steps no prediction of the network reached the guard" in trace.note
        assert len(trace.steps) == 2


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.sampled_from([1.0, 1.0, 1.6, 2.0]), min_size=1, max_size=4))
def test_a_stable_sample_is_untouched_and_a_batch_is_its_samples(world, profile, seed, factors):
    seeds = [seed + b for b in range(len(factors))]
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    _, given_back = world.sample(monitor, seeds=seeds, memorized=factors)
    for b, trace in enumerate(monitor.traces):
        for number, (cond, _, kept) in enumerate(given_back):
            assert torch.equal(kept[b], cond[b]) != trace.evaluations.corrected[number]
        alone = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
        world.sample(alone, seeds=seeds[b : b + 1], memorized=factors[b])
        assert alone.traces[0].verdict == trace.verdict
        np.testing.assert_array_equal(alone.traces[0].steps.mitigated, trace.steps.mitigated)
        np.testing.assert_allclose(alone.traces[0].steps.update_norm, trace.steps.update_norm, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_sample_is_reported_and_left_alone(world, profile, value):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())

    def mix(c, u):
        mixed = u + 3.0 * (c - u)
        if monitor.evaluations == 8:
            mixed[1, 0, 0, 0] = value
        return mixed

    latents, _ = world.sample(monitor, seeds=(500, 501), memorized=[2.0, 1.0], mix=mix)
    healthy, broken = monitor.traces
    assert (broken.nonfinite_step, broken.verdict) == (7, "unscored")
    assert not broken.steps.mitigated.any()
    assert healthy.nonfinite_step is None
    assert healthy.verdict == "likely copy"
    assert not torch.isfinite(latents[-1][1]).all()
    assert torch.isfinite(latents[-1][0]).all()
    assert Trace.from_dict(broken.to_dict()).to_dict() == broken.to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_corrected_in_its_own_dtype(world, profile, dtype):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    _, given_back = world.sample(monitor, memorized=2.0, dtype=dtype)
    assert monitor.traces[0].evaluations.corrected.any()
    assert all(kept.dtype == dtype for *_, kept in given_back)


def test_events_come_in_order_and_say_what_the_trace_says(world, profile):
    events = []
    monitor = StabilityMonitor(profile, mode="mitigate", on_step=events.append, settings=world.settings())
    world.sample(monitor, seeds=(500, 501), memorized=[1.0, 2.0])
    traces = monitor.traces
    assert [event.step for event in events] == list(range(world.steps))
    for b, trace in enumerate(traces):
        for name in ("latent_norm", "update_norm", "denoised_norm", "p_value"):
            np.testing.assert_allclose([getattr(e, name)[b] for e in events], getattr(trace.steps, name), rtol=1e-6)
        np.testing.assert_allclose([e.guidance_norm[b] for e in events], trace.guidance_norm, rtol=1e-6)
        assert [e.mitigated[b] for e in events] == trace.steps.mitigated.tolist()
        assert events[-1].state[b] == trace.verdict
    trigger = traces[1].trigger_step
    assert [e.state[1] for e in events] == ["stable"] * trigger + ["likely copy"] * (world.steps - trigger)
    assert {event.state[0] for event in events} == {"stable"}


def test_an_event_is_strict_json_and_small(world, profile):
    events = []
    monitor = StabilityMonitor(profile, on_step=events.append, settings=world.settings())
    world.sample(monitor, seeds=(500, 501), mix=lambda c, u: (u + 3 * (c - u)) * (math.nan if monitor.evaluations == 9 else 1))
    assert monitor.traces
    for event in events:
        assert len(json.dumps(event.to_dict(), allow_nan=False)) < 900
    assert any(event.to_dict()["latent_norm"] == [None, None] for event in events)


def test_a_failing_listener_is_dropped_and_said_once(world, profile, caplog):
    calls = []

    def listener(event):
        calls.append(event.step)
        raise RuntimeError("socket closed")

    monitor = StabilityMonitor(profile, on_step=listener, settings=world.settings())
    with caplog.at_level(logging.WARNING):
        world.sample(monitor)
    assert calls == [0]
    assert len(caplog.records) == 1
    assert monitor.traces[0].verdict == "stable"


def test_a_failure_inside_ends_the_watching_not_the_sampling(world, profile, caplog):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    world.sample(monitor, stop=2)
    two = torch.zeros(2, *world.shape)
    with caplog.at_level(logging.WARNING):
        assert monitor.predicted(two, 1.0, two, two) is two
        assert monitor.predicted(two, 1.0, two, two) is two
    assert len(caplog.records) == 1
    assert "1 to 2 samples" in str(monitor.error)
    assert "Watching ended early" in monitor.traces[0].note
    assert monitor.traces[0].verdict == "unscored"


def test_a_run_that_ended_early_is_not_called_stable(world, profile):
    monitor = StabilityMonitor(profile, settings=world.settings())
    world.sample(monitor, stop=8)
    assert monitor.traces[0].verdict == "stable"
    monitor.end("after 8 of 20 steps")
    assert monitor.traces[0].verdict == "unscored"
    assert monitor.traces[0].note == "The run ended early: after 8 of 20 steps"


def test_tracing_asks_the_device_for_nothing(world, profile):
    """Tensors on ``meta`` have no values: whatever would wait for one, or copy one to the host, raises."""
    monitor = StabilityMonitor(profile, settings=world.settings())
    x, cond, uncond = (torch.empty(2, *world.shape, device="meta") for _ in range(3))
    sigma = torch.empty(2, device="meta")
    for number in range(3):
        assert monitor.predicted(x, sigma, cond, uncond) is cond
        monitor.latent(x, NoiseLevel.from_sigma(float(3 - number)), evaluated=True)
    assert monitor.error is None
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.norm().item()


def test_no_random_numbers_are_drawn_and_inputs_are_not_written(world, profile):
    state = torch.get_rng_state()
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    x = torch.randn(2, *world.shape, generator=torch.Generator().manual_seed(0)) * 14
    originals = [x, *world.predictions(x, 14.0, (500, 501), [4.0, 4.0])]
    copies = [t.clone() for t in originals]
    assert monitor.predicted(x, 14.0, *originals[1:]) is not originals[1]
    monitor.latent(x, NoiseLevel.from_sigma(14.0), evaluated=True)
    assert all(torch.equal(a, b) for a, b in zip(originals, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_profile_that_does_not_fit_is_not_used(world, profile):
    settings = RunSettings(latent_shape=(4, 99, 99), guidance_scale=3.0)
    monitor = StabilityMonitor(profile, mode="mitigate", settings=settings)
    _, given_back = world.sample(monitor, memorized=2.0)
    trace = monitor.traces[0]
    assert trace.verdict == "unscored"
    assert not trace.bands
    assert "latent shape" in trace.note
    assert all(kept is cond for cond, _, kept in given_back)


def test_the_outline_tells_what_is_to_come(world):
    settings = RunSettings(steps=5, sigmas=(5.0, 4.0, 3.0, 2.0, 1.0), end_sigma=0.0)
    columns = Norms(*(np.arange(5.0) + offset for offset in (10, 20, 30)))
    profile = StabilityProfile(mean=columns, std=Norms(*np.ones((3, 5))), count=50, settings=settings)
    published = Thresholds(method="published")
    part = RunSettings(steps=2, sigmas=(2.0, 1.0), end_sigma=0.0)
    outline = StabilityMonitor(profile, published, "mitigate", settings=part).outline()
    assert json.loads(json.dumps(outline)) == outline
    assert (outline["steps"], outline["mode"], outline["reference_count"]) == (2, "mitigate", 50)
    assert outline["bands"]["update"]["mean"] == [23.0, 24.0]
    assert "less certainty" in outline["note"]
    other = StabilityMonitor(profile, published, settings=RunSettings(steps=2, sigmas=(9.0, 1.0))).outline()
    assert (other["bands"], other["reference_count"]) == ({}, None)
    assert "does not fit" in other["note"]
    assert StabilityMonitor().outline()["bands"] == {}


def test_a_run_is_stopped_as_soon_as_every_image_has_triggered(world, profile):
    def stops(mode, memorized):
        monitor, known = StabilityMonitor(profile, mode=mode, settings=world.settings()), []
        world.sample(
            monitor,
            seeds=(500, 501),
            memorized=memorized,
            mix=lambda c, u: known.append(monitor.should_stop) or u + 3 * (c - u),
        )
        return known

    known = stops("stop", 2.0)
    assert known[-1]
    assert known.index(True) < 10
    assert not any(stops("stop", [2.0, 1.0]))
    assert not any(stops("trace", 2.0))


def test_without_a_profile_a_prompt_that_settles_the_image_is_pointed_out():
    def guided(difference):
        settings = RunSettings(prediction_type="epsilon", latent_shape=(4, 8, 8))
        monitor = StabilityMonitor(settings=settings)
        x = torch.randn(1, 4, 8, 8)
        for sigma in (10.0, 5.0, 1.0):
            monitor.predicted(x * sigma, sigma, x + difference, x)
        return monitor.traces[0]

    ordinary, settled = guided(0.2), guided(0.6)
    assert (ordinary.uncalibrated_score, settled.uncalibrated_score) == pytest.approx((0.2, 0.6), rel=1e-4)
    assert ordinary.note is None
    assert "may be memorized" in settled.note
    assert settled.verdict == "unscored"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "theirs"}, "known: reference, published"),
        ({"tau_mild": 0.0}, "tau_mild"),
        ({"false_positive_rate": 0.0}, "above 0 and below 1"),
        ({"false_positive_rate": math.nan}, "above 0 and below 1"),
        ({"steering_guidance": math.nan}, "guidance scale"),
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
    assert Thresholds.from_dict(Thresholds().to_dict()) == Thresholds()
