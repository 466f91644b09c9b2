"""The seam, held against the samplers of the k-diffusion package themselves."""

import dataclasses
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

from memorization_guard import RunSettings, StabilityMonitor, StabilityProfile, Thresholds
from memorization_guard.adapters.kdiffusion import SamplerWatch, watched
from memorization_guard.core.noise_level import NoiseLevel


def _samplers():
    """k-diffusion's ``sampling`` module without the rest of the package, which wants wandb, kornia and torchvision."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or importlib.util.find_spec("torchsde") is None:
        if os.environ.get("CI"):
            raise RuntimeError("CI has to have k-diffusion: .ci/run installs it")
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


class Denoiser:
    """Not linear, so that whatever reaches it shows in what comes out; has attributes as hosts' models do."""

    name = "denoiser"

    def __init__(self):
        self.calls = 0
        self.stop_at = None
        self.watch = None

    def __call__(self, x, sigma, **kwargs):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        sigma = sigma.view(-1, 1, 1, 1)
        uncond = x / (1 + sigma**2) + 0.1 * torch.tanh(x)
        cond = uncond + 0.3 * torch.cos(3 * x / (1 + sigma))
        if self.watch is not None:
            self.watch.saw_guidance(cond, uncond, x)
        return uncond + 2.0 * (cond - uncond)


