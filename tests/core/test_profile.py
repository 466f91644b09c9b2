"""Stability profiles: files, and what they say about a run they do not fit."""

import dataclasses

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from memorization_guard import ProfileError, RunSettings, StabilityProfile
from memorization_guard.core.noise_level import NoiseLevel
from memorization_guard.core.profile import Norms, name_problem
from memorization_guard.core.reference import Reference
from memorization_guard.core.signals import Signals

SETTINGS = RunSettings(
    model="tiny",
    model_hash="0123456789abcdef",
    prediction_type="epsilon",
    sampler="PNDM",
    scheduler="leading",
    steps=4,
    guidance_scale=7.5,
    latent_shape=(4, 16, 16),
    sigmas=(14.0, 5.0, 2.0, 0.5),
)


def made(settings=SETTINGS):
    norms = np.arange(12, dtype=float).reshape(3, 4) + 10
    return StabilityProfile(
        mean=Norms(*norms), std=Norms(*norms / 10), count=50, settings=settings, left_out={"not finite": 2}
    )


def fitting(settings=SETTINGS):
    """A profile with reference runs, which hold for other samplers too."""
    found = np.exp(np.random.default_rng(0).normal(2.0, 0.1, size=(4, 12, 3)))
    signals = Signals(*map(np.asfortranarray, found))  # as numpy lays out what the calibrator picks from its runs
    reference = Reference(signals, np.array([1.5, 1.0, 0.1]), np.zeros((3, 2)), np.ones(5), np.full(17, 2.0))
    return dataclasses.replace(made(settings), reference=reference)


def test_a_file_gives_back_what_was_saved(tmp_path):
    saved = fitting()
    path = saved.save(tmp_path / "tiny.safetensors")
    loaded = StabilityProfile.load(path)
    np.testing.assert_array_equal(loaded.mean, saved.mean)
    np.testing.assert_array_equal(loaded.std, saved.std)
    np.testing.assert_allclose(loaded.reference.signals, saved.reference.signals, rtol=1e-6)
    for name in ("angles", "patches", "probed", "asked"):
        np.testing.assert_array_equal(getattr(loaded.reference, name), getattr(saved.reference, name))
    assert (loaded.count, loaded.settings, loaded.left_out) == (50, SETTINGS, {"not finite": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_a_file_gives_back_what_was_calibrated(profile, tmp_path):
    """The arrays of a calibration do not lie in memory as they are read."""
    loaded = StabilityProfile.load(profile.save(tmp_path / "p.safetensors"))
    for ours, theirs in zip(profile.reference.signals, loaded.reference.signals, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    np.testing.assert_array_equal(loaded.reference.patches, profile.reference.patches)


def test_a_failed_save_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = made().save(tmp_path / "tiny.safetensors")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(made(), count=99).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_unreadable_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no stability profile at"):
        StabilityProfile.load(tmp_path / "missing.safetensors")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ProfileError, match="calibrate again"):
        StabilityProfile.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ProfileError, match="not a stability profile"):
        StabilityProfile.load(path)
    for version, message in (("99", "this version reads"), ("2", "calibrate again"), ("3", "calibrate again")):
        save_file({"mean": np.zeros((4, 3))}, path, metadata={"format": "memorization-guard.profile", "version": version})
        with pytest.raises(ProfileError, match=message):
            StabilityProfile.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": "[" * 100_000 + "]" * 100_000}, "nested too deep"),
        ({"left_out": "[" * 100_000 + "]" * 100_000}, "nested too deep"),
        ({"left_out": "[1]"}, "left_out"),
        ({"settings": "[]"}, "no mapping"),
        ({"settings": '{"guidance_scale": Infinity}'}, "guidance_scale is inf"),
        ({"settings": '{"guidance_scale": "7"}'}, "guidance_scale is '7'"),
        ({"settings": '{"end_sigma": NaN}'}, "end_sigma is nan"),
        ({"settings": '{"sigmas": [1e999, 1]}'}, "sigmas is"),
        ({"settings": '{"sigmas": [-1]}'}, "sigmas is"),
        ({"settings": '{"latent_shape": [Infinity]}'}, "latent_shape is"),
        ({"settings": '{"latent_shape": "416"}'}, "latent_shape is"),
        ({"settings": '{"steps": 2.0}'}, "steps is"),
        ({"settings": '{"model": [1]}'}, "model is"),
    ],
)
def test_a_profile_with_fields_of_another_kind_is_refused(tmp_path, change, message):
    path = made().save(tmp_path / "a.safetensors")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | change)
    with pytest.raises(ProfileError, match=message) as caught:
        StabilityProfile.load(path)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_no_profile(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as stream:
        stream.truncate(60 << 30)  # takes no space
    with pytest.raises(ProfileError, match="larger than 64 MB"):
        StabilityProfile.load(tmp_path / "a.safetensors")


def test_a_name_is_measured_in_bytes(tmp_path):
    assert name_problem("\U0001f600" * 50) is None
    assert "200 bytes" in name_problem("\U0001f600" * 51)
    made().save(tmp_path / ("\U0001f600" * 50 + ".safetensors"))


def fields(mismatches):
    return {m.field for m in mismatches}


def test_the_same_settings_fit():
    check = made().check(SETTINGS)
    assert check.valid
    assert not check.weakened
    assert str(check) == "The profile fits this run."


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_hash": "f" * 16}, "model_hash"),
        ({"prediction_type": "v_prediction"}, "prediction_type"),
        ({"sampler": "DDIM"}, "sampler"),
        ({"latent_shape": (4, 32, 32)}, "latent_shape"),
        ({"guidance_scale": 12.0}, "guidance_scale"),
        ({"sigmas": (14.0, 6.0, 2.0, 0.5)}, "sigmas"),
        ({"sigmas": None, "steps": 20}, "steps"),
    ],
)
def test_what_makes_a_profile_invalid_is_named(changes, field):
    check = made().check(dataclasses.replace(SETTINGS, **changes))
    assert not check.valid
    assert field in fields(check.invalid)
    assert "Calibrate a profile" in str(check)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale"),
        ({"scheduler": "trailing"}, "scheduler"),
        ({"model": "renamed", "model_hash": None}, "model"),
        ({"steps": 2, "sigmas": (2.0, 0.5)}, "steps"),
    ],
)
def test_what_weakens_a_profile_is_named(changes, field):
    check = made().check(dataclasses.replace(SETTINGS, **changes))
    assert check.valid
    assert fields(check.weakened) == {field}


