"""Every scheduler is the same to the guard: traced bit for bit, judged, and corrected from the evaluation that triggers."""

import math

import diffusers
import numpy as np
import pytest
import torch

from memorization_guard import Thresholds
from memorization_guard.diffusers import guard

from .conftest import STEPS, Sampler, near, profile_around, recorded

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPSILON = {
    "PNDM": lambda **k: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD, **k),
    "DDIM": lambda **k: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD, **k),
    "DDPM": lambda **k: diffusers.DDPMScheduler(clip_sample=False, **SD, **k),
    "Euler": lambda **k: diffusers.EulerDiscreteScheduler(**SD, **k),
    "Euler karras": lambda **k: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SD, **k),
    "Euler ancestral": lambda **k: diffusers.EulerAncestralDiscreteScheduler(**SD, **k),
    "DPM++ 2M": lambda **k: diffusers.DPMSolverMultistepScheduler(**SD, **k),
    "DPM++ 2M SDE": lambda **k: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **SD, **k),
    "DPM++ SDE": lambda **k: diffusers.DPMSolverSDEScheduler(noise_sampler_seed=0, **SD, **k),
    "DPM single": lambda **k: diffusers.DPMSolverSinglestepScheduler(**SD, **k),
    "Heun": lambda **k: diffusers.HeunDiscreteScheduler(**SD, **k),
    "LMS": lambda **k: diffusers.LMSDiscreteScheduler(**SD, **k),
    "UniPC": lambda **k: diffusers.UniPCMultistepScheduler(**SD, **k),
    "DEIS": lambda **k: diffusers.DEISMultistepScheduler(**SD, **k),
    "KDPM2": lambda **k: diffusers.KDPM2DiscreteScheduler(**SD, **k),
    "KDPM2 ancestral": lambda **k: diffusers.KDPM2AncestralDiscreteScheduler(**SD, **k),
    "LCM": lambda **k: diffusers.LCMScheduler(**SD, **k),
    "TCD": lambda **k: diffusers.TCDScheduler(**SD, **k),
    "SASolver": lambda **k: diffusers.SASolverScheduler(**SD, **k),
    "EDM Euler": lambda **k: diffusers.EDMEulerScheduler(**k),
    "EDM DPM++": lambda **k: diffusers.EDMDPMSolverMultistepScheduler(**k),
}
FLOW = {
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Euler inverted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    "flow UniPC": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "flow DPM++": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
V = [name for name in EPSILON if name not in ("DPM++ SDE", "LMS")]
SCHEDULERS = EPSILON | FLOW | {f"{name} v": lambda name=name: EPSILON[name](prediction_type="v_prediction") for name in V}
#: Schedulers that make part of a step, or all of it, in two calls.
CALLS = {"PNDM": STEPS + 1, "Heun": 2 * STEPS - 1, "KDPM2": 2 * STEPS - 1, "KDPM2 ancestral": 2 * STEPS - 1}
CALLS |= {"DPM++ SDE": 2 * STEPS - 1, "flow Heun": 2 * STEPS - 1}


@pytest.fixture(params=list(SCHEDULERS))
def name(request):
    return request.param


@pytest.fixture
def sampler(name):
    torch.manual_seed(0)  # schedulers that take no generator draw from torch's own
    return Sampler(SCHEDULERS[name]())


def painted(sampler, **keywords):
    torch.manual_seed(1)
    return sampler(**keywords)


def test_a_traced_run_is_bit_identical_and_everything_is_restored(name, sampler):
    plain = painted(sampler, seed=3)
    before = set(vars(sampler.scheduler))
    with guard(sampler) as run:
        watched = painted(sampler, seed=3)
    assert torch.equal(plain, watched)
    assert run.error is None
    assert set(vars(sampler.scheduler)) == before
    assert not sampler.unet._forward_hooks
    for trace in run.traces:
        calls = CALLS.get(name.removesuffix(" v"), STEPS)
        assert (len(trace.steps), len(trace.evaluations)) == (STEPS, calls)
        assert "early" not in (trace.note or "")
        assert np.isfinite(trace.steps.update_norm).all()
        assert np.isfinite(trace.evaluations.guidance).all()
        assert trace.settings.steps == STEPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 3, 8, 8)])
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "UniPC", "DPM++ 2M", "TCD", "flow Euler"], indirect=True)
def test_half_precision_and_video_latents(sampler, dtype, shape):
    plain = painted(sampler, dtype=dtype, shape=shape)
    with guard(sampler) as run:
        watched = painted(sampler, dtype=dtype, shape=shape)
    assert watched.dtype == plain.dtype
    assert torch.equal(plain, watched)
    assert [trace.settings.latent_shape for trace in run.traces] == [shape, shape]


