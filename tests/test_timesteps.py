"""Watching samplers in CompVis' form: doubles of the WebUI's, written from their documented form of call."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from memorization_guard import NoiseLevel, RunSettings, StabilityMonitor, StabilityProfile, Thresholds
from memorization_guard.adapters.kdiffusion import watched
from memorization_guard.adapters.timesteps import TimestepScale, TimestepWatch

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
STEPS = 12
SCALE = TimestepScale(ALPHAS_CUMPROD)
#: As the host's: 1, 84, ... in ascending order; the first one is where the last step ends.
TIMESTEPS = torch.clip(torch.tensor(list(range(0, 1000, 1000 // STEPS))) + 1, 0, 999)
SCHEDULE = TIMESTEPS.flip(0).float()


class Denoiser:
    """Predicts noise as if every latent came from a broad Gaussian, differently with and without the prompt."""

    def __init__(self, guide=7.5):
        self.guide = guide
        self.watch = None
        self.calls = []

    def __call__(self, x, t, guidance=True):
        self.calls.append(float(t[0]))
        signal, noise = SCALE.coefficients(t, x.ndim)
        uncond = noise * x / (0.7 * signal**2 + noise**2)
        cond = uncond + 0.05 * torch.tanh(3 * x)
        if guidance and self.watch is not None:
            self.watch.saw_noise(cond, uncond)
        return uncond + self.guide * (cond - uncond)


def at(timestep):
    return math.sqrt(ALPHAS_CUMPROD[timestep]), math.sqrt(1 - ALPHAS_CUMPROD[timestep])


def ddim(model, x, timesteps, extra_args=None, callback=None, disable=None, eta=0.0):
    """One call a step, before it; called back after the update."""
    for i in range(len(timesteps) - 1):
        index = len(timesteps) - 1 - i
        eps = model(x, timesteps[index].item() * x.new_ones(len(x)), **extra_args)
        (a, b), (a_next, b_next) = at(timesteps[index]), at(timesteps[index - 1])
        denoised = (x - b * eps) / a
        x = a_next * denoised + b_next * eps
        if callback is not None:
            callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": denoised})
    return x


def plms(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """Two calls in the first step, the second at the next one's timestep and of a latent that is thrown away."""
    old = []
    for i in range(len(timesteps) - 1):
        index = len(timesteps) - 1 - i
        (a, b), (a_next, b_next) = at(timesteps[index]), at(timesteps[index - 1])

        def update(eps, x=x, a=a, b=b, a_next=a_next, b_next=b_next):
            return a_next * (x - b * eps) / a + b_next * eps

        eps = model(x, timesteps[index].item() * x.new_ones(len(x)), **extra_args)
        if not old:
            following = model(update(eps), timesteps[index - 1].item() * x.new_ones(len(x)), **extra_args)
            mixed = (eps + following) / 2
        else:
            mixed = (3 * eps - old[-1]) / 2
        old.append(eps)
        x = update(mixed)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": (x - b * mixed) / a})
    return x


