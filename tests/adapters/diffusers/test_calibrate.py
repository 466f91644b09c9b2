"""Calibration with a pipeline, and what its profile is good for."""

import copy
import dataclasses

import numpy as np
import pytest

from memorization_guard import CalibrationError
from memorization_guard.core.signals import Signals
from memorization_guard.diffusers import calibrate, guard

from .conftest import images_of

PROMPTS = [f"a red cat on mat {i}" for i in range(10)]
QUICK = {"num_inference_steps": 3, "height": 16, "width": 16, "progress": False, "batch_size": 4}


def test_an_interrupted_calibration_goes_on_where_it_stopped(tiny_pipe, tmp_path):
    whole = calibrate(tiny_pipe, PROMPTS, **QUICK)
    state = tmp_path / "state.json"
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = tiny_pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipe, PROMPTS, state=state, **QUICK)
    assert state.exists()
    calls.clear()
    calls.extend([1] * 100)
    profile = calibrate(tiny_pipe, PROMPTS, state=state, **QUICK)
    handle.remove()
    assert len(calls) - 100 == 2 * 4  # two batches of three steps, PNDM evaluates one step twice
    np.testing.assert_allclose(profile.mean.update, whole.mean.update, rtol=1e-6)
    np.testing.assert_allclose(profile.std.update, whole.std.update, rtol=1e-4)
    calls.clear()
    calls.extend([1] * 100)
    calibrate(tiny_pipe, PROMPTS, state=state, **QUICK)
    assert len(calls) == 100  # the state has all runs, for a caller who could not save the profile


def test_a_state_of_another_calibration_is_refused(tiny_pipe, tmp_path):
    state = tmp_path / "state.json"
    handle = tiny_pipe.unet.register_forward_pre_hook(counted_interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipe, PROMPTS, state=state, **QUICK)
    handle.remove()
    with pytest.raises(CalibrationError, match="other prompts, settings or model"):
        calibrate(tiny_pipe, PROMPTS[::-1], state=state, **QUICK)
    state.write_text("{")
    with pytest.raises(CalibrationError, match="delete it"):
        calibrate(tiny_pipe, PROMPTS, state=state, **QUICK)


def counted_interrupt(count):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt

    return interrupt


def test_one_negative_prompt_serves_a_batch(tiny_pipe):
    plain = calibrate(tiny_pipe, PROMPTS, **QUICK)
    negative = calibrate(tiny_pipe, PROMPTS, negative_prompt="a blue dog", **QUICK)
    assert negative.count == 10
    assert not np.allclose(plain.mean.denoised, negative.mean.denoised, rtol=1e-6)


def test_too_few_prompts_are_refused_before_any_sampling(tiny_pipe):
    with pytest.raises(CalibrationError, match="at least 8"):
        calibrate(tiny_pipe, PROMPTS[:7], **QUICK)


def test_the_pipelines_own_progress_bar_is_as_before(tiny_pipe):
    before = copy.deepcopy(tiny_pipe._progress_bar_config)
    calibrate(tiny_pipe, PROMPTS, **QUICK)
    assert tiny_pipe._progress_bar_config == before


def test_calibration_is_independent_of_the_batch_size_and_fits_its_own_runs(tiny_pipe):
    profile = calibrate(tiny_pipe, PROMPTS, **QUICK)
    other = calibrate(tiny_pipe, PROMPTS, **{**QUICK, "batch_size": 3})
    np.testing.assert_allclose(profile.mean.update, other.mean.update, rtol=1e-4)
    assert (profile.count, profile.steps, profile.settings.sampler) == (10, 3, "PNDM")
    with guard(tiny_pipe, profile) as run:
        images_of(tiny_pipe, PROMPTS[0], num_inference_steps=3)
    assert run.traces[0].verdict == "stable"
    assert run.traces[0].note is None


def test_a_run_is_stopped_once_every_image_has_triggered(tiny_pipe):
    """References as small as nothing: every image is far off from its first step on."""
    profile = calibrate(tiny_pipe, PROMPTS, **QUICK)
    signals = Signals(*(0.01 * signal for signal in profile.reference.signals))
    small = dataclasses.replace(profile.reference, signals=signals, asked=0.01 * profile.reference.asked)
    profile, calls = dataclasses.replace(profile, reference=small), []
    hook = tiny_pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with guard(tiny_pipe, profile, mode="stop") as run:
        latent = images_of(tiny_pipe, num_inference_steps=10, output_type="latent")
    assert len(calls) < 4
    assert run.traces[0].verdict == "likely copy"
    assert "stopped" in run.traces[0].note
    assert not latent.any()
    calls.clear()
    images_of(tiny_pipe, num_inference_steps=10)
    hook.remove()
    assert len(calls) >= 10


def test_a_profile_is_transferred_to_another_step_count_and_to_no_other_model(tiny_pipe):
    profile = calibrate(tiny_pipe, PROMPTS, **{**QUICK, "num_inference_steps": 12})
    with guard(tiny_pipe, profile) as run:
        images_of(tiny_pipe, PROMPTS[0], num_inference_steps=10)
    assert run.traces[0].verdict == "stable"
    assert run.traces[0].note is None
    assert run.traces[0].score is None
    other = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, model_hash="another"))
    with guard(tiny_pipe, other, mode="mitigate") as run:
        images_of(tiny_pipe, num_inference_steps=4)
    assert run.traces[0].verdict == "unscored"
    assert "Calibrate a profile" in run.traces[0].note


def test_a_pipeline_that_cannot_be_watched_is_not_calibrated(tiny_pipe, monkeypatch):
    monkeypatch.setattr("memorization_guard.adapters.sampling.fingerprint", lambda _: 1 / 0)
    with pytest.raises(CalibrationError, match="could not be watched: division by zero"):
        calibrate(tiny_pipe, PROMPTS, **QUICK)
