"""The calibrator against numpy, its refusals, and the state that a calibration is kept in."""

import dataclasses

import numpy as np
import pytest

from memorization_guard import CalibrationError, Calibrator, RunSettings, Trace
from memorization_guard.core.calibration import ReferenceRuns
from memorization_guard.core.trace import Evaluations, Steps


def runs(count, steps=5, seed=0, offset=0.0):
    """Norms ``[steps, 3]`` of runs: latent, update, denoised."""
    return offset + np.random.default_rng(seed).normal(100, 3, size=(count, steps, 3))


def trace(norms, sigma=None, corrected=False, asked=None):
    steps = len(norms)
    sigma = np.arange(steps, 0, -1.0) if sigma is None else np.asarray(sigma, dtype=float)
    nothing, flags = np.full(steps, np.nan), np.full(steps, corrected)
    latent, update, denoised = norms.T
    return Trace(
        steps=Steps(
            sigma=np.arange(steps, 0, -1.0), latent_norm=latent, update_norm=update, denoised_norm=denoised,
            update_score=nothing, denoised_score=nothing, mitigated=flags,
        ),
        evaluations=Evaluations(
            step=np.arange(float(steps)), sigma=sigma, velocity=update, denoised=denoised, guidance=nothing, detail=latent,
            patch_mean=latent, patch_std=update, corrected=flags,
        ),
        asked=asked,
        settings=RunSettings(model="tiny", sampler="PNDM", prediction_type="epsilon", end_sigma=0.0),
    )  # fmt: skip


def calibrated(norms, settings=None):
    calibrator = Calibrator(settings)
    for run in norms:
        calibrator.add(trace(run))
    return calibrator


def test_mean_and_standard_deviation_are_numpys():
    norms = runs(30)
    profile = calibrated(norms).profile()
    np.testing.assert_allclose(np.stack(profile.mean, axis=1), norms.mean(axis=0))
    np.testing.assert_allclose(np.stack(profile.std, axis=1), norms.std(axis=0, ddof=1))
    assert profile.count == 30
    assert profile.settings.steps == 5


def test_the_reference_holds_the_signals_of_every_run_by_noise_level():
    norms = runs(12)
    reference = calibrated(norms).profile().reference
    np.testing.assert_array_equal(reference.signals.velocity, norms[:, :, 1])
    np.testing.assert_array_equal(reference.signals.denoised, norms[:, :, 2])
    np.testing.assert_allclose(reference.angles, np.arctan(np.arange(5, 0, -1.0)))
    # Over runs and places: the variance within the runs, and that between them.
    spread = np.sqrt((norms[:, :, 1] ** 2).mean(axis=0) + norms[:, :, 0].var(axis=0))
    np.testing.assert_allclose(reference.patches, np.stack([norms[:, :, 0].mean(axis=0), spread], axis=1))


def test_of_two_evaluations_at_one_noise_level_the_later_counts():
    norms, levels = runs(12), (5.0, 4.0, 4.0, 2.0, 3.0)  # as second-order samplers go
    calibrator = Calibrator()
    for run in norms:
        calibrator.add(trace(run, levels))
    reference = calibrator.profile().reference
    np.testing.assert_allclose(np.tan(reference.angles), (5.0, 4.0, 3.0, 2.0))
    np.testing.assert_array_equal(reference.signals.velocity, norms[:, [0, 2, 4, 3], 1])


def test_fewer_than_eight_runs_are_refused_and_the_reasons_named():
    calibrator = calibrated(runs(7))
    bad = runs(1)[0]
    bad[3, 1] = np.nan
    with pytest.raises(CalibrationError, match="step 3"):
        calibrator.add(trace(bad))
    with pytest.raises(CalibrationError, match=r"7 usable reference runs, 1 left out \(not finite\).*at least 8"):
        calibrator.profile()


def test_a_refused_run_changes_nothing_but_the_count_of_those_left_out():
    norms = runs(8)
    calibrator = calibrated(norms)
    bad = norms[0].copy()
    bad[0, 0] = np.inf
    for run in (trace(bad), trace(runs(1, steps=4)[0]), trace(norms[0], (5.0, 4.0, 3.5, 2.0, 1.0))):
        with pytest.raises(CalibrationError):
            calibrator.add(run)
    profile = calibrator.profile()
    np.testing.assert_allclose(np.stack(profile.mean, axis=1), norms.mean(axis=0))
    assert profile.left_out == {"not finite": 1, "another step count": 1, "other noise levels": 1}


