"""The diffusers adapter: it sees what the scheduler did, changes nothing unless asked, and leaves nothing behind."""

import copy
import dataclasses
import inspect
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from memorization_guard import CalibrationError, StabilityMonitor, StabilityProfile, Thresholds  # noqa: E402
from memorization_guard.diffusers import calibrate, copy_sharing_weights, guard  # noqa: E402
from memorization_guard.fingerprint import fingerprint  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "PNDM": lambda **k: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD, **k),
    "DDIM": lambda **k: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD, **k),
    "DDPM": lambda **k: diffusers.DDPMScheduler(clip_sample=False, **SD, **k),
    "Euler": lambda **k: diffusers.EulerDiscreteScheduler(**SD, **k),
    "Euler karras": lambda **k: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SD, **k),
    "Euler ancestral": lambda **k: diffusers.EulerAncestralDiscreteScheduler(**SD, **k),
    "DPM++ 2M": lambda **k: diffusers.DPMSolverMultistepScheduler(**SD, **k),
    "DPM++ 2M SDE": lambda **k: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **SD, **k),
    "Heun": lambda **k: diffusers.HeunDiscreteScheduler(**SD, **k),
    "LMS": lambda **k: diffusers.LMSDiscreteScheduler(**SD, **k),
    "UniPC": lambda **k: diffusers.UniPCMultistepScheduler(**SD, **k),
    "flow Euler": lambda **k: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
STEPS = 7


