"""The WebUI's timestep samplers without a host: doubles of them, written from their documented form of call."""

import itertools
import math

import numpy as np
import pytest
import torch

from memorization_guard import NoiseLevel, RunSettings, StabilityMonitor
from memorization_guard.adapters.kdiffusion import watched

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
STEPS = 12
#: As the host's: 1, 84, ... in ascending order; the first one is where the last step ends.
TIMESTEPS = torch.clip(torch.tensor(list(range(0, 1000, 1000 // STEPS))) + 1, 0, 999)
GUIDE = 7.5


@pytest.fixture(scope="module")
def timesteps(load_extension):
    """``extension/timesteps.py``; it needs no host."""
    return load_extension("timesteps")


@pytest.fixture(scope="module")
def level(timesteps):
    """The noise level of a timestep."""
    return timesteps.timestep_levels(ALPHAS_CUMPROD)


class Denoiser(torch.nn.Module):
    """Predicts noise as if every latent came from a broad Gaussian, differently with and without the prompt."""

    def __init__(self):
        super().__init__()
        self.predicted = None

    def forward(self, x, t):
        a = ALPHAS_CUMPROD[t.long()].view(-1, 1, 1, 1)
        uncond = (1 - a).sqrt() * x / (0.7 * a + (1 - a))
        cond = uncond + 0.05 * torch.tanh(3 * x)
        if self.predicted is not None:
            cond = self.predicted(x, t, cond, uncond)
        return uncond + GUIDE * (cond - uncond)


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


def planned(level):
    return [level(t) for t in TIMESTEPS.flip(0).tolist()]


def sample(name, timesteps=None, level=None, monitor=None, callback=None, x=None):
    """A run of a double, watched if there is a monitor."""
    denoiser, function, x = Denoiser(), SAMPLERS[name], noise() if x is None else x
    arguments = {"timesteps": TIMESTEPS, "extra_args": {}, "callback": callback or (lambda _: None)}
    if monitor is None:
        return function(denoiser, x, **arguments)
    run = timesteps.TimestepRun(monitor, planned(level), level, x)
    denoiser.predicted = run.predicted_noise
    with run.evaluations_of(denoiser):
        result = watched(function, lambda *_, **__: run)(denoiser, x, **arguments)
    assert not denoiser._forward_pre_hooks
    return result


def new_monitor(level):
    *sigmas, end = [each.sigma for each in planned(level)]
    settings = RunSettings(prediction_type="epsilon", steps=STEPS, sigmas=tuple(sigmas), end_sigma=end)
    return StabilityMonitor(settings=settings, level=level)


def test_the_levels_are_those_of_the_timesteps_and_in_between(level):
    for t in (0, 1, 500, 999):
        assert level(t).alpha == pytest.approx(math.sqrt(ALPHAS_CUMPROD[t]), rel=1e-5)
    assert math.log(level(500.5).alpha) == pytest.approx((math.log(level(500).alpha) + math.log(level(501).alpha)) / 2)
    assert (level(2000), level(-1)) == (level(999), level(0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_watched_run_is_bit_identical(timesteps, level, name):
    state, seen, plain = torch.get_rng_state(), [], sample(name)
    watched_run = sample(name, timesteps, level, new_monitor(level), lambda info: seen.append(info["i"]))
    assert torch.equal(plain, watched_run)
    assert seen == list(range(STEPS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trace_is_that_of_the_latents_between_steps(timesteps, level, name):
    monitor, latents = new_monitor(level), [noise()]
    sample(name, timesteps, level, monitor, lambda info: latents.append(info["x"].clone()))
    traces = monitor.traces
    assert [len(trace.steps) for trace in traces] == [STEPS, STEPS]
    assert all(trace.note is None for trace in traces)
    assert np.allclose(traces[0].steps.sigma, monitor.settings.sigmas)
    for i, (before, after) in enumerate(itertools.pairwise(latents)):
        for sample_index, trace in enumerate(traces):
            assert trace.steps.latent_norm[i] == pytest.approx(after[sample_index].norm().item(), rel=1e-5)
            assert trace.steps.update_norm[i] == pytest.approx((after - before)[sample_index].norm().item(), rel=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_belong_to_the_step_that_starts_where_they_are_made(timesteps, level, name):
    monitor = new_monitor(level)
    sample(name, timesteps, level, monitor)
    evaluations = monitor.traces[0].evaluations
    start = level(float(TIMESTEPS[-1]))
    assert np.allclose(evaluations.sigma[0], start.sigma)
    # PLMS has a second evaluation in its first step.
    assert evaluations.step.tolist() == ([0, *range(STEPS)] if name == "plms" else list(range(STEPS)))
    first = noise()
    eps = Denoiser()(first, TIMESTEPS[-1:].expand(2).float())
    denoised = ((first - start.beta * eps) / start.alpha)[0].norm().item()
    assert evaluations.denoised[0] == pytest.approx(denoised, rel=1e-3)
    assert evaluations.guidance[0] * start.alpha == pytest.approx((0.05 * torch.tanh(3 * first))[0].norm().item(), rel=1e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_that_is_corrected_changes_and_the_other_keeps_every_bit(timesteps, level, name, monkeypatch):
    monitor = new_monitor(level)
    without_first = lambda x, sigma, cond, uncond, ask, prompts: torch.cat([uncond[:1], cond[1:]])  # noqa: E731
    monkeypatch.setattr(monitor, "predicted", without_first)
    plain, corrected = sample(name), sample(name, timesteps, level, monitor)
    assert torch.equal(plain[1], corrected[1])
    assert not torch.allclose(plain[0], corrected[0])
    # As guidance at scale 0 would have had it, in every step of whatever solver.
    monkeypatch.setattr(f"{__name__}.GUIDE", 0.0)
    assert torch.allclose(sample(name)[0], corrected[0], atol=1e-3)


def test_what_is_asked_is_put_in_clean_latents(timesteps, level, monkeypatch):
    monitor, seen, asked = new_monitor(level), [], []

    def predicted(x, sigma, cond, uncond, ask, prompts):
        seen.append(ask)
        asked.append(prompts)
        return cond

    monkeypatch.setattr(monitor, "predicted", predicted)
    run, denoiser, x = timesteps.TimestepRun(monitor, planned(level), level, noise()), Denoiser(), noise()
    with run.evaluations_of(denoiser):
        denoiser(x, TIMESTEPS[-1:].expand(2))
    eps, evaluations = torch.tanh(x), Denoiser()

    def ask(unit, alone=False):
        evaluations(unit, torch.full((2,), 999))  # not one of the run's
        return unit, 999.0, eps, None if guided is False else 0.5 * eps

    a, b = at(999)
    for guided in (True, False):
        run.predicted_noise(x, TIMESTEPS[-1:].expand(2), eps, eps, ask=ask)
        latent, timestep, cond, uncond = seen[-1](-x)
        assert torch.equal(latent, -x)
        assert timestep == 999.0
        assert torch.allclose(cond, (-x - b * eps) / a, rtol=1e-4, atol=1e-4)
        assert torch.allclose(uncond, (-x - b * 0.5 * eps) / a, rtol=1e-4, atol=1e-4) if guided else uncond is None
    run.predicted_noise(x, TIMESTEPS[-1:].expand(2), eps, eps)
    assert (seen[-1], asked[-1]) == (None, None)

    class Prompts:
        texts = ("a fox", "a red fox")

        def ask(self, noise, sample, texts):
            return noise[None], 999.0, eps[:1]

        def go_on(self, texts):
            return 0.5 * eps

    run.predicted_noise(x, TIMESTEPS[-1:].expand(2), eps, eps, ask=ask, prompts=Prompts())
    latent, timestep, cond = asked[-1].ask(x[0], 0, ["a fox"])
    assert (asked[-1].texts, timestep) == (Prompts.texts, 999.0)
    assert torch.allclose(cond, (latent - b * eps[:1]) / a, rtol=1e-4, atol=1e-4)
    a, b = at(int(TIMESTEPS[-1]))
    assert torch.allclose(asked[-1].go_on({0: "a fox"}), (x - b * 0.5 * eps) / a, rtol=1e-4, atol=1e-4)


def test_an_interrupt_is_told(timesteps, level):
    class InterruptedException(BaseException):
        pass

    monitor = new_monitor(level)

    def callback(info):
        if info["i"] == 4:
            raise InterruptedException

    with pytest.raises(InterruptedException):
        sample("plms", timesteps, level, monitor, callback)
    (trace, _) = monitor.traces
    assert trace.verdict == "unscored"
    assert f"interrupted after {len(trace.steps)} of {STEPS} steps" in trace.note


def test_half_precision_latents_are_widened(timesteps, level):
    monitor = new_monitor(level)
    plain = sample("ddim", x=noise().half())
    assert torch.equal(sample("ddim", timesteps, level, monitor, x=noise().half()), plain)
    assert len(monitor.traces[0].steps) == STEPS
    assert NoiseLevel.from_alpha_bar(0.5).alpha == pytest.approx(math.sqrt(0.5))