def test_a_name_does_not_matter_when_the_weights_are_the_same():
    assert not made().check(dataclasses.replace(SETTINGS, model="renamed")).weakened


def test_what_nobody_knows_is_no_difference():
    assert made().check(RunSettings()).valid
    assert made(RunSettings()).check(SETTINGS).valid


def test_every_difference_is_named_at_once():
    check = made().check(
        RunSettings(model_hash="f" * 16, prediction_type="sample", sampler="x", steps=9, guidance_scale=1.0, latent_shape=(1,))
    )
    assert fields(check.invalid) == {"model_hash", "prediction_type", "sampler", "steps", "guidance_scale", "latent_shape"}


def test_skipping_every_other_step_is_not_part_of_the_schedule():
    check = made().check(dataclasses.replace(SETTINGS, steps=2, sigmas=(14.0, 2.0)))
    assert "sigmas" in fields(check.invalid)


def norms(*shape, value=1.0):
    return Norms(*np.full((3, *shape), value))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mean": norms(4, 2), "std": norms(4, 2)},
        {"mean": norms(4), "std": norms(3)},
        {"mean": norms(4, value=np.nan), "std": norms(4)},
        {"mean": norms(4), "std": norms(4, value=-1.0)},
        {"mean": norms(4), "std": norms(4), "settings": RunSettings(steps=5)},
    ],
)
def test_statistics_that_do_not_hold_together_are_refused(arguments):
    with pytest.raises(ValueError, match=r"mean and std|finite|number of steps"):
        StabilityProfile(count=50, **arguments)


def test_the_statistics_cannot_be_changed_behind_the_profiles_back():
    with pytest.raises(ValueError, match="read-only"):
        made().mean.latent[0] = 1.0


@pytest.mark.parametrize(
    ("sigmas", "end", "fits"),
    [
        ((3.0, 2.0, 1.0), 0.0, True),
        ((3.0, 2.0), 1.0, True),
        ((3.0, 2.0), 0.0, False),
        ((2.0, 1.0), 0.0, True),
        ((2.0, 1.0), 0.5, False),
        ((3.0, 2.0), None, True),
    ],
)
def test_a_last_step_that_goes_elsewhere_is_another_schedule(sigmas, end, fits):
    settings = RunSettings(sigmas=(3.0, 2.0, 1.0), end_sigma=0.0)
    profile = StabilityProfile(mean=norms(3), std=norms(3), count=8, settings=settings)
    assert profile.check(RunSettings(sigmas=sigmas, end_sigma=end)).valid == fits


def test_what_the_reference_runs_hold_for_is_transferred():
    known = fitting()
    for changes in (
        {"sampler": "DDIM"},
        {"guidance_scale": 20.0},
        {"sigmas": (14.0, 6.0, 2.0, 0.5)},
        {"sigmas": None, "steps": 20},
    ):
        check = known.check(dataclasses.replace(SETTINGS, **changes))
        assert check.valid, changes
        assert not check.exact
        assert "transferred" in str(check)


def test_bands_are_the_profiles_own_or_those_of_a_solver_that_adds_no_noise():
    known = fitting(dataclasses.replace(SETTINGS, end_sigma=0.0))
    levels = [NoiseLevel.from_sigma(sigma) for sigma in (*SETTINGS.sigmas, 0.0)]
    own = known.bands(SETTINGS.sigmas, levels, exact=True)
    for name in ("latent", "update", "denoised"):
        np.testing.assert_array_equal(own[name]["mean"], getattr(known.mean, name))
        np.testing.assert_array_equal(own[name]["std"], getattr(known.std, name))
    other = known.bands(SETTINGS.sigmas, levels, exact=False)
    region = known.reference
    velocity = region.band(levels[1].angle, "velocity")[0]
    assert other["update"]["mean"][1] == pytest.approx(velocity * 2 * np.sin((levels[1].angle - levels[2].angle) / 2))
    assert other["denoised"]["mean"][1] == pytest.approx(region.band(levels[1].angle, "denoised")[0])
    assert other["latent"]["mean"][1] == pytest.approx(known.mean.latent[1])