class Network(torch.nn.Module):
    """A fixed function that stands in for a UNet, evaluated on conditional and unconditional halves."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.inputs = []

    def forward(self, x, t):
        self.inputs.append(x)
        uncond, cond = x.chunk(2)
        return (torch.cat([0.4 * uncond.sin() + 0.1 * uncond, 0.5 * cond.cos() * cond + 0.2]),)


class Sampler:
    """The loop of a pipeline, with guidance 3, around any scheduler."""

    do_classifier_free_guidance = True
    guidance_scale = 3.0

    def __init__(self, scheduler):
        self.scheduler, self.unet = scheduler, Network()

    def __call__(self, batch=2, shape=(4, 8, 8), seed=0, steps=STEPS, begin=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[begin * getattr(scheduler, "order", 1) :]
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        x = torch.randn(batch, *shape, generator=generator).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with torch.no_grad():
            for t in timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                uncond, cond = self.unet(torch.cat([scaled] * 2), t)[0].chunk(2)
                prediction = uncond + 3.0 * (cond - uncond)
                x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        return x


@pytest.fixture(params=list(SCHEDULERS))
def name(request):
    return request.param


@pytest.fixture
def seen(monkeypatch):
    """What every monitor is given, in order."""
    steps = []
    original = StabilityMonitor.step

    def record(self, z_prev, z_next, x0, **keywords):
        steps.append({"z_prev": z_prev.clone(), "z_next": z_next.clone(), "x0": x0.clone(), **keywords})
        return original(self, z_prev, z_next, x0, **keywords)

    monkeypatch.setattr(StabilityMonitor, "step", record)
    return steps


def expected_steps(name, sampler):
    """True solver steps, recomputed from the definition of each scheduler while an unwatched copy of it runs."""
    scheduler = sampler.scheduler
    calls = []
    original = scheduler.step

    def step(prediction, t, sample, **keywords):
        out = original(prediction, t, sample, **keywords)
        calls.append((prediction, t, sample, out[0], getattr(scheduler, "last_sample", None)))
        return out

    step.__signature__ = inspect.signature(original)
    scheduler.step = step
    sampler()
    if name == "flow Euler":
        sigmas = scheduler.sigmas.tolist()
        return [
            {
                "z_prev": x / math.hypot(1 - s, s),
                "z_next": after / math.hypot(1 - n, n),
                "x0": x - s * v,
                "sigma": s,
                "x0_coefficient": (1 - n) / math.hypot(1 - n, n),
            }
            for (v, _, x, after, _), s, n in zip(calls, sigmas, sigmas[1:], strict=False)
        ]
    if name in ("PNDM", "DDIM", "DDPM"):
        abar, stride = scheduler.alphas_cumprod, 1000 // STEPS
        if name == "PNDM":  # the second call takes the first step again, from the first call's sample
            first, second, *rest = calls
            calls = [(first[0], first[1], first[2], second[3], None), *rest]
        steps = []
        for e, t, x, after, _ in calls:
            a = abar[int(t)].item()
            previous = int(t) - stride
            n = abar[previous].item() if previous >= 0 else (abar[0].item() if name != "DDPM" else 1.0)
            x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
            steps.append(
                {"z_prev": x, "z_next": after, "x0": x0, "sigma": math.sqrt(1 / a - 1), "x0_coefficient": math.sqrt(n)}
            )
        return steps
    sigmas = scheduler.sigmas.tolist()
    if name == "Heun":
        sigmas = sigmas[:1] + sigmas[1:-1:2] + sigmas[-1:]
        calls = [(*calls[2 * i][:3], calls[min(2 * i + 1, len(calls) - 1)][3], None) for i in range(STEPS)]
    vp = name in ("DPM++ 2M", "DPM++ 2M SDE", "UniPC")
    steps = []
    for (e, _, x, after, last), s, n in zip(calls, sigmas, sigmas[1:], strict=False):
        x0 = x * math.sqrt(1 + s * s) - s * e if vp else x - s * e
        start = last if name == "UniPC" else x
        steps.append(
            {
                "z_prev": start if vp else start / math.sqrt(1 + s * s),
                "z_next": after if vp else after / math.sqrt(1 + n * n),
                "x0": x0,
                "sigma": s,
                "x0_coefficient": 1 / math.sqrt(1 + n * n),
            }
        )
    return steps


def test_the_traced_steps_are_those_the_scheduler_took(name, seen):
    sampler = Sampler(SCHEDULERS[name]())
    with guard(sampler):
        sampler()
    expected = expected_steps(name, Sampler(SCHEDULERS[name]()))
    assert len(seen) == len(expected) == STEPS
    for step, wanted in zip(seen, expected, strict=True):
        for key in ("z_prev", "z_next", "x0"):
            torch.testing.assert_close(step[key], wanted[key], rtol=2e-4, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
        assert step["sigma"] == pytest.approx(wanted["sigma"], rel=1e-4)
        assert step["x0_coefficient"] == pytest.approx(wanted["x0_coefficient"], rel=1e-4)


def test_a_watched_run_is_bit_identical_and_everything_is_restored(name):
    sampler = Sampler(SCHEDULERS[name]())
    plain = sampler(seed=3)
    before = set(vars(sampler.scheduler))
    with guard(sampler) as run:
        watched = sampler(seed=3)
    assert torch.equal(plain, watched)
    assert len(run.traces) == 2
    assert set(vars(sampler.scheduler)) == before
    assert not sampler.unet._forward_hooks
    assert torch.equal(sampler(seed=3), plain)


@pytest.fixture
def double_the_third(monkeypatch):
    """Doubles the latent after the third step; gives the ``(z_prev, z_next)`` of all steps."""
    taken = []

    def correct(self, z_prev, z_next, x0, **keywords):
        taken.append((z_prev, z_next))
        return z_next * 2 if len(taken) == 3 else z_next

    monkeypatch.setattr(StabilityMonitor, "step", correct)
    return taken


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "UniPC"], indirect=True)
def test_the_next_step_starts_from_the_corrected_latent(name, double_the_third):
    sampler = Sampler(SCHEDULERS[name]())
    with guard(sampler):
        sampler()
    torch.testing.assert_close(double_the_third[3][0], 2 * double_the_third[2][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [
        {"solver_order": 2},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        {"prediction_type": "epsilon", "predict_x0": False},
    ],
)
def test_unipcs_corrector_does_not_take_a_correction_back(solver, double_the_third):
    """With a network that always predicts the same x0, the corrector leaves of a change in its input nothing: exactly what
    was folded into ``last_sample`` remains, and it must be the whole correction."""

    class Constant(Network):
        def forward(self, x, t):
            if solver.get("prediction_type") != "flow_prediction":
                return (torch.full_like(x, 0.5),)
            # v = (x - x0) / t of x0 = 0.5, at the time the sampler is at.
            return ((x - 0.5) / self.scheduler.sigmas[self.scheduler.step_index or 0],)

    def steps(watch):
        sampler = Sampler(SCHEDULERS["UniPC"](**({"prediction_type": "sample"} | solver)))
        sampler.unet = Constant()
        sampler.unet.__dict__["scheduler"] = sampler.scheduler
        with guard(sampler):
            sampler()
        taken = list(watch)
        watch.clear()
        return taken

    corrected = steps(double_the_third)
    double_the_third.extend([None] * 100)  # beyond the third: no correction
    plain = steps(double_the_third)[100:]
    torch.testing.assert_close(corrected[3][0] - plain[3][0], corrected[2][1], rtol=1e-3, atol=1e-3)


def test_a_sample_beside_a_corrected_one_is_bit_identical(name, monkeypatch):
    """Also where the scheduler's scale is not the monitor's, and going there and back would round."""

    def correct(self, z_prev, z_next, x0, **keywords):
        z = z_next.clone()
        z[1] *= 1.5
        return z

    if name in ("Euler ancestral", "DPM++ 2M SDE", "DDPM"):
        monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.ones(*size[0] if len(size) == 1 else size))
    sampler = Sampler(SCHEDULERS[name]())
    plain = sampler(seed=4)
    monkeypatch.setattr(StabilityMonitor, "step", correct)
    with guard(sampler):
        corrected = sampler(seed=4)
    assert torch.equal(plain[0], corrected[0])
    assert not torch.equal(plain[1], corrected[1])


@pytest.mark.parametrize("begin", [1, 2, 3, 5])
def test_pndm_image_to_image_is_watched_as_it_steps(begin, seen):
    """PNDM lists its second timestep twice, and makes its first step in two calls wherever it begins."""
    sampler = Sampler(SCHEDULERS["PNDM"]())
    taken = []
    original = sampler.scheduler._get_prev_sample

    def record(sample, timestep, prev_timestep, model_output):
        after = original(sample, timestep, prev_timestep, model_output)
        taken.append((sample, int(timestep), after))
        return after

    sampler.scheduler._get_prev_sample = record
    with guard(sampler) as run:
        sampler(begin=begin)
    assert len(seen) == len(taken) - 1
    abar = sampler.scheduler.alphas_cumprod
    for step, (sample, t, after) in zip(seen, taken[1:], strict=True):
        assert torch.equal(step["z_prev"], sample)
        assert torch.equal(step["z_next"], after)
        # The first step is told by its first call, whose timestep is not always the second's.
        if step is not seen[0] or begin > 1:
            assert step["sigma"] == pytest.approx(math.sqrt(1 / abar[t].item() - 1), rel=1e-4)
    assert run.traces[0].settings.steps == run.traces[0].steps == len(seen)


def test_a_clipped_prediction_is_traced_as_the_scheduler_used_it(seen):
    sampler = Sampler(diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.7, **SD))
    with guard(sampler):
        sampler()
    assert max(step["x0"].abs().max() for step in seen) == pytest.approx(0.7)
    # The very x0 from which the scheduler made the last latent: nothing else is left at the end of its schedule.
    torch.testing.assert_close(seen[-1]["z_next"], seen[-1]["x0"], rtol=1e-3, atol=1e-3)


def test_a_run_that_ends_early_by_plan_has_the_steps_it_takes():
    sampler = Sampler(SCHEDULERS["Euler"]())
    sampler.num_timesteps = 4
    with guard(sampler) as run:
        sampler()
    assert len(run.traces[0].settings.sigmas) == run.traces[0].settings.steps == 4


def test_predictions_of_two_calls_are_told_apart():
    from memorization_guard.adapters.diffusers import _predictions

    both, cond, uncond = torch.arange(4.0).view(4, 1), torch.ones(2, 1), torch.zeros(2, 1)
    assert [x.tolist() for x in _predictions([both, cond], 2)] == [[[0.0], [1.0]], [[2.0], [3.0]]]
    assert _predictions([cond, uncond], 2) == (uncond, cond)
    assert _predictions([cond], 2) == (None, None)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "flow Euler"], indirect=True)
def test_guidance_predictions_are_those_of_the_step_start(name, seen):
    sampler = Sampler(SCHEDULERS[name]())
    with guard(sampler):
        sampler()
    inputs = list(sampler.unet.inputs)
    if name == "PNDM":
        inputs = inputs[:1] + inputs[2:]
    elif name == "Heun":
        inputs = inputs[::2]
    for step, x in zip(seen, inputs, strict=True):
        uncond, cond = sampler.unet(x, None)[0].chunk(2)
        torch.testing.assert_close(step["eps_uncond"], uncond)
        torch.testing.assert_close(step["eps_cond"], cond)


@pytest.mark.parametrize("name", ["PNDM", "DDIM", "Euler", "Heun", "DPM++ 2M", "UniPC", "flow Euler"], indirect=True)
def test_a_run_over_the_end_of_the_schedule_knows_its_noise_levels(name):
    whole, part = Sampler(SCHEDULERS[name]()), Sampler(SCHEDULERS[name]())
    with guard(whole) as run:
        whole()
    with guard(part) as late:
        part(begin=3)
    sigmas = run.traces[0].sigma
    found = late.traces[0]
    assert found.settings.steps == found.steps
    np.testing.assert_allclose(found.settings.sigmas, found.sigma, rtol=1e-6)
    assert np.isclose(found.sigma[-1], sigmas[-1])
    assert found.steps < len(sigmas)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ 2M"], indirect=True)
def test_other_prediction_types(name, kind, seen):
    sampler = Sampler(SCHEDULERS[name](prediction_type=kind))
    predictions = []
    original = sampler.scheduler.step

    def step(prediction, *arguments, **keywords):
        predictions.append(prediction)
        return original(prediction, *arguments, **keywords)

    step.__signature__ = inspect.signature(original)
    sampler.scheduler.step = step
    with guard(sampler):
        sampler()
    assert len(seen) == STEPS
    for step, prediction in zip(seen, predictions, strict=True):
        alpha = 1 / math.sqrt(1 + step["sigma"] ** 2)
        v = alpha * step["z_prev"] - alpha * step["sigma"] * prediction
        torch.testing.assert_close(step["x0"], v if kind == "v_prediction" else prediction, rtol=1e-3, atol=1e-3)


def strong_profile(steps=STEPS, settings=None):
    """A profile no run of the sampler is near: everything triggers, strongly, at the first step."""
    from memorization_guard import RunSettings

    mean = np.tile([16.0, 7.0, 10.0], (steps, 1))
    return StabilityProfile(mean=mean, std=np.full((steps, 3), 0.01), count=50, settings=settings or RunSettings())


@pytest.mark.parametrize("thresholds", [Thresholds(), Thresholds(steering_guidance=None)])
def test_mitigation_holds_the_latents_in_their_bands(name, thresholds, seen):
    sampler = Sampler(SCHEDULERS[name]())
    with guard(sampler, strong_profile(), mitigate=True, thresholds=thresholds) as run:
        sampler()
    for trace in run.traces:
        assert trace.verdict == "strong"
        np.testing.assert_array_equal(trace.mitigated, trace.update_score > 3)
        assert trace.mitigated.sum() >= STEPS - 1
        np.testing.assert_allclose(trace.corrected_latent_norm[trace.mitigated], 16, atol=0.04)


def test_a_steered_ddim_step_is_the_step_of_another_guidance_scale():
    """In a first-order solver nothing of the guidance that was taken is left, from the network's output to the latent."""
    wide = StabilityProfile(mean=np.tile([8.0, 1e-3, 1e-3], (STEPS, 1)), std=np.tile([1e6, 1e-6, 1e-6], (STEPS, 1)), count=50)
    thresholds = Thresholds(steering_guidance=-0.5, tau_strong=1e12)
    steered = Sampler(SCHEDULERS["DDIM"]())
    with guard(steered, wide, mitigate=True, thresholds=thresholds) as run:
        result = steered(seed=5)
    assert all(trace.mitigated.all() for trace in run.traces)

    class Other(Network):
        def forward(self, x, t):
            uncond, cond = super().forward(x, t)[0].chunk(2)
            # The sampler's loop makes guidance -0.5 of these, at its scale of 3.
            return (torch.cat([uncond, uncond + (cond - uncond) * -0.5 / 3.0]),)

    other = Sampler(SCHEDULERS["DDIM"]())
    other.unet = Other()
    torch.testing.assert_close(result, other(seed=5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_stay_half_precision(dtype):
    sampler = Sampler(SCHEDULERS["DDIM"]())
    with guard(sampler, strong_profile(), mitigate=True) as run:
        x = sampler(dtype=dtype)
    assert x.dtype == dtype
    assert run.traces[0].mitigated.any()


def test_the_pipeline_still_sees_the_scheduler_signatures():
    sampler = Sampler(SCHEDULERS["DDIM"]())
    wanted = inspect.signature(sampler.scheduler.step), inspect.signature(sampler.scheduler.set_timesteps)
    with guard(sampler):
        assert (inspect.signature(sampler.scheduler.step), inspect.signature(sampler.scheduler.set_timesteps)) == wanted


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_when_sampling_breaks(error):
    sampler = Sampler(SCHEDULERS["DDIM"]())

    def stop(_module, _inputs):
        if len(sampler.unet.inputs) == 3:
            raise error("stop")

    handle = sampler.unet.register_forward_pre_hook(stop)
    with pytest.raises(error, match="stop"), guard(sampler) as run:
        sampler()
    handle.remove()
    assert "step" not in vars(sampler.scheduler)
    assert not sampler.unet._forward_hooks
    assert run.traces[0].steps == 3


def test_guards_nest():
    sampler = Sampler(SCHEDULERS["Euler"]())
    plain = sampler()
    with guard(sampler) as outer:
        sampler(seed=1)
        with guard(sampler) as inner:
            assert torch.equal(sampler(), plain)
        sampler(seed=2)
    assert (len(outer.traces), len(inner.traces)) == (6, 2)
    np.testing.assert_array_equal(outer.traces[2].update_norm, inner.traces[0].update_norm)
    assert "step" not in vars(sampler.scheduler)


def guidance_of(trace):
    return np.stack([trace.guidance_norm, trace.uncond_norm, trace.alignment])


def test_two_threads_on_one_denoiser_are_told_apart():
    """Entered here and called in threads; every guard's hook has run for both before either scheduler steps."""
    samplers = [Sampler(SCHEDULERS["Euler"]()) for _ in range(2)]
    samplers[1].unet = shared = samplers[0].unet
    plain, alone = [], []
    for seed, sampler in enumerate(samplers):
        with guard(sampler) as run:
            plain.append(sampler(seed=seed))
        alone.append(run.traces)
    both = threading.Barrier(2, timeout=20)

    def wait(*_):
        both.wait()

    with guard(samplers[0]) as first, guard(samplers[1]) as second, ThreadPoolExecutor(2) as pool:
        handle = shared.register_forward_hook(wait)
        together = list(pool.map(lambda i: samplers[i](seed=i), range(2)))
        handle.remove()
    for seed, run in enumerate((first, second)):
        assert torch.equal(together[seed], plain[seed])
        for found, wanted in zip(run.traces, alone[seed], strict=True):
            np.testing.assert_array_equal(guidance_of(found), guidance_of(wanted))
    assert not np.array_equal(guidance_of(alone[0][0]), guidance_of(alone[1][0]))
    assert not shared._forward_hooks


def test_what_the_network_said_before_a_run_is_not_of_it():
    sampler = Sampler(SCHEDULERS["Euler"]())
    with guard(sampler) as alone:
        sampler()
    with guard(sampler) as run:
        sampler.unet(torch.randn(4, 4, 8, 8), None)  # another pipeline's, or of a run that broke off
        sampler()
    np.testing.assert_array_equal(guidance_of(run.traces[0]), guidance_of(alone.traces[0]))


def test_hooks_registered_at_once_keep_apart(monkeypatch):
    """torch's counter of hooks is read and written in two steps; here every thread waits between them."""
    from torch.utils.hooks import RemovableHandle

    class Slow(int):
        def __add__(self, other):
            threading.Event().wait(0.02)
            return Slow(int(self) + other)

    monkeypatch.setattr(RemovableHandle, "next_id", Slow(RemovableHandle.next_id))
    shared, entered = Network(), threading.Barrier(4, timeout=20)

    def enter(_):
        sampler = Sampler(SCHEDULERS["Euler"]())
        sampler.unet = shared
        with guard(sampler):
            entered.wait()
            return len(shared._forward_hooks)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(enter, range(4))) == 4


def test_the_guard_tells_what_watching_took(monkeypatch):
    original = StabilityMonitor.step

    def slow(self, *arguments, **keywords):
        threading.Event().wait(0.01)
        return original(self, *arguments, **keywords)

    sampler = Sampler(SCHEDULERS["Euler"]())
    step = sampler.scheduler.step

    def slower(*arguments, **keywords):
        threading.Event().wait(0.05)
        return step(*arguments, **keywords)

    slower.__signature__ = inspect.signature(step)
    sampler.scheduler.step = slower
    with guard(sampler) as quick:
        sampler()
    assert 0 < quick.overhead_seconds < 0.05 * STEPS
    monkeypatch.setattr(StabilityMonitor, "step", slow)
    with guard(sampler) as run:
        sampler()
    assert run.overhead_seconds > 0.01 * STEPS


def test_what_cannot_be_watched_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match="no scheduler"), guard(object()):
        pass
    with pytest.raises(TypeError, match="no unet and no transformer"), guard(SimpleNamespace(scheduler=SCHEDULERS["DDIM"]())):
        pass
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot be watched; schedulers that can: PNDM"):
        guard(Sampler(diffusers.EDMEulerScheduler())).__enter__()
    with pytest.raises(ValueError, match="thresholding=True"):
        guard(Sampler(diffusers.DDIMScheduler(thresholding=True))).__enter__()
    with pytest.raises(ValueError, match="skip_prk_steps"):
        guard(Sampler(diffusers.PNDMScheduler(skip_prk_steps=False))).__enter__()


