"""References: p-values against simulation, memorized references, and what holds between noise levels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorization_guard.core.reference import BEYOND, Reference, Tail, memorized
from memorization_guard.core.signals import Signals

#: Logarithms of the detail of ordinary prompts, as they might be distributed.
SHAPES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "heavy": lambda rng, n: rng.standard_t(5, n),
    "some settled": lambda rng, n: rng.standard_normal(n) + 2.0 * (rng.random(n) < 0.04),
    "some settled far": lambda rng, n: rng.standard_normal(n) + 3.5 * (rng.random(n) < 0.04),
}


def shares(shape, count, levels, profiles=300):
    """Share of new ordinary prompts at or below each level, over many simulated profiles."""
    rng = np.random.default_rng([count, len(shape)])
    found = np.zeros(len(levels))
    for _ in range(profiles):
        p_values = Tail(SHAPES[shape](rng, count)).p_value(np.exp(SHAPES[shape](rng, 2000)))
        found += [(p_values <= level).mean() for level in levels]
    return found / profiles


@pytest.mark.parametrize("count", [50, 100, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_ordinary_prompts_fall_below_a_level_than_it_says(shape, count):
    """Within a factor of 1.5, whatever the shape; rarely, heavy tails make it twice as many at one in 1,000."""
    levels = (0.1, 0.01, 0.005, 0.001)
    found = shares(shape, count, levels) / levels
    assert (found[:3] < 1.5).all()
    assert found[3] < 2.1
    assert 0.8 < found[0] < 1.3
    if shape == "exponential":
        assert (found[:3] > 0.9).all()


@pytest.mark.parametrize("count", [8, 16])
def test_few_references_are_cautious(count):
    found = shares("normal", count, (0.1, 0.01))
    assert 0.07 < found[0] < 0.13
    assert found[1] < 0.01


def test_within_the_references_a_p_value_is_the_rank():
    logs = np.arange(100.0)
    p_values = Tail(logs).p_value(np.exp([-1.0, 0.0, 49.5, 50.0, 80.0]))
    np.testing.assert_allclose(p_values, [1.0, 1.0, 51 / 101, 51 / 101, 21 / 101])


def test_beyond_them_it_is_the_predictive_distribution_of_an_exponential_tail():
    """Averaged over what the references leave unknown of its scale: that of a gamma posterior, drawn here."""
    logs = np.random.default_rng(1).exponential(size=400)
    top = np.sort(logs)[-41:]
    scale = (top[1:] - top[0]).sum() / np.random.default_rng(2).gamma(40, size=200_000)
    for x in (0.5, 2.0, 4.0):
        averaged = 40 / 401 * np.exp(-x / scale).mean()
        assert Tail(logs).p_value(np.exp(top[0] + x)) == pytest.approx(averaged, rel=0.02)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from([3, 8, 50, 400]))
def test_p_values_fall_as_detail_rises_and_never_below_what_the_references_carry(seed, count):
    tail = Tail(np.random.default_rng(seed).normal(size=count))
    p_values = tail.p_value(np.exp(np.linspace(-5, 60, 500)))
    assert (np.diff(p_values) <= 1e-12).all()
    assert p_values[0] == 1.0
    assert p_values[-1] == tail.lowest == 1 / (BEYOND * count)


def test_what_is_nan_stays_so_and_nothing_is_ordinary():
    tail = Tail(np.zeros(20))
    assert np.isnan(tail.p_value(np.array([math.nan]))).all()
    assert tail.p_value(np.array([0.0]))[0] == 1.0


def test_references_that_are_all_alike_are_judged():
    """No division by zero where there is no spread at all, and what differs is rare."""
    tail = Tail(np.full(50, 0.3))
    assert tail.p_value(np.exp(0.3)) > 0.1
    assert tail.p_value(np.exp(0.31)) == tail.lowest


@pytest.mark.parametrize("shape", SHAPES)
def test_honest_references_are_kept(shape):
    rng = np.random.default_rng(0)
    thrown = [len(memorized(np.exp(SHAPES[shape](rng, 400)))) for _ in range(200)]
    assert np.mean([count > 0 for count in thrown]) <= 0.02


@pytest.mark.parametrize("count", [1, 4, 20])
def test_memorized_references_are_named_though_they_hide_each_other(count):
    rng = np.random.default_rng(0)
    details = np.exp(np.concatenate([rng.normal(size=400 - count), rng.normal(9.0, 0.3, size=count)]))
    order = rng.permutation(400)
    assert sorted(memorized(details[order])) == sorted(np.flatnonzero(order >= 400 - count).tolist())


def test_too_few_references_tell_of_no_gap():
    assert memorized([1.0] * 9 + [1e9]) == []
    assert memorized([]) == []


def draw(runs=30, evaluations=20, seed=0):
    return Signals(*np.exp(3 + 0.1 * np.random.default_rng(seed).standard_normal((4, runs, evaluations))))


def angles_of(evaluations):
    return np.arctan(np.geomspace(14.6, 0.03, evaluations))


def reference(runs=30, evaluations=20, probed=(), asked=()):
    return Reference(draw(runs, evaluations), angles_of(evaluations), np.zeros((evaluations, 2)), probed, asked)


def test_a_tail_holds_the_runs_at_the_angle_and_what_was_evaluated_once_moved_as_the_runs_are():
    probed = np.exp(np.random.default_rng(3).normal(3, 0.1, 70))
    whole = reference(probed=probed)
    assert whole.count == 100
    logs = np.log(whole.signals.detail)
    at_first = np.sort(np.concatenate([logs[:, 0], np.log(probed)]))
    np.testing.assert_allclose(whole.tail(whole.angles[0])._sorted, at_first)
    np.testing.assert_allclose(whole.tail(1.57)._sorted, at_first)  # held constant beyond
    middle = (whole.angles[0] + whole.angles[1]) / 2
    shift = (logs[:, 1] - logs[:, 0]).mean() / 2
    there = np.sort(np.concatenate([logs[:, :2].mean(axis=1), np.log(probed) + shift]))
    np.testing.assert_allclose(whole.tail(middle)._sorted, there)


def test_bands_and_patches_are_read_at_an_angle():
    signals, angles = draw(30, 3), np.array([1.5, 1.0, 0.5])
    whole = Reference(signals, angles, np.array([[1, 10], [2, 20], [4, 40]]), [], [])
    for name in Signals._fields:
        logs = np.log(getattr(signals, name))
        for angle, there in ((1.57, logs[:, 0]), (1.0, logs[:, 1]), (0.75, logs[:, 1:].mean(axis=1)), (0.0, logs[:, 2])):
            mean, std = there.mean(), there.std(ddof=1)
            assert whole.band(angle, name) == pytest.approx((math.exp(mean), math.exp(mean) * std))
    for angle, patch in ((1.57, (1, 10)), (1.25, (1.5, 15)), (1.0, (2, 20)), (0.6, (3.6, 36)), (0.0, (4, 40))):
        assert whole.patch(angle) == pytest.approx(patch)


def test_one_evaluation_is_enough():
    whole = reference(evaluations=1)
    assert whole.band(0.3, "velocity")[0] == pytest.approx(math.exp(np.log(whole.signals.velocity).mean()))
    np.testing.assert_allclose(whole.tail(1.2)._sorted, np.sort(np.log(whole.signals.detail[:, 0])))


def test_arrays_are_copied_to_double_precision_and_read_only():
    made = reference(probed=[1.0], asked=np.ones(31))
    for values in (*made.signals, made.angles, made.patches, made.probed, made.asked):
        assert values.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


NONE = np.zeros(0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s, a, p: (Signals(*(values[:2] for values in s)), a, p, NONE, NONE), "3 or more runs"),
        (lambda s, a, p: (Signals(*(values[:, :0] for values in s)), a[:0], p[:0], NONE, NONE), "3 or more runs"),
        (lambda s, a, p: (Signals(*(values[:, 0] for values in s)), a, p, NONE, NONE), "3 or more runs"),
        (lambda s, a, p: (s._replace(detail=s.detail[:, 1:]), a, p, NONE, NONE), "signals must be"),
        (lambda s, a, p: (s, a[1:], p, NONE, NONE), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, a, p[1:], NONE, NONE), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, a, p[:, 0], NONE, NONE), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, np.where(a == a[3], np.nan, a), p, NONE, NONE), "finite"),
        (lambda s, a, p: (s._replace(velocity=np.where(s.velocity > 25, np.nan, s.velocity)), a, p, NONE, NONE), "finite"),
        (lambda s, a, p: (s._replace(denoised=np.where(s.denoised > 25, np.inf, s.denoised)), a, p, NONE, NONE), "finite"),
        (lambda s, a, p: (s._replace(detail=np.where(s.detail > 25, 0, s.detail)), a, p, NONE, NONE), "positive"),
        (lambda s, a, p: (s, a[::-1], p, NONE, NONE), "must fall"),
        (lambda s, a, p: (s, np.where(a == a[3], a[4], a), p, NONE, NONE), "must fall"),
        (lambda s, a, p: (s, a, p, np.ones((2, 2)), NONE), "do not fit"),
        (lambda s, a, p: (s, a, p, np.zeros(2), NONE), "positive"),
        (lambda s, a, p: (s, a, p, np.ones(2), np.ones(30)), "asked does not fit 30 runs and 2 prompts"),
        (lambda s, a, p: (s, a, p, np.ones(2), np.full(32, np.nan)), "positive"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed, message):
    whole = reference()
    with pytest.raises(ValueError, match=message):
        Reference(*changed(whole.signals, whole.angles, whole.patches))
