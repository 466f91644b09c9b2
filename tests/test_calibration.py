"""The calibrator against numpy, its refusals, and merging."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorization_guard import CalibrationError, Calibrator, RunSettings, Trace
from memorization_guard.core.calibration import ReferenceRuns
from memorization_guard.core.profile import NORMS
from memorization_guard.core.trace import STEP_FIELDS


def runs(count, steps=5, seed=0, offset=0.0):
    return offset + np.random.default_rng(seed).normal(100, 3, size=(count, steps, 3))


def calibrated(norms, settings=None):
    calibrator = Calibrator(settings)
    for run in norms:
        calibrator.add(run)
    return calibrator


def test_mean_and_standard_deviation_are_numpys():
    norms = runs(30)
    profile = calibrated(norms).profile()
    np.testing.assert_allclose(profile.mean, norms.mean(axis=0))
    np.testing.assert_allclose(profile.std, norms.std(axis=0, ddof=1))
    assert profile.count == 30
    assert profile.settings.steps == 5


def test_it_stays_stable_where_a_sum_of_squares_would_not():
    norms = runs(50, offset=1e9)
    np.testing.assert_allclose(calibrated(norms).profile().std, norms.std(axis=0, ddof=1), rtol=1e-6)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**16))
def test_merging_parts_gives_what_one_calibrator_gives(sizes, seed):
    norms = runs(8 + sum(sizes), seed=seed)
    merged = calibrated(norms[:8])
    start = 8
    for size in sizes:
        merged.merge(calibrated(norms[start : start + size]))
        start += size
    whole = calibrated(norms).profile()
    np.testing.assert_allclose(merged.profile().mean, whole.mean)
    np.testing.assert_allclose(merged.profile().std, whole.std)
    assert merged.profile().count == whole.count


def test_an_empty_calibrator_takes_over_the_settings_it_merges():
    merged = Calibrator()
    merged.merge(calibrated(runs(8), RunSettings(model="a")))
    assert merged.profile().settings.model == "a"


def test_fewer_than_eight_runs_are_refused_and_the_reasons_named():
    calibrator = calibrated(runs(7))
    bad = runs(1)[0]
    bad[3, 1] = np.nan
    with pytest.raises(CalibrationError, match="step 3"):
        calibrator.add(bad)
    with pytest.raises(CalibrationError, match=r"7 usable reference runs, 1 left out \(not finite\).*at least 8"):
        calibrator.profile()


def test_a_refused_run_changes_nothing_but_the_count_of_those_left_out():
    norms = runs(8)
    calibrator = calibrated(norms)
    bad = norms[0].copy()
    bad[0, 0] = np.inf
    for run in (bad, runs(1, steps=4)[0]):
        with pytest.raises(CalibrationError):
            calibrator.add(run)
    profile = calibrator.profile()
    np.testing.assert_allclose(profile.mean, norms.mean(axis=0))
    assert profile.left_out == {"not finite": 1, "another step count": 1}


def test_steps_that_the_settings_contradict_are_refused():
    with pytest.raises(CalibrationError, match="the settings say 50"):
        Calibrator(RunSettings(steps=50)).add(runs(1)[0])


def test_merging_other_step_counts_and_odd_shapes_is_refused():
    with pytest.raises(CalibrationError, match="calibrate them apart"):
        calibrated(runs(8)).merge(calibrated(runs(8, steps=6)))
    with pytest.raises(CalibrationError, match=r"\[steps, 3\]"):
        Calibrator().add(np.ones((5, 2)))


def trace(norms, corrected=np.nan):
    steps = len(norms)
    missing = set(STEP_FIELDS) - {"sigma", *(f"{name}_norm" for name in NORMS), "corrected_latent_norm"}
    return Trace(
        **{name: np.full(steps, np.nan) for name in missing},
        sigma=np.arange(steps, 0, -1.0),
        latent_norm=norms[:, 0],
        update_norm=norms[:, 1],
        denoised_norm=norms[:, 2],
        corrected_latent_norm=np.full(steps, corrected),
        settings=RunSettings(model="tiny", sampler="PNDM"),
    )


def test_traces_bring_their_settings_and_noise_levels():
    calibrator = Calibrator()
    for norms in runs(8):
        calibrator.add(trace(norms))
    settings = calibrator.profile().settings
    assert (settings.model, settings.sampler, settings.sigmas) == ("tiny", "PNDM", (5.0, 4.0, 3.0, 2.0, 1.0))


def test_a_mitigated_run_is_no_reference():
    calibrator = Calibrator()
    with pytest.raises(CalibrationError, match="mitigation off"):
        calibrator.add(trace(runs(1)[0], corrected=1.0))
    assert calibrator.left_out == {"mitigated": 1}


def test_a_calibration_goes_on_from_its_file_and_belongs_to_one_identity(tmp_path):
    state = tmp_path / "state.json"
    first = ReferenceRuns(state, ["a", 1])
    first.add([trace(norms) for norms in runs(5)], 5)
    again = ReferenceRuns(state, ["a", 1])
    assert [t.to_dict() for t in again.traces] == [t.to_dict() for t in first.traces]
    again.add([trace(norms) for norms in runs(9)[5:]], 4)
    assert again.profile()[0].count == 9
    with pytest.raises(CalibrationError, match="other prompts, settings or model"):
        ReferenceRuns(state, ["a", 2])
    state.write_text("{", encoding="utf-8")
    with pytest.raises(CalibrationError, match="no state of a calibration"):
        ReferenceRuns(state, ["a", 1])


def test_a_batch_without_a_trace_for_every_prompt_is_refused():
    references = ReferenceRuns(None, [])
    with pytest.raises(CalibrationError, match="3 prompts gave 2 traces"):
        references.add([trace(norms) for norms in runs(2)], 3)
    assert references.traces == []


def test_an_outlier_among_the_references_is_left_out_and_named(caplog):
    ordinary = runs(30)
    memorized = ordinary[3].copy()
    memorized[1, 1:] *= 2.0
    late = ordinary[4].copy()
    late[-1, 1] *= 2.0  # the update alone, as ordinary images do in late steps
    references = ReferenceRuns(None, [])
    references.add([trace(norms) for norms in (*ordinary, memorized, late)], 32)
    profile, left_out = references.profile()
    assert list(left_out) == [30]
    assert "outlier" in left_out[30]
    assert profile.count == 31
    assert profile.left_out == {"outlier": 1}
    assert "Reference prompt 31 was left out" in caplog.text