def test_a_failure_of_ours_costs_no_image(monkeypatch, caplog):
    sampler = Sampler(SCHEDULERS["DDIM"]())
    plain = sampler()
    monkeypatch.setattr("memorization_guard.adapters.diffusers.fingerprint", lambda _: 1 / 0)
    with guard(sampler) as run:
        assert torch.equal(sampler(), plain)
    assert run.traces == []
    assert len(caplog.records) == 1


def test_a_run_watched_in_part_is_not_called_stable(monkeypatch, caplog):
    sampler = Sampler(SCHEDULERS["DDIM"]())
    plain = sampler()
    wide = StabilityProfile(mean=np.full((STEPS, 3), 10.0), std=np.full((STEPS, 3), 1e3), count=50)
    original, calls = torch.Tensor.chunk, []

    def chunk(*arguments):
        calls.append(1)
        # The sampler's own, and the network's, come before the guard's.
        if len(calls) == 3 * 3:
            raise RuntimeError("no chunk")
        return original(*arguments)

    monkeypatch.setattr(torch.Tensor, "chunk", chunk)
    with guard(sampler, wide) as run:
        assert torch.equal(sampler(), plain)
    assert len(caplog.records) == 1
    assert (run.traces[0].steps, run.traces[0].verdict) == (2, "unscored")
    assert "no chunk" in run.traces[0].note


