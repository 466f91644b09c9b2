"""Scales and prediction types against closed forms and against diffusers' own schedulers."""

import math

import pytest
import torch

from memorization_guard.core.noise_level import MAX_SIGMA, NoiseLevel, Timesteps, sample_norm

LEVELS = {
    "ve": NoiseLevel.from_sigma(2.5),
    "ve-low": NoiseLevel.from_sigma(0.03),
    "vp": NoiseLevel.from_alpha_bar(0.3),
    "flow": NoiseLevel.from_flow(0.7),
}


def denoised(level, x, output, prediction_type):
    a, b = level.denoised_coefficients(prediction_type)
    return a * x + b * output


@pytest.fixture
def clean_and_noise():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_predictions_give_back_what_the_latent_was_made_of(level, clean_and_noise):
    x0, eps = clean_and_noise
    x = level.signal * x0 + level.noise * eps
    predictions = {
        "epsilon": eps,
        "v_prediction": level.alpha * eps - level.beta * x0,
        "flow_prediction": eps - x0,
        "sample": x0,
    }
    for prediction_type, prediction in predictions.items():
        torch.testing.assert_close(denoised(level, x, prediction, prediction_type), x0)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_vp_scale_has_unit_coefficients(level):
    assert level.alpha**2 + level.beta**2 == pytest.approx(1)
    assert (level.alpha * level.scale, level.beta * level.scale) == pytest.approx((level.signal, level.noise))


def test_conventions_of_one_point_agree():
    sigma = 1.7
    ve, vp = NoiseLevel.from_sigma(sigma), NoiseLevel.from_alpha_bar(1 / (1 + sigma**2))
    flow = NoiseLevel.from_flow(sigma / (1 + sigma))
    for level in (vp, flow):
        assert (level.alpha, level.beta, level.sigma) == pytest.approx((ve.alpha, ve.beta, sigma))
    # Pure noise has a number too, since infinity is no JSON.
    assert NoiseLevel.from_flow(1.0).sigma == NoiseLevel.from_alpha_bar(0.0).sigma == MAX_SIGMA


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_denoised_equals_ddim_pred_original_sample(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(1)
    sample, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for t in scheduler.timesteps:
        level = NoiseLevel.from_alpha_bar(scheduler.alphas_cumprod[t])
        expected = scheduler.step(output, t, sample).pred_original_sample
        torch.testing.assert_close(denoised(level, sample, output, prediction_type), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoised_equals_euler_pred_original_sample(prediction_type):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(2)
    sample, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        scheduler.scale_model_input(sample, t)
        expected = scheduler.step(output, t, sample).pred_original_sample
        torch.testing.assert_close(
            denoised(NoiseLevel.from_sigma(sigma), sample, output, prediction_type), expected, rtol=1e-4, atol=1e-4
        )


def test_flow_denoised_equals_the_end_of_one_euler_step_to_zero():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(3)
    sample, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    end = scheduler.step(output, scheduler.timesteps[0], sample).prev_sample
    level = NoiseLevel.from_flow(float(scheduler.sigmas[0]))
    torch.testing.assert_close(denoised(level, sample, output, "flow_prediction"), end)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 16, 5, 8, 8)])
def test_norms_are_taken_in_float32(dtype, shape):
    x = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(4))).to(dtype)
    norm = sample_norm(x)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), x.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_a_half_precision_norm_beyond_the_half_precision_range_is_finite():
    x = torch.full((1, 4, 64, 64), 6e4, dtype=torch.float16)
    assert sample_norm(x).item() == pytest.approx(6e4 * 128, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseLevel(0.0, 0.0), "not both zero"),
        (lambda: NoiseLevel(math.nan, 1.0), "finite"),
        (lambda: NoiseLevel.from_alpha_bar(1.5), "share of variance"),
        (lambda: NoiseLevel.from_flow(-0.1), "flow time"),
    ],
)
def test_impossible_levels_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_prediction_type_and_missing_signal_are_refused():
    with pytest.raises(ValueError, match="known: epsilon"):
        NoiseLevel.from_sigma(1.0).denoised_coefficients("eps")
    with pytest.raises(ValueError, match="zero signal"):
        NoiseLevel.from_alpha_bar(0.0).denoised_coefficients("epsilon")


def test_timesteps_have_the_levels_of_their_table_and_are_linear_in_log_sigma_between():
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    timesteps = Timesteps(alphas_cumprod)
    for t in (0, 1, 500, 999):
        level = timesteps.level(t)
        assert level.signal**2 == pytest.approx(float(alphas_cumprod[t]), rel=1e-9)
        assert level.scale == pytest.approx(1.0)
    between = timesteps.level(500.25).sigma
    assert math.log(between) == pytest.approx(
        0.75 * math.log(timesteps.level(500).sigma) + 0.25 * math.log(timesteps.level(501).sigma)
    )
    assert timesteps.level(-1).sigma == timesteps.level(0).sigma
    assert timesteps.level(2000).sigma == timesteps.level(999).sigma


def test_a_table_that_ends_in_pure_noise_has_a_last_level():
    assert Timesteps(torch.tensor([0.9, 0.5, 0.0])).level(2).sigma == pytest.approx(MAX_SIGMA, rel=1e-3)
