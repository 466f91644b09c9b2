"""The monitor: what it measures, when an image triggers, and what is left once it was corrected."""

import dataclasses
import json
import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorization_guard import Calibrator, RunSettings, StabilityMonitor, StabilityProfile, Thresholds, Trace
from memorization_guard.core.judge import HOLD_SIGMA
from memorization_guard.core.monitor import STOPPED
from memorization_guard.core.noise_level import NoiseLevel
from memorization_guard.core.profile import Norms


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
        for name in ("velocity", "denoised", "guidance", "detail"):
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
    first = [world.trace(profile, guidance=guidance, memorized=factor) for guidance in (3.0, 7.0) for factor in (1.0, 2.0)]
    for plain, other in ((first[0], first[2]), (first[1], first[3])):
        assert plain.p_value == other.p_value
        for name in ("velocity", "denoised", "guidance", "detail"):
            found, wanted = (getattr(trace.evaluations, name)[0] for trace in (plain, other))
            assert found == pytest.approx(wanted, rel=1e-6), name


def test_a_detail_is_what_is_finer_than_an_eighth_of_the_shorter_side():
    """Of two waves over 32 x 64 places, that of 16 places does not count, and that of 2 counts whole, at any guidance."""
    places = torch.arange(64.0)
    coarse = torch.sin(2 * math.pi * places / 16).expand(1, 4, 32, 64)
    fine = (-1.0) ** places.expand(1, 4, 32, 64)
    x = torch.randn(1, 4, 32, 64)
    for w in (1.0, 7.5):
        found = []
        for difference in (coarse, fine, coarse + fine):
            monitor = StabilityMonitor(settings=RunSettings(guidance_scale=w, prediction_type="epsilon"))
            monitor.predicted(x * 14, 14.0, x + difference, x)
            found.append(monitor.traces[0].detail)
        assert found[0] < 0.25
        assert found[1] == pytest.approx(1.0, rel=1e-3)
        assert found[2] == pytest.approx(math.hypot(*found[:2]), rel=0.02)


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 2, 3), (4, 5, 90), (16, 3, 8, 8), (48, 16)])
def test_a_latent_of_any_shape_has_detail(shape):
    monitor = StabilityMonitor(settings=RunSettings(prediction_type="epsilon"))
    x, cond = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(s)) for s in range(2))
    monitor.predicted(x * 14, 14.0, cond, x * 0)
    assert monitor.error is None
    details = [trace.detail for trace in monitor.traces]
    if shape == (4, 1, 1):
        assert details == [0.0, 0.0]
    else:
        assert min(details) > 0.1


def asking(world, sigma=14.0, *, seed=500, memorized=1.0, asked=None):
    """What a host hands over to ask the network by; the noises it was asked in end up in ``asked``."""

    def ask(noise, alone=False):
        if noise is None:  # the run's own latent once more, whatever it is: nobody reads what is said of it
            noise = torch.zeros(1, *world.shape)
        elif asked is not None:
            asked.append(noise.clone())
        return noise * sigma, sigma, *world.predictions(noise * sigma, sigma, (seed,) * len(noise), [memorized] * len(noise))

    return ask


def with_answers(world, count=40):
    """A profile whose references were asked."""
    calibrator = Calibrator()
    for seed in range(count):
        monitor = StabilityMonitor(settings=world.settings(), serves="whole")
        world.sample(monitor, seeds=(seed,), ask=asking(world, seed=seed))
        calibrator.add(monitor.traces[0])
    return calibrator.profile()


def test_a_run_that_begins_in_the_middle_is_judged_by_asking(world):
    """Image to image, a second pass: the latent is nearly clean, and the prompt is asked for in noise."""
    profile = with_answers(world)
    low = world.schedule(8, start=1.5)
    settings = world.settings(low)
    for factor, verdict in ((1.0, "stable"), (2.0, "corrected")):
        asked = []
        monitor = StabilityMonitor(profile, mode="mitigate", settings=settings)
        world.sample(monitor, sigmas=low, memorized=factor, ask=asking(world, memorized=factor, asked=asked))
        trace = monitor.traces[0]
        assert trace.verdict == verdict
        assert len(asked) == 2
        assert torch.equal(asked[0], -asked[1])
        held = trace.evaluations.sigma > HOLD_SIGMA
        np.testing.assert_array_equal(trace.evaluations.corrected, held & (factor > 1))
        assert len(trace.evaluations) == 8