# --- real pipelines ---------------------------------------------------------------------------------------------------


def images_of(pipe, prompt="a red cat", *, seeds=(0,), **keywords):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    keywords = {"num_inference_steps": 4, "output_type": "np", "height": 16, "width": 16} | keywords
    return pipe(prompt, generator=generators if len(seeds) > 1 else generators[0], **keywords).images


@pytest.mark.parametrize("scheduler", [n for n in SCHEDULERS if n != "flow Euler"])
def test_stable_diffusion_paints_the_same_images_watched(tiny_pipe, scheduler):
    tiny_pipe.scheduler = SCHEDULERS[scheduler]()
    plain = images_of(tiny_pipe, ["a red cat", "a blue dog"], seeds=(1, 2))
    with guard(tiny_pipe) as run:
        watched = images_of(tiny_pipe, ["a red cat", "a blue dog"], seeds=(1, 2))
    np.testing.assert_array_equal(plain, watched)
    assert [trace.steps for trace in run.traces] == [4, 4]
    assert np.isfinite(run.traces[0].guidance_norm).all()
    settings = run.traces[0].settings
    assert (settings.guidance_scale, settings.latent_shape, settings.steps) == (7.5, (4, 8, 8), 4)
    assert settings.model_hash == fingerprint(tiny_pipe.unet)