def test_steps_that_the_settings_contradict_are_refused():
    with pytest.raises(CalibrationError, match="has 5 steps, not 50"):
        Calibrator(RunSettings(steps=50)).add(trace(runs(1)[0]))


def test_a_sampler_without_a_fixed_schedule_gives_no_profile():
    calibrator = calibrated(runs(1))
    with pytest.raises(CalibrationError, match="PNDM keeps to no fixed schedule"):
        calibrator.add(trace(runs(1)[0], (5.0, 3.9, 3.0, 2.0, 1.0)))


def test_a_run_without_a_prediction_is_no_reference():
    blind = dataclasses.replace(trace(runs(1)[0]), evaluations=Evaluations())
    with pytest.raises(CalibrationError, match="no prediction"):
        Calibrator().add(blind)


def test_traces_bring_their_settings_and_noise_levels():
    settings = calibrated(runs(8)).profile().settings
    assert (settings.model, settings.sampler, settings.sigmas) == ("tiny", "PNDM", (5.0, 4.0, 3.0, 2.0, 1.0))


def test_a_mitigated_run_is_no_reference():
    calibrator = Calibrator()
    with pytest.raises(CalibrationError, match="mode trace"):
        calibrator.add(trace(runs(1)[0], corrected=True))
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


def probed(detail, asked, sigma=5.0):
    """The trace of a prompt that was stopped after its first evaluation."""
    return trace(np.array([[detail, 100.0, 100.0]]), (sigma,), asked=asked)


def test_a_memorized_prompt_among_the_references_is_left_out_and_named(caplog):
    ordinary = runs(30)
    memorized = ordinary[3].copy()
    memorized[0, 0] *= 20.0  # the detail
    far = ordinary[4].copy()
    far[:, 1:] *= 2.0  # the norms alone
    references = ReferenceRuns(None, [])
    references.add([trace(norms) for norms in (*ordinary, memorized, far)], 32)
    profile, left_out = references.profile()
    assert left_out == {30: "the model seems to have memorized it"}
    assert profile.count == 31
    assert profile.left_out == {"memorized": 1}
    assert "Reference prompt 31 was left out" in caplog.text


def test_further_prompts_are_sampled_for_their_first_evaluation_alone():
    references = ReferenceRuns(None, [])
    batches = []
    while batch := references.next_batch(70, 20):
        start, end, serves = batch
        batches.append(batch)
        norms = runs(end - start, seed=start)
        references.add([trace(one, asked=2.0) if serves == "whole" else probed(one[0, 0], 3.0) for one in norms], end - start)
    assert batches == [(0, 20, "whole"), (20, 40, "whole"), (40, 50, "whole"), (50, 70, "first")]
    profile, left_out = references.profile()
    assert left_out == {}
    assert (profile.count, profile.reference.count) == (50, 70)
    np.testing.assert_array_equal(profile.reference.probed, runs(20, seed=50)[:, 0, 0])
    np.testing.assert_array_equal(profile.reference.asked, [2.0] * 50 + [3.0] * 20)


def test_where_one_reference_could_not_be_asked_none_counts():
    calibrator = Calibrator()
    for number, norms in enumerate(runs(9)):
        calibrator.add(trace(norms, asked=None if number == 4 else 1.0))
    assert calibrator.profile().reference.asked.size == 0


def test_a_prompt_evaluated_elsewhere_or_without_detail_is_refused():
    with pytest.raises(CalibrationError, match="begins with runs"):
        Calibrator().probe(probed(100.0, 1.0))
    calibrator = calibrated(runs(8))
    for bad, message in (
        (probed(100.0, 1.0, 4.0), "noise level"),
        (probed(np.nan, 1.0), "not finite|NaN"),
        (probed(0.0, 1.0), "NaN"),
    ):
        with pytest.raises(CalibrationError, match=message):
            calibrator.probe(bad)
    assert calibrator.profile().reference.count == 8