@pytest.mark.parametrize(("start", "asks"), [(6.0, True), (14.0, False)])
def test_where_an_image_shows_in_the_first_prediction_the_answers_decide(world, start, asks):
    """At a noise level of 6 an image to image run looks ordinary at first, whatever its prompt is."""
    sigmas, asked = world.schedule(8, start=start), []
    monitor = StabilityMonitor(with_answers(world), settings=world.settings(sigmas))
    world.sample(monitor, sigmas=sigmas, memorized=1.0, ask=asking(world, memorized=2.0, asked=asked))
    assert len(asked) == 2 * asks
    assert monitor.traces[0].verdict == ("likely copy" if asks else "stable")


def test_without_a_way_to_ask_a_run_that_begins_in_the_middle_says_so(world, profile):
    low = world.schedule(8, start=1.5)
    for ask, why in ((None, "no way to ask"), (lambda noise, alone: 1 / 0, "ZeroDivisionError")):
        monitor = StabilityMonitor(with_answers(world) if ask else profile, mode="mitigate", settings=world.settings(low))
        world.sample(monitor, sigmas=low, memorized=2.0, ask=ask)
        trace = monitor.traces[0]
        assert (trace.verdict, trace.p_value) == ("unscored", None)
        assert "begins at noise level 1.5" in trace.note
        assert why in trace.note
        assert not trace.mitigated.any()


def resized_run(world, profile, *, ask, shape=(4, 12, 16), mode="mitigate", on_step=None):
    """One evaluation of latents of another size than the references', and what is to go on."""
    settings = dataclasses.replace(world.settings(), latent_shape=shape)
    monitor = StabilityMonitor(profile, mode=mode, settings=settings, on_step=on_step)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)) * 14
    cond = x / 20
    return monitor, cond, monitor.predicted(x, 14.0, cond, cond * 0.9, ask=ask)


def test_a_run_of_another_size_is_judged_by_asking_at_the_size_of_the_references(world):
    profile = with_answers(world)
    for factor, verdict in ((1.0, "stable"), (2.0, "corrected")):
        asked = []
        monitor, cond, kept = resized_run(world, profile, ask=asking(world, memorized=factor, asked=asked))
        assert [tuple(noise.shape) for noise in asked] == [(1, *world.shape)] * 2
        trace = monitor.traces[0]
        assert trace.verdict == verdict
        assert trace.note is None  # the verdict does not depend on the size
        assert not trace.local_map.size
        assert not trace.bands
        assert (kept is cond) == (factor == 1.0)


def test_the_live_graph_of_a_run_of_another_size_has_its_p_value(world):
    events = []
    ask = asking(world, memorized=2.0)
    monitor, cond, kept = resized_run(world, with_answers(world), ask=ask, on_step=events.append)
    monitor.latent(torch.zeros_like(cond), NoiseLevel.from_sigma(14.0), evaluated=True)
    monitor.latent(kept, NoiseLevel.from_sigma(0.0), evaluated=False)
    (trace,) = monitor.traces
    assert [event.p_value for event in events] == [[trace.p_value]]


def test_what_cannot_be_asked_at_another_size_is_not_judged_and_says_so(world, profile):
    def fails(noise, alone):
        raise RuntimeError("the mask has another size")

    for ask, why in ((None, "no way to ask"), (fails, "the mask has another size")):
        monitor, cond, kept = resized_run(world, with_answers(world), ask=ask)
        assert kept is cond
        assert monitor.traces[0].verdict == "unscored"
        assert "The run has latents of (4, 12, 16), the profile of (4, 8, 8)" in monitor.traces[0].note
        assert why in monitor.traces[0].note
    # Latents of another kind, and a profile whose references were not asked, do not fit at all.
    for other, shape in ((with_answers(world), (16, 8, 8)), (with_answers(world), (4, 3, 8, 8)), (profile, (4, 12, 16))):
        monitor, cond, kept = resized_run(world, other, ask=asking(world, memorized=3.0), shape=shape)
        assert not monitor.judges
        assert "does not fit" in monitor.traces[0].note


def test_one_prediction_alone_is_judged_by_asking(world):
    """At a guidance scale of 1 there is no prediction without the prompt; the answers need none."""
    profile = with_answers(world)
    for factor, verdict in ((1.0, "stable"), (2.0, "corrected")):
        monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings(guidance=1.0))
        world.sample(monitor, guided=False, memorized=factor, ask=asking(world, memorized=factor))
        assert monitor.traces[0].verdict == verdict
        assert monitor.traces[0].mitigated.any() == (factor > 1)