def test_several_images_a_prompt_and_several_calls_come_in_image_order(tiny_pipe):
    with guard(tiny_pipe) as run:
        for seed in (5, 6):
            images_of(tiny_pipe, ["a red cat", "a blue dog"], seeds=range(seed, seed + 4), num_images_per_prompt=2)
    assert len(run.traces) == 8
    with guard(tiny_pipe) as alone:
        images_of(tiny_pipe, "a blue dog", seeds=(7,))
    np.testing.assert_allclose(run.traces[2].update_norm, alone.traces[0].update_norm, rtol=1e-4)


def test_a_copy_shares_the_networks_and_nothing_that_a_call_writes_to(tiny_pipe):
    config = dict(tiny_pipe.config)
    twin = copy_sharing_weights(tiny_pipe)
    assert type(twin) is type(tiny_pipe)
    assert all(getattr(twin, name) is getattr(tiny_pipe, name) for name in ("unet", "vae", "text_encoder"))
    assert twin.tokenizer is not tiny_pipe.tokenizer
    assert twin.scheduler is not tiny_pipe.scheduler
    assert dict(tiny_pipe.config) == dict(twin.config) == config
    plain = images_of(tiny_pipe)
    before = set(vars(tiny_pipe)), set(vars(tiny_pipe.scheduler)), tiny_pipe.guidance_scale
    with guard(twin):
        images_of(twin, guidance_scale=2.0, num_inference_steps=6)
    assert (set(vars(tiny_pipe)), set(vars(tiny_pipe.scheduler)), tiny_pipe.guidance_scale) == before
    assert tiny_pipe.scheduler.num_inference_steps == 4
    np.testing.assert_array_equal(images_of(twin), plain)