def evaluated_levels(sampler):
    """Noise levels from what the network and the scheduler are really given: those of pure noise and nothing else."""
    with guard(sampler) as run:
        painted(sampler)
    return run.traces[0].evaluations.sigma


def test_the_noise_levels_are_the_schedulers_own(name, sampler):
    sigmas = evaluated_levels(sampler)
    scheduler = sampler.scheduler
    if name.startswith("flow"):
        wanted = scheduler.sigmas[:-1].numpy()
        wanted = 1 - wanted if "inverted" in name else wanted
    elif hasattr(scheduler, "sigmas") and scheduler.order == 1:
        wanted = scheduler.sigmas[:-1].numpy()
    elif scheduler.order == 1:
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
        wanted = ((1 - abar) / abar).sqrt().numpy()
    else:
        wanted = np.exp(
            np.interp(scheduler.timesteps.numpy(), np.arange(1000), 0.5 * np.log(1 / scheduler.alphas_cumprod.numpy() - 1))
        )
    np.testing.assert_allclose(sigmas, wanted, rtol=2e-3)


#: Below what a made-up reference around one run gives its own first evaluations.
STRICT = Thresholds(false_positive_rate=0.001)


def test_a_run_is_corrected_from_its_first_evaluation_on(name, sampler):
    """Guidance 3 of what the guard puts in place is guidance -1 of what the network said, exactly, under every solver."""
    with guard(sampler) as run:
        painted(sampler)
    profile = profile_around(run.traces[0])
    sampler.unet.loud_from = 0
    with recorded(sampler) as plain:
        painted(sampler)
    with recorded(sampler) as record, guard(sampler, profile, "mitigate", STRICT) as run:
        painted(sampler)
    trace = run.traces[0]
    assert trace.verdict == "corrected"
    corrected = trace.evaluations.corrected
    assert corrected[0]
    assert trace.trigger_step == 0
    for number, ((output,), guided, _) in enumerate(record.steps):
        uncond, cond = (half[:1] for half in output.chunk(2))
        scale = -1.0 if corrected[number] else 3.0
        # Where next to no noise is left, rounding of x0 weighs more in the network's units, and nothing in the image.
        tolerance = 1e-4 if trace.evaluations.sigma[number] > 0.01 else 1e-2
        assert near(guided[:1], uncond + scale * (cond - uncond), tolerance), number
    assert torch.equal(record.steps[0][2][0], plain.steps[0][2][0])
    assert not torch.equal(record.steps[0][1][0], plain.steps[0][1][0])


# KDPM2 ancestral evaluates its last noise level twice, and of those the reference has the second only.
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "KDPM2 ancestral v"], indirect=True)
def test_a_sample_beside_a_corrected_one_is_bit_identical(sampler):
    with guard(sampler) as run:
        painted(sampler)
    profile = profile_around(run.traces[0])
    plain = painted(sampler)

    class Half(type(sampler.unet)):
        def forward(self, x, t):
            quiet = super().forward(x, t)[0].clone()
            quiet[3] = quiet[1] + 20 * (quiet[3] - quiet[1])
            return (quiet,)

    sampler.unet = Half()
    loud = painted(sampler)
    with guard(sampler, profile, "mitigate", Thresholds(false_positive_rate=1e-6)) as run:
        corrected = painted(sampler)
    assert [trace.verdict for trace in run.traces] == ["stable", "corrected"]
    assert torch.equal(corrected[0], plain[0])
    assert not torch.equal(corrected[1], loud[1])