def test_a_negative_prompt_has_no_part_in_the_answers(world):
    """What the prediction without the prompt holds makes the first evaluation suspicious, and decides nothing."""
    profile = with_answers(world)

    def negative(ask):
        def with_detail(noise, alone=False):
            x, sigma, cond, uncond = ask(noise)
            return x, sigma, cond, uncond + 3 * torch.randn(uncond.shape, generator=torch.Generator().manual_seed(7))

        return with_detail

    for factor, verdict in ((1.0, "stable"), (2.0, "corrected")):
        ask = asking(world, memorized=factor)
        x, sigma, cond, uncond = negative(ask)(torch.randn(1, *world.shape, generator=torch.Generator().manual_seed(8)))
        monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
        monitor.predicted(x, sigma, cond, uncond, ask=negative(ask))
        plain = StabilityMonitor(profile, settings=world.settings())
        plain.predicted(x, sigma, cond, ask(x / sigma)[3], ask=ask)
        found = monitor.traces[0]
        assert found.asked is not None
        assert found.verdict == verdict
        if factor > 1:
            assert found.p_value == plain.traces[0].p_value


def test_only_what_is_suspicious_is_asked_about(world):
    profile = with_answers(world)
    asked = {}
    for factor in (1.0, 3.0):
        asked[factor] = [[] for _ in range(20)]
        for seed, calls in enumerate(asked[factor]):
            monitor = StabilityMonitor(profile, settings=world.settings())
            ask = asking(world, seed=600 + seed, memorized=factor, asked=calls)
            world.sample(monitor, seeds=(600 + seed,), memorized=factor, ask=ask)
            trace = monitor.traces[0]
            assert (trace.asked is not None) == bool(calls)
            assert (trace.verdict == "likely copy") == (factor == 3.0)
    assert sum(map(bool, asked[1.0])) <= 6
    assert all(len(calls) == 2 for calls in asked[3.0])


def test_what_else_is_in_a_batch_has_no_part_in_a_verdict(world):
    """One image is suspicious, so that all are asked about; the one that was not is judged as by itself."""
    profile = with_answers(world)
    factors = [3.0, 1.0, 0.8]

    def ask(noise, alone=False):
        noise = torch.zeros(3, *world.shape) if noise is None else noise
        return noise * 14, 14.0, *world.predictions(noise * 14, 14.0, (500, 501, 502), factors)

    together = StabilityMonitor(profile, settings=world.settings())
    world.sample(together, seeds=(500, 501, 502), memorized=factors, ask=ask)
    assert all(trace.asked is not None for trace in together.traces)
    for seed, factor, trace in zip((500, 501, 502), factors, together.traces, strict=True):
        alone = StabilityMonitor(profile, settings=world.settings())
        world.sample(alone, seeds=(seed,), memorized=factor, ask=asking(world, seed=seed, memorized=factor))
        assert alone.traces[0].p_value == pytest.approx(trace.p_value, rel=1e-6)
        assert alone.traces[0].verdict == trace.verdict
        assert alone.traces[0].judged_by == trace.judged_by
    assert [trace.judged_by for trace in together.traces] == ["asked", "first", "first"]
    later = StabilityMonitor(profile, settings=world.settings(world.schedule(8, start=1.0)))
    world.sample(later, sigmas=world.schedule(8, start=1.0), ask=asking(world))
    assert later.traces[0].judged_by == "asked"
    assert StabilityMonitor().traces == []
    assert world.trace().judged_by is None


def test_bands_are_given_where_they_hold(world, profile):
    """Of the profile's own sampler all; else x0's, and the others for a solver without noise at the profile's guidance."""

    def bands(**how):
        events = []
        settings = world.settings(how.get("sigmas"), how.pop("sampler", "other"), how.get("guidance", world.guidance))
        monitor = StabilityMonitor(profile, settings=settings, on_step=events.append)
        planned = set(monitor.outline()["bands"])
        world.sample(monitor, **how)
        told = [tuple(event.bands) for event in events]
        assert set(told) == {tuple(monitor.traces[0].bands)}  # from the first step on
        assert set(told[0]) <= planned
        return set(told[0])

    every = {"latent", "update", "denoised"}
    assert bands(sampler="euler") == bands() == bands(sigmas=world.schedule(50)) == bands(memorized=2.0) == every
    for noise in (1.0, 0.5):
        assert bands(ancestral=noise) == bands(ancestral=noise, sigmas=world.schedule(50)) == {"denoised"}
    assert bands(guidance=7.0) == {"denoised"}