def test_what_cannot_be_copied_is_refused_in_one_sentence(tiny_pipe):
    with pytest.raises(TypeError, match="not a diffusion pipeline"):
        copy_sharing_weights(object())
    with guard(tiny_pipe), pytest.raises(ValueError, match="copy it outside of the block"):
        copy_sharing_weights(tiny_pipe)
    with guard(copy_sharing_weights(tiny_pipe)):
        copy_sharing_weights(tiny_pipe)


@pytest.mark.parametrize("mitigate", [False, True])
def test_runs_side_by_side_are_those_one_after_the_other(mitigate):
    """The lab model in three threads: memorized and ordinary prompts, other steps, guidance scales and schedulers."""
    from memorization_guard import lab

    pipe, profile = lab.pipeline(), lab.profile()
    exact, ordinary = lab.prompts("exact"), lab.prompts("ordinary")
    requests = [(exact[0], 9, 7.5), (ordinary[0], 12, 5.0), (exact[1], 7, 7.5), (ordinary[1], 9, 1.0), (exact[2], 12, 9.0)]
    pipes = [copy_sharing_weights(pipe) for _ in requests]
    pipes[1].scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipes[4].scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)

    def paint(number):
        prompt, steps, scale = requests[number]
        generator = torch.Generator().manual_seed(number)
        with guard(pipes[number], profile, mitigate=mitigate) as run:
            images = pipes[number](
                prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="np"
            ).images
        return images[0], run.traces[0].to_dict()

    alone = [paint(number) for number in range(len(requests))]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(paint, range(len(requests))))
    for (image, trace), (wanted, its_trace) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(image, wanted)
        assert trace == its_trace
    verdicts = [trace["verdict"] for _, trace in alone]
    assert verdicts[1] == "stable"
    assert "stable" not in (verdicts[0], verdicts[2])
    assert not pipe.unet._forward_hooks


