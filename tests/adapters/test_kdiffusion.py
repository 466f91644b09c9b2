"""The seam, held against the samplers of the k-diffusion package themselves."""

import importlib.util
import inspect
import itertools
import logging
import os
import sys
import types

import numpy as np
import pytest
import torch

from memorization_guard import Calibrator, RunSettings, StabilityMonitor
from memorization_guard.adapters.kdiffusion import SamplerRun, guarded, sampler_name, watched
from memorization_guard.core.judge import HOLD_SIGMA
from memorization_guard.core.noise_level import NoiseLevel


def _samplers():
    """k-diffusion's ``sampling`` module without the rest of the package, which wants wandb, kornia and torchvision."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or importlib.util.find_spec("torchsde") is None:
        if os.environ.get("CI"):
            raise RuntimeError("the gate needs k-diffusion: the README's test command installs it")
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    package.utils = utils
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


K = _samplers()
if K is None:
    pytest.skip("k-diffusion is not there: pip install --no-deps k-diffusion==0.1.1.post1", allow_module_level=True)

SAMPLERS = sorted(
    name.removeprefix("sample_")
    for name, function in inspect.getmembers(K, inspect.isfunction)
    if name.startswith("sample_") and "sigmas" in inspect.signature(function).parameters
)
STEPS = 12
SIGMAS = K.get_sigmas_karras(STEPS, 0.05, 12.0)


class Prompts:
    """Predictions for images around a mean for each prompt; not linear, so that whatever reaches them shows in what comes
    out."""

    def __init__(self, seeds, memorized=1.0):
        self.calls = 0
        self.stop_at = None
        self.means = torch.stack(
            [self.mean(seed) * factor for seed, factor in zip(seeds, _factors(memorized, seeds), strict=True)]
        )

    @staticmethod
    def mean(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 8, 8, generator=generator) * (0.5 + 0.05 * torch.randn(1, generator=generator))

    def __call__(self, x, sigma, **_):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        shrink = 0.36 / (0.36 + sigma.view(-1, 1, 1, 1) ** 2)
        uncond = shrink * x + 0.02 * torch.tanh(x)
        return uncond + (1 - shrink) * self.means, uncond


def _factors(memorized, seeds):
    return memorized if isinstance(memorized, list) else [memorized] * len(seeds)


GUIDANCE = 3.0
LEVELS = [NoiseLevel.from_sigma(sigma) for sigma in SIGMAS.tolist()]
SETTINGS = RunSettings(
    prediction_type="epsilon", steps=STEPS, sigmas=SIGMAS[:-1].tolist(), end_sigma=0.0, guidance_scale=GUIDANCE, sampler="any"
)


def noise(batch=2, seed=1):
    generators = [torch.Generator().manual_seed(seed + b) for b in range(batch)]
    return torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]) * SIGMAS[0]


def sample(name, prompts, x, monitor=None, callback=None):
    """Runs one of k-diffusion's samplers, guarded where there is a monitor."""
    function = getattr(K, f"sample_{name}")
    if "sigma_min" in inspect.signature(function).parameters:
        options = {"n": STEPS} if name == "dpm_fast" else {}
        inner = function

        def function(model, x, sigmas, **kwargs):  # as ComfyUI calls them
            return inner(model, x, float(sigmas[-2]), float(sigmas[0]), **options, **kwargs)

    torch.manual_seed(7)
    arguments = {"extra_args": {}, "callback": callback, "disable": True}
    if monitor is not None:
        run = SamplerRun(monitor, LEVELS)
        return run.around(function, guarded(run, prompts, GUIDANCE), x.clone(), SIGMAS, **arguments)

    def model(x, sigma, **_):
        cond, uncond = prompts(x, sigma)
        return uncond + (cond - uncond) * GUIDANCE

    return function(model, x.clone(), SIGMAS, **arguments)