def test_ordinary_runs_lie_in_the_bands_that_hold(world, profile):
    """Whatever the sampler: of 20 runs' steps, hardly any lies outside of three standard deviations of the logarithm."""
    for how in ({"sampler": "euler"}, {"sigmas": world.schedule(30)}, {"ancestral": 1.0}):
        outside = []
        for seed in range(700, 720):
            trace = world.trace(profile, seed=seed, **{"sampler": "other", **how})
            for name, band in trace.bands.items():
                spread = np.sqrt(np.log1p((band["std"] / band["mean"]) ** 2))
                away = np.log(getattr(trace.steps, f"{name}_norm") / band["mean"]) + spread**2 / 2
                outside += (np.abs(away) > 3 * spread).tolist()
        assert np.mean(outside) < 0.03, how


def test_what_the_network_answers_decides(world):
    """The first evaluation is suspicious by its own noise; the prompt is ordinary, or the other way round is not asked."""
    profile = with_answers(world)
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    _, given_back = world.sample(monitor, memorized=2.0, ask=asking(world, memorized=1.0))
    trace = monitor.traces[0]
    assert trace.verdict == "stable"
    assert all(kept is cond for cond, _, kept in given_back)


def test_a_failing_answer_leaves_the_first_evaluation_to_decide(world, caplog):
    def ask(noise, alone=False):
        raise RuntimeError("no such layer")

    monitor = StabilityMonitor(with_answers(world), mode="mitigate", settings=world.settings())
    with caplog.at_level(logging.WARNING):
        world.sample(monitor, memorized=2.0, ask=ask)
    assert monitor.error is None
    assert monitor.traces[0].verdict == "corrected"
    assert monitor.traces[0].mitigated.any()
    assert "no such layer" in caplog.text


def test_a_reference_run_stops_after_its_first_evaluation(world):
    for serves, wanted in (("whole", 20), ("first", 1)):
        monitor, calls = StabilityMonitor(settings=world.settings(), serves=serves), []
        for number, sigma in enumerate(world.schedule()[:-1]):
            if monitor.should_stop:
                break
            x = torch.randn(1, *world.shape) * sigma
            monitor.predicted(x, sigma, *world.predictions(x, sigma, (500,), [1.0]), ask=asking(world, asked=calls))
            assert len(calls) == 2, number
        trace = monitor.traces[0]
        assert len(trace.evaluations) == wanted
        assert trace.asked > 0


def test_after_asking_the_network_sees_the_runs_own_latent_again(world):
    """What notes what the network saw last, as self-attention guidance does, goes on from the run's own. Of a reference, which
    is not sampled for its image, the prediction with the prompt is enough."""
    seen = []
    answer = asking(world, memorized=2.0)
    for serves, expected in ((None, ["asked", "asked", "own"]), ("whole", ["asked alone", "asked alone"])):
        monitor = StabilityMonitor(with_answers(world), settings=world.settings(), serves=serves)
        seen.clear()
        x = torch.randn(1, *world.shape) * 14.0

        def ask(noise, alone=False):
            seen.append("own" if noise is None else "asked alone" if alone else "asked")
            return answer(noise)

        monitor.predicted(x, 14.0, *world.predictions(x, 14.0, (500,), [2.0]), ask=ask)
        assert seen == expected


def test_asking_draws_from_no_generator_of_others(world):
    state = torch.get_rng_state()
    monitor = StabilityMonitor(with_answers(world), settings=world.settings())
    answer = asking(world, memorized=2.0)

    def ask(noise, alone=False):
        torch.rand(1)  # as token merging does
        return answer(noise)

    world.sample(monitor, memorized=2.0, ask=ask)
    assert monitor.traces[0].asked is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_gets_its_prompt_back_where_noise_hides_nothing_any_more(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings())
    world.sample(monitor, memorized=2.0)
    trace = monitor.traces[0]
    assert trace.trigger_step == 0
    np.testing.assert_array_equal(trace.evaluations.corrected, trace.evaluations.sigma > HOLD_SIGMA)


def test_a_rate_below_what_the_references_carry_still_triggers(world, profile):
    """Forty references know one in 800 at best; asked for one in 10,000, the guard does not fall silent."""
    trace = world.trace(profile, thresholds=Thresholds(false_positive_rate=1e-4), memorized=3.0)
    assert trace.p_value == pytest.approx(1 / 800)
    assert trace.verdict == "likely copy"


def test_one_prediction_alone_is_judged_by_a_profile_without_guidance(world):
    profile = world.calibrated(guidance=1.0, guided=False)
    settings = world.settings(guidance=1.0)
    for factor, verdict in ((1.0, "stable"), (2.0, "likely copy")):
        monitor = StabilityMonitor(profile, settings=settings)
        world.sample(monitor, guided=False, memorized=factor)
        assert monitor.traces[0].verdict == verdict
    monitor = StabilityMonitor(profile, mode="mitigate", settings=settings)
    _, given_back = world.sample(monitor, guided=False, memorized=2.0)
    trace = monitor.traces[0]
    chosen = int(np.flatnonzero(trace.evaluations.corrected)[0])
    usual = profile.reference.band(math.atan(trace.evaluations.sigma[chosen]), "denoised")[0]
    assert float(norm(given_back[chosen][2])[0]) == pytest.approx(usual, rel=1e-4)