def test_without_guidance_there_are_no_guidance_signals(tiny_pipe):
    with guard(tiny_pipe) as run:
        images_of(tiny_pipe, guidance_scale=1.0)
    assert np.isnan(run.traces[0].guidance_norm).all()
    assert run.traces[0].settings.guidance_scale == 1.0


@pytest.mark.parametrize(("scheduler", "steps"), [("DDIM", 5), ("PNDM", 5)])
def test_image_to_image_is_held_against_the_end_of_the_schedule(tiny_pipe, scheduler, steps):
    tiny_pipe.scheduler = SCHEDULERS[scheduler]()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    keywords = {"num_inference_steps": 10, "output_type": "np"}
    image = np.random.default_rng(0).random((1, 16, 16, 3)).astype(np.float32)

    def paint():
        return pipe("a red cat", image=image, strength=0.5, generator=torch.Generator().manual_seed(0), **keywords).images

    plain = paint()
    profile = calibrate(tiny_pipe, ["a red cat"] * 8, progress=False, num_inference_steps=10, height=16, width=16)
    with guard(pipe, profile) as run:
        watched = paint()
    np.testing.assert_array_equal(plain, watched)
    trace = run.traces[0]
    assert trace.steps == steps
    assert trace.verdict != "unscored"
    assert "less certainty" in trace.note
    # PNDM's second step leaves one noise level out.
    rows = [-5, -4, -3, -2, -1] if scheduler == "DDIM" else [-6, -4, -3, -2, -1]
    np.testing.assert_allclose(trace.bands["update"]["mean"], profile.mean[rows, 1])


def test_a_live_view_that_fails_costs_no_image(tiny_pipe):
    plain = images_of(tiny_pipe)
    with guard(tiny_pipe, on_step=lambda event: 1 / 0) as run:
        np.testing.assert_array_equal(images_of(tiny_pipe), plain)
    assert len(run.traces) == 1


def test_stable_diffusion_xl(tokenizer, tiny_parts):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_parts[1],
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=SCHEDULERS["Euler"](),
        add_watermarker=False,
    )
    check_pipeline(pipe, guided=True)


def check_pipeline(pipe, *, guided, **keywords):
    pipe.set_progress_bar_config(disable=True)
    plain = images_of(pipe, seeds=(1, 2), num_images_per_prompt=2, **keywords)
    with guard(pipe) as run:
        watched = images_of(pipe, seeds=(1, 2), num_images_per_prompt=2, **keywords)
    np.testing.assert_array_equal(plain, watched)
    assert [trace.steps for trace in run.traces] == [4, 4]
    assert all(trace.nonfinite_step is None for trace in run.traces)
    assert np.isfinite(run.traces[0].guidance_norm).all() == guided
    profile = strong_profile(4, run.traces[0].settings)
    with guard(pipe, profile, mitigate=True) as steered:
        assert not np.array_equal(images_of(pipe, seeds=(1, 2), num_images_per_prompt=2, **keywords), plain)
    assert all(trace.mitigated[0] for trace in steered.traces)