@pytest.fixture(scope="module")
def profile():
    """Made with one sampler, for all of them."""
    calibrator = Calibrator()
    for start in range(0, 40, 8):
        monitor = StabilityMonitor(settings=SETTINGS)
        sample("euler", Prompts(range(start, start + 8)), noise(8, 100 + start), monitor)
        for trace in monitor.traces:
            calibrator.add(trace)
    return calibrator.profile()


ALL = [*SAMPLERS, "dpm_fast", "dpm_adaptive"]


@pytest.mark.parametrize("name", ALL)
def test_tracing_changes_nothing_and_the_steps_are_those_of_the_callback(name, profile):
    seen = []

    def callback(d):
        seen.append({k: torch.as_tensor(v).clone() for k, v in d.items()})

    plain = sample(name, Prompts((500, 501)), noise(), callback=callback)
    after_plain = torch.get_rng_state()
    monitor = StabilityMonitor(profile, settings=SETTINGS)
    callbacks, prompts = [], Prompts((500, 501))
    traced = sample(name, prompts, noise(), monitor, callback=callbacks.append)

    assert torch.equal(plain, traced)
    assert torch.equal(after_plain, torch.get_rng_state()), "random numbers were drawn"
    assert len(callbacks) == len(seen)
    for row, trace in enumerate(monitor.traces):
        assert trace.verdict == "stable", trace.p_value
        assert len(trace.steps) == len(seen)
        assert len(trace.evaluations) == prompts.calls
        if name in ("dpm_fast", "dpm_adaptive"):  # they call back at the end of a step, with noise levels of their own
            continue
        z = [d["x"] / torch.sqrt(1 + d["sigma"] ** 2) for d in seen] + [plain]
        assert np.allclose(trace.steps.sigma, SIGMAS[:-1])
        norms = [float(torch.linalg.vector_norm(after[row])) for after in z[1:]]
        updates = [float(torch.linalg.vector_norm((after - before)[row])) for before, after in itertools.pairwise(z)]
        assert np.allclose(trace.steps.latent_norm, norms, rtol=1e-5)
        assert np.allclose(trace.steps.update_norm, updates, rtol=1e-4)
        denoised = [float(torch.linalg.vector_norm(d["denoised"][row])) for d in seen]
        assert np.allclose(trace.steps.denoised_norm, denoised, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_is_corrected_from_its_first_evaluation_on(name, profile):
    """What is left after mitigation: the memorized mean is gone from the image, and the ordinary image beside it is
    untouched."""
    seeds, memorized = (500, 501), [1.0, 2.0]
    monitor = StabilityMonitor(profile, mode="mitigate", settings=SETTINGS)
    mitigated = sample(name, Prompts(seeds, memorized), noise(), monitor)
    plain = sample(name, Prompts(seeds, memorized), noise())
    ordinary, copy = monitor.traces
    assert (ordinary.verdict, copy.verdict) == ("stable", "corrected")
    assert not ordinary.evaluations.corrected.any()
    assert copy.trigger_step == 0
    np.testing.assert_array_equal(copy.evaluations.corrected, copy.evaluations.sigma > HOLD_SIGMA)
    if name != "dpm_adaptive":  # its steps depend on the whole batch
        assert torch.equal(mitigated[0], plain[0])

    def likeness(x):
        return float(torch.cosine_similarity(x[1].flatten(), Prompts.mean(501).flatten(), dim=0))

    assert likeness(plain) > 0.9
    assert likeness(mitigated) < 0.2


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_that_has_triggered_is_stopped_and_hands_nothing_on(name, profile):
    monitor = StabilityMonitor(profile, mode="stop", settings=SETTINGS)
    whole, stopped = Prompts((500, 501), 2.0), Prompts((500, 501), 2.0)
    sample(name, whole, noise())
    result = sample(name, stopped, noise(), monitor)
    assert stopped.calls < whole.calls
    assert not result.any()
    assert [trace.verdict for trace in monitor.traces] == ["likely copy"] * 2
    assert "stopped" in monitor.traces[0].note
    assert "Nothing of the image is handed on" in monitor.traces[0].note


def test_of_another_number_of_images_nothing_is_handed_on(profile):
    """Which of them triggered is not known."""
    monitor = StabilityMonitor(profile, mode="stop", settings=SETTINGS)
    sample("euler", Prompts((500, 501), [2.0, 1.0]), noise(), monitor)
    assert not monitor.withheld(torch.ones(3, 4, 8, 8)).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_of_a_mixed_batch_only_what_triggered_is_withheld(name, profile):
    """The other image goes to its end, and keeps every bit."""
    monitor = StabilityMonitor(profile, mode="stop", settings=SETTINGS)
    plain = sample(name, Prompts((500, 501), [2.0, 1.0]), noise())
    result = sample(name, Prompts((500, 501), [2.0, 1.0]), noise(), monitor)
    assert not result[0].any()
    assert torch.equal(result[1], plain[1])
    copied, stable = monitor.traces
    assert copied.verdict == "likely copy"
    assert copied.note == "Nothing of the image is handed on: if a picture comes out, it is a plain one."
    assert (stable.verdict, stable.note) == ("stable", None)


@pytest.mark.parametrize("mode", ["trace", "mitigate"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m_sde"])
def test_an_interrupt_leaves_the_trace_closed(name, mode, profile):
    monitor, prompts = StabilityMonitor(profile, mode=mode, settings=SETTINGS), Prompts((500, 501))
    prompts.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        sample(name, prompts, noise(), monitor)
    trace = monitor.traces[0]
    assert 1 <= len(trace.steps) < 6
    assert trace.verdict == "unscored"
    assert trace.note == f"The run ended early: interrupted after {len(trace.steps)} of 12 steps"


def test_if_we_fail_the_image_comes_out_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(StabilityMonitor, "_check_batch", lambda *args: 1 / 0)
    monitor = StabilityMonitor(settings=SETTINGS)
    with caplog.at_level(logging.WARNING, logger="memorization_guard"):
        traced = sample("euler", Prompts((500, 501)), noise(), monitor)
    assert torch.equal(traced, sample("euler", Prompts((500, 501)), noise()))
    assert len(caplog.records) == 1
    assert isinstance(monitor.error, ZeroDivisionError)


def test_a_callback_that_makes_no_sense_ends_the_watching_only(caplog):
    def sampler(model, x, sigmas, callback=None):
        callback({"i": 0})
        return x

    monitor = StabilityMonitor(settings=SETTINGS)
    with caplog.at_level(logging.WARNING, logger="memorization_guard"):
        assert torch.equal(SamplerRun(monitor, LEVELS).around(sampler, None, noise(), SIGMAS), noise())
    assert monitor.error is not None


def test_nobody_watches_where_nobody_wants_to():
    def sampler(model, x, sigmas, *, extra_args=None, callback=None):
        callback({"x": x, "i": 0, "sigma": sigmas[0], "denoised": x})
        return x + 1

    seen, runs = [], []

    def new_run(x, sigmas, **arguments):
        assert set(arguments) == {"extra_args"}
        runs.append(SamplerRun(StabilityMonitor(settings=SETTINGS), LEVELS) if len(runs) else None)
        return runs[-1]

    for _ in range(2):
        result = watched(sampler, new_run)(None, noise(), SIGMAS, extra_args={}, callback=seen.append)
        assert torch.equal(result, noise() + 1)
    assert len(seen) == 2
    assert runs[1].monitor.steps == 1


def test_a_sampler_is_named_with_its_plain_options():
    assert sampler_name("sample_euler_ancestral", {"eta": 0.5, "noise_sampler": object()}) == "euler_ancestral(eta=0.5)"
    assert sampler_name("sample_euler", {}) == "euler"