def test_one_prediction_alone_is_not_judged_by_a_profile_with_guidance(world, profile):
    monitor = StabilityMonitor(profile, mode="mitigate", settings=world.settings(guidance=1.0))
    world.sample(monitor, guided=False, memorized=2.0)
    assert monitor.traces[0].verdict == "unscored"
    assert monitor.traces[0].nonfinite_step is None
    assert "gave one prediction only, and what the prompt does could not be asked for" in monitor.traces[0].note
    partly = StabilityMonitor(profile, settings=world.settings())
    for number, sigma in enumerate((14.0, 10.0, 1.0)):
        x = torch.randn(1, *world.shape) * sigma
        cond, uncond = world.predictions(x, sigma, (500,), [1.0])
        partly.predicted(x, sigma, cond, None if number == 1 else uncond)
    assert partly.traces[0].verdict == "stable"
    assert partly.traces[0].note is None
    assert np.isnan(partly.traces[0].evaluations.detail).tolist() == [False, True, True]


def test_where_the_prediction_without_the_prompt_is_left_out_early_it_is_asked_for(world):
    """The first five evaluations have one prediction: they are judged by the answers, and led away from the copy by them."""
    profile = with_answers(world)
    mean = torch.randn(world.shape, generator=torch.Generator().manual_seed(500))

    def sampled(mode):
        monitor = StabilityMonitor(profile, mode=mode, settings=world.settings())
        x = torch.randn(1, *world.shape, generator=torch.Generator().manual_seed(1)) * 14
        for number, (sigma, following) in enumerate(pairwise(world.schedule())):
            cond, uncond = world.predictions(x, sigma, (500,), [3.0])
            alone = number < 5
            kept = monitor.predicted(x, sigma, cond, None if alone else uncond, ask=asking(world, memorized=3.0))
            denoised = kept if alone else uncond + 3.0 * (kept - uncond)
            x = denoised + (x - denoised) * (following / sigma)
        return monitor.traces[0], float(torch.cosine_similarity(x.flatten(), mean.flatten(), dim=0))

    (traced, copy), (mitigated, other) = sampled("trace"), sampled("mitigate")
    assert (traced.verdict, mitigated.verdict) == ("likely copy", "corrected")
    assert copy > 0.95
    assert other < 0.1
    assert mitigated.evaluations.corrected[:5].all()
    assert traced.note is None


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


def test_a_first_prediction_that_is_no_number_is_not_taken_for_a_missing_one(world, profile):
    monitor = StabilityMonitor(profile, settings=world.settings())
    monitor.predicted(*(torch.full((1, *world.shape), math.nan) if i != 1 else 14.0 for i in range(4)))
    assert "The first prediction is NaN or infinite" in monitor.traces[0].note


def test_a_run_of_which_the_first_evaluation_is_needed_ends_regularly_where_it_is_stopped(world, profile):
    for other, verdict, note in (
        ({}, "stable", None),
        ({"prediction_type": "sample"}, "unscored", "The profile does not fit"),
    ):
        settings = dataclasses.replace(world.settings(), **other)
        monitor = StabilityMonitor(profile, settings=settings, serves="first", level=NoiseLevel.from_sigma)
        cond, uncond = world.predictions(x := torch.randn(1, *world.shape) * 14, 14.0, (500,), [1.0])
        monitor.predicted(x, 14.0, cond, uncond)
        assert monitor.should_stop
        monitor.end(STOPPED)
        (trace,) = monitor.traces
        assert trace.verdict == verdict
        assert trace.note is None if note is None else trace.note.startswith(note)


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
    assert healthy.verdict == "corrected"
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
        assert {event.p_value[b] for event in events} == {trace.p_value}
        for name in ("latent_norm", "update_norm", "denoised_norm"):
            np.testing.assert_allclose([getattr(e, name)[b] for e in events], getattr(trace.steps, name), rtol=1e-6)
        np.testing.assert_allclose([e.guidance_norm[b] for e in events], trace.guidance_norm, rtol=1e-6)
        assert [e.mitigated[b] for e in events] == trace.steps.mitigated.tolist()
        assert events[-1].state[b] == trace.verdict
    assert {event.state[1] for event in events} == {"corrected"}
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
    assert known.index(True) == 0
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