def noise(batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * SIGMAS[0]


def sample(name, model, x, callback=None, monitor=None, **watch):
    """Runs a sampler, watched where there is a monitor."""
    function = getattr(K, f"sample_{name}")
    if "sigma_min" in inspect.signature(function).parameters:
        options = {"n": STEPS} if name == "dpm_fast" else {}
        inner = function

        def function(model, x, sigmas, **kwargs):  # as ComfyUI calls them
            return inner(model, x, float(sigmas[-2]), float(sigmas[0]), **options, **kwargs)

    if monitor is not None:

        def new_watch(x, sigmas, **_):
            model.watch = SamplerWatch(monitor, sigmas, NoiseLevel.from_sigma, **watch)
            return model.watch

        function = watched(function, new_watch)
    torch.manual_seed(7)
    return function(model, x.clone(), SIGMAS, extra_args={}, callback=callback, disable=True)


def settings(**changes):
    return dataclasses.replace(
        RunSettings(prediction_type="epsilon", steps=STEPS, sigmas=SIGMAS[:-1].tolist(), end_sigma=0.0), **changes
    )


def profile_outside(name):
    """A profile from which every step of this sampler's run lies far off in update and x0 norm."""
    monitor = StabilityMonitor(settings=settings())
    sample(name, Denoiser(), noise(), monitor=monitor)
    norms = np.stack([[t.latent_norm, t.update_norm, t.denoised_norm] for t in monitor.traces]).mean(0).T
    mean = norms * [1.0, 0.6, 0.8]
    return StabilityProfile(mean=mean, std=0.01 * mean, count=50, settings=settings())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trace_is_what_the_samplers_own_callback_tells_and_changes_nothing(name):
    seen = []
    plain = sample(
        name, Denoiser(), noise(), callback=lambda d: seen.append({k: torch.as_tensor(v).clone() for k, v in d.items()})
    )
    after_plain = torch.get_rng_state()
    monitor = StabilityMonitor(settings=settings())
    callbacks = []
    traced = sample(name, Denoiser(), noise(), callback=callbacks.append, monitor=monitor)

    assert torch.equal(plain, traced)
    assert torch.equal(after_plain, torch.get_rng_state()), "random numbers were drawn"
    assert len(callbacks) == STEPS

    z = [d["x"] / torch.sqrt(1 + d["sigma"] ** 2) for d in seen] + [plain]
    for row, trace in enumerate(monitor.traces):
        assert trace.steps == STEPS
        assert trace.note is None
        assert np.allclose(trace.sigma, SIGMAS[:-1])
        norm = lambda x: float(torch.linalg.vector_norm(x[row]))  # noqa: B023, E731
        assert np.allclose(trace.latent_norm, [norm(b) for b in z[1:]], rtol=1e-5)
        assert np.allclose(trace.update_norm, [norm(b - a) for a, b in itertools.pairwise(z)], rtol=1e-4)
        assert np.allclose(trace.denoised_norm, [norm(d["denoised"]) for d in seen], rtol=1e-5)
        eps = [(d["x"] - x0) / d["sigma"] for d in seen for x0 in [d["x"] / (1 + d["sigma"] ** 2) + 0.1 * torch.tanh(d["x"])]]
        guidance = [0.3 * torch.cos(3 * d["x"] / (1 + d["sigma"])) / d["sigma"] for d in seen]
        assert np.allclose(trace.guidance_norm, [norm(g) for g in guidance], rtol=1e-3)
        cosine = [
            float(torch.cosine_similarity(-g[row].flatten(), e[row].flatten(), dim=0))
            for g, e in zip(guidance, eps, strict=True)
        ]
        assert np.allclose(trace.alignment, cosine, atol=1e-3)


@pytest.mark.parametrize("guided", [True, False], ids=["steered", "published"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_correction_reaches_the_next_step(name, guided):
    thresholds = Thresholds(mild_steps=50, steering_guidance=-1.0 if guided else None)
    monitor = StabilityMonitor(profile_outside(name), thresholds, mitigate=True, settings=settings())
    starts = []
    result = sample(name, Denoiser(), noise(), callback=lambda d: starts.append(d["x"].clone()), monitor=monitor)
    z = [x / torch.sqrt(1 + s**2) for x, s in zip(starts, SIGMAS[:-1], strict=True)] + [result]

    for row, trace in enumerate(monitor.traces):
        assert trace.steps == STEPS
        assert trace.verdict == "strong"
        assert trace.mitigated.sum() >= STEPS // 2
        for step in np.flatnonzero(trace.mitigated):
            assert np.isclose(float(torch.linalg.vector_norm(z[step + 1][row])), trace.corrected_latent_norm[step], rtol=1e-4)
        # All but what a sampler of several evaluations did before it was known to be one.
        assert trace.mitigated[1]
    assert not torch.equal(result, sample(name, Denoiser(), noise()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_step_of_a_sampler_is_corrected_before_its_second_begins(name):
    monitor = StabilityMonitor(profile_outside(name), Thresholds(mild_steps=50), mitigate=True, settings=settings())
    sample(name, Denoiser(), noise(), monitor=monitor)
    # These evaluate at the next step's own noise level inside the first one, which cannot be told from a start before it is
    # over: what is changed there is the inner evaluation.
    assert monitor.traces[0].mitigated[0] == (name not in ("heun", "dpm_2_ancestral", "dpmpp_2s_ancestral"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_inside_its_region_is_left_bit_identical_beside_what_is_not(name):
    lone = noise()
    lone[1] *= 3.0
    monitor = StabilityMonitor(settings=settings())
    sample(name, Denoiser(), lone, monitor=monitor)
    trace = monitor.traces[0]
    mean = np.stack([trace.latent_norm, trace.update_norm, trace.denoised_norm], axis=1)
    profile = StabilityProfile(mean=mean, std=0.02 * mean, count=50, settings=settings())
    monitor = StabilityMonitor(profile, mitigate=True, settings=settings())
    result = sample(name, Denoiser(), lone, monitor=monitor)
    assert [t.verdict != "stable" for t in monitor.traces] == [False, True]
    assert monitor.traces[1].mitigated.any()
    plain = sample(name, Denoiser(), lone)
    assert torch.equal(result[0], plain[0])
    assert not torch.equal(result[1], plain[1])


def test_live_events_tell_a_step_that_was_only_tried_again():
    events = []
    monitor = StabilityMonitor(profile_outside("heun"), mitigate=True, on_step=events.append, settings=settings())
    sample("heun", Denoiser(), noise(), monitor=monitor)
    assert [e.step for e in events] == [0, *range(STEPS)]
    assert np.allclose([e.update_norm[0] for e in events[1:]], monitor.traces[0].update_norm)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("mitigate", [False, True])
def test_samplers_with_steps_of_their_own_are_traced_and_not_scored(name, mitigate):
    plain = sample(name, Denoiser(), noise())
    monitor = StabilityMonitor(profile_outside("euler"), mitigate=mitigate, settings=settings())
    seen = []
    traced = sample(name, Denoiser(), noise(), callback=lambda d: seen.append(d["denoised"].clone()), monitor=monitor)
    trace = monitor.traces[0]
    assert torch.equal(plain, traced)
    assert trace.verdict == "unscored"
    assert "no fixed schedule" in trace.note
    assert trace.steps == len(seen)
    assert not trace.mitigated.any()
    assert trace.score is None
    # DPM adaptive reports a step that it rejects and tries anew as one of no length.
    assert np.all(np.diff(trace.sigma) <= 0)
    if name == "dpm_fast":
        assert np.allclose(trace.denoised_norm, [float(torch.linalg.vector_norm(d[0])) for d in seen], rtol=1e-5)


@pytest.mark.parametrize("mitigate", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m_sde"])
def test_an_interrupt_leaves_the_trace_closed_and_the_model_as_it_was(name, mitigate):
    monitor = StabilityMonitor(profile_outside(name), mitigate=mitigate, settings=settings())
    model = Denoiser()
    model.stop_at = 6
    attributes = set(vars(model))
    with pytest.raises(KeyboardInterrupt):
        sample(name, model, noise(), monitor=monitor)
    assert set(vars(model)) == attributes
    trace = monitor.traces[0]
    assert 1 <= trace.steps < 6
    assert trace.note == f"The run ended early: interrupted after {trace.steps} of 12 steps"


def test_a_run_that_was_cut_short_is_not_called_stable():
    reference = StabilityMonitor(settings=settings())
    sample("euler", Denoiser(), noise(), monitor=reference)
    mean = np.stack(
        [reference.traces[0].latent_norm, reference.traces[0].update_norm, reference.traces[0].denoised_norm], axis=1
    )
    profile = StabilityProfile(mean=mean, std=0.2 * mean, count=50, settings=settings())
    monitor = StabilityMonitor(profile, settings=settings())
    sample("euler", Denoiser(), noise(), monitor=monitor)
    assert monitor.traces[0].verdict == "stable"
    monitor, model = StabilityMonitor(profile, settings=settings()), Denoiser()
    model.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        sample("euler", model, noise(), monitor=monitor)
    assert monitor.traces[0].verdict == "unscored"


def latentless(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that keeps nothing of its latent but the prediction, as LCM's does."""
    fresh = torch.randn(len(sigmas), *x.shape, generator=torch.Generator().manual_seed(3))
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)))
        callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = denoised + sigmas[i + 1] * fresh[i]
    return x


def hidden(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that shows its model a rescaled copy of what it keeps, as UniPC does."""
    x = x / sigmas[0]
    for i in range(len(sigmas) - 1):
        denoised = model(x * sigmas[i], sigmas[i].expand(len(x)))
        callback({"x": x, "i": i, "denoised": denoised})
        x = (
            denoised / sigmas[i] + (x - denoised / sigmas[i])
            if sigmas[i + 1] == 0
            else x + (1 / sigmas[i + 1] - 1 / sigmas[i]) * denoised
        )
    return denoised


@pytest.mark.parametrize(("sampler", "watch"), [(latentless, {"editable": False}), (hidden, {})])
@pytest.mark.parametrize("guided", [True, False])
def test_where_the_latent_cannot_be_changed_the_prediction_is(sampler, watch, guided, monkeypatch):
    monkeypatch.setattr(K, "sample_own", sampler, raising=False)
    monitor = StabilityMonitor(
        profile_outside("own"),
        Thresholds(mild_steps=50, steering_guidance=-1.0 if guided else None),
        mitigate=True,
        settings=settings(),
    )
    predictions, callbacks = [], []
    model = Denoiser()
    plain_call = Denoiser.__call__

    def call(self, x, sigma, **kwargs):
        predictions.append(plain_call(self, x, sigma, **kwargs))
        return predictions[-1]

    monkeypatch.setattr(Denoiser, "__call__", call)
    sample("own", model, noise(), callback=lambda d: callbacks.append(d["denoised"].clone()), monitor=monitor, **watch)
    trace = monitor.traces[0]
    assert trace.mitigated.any()
    assert not trace.mitigated[0], "nothing is known before the first step"
    changed = [not torch.equal(a[0], b[0]) for a, b in zip(predictions, callbacks, strict=True)]
    # The last step's result can always be changed.
    assert changed[:-1] == trace.mitigated[:-1].tolist()
    assert np.allclose(trace.denoised_norm, [float(torch.linalg.vector_norm(p[0])) for p in predictions], rtol=1e-5)


def test_if_we_fail_the_image_comes_out_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(StabilityMonitor, "step", lambda *args, **kwargs: 1 / 0)
    monitor = StabilityMonitor(settings=settings())
    with caplog.at_level(logging.WARNING, logger="memorization_guard"):
        traced = sample("euler", Denoiser(), noise(), monitor=monitor)
    assert torch.equal(traced, sample("euler", Denoiser(), noise()))
    assert len(caplog.records) == 1
    assert isinstance(monitor.error, ZeroDivisionError)


def test_the_model_can_be_reached_through_the_proxy():
    model = Denoiser()

    def sampler(model, x, sigmas, extra_args=None, callback=None):
        assert model.name == "denoiser"
        model.mark = 5
        return x

    watched(sampler, lambda x, sigmas, **_: SamplerWatch(StabilityMonitor(), sigmas, NoiseLevel.from_sigma))(
        model, noise(), SIGMAS
    )
    assert model.mark == 5


def test_nobody_watches_where_nobody_wants_to():
    assert torch.equal(
        watched(K.sample_euler, lambda *_, **__: None)(Denoiser(), noise(), SIGMAS, disable=True),
        sample("euler", Denoiser(), noise()),
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_that_has_triggered_is_stopped_with_the_clean_latent_so_far(name):
    monitor = StabilityMonitor(profile_outside(name), settings=settings(), stop=True)
    whole, model = Denoiser(), Denoiser()
    sample(name, whole, noise())
    result = sample(name, model, noise(), monitor=monitor)
    assert model.calls < whole.calls / 2
    assert torch.isfinite(result).all()
    assert [trace.verdict == "stable" for trace in monitor.traces] == [False, False]
    assert monitor.steps < STEPS
    assert "stopped" in monitor.traces[0].note