def unipc(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """A call before the first step; then one a step, but for the last, at its predicted end: the next one goes on with it."""
    last = len(timesteps) - 1
    eps = model(x, timesteps[last].item() * x.new_ones(len(x)), **extra_args)
    for i in range(last):
        index = last - i
        (a, b), (a_next, b_next) = at(timesteps[index]), at(timesteps[index - 1])
        predicted = a_next * (x - b * eps) / a + b_next * eps
        if i == last - 1:
            x, eps = predicted, None
        else:
            following = model(predicted, timesteps[index - 1].item() * x.new_ones(len(x)), **extra_args)
            mean = (eps + following) / 2
            x, eps = a_next * (x - b * mean) / a + b_next * mean, following
        callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": eps})
    return x


SAMPLERS = {"ddim": ddim, "plms": plms, "unipc": unipc}


def noise(batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def settings(**changes):
    levels = [SCALE.level(t).sigma for t in SCHEDULE.tolist()]
    known = {"prediction_type": "epsilon", "steps": STEPS, "sigmas": levels[:-1], "end_sigma": levels[-1]}
    return RunSettings(**{**known, "sigmas": tuple(levels[:-1]), **changes})


def sample(name, model=None, monitor=None, callback=None, x=None):
    model, function = model or Denoiser(), SAMPLERS[name]
    if monitor is not None:

        def new_watch(x, timesteps, **_):
            model.watch = TimestepWatch(
                monitor, timesteps.flip(0).float(), SCALE, editable=name != "unipc", every_call=name == "unipc"
            )
            return model.watch

        function = watched(function, new_watch)
    return function(
        model, noise() if x is None else x, timesteps=TIMESTEPS, extra_args={}, callback=callback or (lambda _: None)
    )


def new_monitor(**arguments):
    return StabilityMonitor(**{"settings": settings(), **arguments})


def profile_of(name, **changes):
    monitor = new_monitor()
    sample(name, monitor=monitor)
    norms = np.stack([[t.latent_norm, t.update_norm, t.denoised_norm] for t in monitor.traces]).mean(0).T
    profile = StabilityProfile(mean=norms, std=np.maximum(0.02 * norms, 1e-3), count=50, settings=settings())
    return dataclasses.replace(profile, **changes)


def test_the_levels_are_those_of_the_timesteps_and_in_between():
    for t in (0, 1, 500, 999):
        assert SCALE.level(t).alpha == pytest.approx(math.sqrt(ALPHAS_CUMPROD[t]), rel=1e-5)
    between = SCALE.level(500.5)
    assert math.log(between.alpha) == pytest.approx((math.log(SCALE.level(500).alpha) + math.log(SCALE.level(501).alpha)) / 2)
    signal, noise = SCALE.coefficients(torch.tensor([3.25, 700.0, 2000.0, -1.0]), 4)
    assert signal.shape == noise.shape == (4, 1, 1, 1)
    for i, t in enumerate((3.25, 700.0, 999.0, 0.0)):
        assert signal[i].item() == pytest.approx(SCALE.level(t).alpha, rel=1e-5)
        assert noise[i].item() == pytest.approx(SCALE.level(t).beta, rel=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_watched_run_is_bit_identical(name):
    state = torch.get_rng_state()
    seen, plain = [], sample(name)
    watched_run = sample(name, monitor=new_monitor(), callback=lambda info: seen.append(info["i"]))
    assert torch.equal(plain, watched_run)
    assert seen == list(range(STEPS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trace_is_that_of_the_latents_between_steps(name):
    monitor, latents = new_monitor(), [noise()]
    result = sample(name, monitor=monitor, callback=lambda info: latents.append(info["x"].clone()))
    traces = monitor.traces
    assert [trace.steps for trace in traces] == [STEPS, STEPS]
    assert all(trace.note is None for trace in traces)
    assert np.allclose(traces[0].sigma, settings().sigmas)
    assert traces[0].latent_norm[-1] == pytest.approx(result[0].norm().item(), rel=1e-5)
    if name == "unipc":  # it shows the model what it predicts, and corrects that afterwards
        assert np.allclose(traces[0].latent_norm[:-1], [z[0].norm().item() for z in latents[1:-1]], rtol=0.1)
        return
    for i, (before, after) in enumerate(itertools.pairwise(latents)):
        for sample_index, trace in enumerate(traces):
            assert trace.latent_norm[i] == pytest.approx(after[sample_index].norm().item(), rel=1e-5)
            assert trace.update_norm[i] == pytest.approx((after - before)[sample_index].norm().item(), rel=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trace_has_the_clean_latent_and_the_guidance_of_each_step(name):
    monitor, model = new_monitor(), Denoiser()
    sample(name, model, monitor)
    trace = monitor.traces[0]
    x = noise()
    t = SCHEDULE[:1].expand(2)
    eps = Denoiser()(x, t)
    level = SCALE.level(float(SCHEDULE[0]))
    assert trace.denoised_norm[0] == pytest.approx(level.denoised(x, eps, "epsilon")[0].norm().item(), rel=1e-4)
    difference = 0.05 * torch.tanh(3 * x)
    assert trace.guidance_norm[0] == pytest.approx(difference[0].norm().item(), rel=1e-3)
    assert np.isfinite(trace.alignment).all()


def with_one_far_off(name, **thresholds):
    """Results without and with mitigation of two samples, the first of them far off, and the traces of both."""
    monitor = new_monitor(profile=profile_of(name), mitigate=True, thresholds=Thresholds(**thresholds))
    x = torch.cat([noise()[:1] * 1.6, noise()[1:]])
    plain, corrected = sample(name, x=x.clone()), sample(name, Denoiser(), monitor, x=x.clone())
    return plain, corrected, *monitor.traces


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_correction_reaches_the_result(name):
    plain, corrected, far, ordinary = with_one_far_off(name, tau_mild=0.5, gamma=0.5)
    assert far.mitigated.any()
    assert not torch.equal(plain[0], corrected[0])
    assert far.note is None
    if not ordinary.mitigated.any():
        assert torch.equal(plain[1], corrected[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_that_are_not_corrected_are_bit_identical(name):
    plain, corrected, far, ordinary = with_one_far_off(name, tau_mild=8.0, tau_strong=14.0)
    assert far.mitigated.any()
    assert not ordinary.mitigated.any()
    assert torch.equal(plain[1], corrected[1])


def test_other_timesteps_than_the_schedules_are_traced_and_not_scored():
    profile, model = profile_of("ddim"), Denoiser()
    monitor = new_monitor(profile=profile, mitigate=True)
    other = TIMESTEPS - 40

    def new_watch(x, timesteps, **_):
        model.watch = TimestepWatch(monitor, SCHEDULE, SCALE, editable=True, every_call=False)
        return model.watch

    watched(ddim, new_watch)(model, noise(), timesteps=other.clip(0), extra_args={}, callback=None)
    assert monitor.off_schedule
    assert monitor.traces[0].verdict == "unscored"


def test_a_failing_monitor_lets_sampling_go_on(monkeypatch, caplog):
    monitor = new_monitor()
    monkeypatch.setattr(monitor, "_step", lambda *_: 1 / 0)
    assert torch.equal(sample("ddim", monitor=monitor), sample("ddim"))
    assert "division by zero" in caplog.text


def test_an_interrupt_is_told():
    class InterruptedException(BaseException):
        pass

    monitor = new_monitor()

    def callback(info):
        if info["i"] == 4:
            raise InterruptedException

    with pytest.raises(InterruptedException):
        sample("plms", monitor=monitor, callback=callback)
    (trace, _) = monitor.traces
    assert trace.verdict == "unscored"
    assert f"interrupted after {trace.steps} of {STEPS} steps" in trace.note


def test_half_precision_latents_are_widened():
    monitor = new_monitor()
    plain = sample("ddim", x=noise().half())
    assert torch.equal(sample("ddim", monitor=monitor, x=noise().half()), plain)
    assert monitor.traces[0].steps == STEPS
    assert NoiseLevel.from_alpha_bar(0.5).alpha == pytest.approx(math.sqrt(0.5))