@pytest.mark.parametrize("name", ["PNDM", "DDIM", "Euler", "Heun", "DPM++ 2M", "UniPC", "flow Euler"], indirect=True)
def test_a_run_over_a_part_of_the_schedule_knows_its_noise_levels(name):
    whole, part = Sampler(SCHEDULERS[name]()), Sampler(SCHEDULERS[name]())
    with guard(whole) as run:
        whole()
    with guard(part) as late:
        part(begin=3, take=3)
    wanted, found = run.traces[0], late.traces[0]
    assert "early" not in (found.note or "")
    assert found.settings.steps == len(found.steps)
    np.testing.assert_allclose(found.settings.sigmas, found.steps.sigma, rtol=1e-6)
    assert set(np.round(found.evaluations.sigma, 5)) <= set(np.round(wanted.evaluations.sigma, 5))
    assert found.settings.end_sigma == pytest.approx(
        float(wanted.evaluations.sigma[np.flatnonzero(wanted.evaluations.sigma < found.evaluations.sigma[-1] - 1e-6)[0]]),
        rel=1e-4,
    )


def published_profile(sampler, scale):
    with guard(sampler) as run:
        painted(sampler)
    return profile_around(run.traces[0], scale)


@pytest.mark.parametrize("name", ["PNDM", "DDIM"], indirect=True)
def test_the_published_method_edits_latents_between_steps(name, sampler):
    thresholds = Thresholds(method="published")
    with guard(sampler, published_profile(sampler, 1.0), "mitigate", thresholds) as run:
        stable = painted(sampler)
    assert run.traces[0].verdict == "stable"
    assert torch.equal(stable[0], painted(sampler)[0])
    profile = published_profile(sampler, 0.5)
    with recorded(sampler) as record, guard(sampler, profile, "mitigate", thresholds) as run:
        painted(sampler)
    trace = run.traces[0]
    assert (trace.verdict, trace.trigger_step, len(trace.steps)) == ("strong", 0, STEPS)
    assert trace.mitigated.sum() >= STEPS - 1
    # Each step starts from a latent that lies in its band.
    starts = [sample for _, _, sample in record.steps][-(STEPS - 1) :]
    for mean, std, sample in zip(profile.mean.latent, profile.std.latent, starts, strict=False):
        assert abs(float(sample[0].norm()) - mean) <= 3 * std + 1e-3


@pytest.mark.parametrize("name", ["Euler", "UniPC", "flow Euler", "DPM single", "EDM Euler", "flow UniPC"])
def test_the_published_method_is_refused_where_steps_cannot_be_had(name):
    with (
        pytest.raises(ValueError, match="the published method edits latents between solver steps"),
        guard(Sampler(SCHEDULERS[name]()), thresholds=Thresholds(method="published")),
    ):
        pass


def test_a_scheduler_whose_noise_levels_are_not_known_says_so():
    sampler = Sampler(diffusers.CMStochasticIterativeScheduler())
    plain = painted(sampler)
    with guard(sampler) as run:
        assert torch.equal(painted(sampler), plain)
    assert [trace.verdict for trace in run.traces] == ["unscored"] * 2
    assert "noise levels of CMStochasticIterativeScheduler cannot be read" in run.traces[0].note


def test_zero_terminal_snr():
    sampler = Sampler(
        EPSILON["DDIM"](prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    )
    plain = painted(sampler)
    with guard(sampler) as run:
        assert torch.equal(painted(sampler), plain)
    trace = run.traces[0]
    assert trace.evaluations.sigma[0] == pytest.approx(4096, rel=1e-3)
    assert np.isfinite(trace.evaluations.velocity).all()
    assert math.isfinite(trace.steps.update_norm.sum())
