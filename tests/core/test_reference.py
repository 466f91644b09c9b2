"""Reference runs: p-values against SciPy and simulation, their inverse, and what holds between noise levels."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal, stats

from memorization_guard.core.reference import OPEN_SIGMA, Reference, Region, Statistics, _rates
from memorization_guard.core.signals import Signals

JOINT, TWO, THREE = ("joint",), ("joint", "local"), Statistics._fields


def draw(rng, runs, evaluations, along, across):
    """Log-normal signals ``[runs, evaluations]``, correlated along the run (AR(1)) and across signals."""
    own, common = (rng.standard_normal((runs, count, evaluations)) for count in (4, 1))
    for noise in (own, common):
        noise[..., 1:] *= math.sqrt(1 - along**2)
    values = math.sqrt(1 - across) * own + math.sqrt(across) * common
    return np.exp(3 + 0.1 * signal.lfilter([1], [1, -along], values)).transpose(1, 0, 2)


def angles_of(evaluations):
    return np.arctan(np.geomspace(14.6, 0.03, evaluations))


def with_statistics(values, statistics):
    velocity, denoised, guidance, local = values
    missing = np.full_like(velocity, np.nan)
    return Signals(
        velocity, denoised, guidance if "guidance" in statistics else missing, local if "local" in statistics else missing
    )


def reference(runs=30, evaluations=20, along=0.9, across=0.5, *, statistics=THREE, seed=0):
    values = draw(np.random.default_rng(seed), runs, evaluations, along, across)
    return Reference(with_statistics(values, statistics), angles_of(evaluations), np.zeros((evaluations, 2)))


def highest(region, values):
    """The highest statistics ``[3, B]`` of runs with the signals ``[B, evaluations]``."""
    every = [region.statistics(angle, Signals(*(each[:, i] for each in values))) for i, angle in enumerate(region.angles)]
    return np.fmax.reduce([np.stack(statistics) for statistics in every])


def held_out(statistics, runs, evaluations, along, across, profiles):
    """p-values of 100 ordinary runs for each of many profiles, simulated."""
    rng = np.random.default_rng([runs, evaluations, int(100 * along), int(100 * across), len(statistics)])
    p_values = []
    for _ in range(profiles):
        values = with_statistics(draw(rng, runs + 100, evaluations, along, across), statistics)
        known, new = (Signals(*(each[part] for each in values)) for part in (slice(runs), slice(runs, None)))
        region = Reference(known, angles_of(evaluations), np.zeros((evaluations, 2))).region()
        p_values.append(region.p_value(highest(region, new)))
    return np.array(p_values)


def share_below(p_values, level):
    """Share of p-values below ``level``, and its standard error; those of one profile go together."""
    shares = (p_values < level).mean(axis=1)
    return shares.mean(), shares.std(ddof=1) / math.sqrt(len(shares))


UNIFORM = [
    # statistics, reference runs, evaluations, correlation along the run, correlation across signals, profiles
    (JOINT, 16, 20, 0.9, 0.9, 300),
    (JOINT, 50, 20, 0.0, 0.0, 200),
    (JOINT, 50, 30, 0.95, 0.7, 200),
    (JOINT, 200, 20, 0.9, 0.9, 150),
    (TWO, 16, 30, 0.95, 0.5, 300),
    (TWO, 50, 20, 0.0, 0.0, 200),
    (("joint", "guidance"), 50, 20, 0.9, 0.5, 200),
    (TWO, 200, 10, 0.98, 0.9, 150),
    (THREE, 16, 5, 0.0, 0.0, 300),
    (THREE, 16, 20, 0.9, 0.5, 300),
    (THREE, 16, 30, 0.98, 0.9, 300),
    (THREE, 50, 50, 0.5, 0.0, 200),
    (THREE, 50, 100, 0.98, 0.9, 200),
    (THREE, 200, 20, 0.0, 0.5, 150),
    (THREE, 200, 20, 0.98, 0.9, 150),
]


@pytest.mark.parametrize(("statistics", "runs", "evaluations", "along", "across", "profiles"), UNIFORM)
def test_p_values_of_ordinary_runs_are_uniform(statistics, runs, evaluations, along, across, profiles):
    """As many new runs fall below a level as it says, within a factor of 1.5, and the whole lower half is near uniform."""
    p_values = held_out(statistics, runs, evaluations, along, across, profiles)
    for level in (0.1, 0.01):
        share, error = share_below(p_values, level)
        assert error < level / 6, "too few profiles to tell"
        assert level / 1.5 < share < 1.5 * level
    ordered = np.sort(p_values, axis=None)
    distance = np.abs(np.arange(1, ordered.size + 1) / ordered.size - ordered)[ordered < 0.5].max()
    assert distance < 0.035


def test_a_number_of_statistics_of_one_is_seen(monkeypatch):
    """It once always was one, by misplaced parentheses: the bounds of the test above tell."""
    counts = Region._counts.func
    monkeypatch.setattr(Region, "_counts", property(lambda region: counts(region)._replace(statistics=1.0)))
    for runs, across in ((16, 0.0), (50, 0.5)):
        share, error = share_below(held_out(THREE, runs, 20, 0.9, across, 150), 0.1)
        assert share - 2 * error > 1.5 * 0.1


@pytest.mark.parametrize("runs", [3, 8, 50, 200])
def test_one_test_follows_students_t(runs):
    t = np.array([-8.0, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 10.0])
    single = -np.expm1(-_rates(np.tile(t * math.sqrt(1 + 1 / runs), (3, 1)), runs, np.ones(3)))
    joint, guidance, local = single
    np.testing.assert_allclose(guidance, stats.t.sf(t, runs - 1), rtol=1e-4)
    np.testing.assert_array_equal(local, guidance)
    np.testing.assert_allclose(joint, np.minimum(2 * guidance, 1), rtol=1e-9)


@pytest.mark.parametrize("statistics", [JOINT, TWO, ("joint", "guidance"), THREE])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rate=st.floats(1e-9, 0.99), runs=st.sampled_from([16, 50]))
def test_critical_values_are_the_inverse_of_p_values(statistics, rate, runs):
    region = prepared(runs, statistics)
    critical = region.critical(rate)
    present = np.array([name in statistics for name in Statistics._fields])
    np.testing.assert_array_equal(np.isfinite(critical), present)
    alone = np.where(np.eye(3, dtype=bool) & present, critical[:, None], np.nan)[:, present]
    np.testing.assert_allclose(region.p_value(alone), rate, rtol=1e-6)
    assert (region.p_value(alone + 0.01) < rate).all()


@cache
def prepared(runs, statistics):
    return reference(runs, statistics=statistics).region()


def test_effective_numbers_are_the_true_ones_where_these_are_known():
    """Of independent tests there are as many as evaluations; the joint statistic takes two independent signals at once."""
    rng = np.random.default_rng(0)
    independent = draw(rng, 200, 20, 0.0, 0.0)
    everything = reference_of(independent).region()._counts
    is_open = np.count_nonzero(np.tan(angles_of(20)) > OPEN_SIGMA)
    assert 1.6 < everything.exponents[0] <= 2
    np.testing.assert_allclose(everything.exponents[1:], 1, atol=0.15)
    np.testing.assert_allclose(everything.tests[1:], [is_open, 20], rtol=0.5)
    assert 2.4 < everything.statistics < 3.6

    constant = np.repeat(draw(rng, 200, 1, 0.0, 1.0), 20, axis=2)
    the_same = reference_of(constant).region()._counts
    np.testing.assert_allclose(the_same.exponents, 1, atol=0.15)
    np.testing.assert_allclose(the_same.tests, 1, rtol=0.3)
    assert 1 <= the_same.statistics < 2


def reference_of(values):
    count = values.shape[2]
    return Reference(Signals(*values), angles_of(count), np.zeros((count, 2)))


def test_p_values_are_the_same_every_time_and_fall_as_statistics_rise():
    region, again = reference().region(), reference().region()
    rising = np.linspace(-3, 30, 500)
    for name in Statistics._fields:
        alone = np.stack([rising if name == other else np.full_like(rising, np.nan) for other in Statistics._fields])
        p_values = region.p_value(alone)
        np.testing.assert_array_equal(p_values, again.p_value(alone))
        assert (np.diff(p_values) <= 0).all()
        assert 0 < p_values[-1] < 1e-6 < 0.9 < p_values[0] <= 1


def test_what_is_nan_is_left_out():
    region = reference().region()
    value = np.full(3, 4.0)
    for missing in range(3):
        some = value.copy()
        some[missing] = np.nan
        alone = [
            region.p_value(np.where(np.arange(3) == other, value, np.nan)[:, None])[0]
            for other in range(3)
            if other != missing
        ]
        assert region.p_value(some[:, None])[0] == min(alone)
    assert np.isnan(region.p_value(np.full((3, 2), np.nan))).all()


def test_a_statistic_without_reference_runs_does_not_count():
    """Guidance is judged at the evaluations where all reference runs have it."""
    values = draw(np.random.default_rng(0), 30, 20, 0.9, 0.5)
    gaps = Signals(*values.copy())
    gaps.guidance[3, :2] = np.nan
    gaps.guidance[:, 3] = 0.0  # of logarithm minus infinity
    region = reference_of(np.stack(gaps)).region()
    assert np.isfinite(region._counts.tests).all()
    judged = [region.statistics(angle, Signals(*np.full((4, 1), 20.0))).guidance[0] for angle in region.angles]
    assert np.flatnonzero(np.isfinite(judged)).tolist() == [2]

    gaps.guidance[4] = np.nan
    region = reference_of(np.stack(gaps)).region()
    assert np.isnan(region._counts.tests).tolist() == [False, True, False]
    large = np.full((3, 1), 5.0)
    ignored = large.copy()
    ignored[1] = 50.0
    np.testing.assert_array_equal(region.p_value(ignored), region.p_value(large))
    assert region.critical(0.01)[1] == math.inf


def test_statistics_are_deviations_of_logarithms():
    region = reference().region()
    early, late = region.angles[1], region.angles[-2]
    for angle in (early, late):
        mean, std = region.moments(angle)
        low, high = (Signals(*np.exp(mean + off * std)[:, None]) for off in (-3, 2))
        low, high = low._replace(velocity=high.velocity), high._replace(denoised=np.exp(mean[1] + 5 * std[1])[None])
        for signals, joint, others in ((low, 2, -3), (high, 2, 2)):
            result = region.statistics(angle, signals)
            np.testing.assert_allclose(result.joint, joint)
            np.testing.assert_allclose(result.local, others)
            np.testing.assert_allclose(result.guidance, others if angle == early else np.nan)
    batch = Signals(*np.exp(np.random.default_rng(1).normal(3, 0.1, (4, 8))))
    together = np.stack(region.statistics(early, batch))
    for i in range(8):
        one = region.statistics(early, Signals(*(values[i : i + 1] for values in batch)))
        np.testing.assert_array_equal(np.concatenate(one), together[:, i])


def test_between_noise_levels_logarithms_are_interpolated_along_the_angle_and_constant_outside():
    whole = reference(evaluations=21)
    first, last = whole.angles[[0, -1]]
    middle = (whole.angles[3] + whole.angles[4]) / 2
    given_angles = np.array([middle, first + 0.01, whole.angles[7], last / 2, middle])
    region = whole.region(given_angles)
    np.testing.assert_array_equal(region.angles, [first + 0.01, middle, whole.angles[7], last / 2])
    logs = np.log(np.stack(whole.signals, axis=-1))
    np.testing.assert_allclose(
        region.logs, np.stack([logs[:, 0], (logs[:, 3] + logs[:, 4]) / 2, logs[:, 7], logs[:, -1]], axis=1), rtol=1e-12
    )

    own = whole.region()
    np.testing.assert_array_equal(own.angles, whole.angles)
    for i, angle in enumerate(whole.angles):
        np.testing.assert_allclose(own.moments(angle), [logs[:, i].mean(0), logs[:, i].std(0, ddof=1)])
    np.testing.assert_allclose(own.moments(middle), (own.moments(whole.angles[3]) + own.moments(whole.angles[4])) / 2)
    np.testing.assert_array_equal(own.moments(1.6), own.moments(first))
    np.testing.assert_array_equal(own.moments(0.0), own.moments(last))


def test_bands_and_patches_are_read_at_an_angle():
    values, angles = draw(np.random.default_rng(0), 30, 3, 0.5, 0.5), np.array([1.5, 1.0, 0.5])
    region = Reference(Signals(*values), angles, np.array([[1, 10], [2, 20], [4, 40]])).region()
    for i, name in enumerate(Signals._fields):
        mean, std = region.moments(1.0)[:, i]
        assert region.band(1.0, name) == pytest.approx((math.exp(mean), math.exp(mean) * std))
    for angle, patch in ((1.57, (1, 10)), (1.25, (1.5, 15)), (1.0, (2, 20)), (0.6, (3.6, 36)), (0.0, (4, 40))):
        assert region.patch(angle) == pytest.approx(patch)


def test_arrays_are_copied_to_double_precision_and_read_only():
    made = reference()
    for values in (*made.signals, made.angles, made.patches):
        assert values.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s, a, p: (Signals(*(values[:2] for values in s)), a, p), "3 or more runs"),
        (lambda s, a, p: (Signals(*(values[:, :0] for values in s)), a[:0], p[:0]), "3 or more runs"),
        (lambda s, a, p: (Signals(*(values[:, 0] for values in s)), a, p), "3 or more runs"),
        (lambda s, a, p: (s._replace(local=s.local[:, 1:]), a, p), "signals must be"),
        (lambda s, a, p: (s, a[1:], p), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, a, p[1:]), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, a, p[:, 0]), "do not fit runs of 20 evaluations"),
        (lambda s, a, p: (s, np.where(a == a[3], np.nan, a), p), "finite"),
        (lambda s, a, p: (s._replace(velocity=np.where(s.velocity > 25, np.nan, s.velocity)), a, p), "finite"),
        (lambda s, a, p: (s._replace(denoised=np.where(s.denoised > 25, np.inf, s.denoised)), a, p), "finite"),
        (lambda s, a, p: (s._replace(denoised=np.where(s.denoised > 25, 0, s.denoised)), a, p), "positive"),
        (lambda s, a, p: (s, a[::-1], p), "must fall"),
        (lambda s, a, p: (s, np.where(a == a[3], a[4], a), p), "must fall"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed, message):
    whole = reference()
    with pytest.raises(ValueError, match=message):
        Reference(*changed(whole.signals, whole.angles, whole.patches))


def test_runs_that_are_all_alike_are_judged():
    """No division by zero where there is no spread at all, and what differs is rare."""
    values = np.repeat(draw(np.random.default_rng(0), 1, 5, 0.5, 0.5), 16, axis=1)
    region = reference_of(values).region()
    same, other = (highest(region, Signals(*(factor * each[:1] for each in values))) for factor in (1.0, 1.01))
    assert region.p_value(same)[0] > 0.3
    assert region.p_value(other)[0] < 1e-6