def test_stable_diffusion_3(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=SCHEDULERS["flow Euler"](),
        vae=tiny_vae(4),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    check_pipeline(pipe, guided=True)


def tiny_vae(channels):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def test_flux(tiny_parts, tokenizer):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=SCHEDULERS["flow Euler"](),
        vae=tiny_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    generator = torch.Generator().manual_seed(0)
    embeddings = {
        "prompt_embeds": torch.randn(1, 6, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    check_pipeline(Positional(pipe), guided=False, **embeddings)


class Positional:
    """FluxPipeline called with embeddings in place of a prompt; everything else is the pipeline's own."""

    def __init__(self, pipe):
        self.__dict__.update(_pipe=pipe)

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __call__(self, _prompt, **keywords):
        return self._pipe(**keywords)


# --- calibration ------------------------------------------------------------------------------------------------------

PROMPTS = [f"a red cat on mat {i}" for i in range(10)]
QUICK = {"num_inference_steps": 3, "height": 16, "width": 16, "progress": False, "batch_size": 4}


def test_calibration_is_independent_of_the_batch_size_and_fits_its_own_runs(tiny_pipe):
    profile = calibrate(tiny_pipe, PROMPTS, **QUICK)
    other = calibrate(tiny_pipe, PROMPTS, **{**QUICK, "batch_size": 3})
    np.testing.assert_allclose(profile.mean, other.mean, rtol=1e-4)
    assert (profile.count, profile.steps, profile.settings.sampler) == (10, 3, "PNDM")
    with guard(tiny_pipe, profile) as run:
        images_of(tiny_pipe, PROMPTS[0], num_inference_steps=3)
    assert run.traces[0].verdict == "stable"
    assert run.traces[0].note is None


def test_a_profile_is_carried_over_to_another_step_count_and_to_no_other_model(tiny_pipe):
    profile = calibrate(tiny_pipe, PROMPTS, **{**QUICK, "num_inference_steps": 12})
    with guard(tiny_pipe, profile) as run:
        images_of(tiny_pipe, PROMPTS[0], num_inference_steps=10)
    assert run.traces[0].verdict == "stable"
    assert "carried over" in run.traces[0].note
    other = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, model_hash="another"))
    with guard(tiny_pipe, other, mitigate=True) as run:
        images_of(tiny_pipe, num_inference_steps=4)
    assert run.traces[0].verdict == "unscored"
    assert "Calibrate a profile" in run.traces[0].note


def test_a_run_is_stopped_once_every_image_has_triggered(tiny_pipe):
    """References as small as nothing: every image is far off from its first step on."""
    profile = calibrate(tiny_pipe, PROMPTS, **QUICK)
    small = dataclasses.replace(profile.reference, runs=profile.reference.runs * 0.01)
    profile, calls = dataclasses.replace(profile, reference=small), []
    hook = tiny_pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with guard(tiny_pipe, profile, stop=True) as run:
        image = images_of(tiny_pipe, num_inference_steps=10)
    assert len(calls) < 4
    assert run.traces[0].verdict != "stable"
    assert "stopped" in run.traces[0].note
    assert np.isfinite(np.asarray(image)).all()
    calls.clear()
    images_of(tiny_pipe, num_inference_steps=10)
    hook.remove()
    assert len(calls) >= 10


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
    np.testing.assert_allclose(profile.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(profile.std, whole.std, rtol=1e-4)
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
    assert not np.allclose(plain.mean, negative.mean, rtol=1e-6)


def test_too_few_prompts_are_refused_before_any_sampling(tiny_pipe):
    with pytest.raises(CalibrationError, match="at least 8"):
        calibrate(tiny_pipe, PROMPTS[:7], **QUICK)


def test_the_pipelines_own_progress_bar_is_as_before(tiny_pipe):
    before = copy.deepcopy(tiny_pipe._progress_bar_config)
    calibrate(tiny_pipe, PROMPTS, **QUICK)
    assert tiny_pipe._progress_bar_config == before


def test_thresholds_reach_the_traces(tiny_pipe):
    with guard(tiny_pipe, thresholds=Thresholds(tau_mild=2.0)) as run:
        images_of(tiny_pipe)
    assert run.traces[0].thresholds.tau_mild == 2.0
