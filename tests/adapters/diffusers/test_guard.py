"""What a guard leaves behind (nothing), what it says of runs that break off, and pipelines in threads."""

import contextlib
import copy
import functools
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from memorization_guard import Thresholds
from memorization_guard.adapters.hooks import calls_of
from memorization_guard.diffusers import copy_sharing_weights, guard

from .conftest import STEPS, Network, Sampler, images_of, profile_around
from .test_schedulers import SCHEDULERS


def clean(sampler):
    return "step" not in vars(sampler.scheduler) and not sampler.unet._forward_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_is_not_called_stable(error):
    sampler = Sampler(SCHEDULERS["DDIM"]())
    with guard(sampler) as whole:
        sampler()

    def stop(_module, _inputs):
        if sampler.unet.calls == 3:
            raise error("stop")

    handle = sampler.unet.register_forward_pre_hook(stop)
    with pytest.raises(error, match="stop"), guard(sampler, profile_around(whole.traces[0])) as run:
        sampler()
    handle.remove()
    assert clean(sampler)
    assert (len(run.traces[0].steps), run.traces[0].verdict) == (3, "unscored")
    assert run.traces[0].note == f"The run ended early: 3 of {STEPS} evaluations were made"
    with guard(sampler, profile_around(whole.traces[0])) as run:
        sampler()
    assert (run.traces[0].verdict, run.traces[0].note) == ("stable", None)


def test_traces_may_be_read_in_the_middle_of_a_run():
    sampler = Sampler(SCHEDULERS["Euler"]())
    with guard(sampler) as whole:
        sampler()
    with guard(sampler, profile_around(whole.traces[0])) as run:
        seen = []
        handle = sampler.unet.register_forward_pre_hook(
            lambda *_: seen.append(run.traces) if sampler.unet.calls == 3 else None
        )
        sampler()
        handle.remove()
    assert seen[0][0].verdict == "unscored"
    assert run.traces[0].verdict == "stable"


def test_guards_nest():
    sampler = Sampler(SCHEDULERS["Euler"]())
    plain = sampler()
    with guard(sampler) as outer:
        sampler(seed=1)
        with guard(sampler) as inner:
            assert torch.equal(sampler(), plain)
        sampler(seed=2)
    assert (len(outer.traces), len(inner.traces)) == (6, 2)
    np.testing.assert_array_equal(outer.traces[2].steps.update_norm, inner.traces[0].steps.update_norm)
    assert clean(sampler)


def test_a_scheduler_that_is_exchanged_within_the_block_is_watched():
    sampler = Sampler(SCHEDULERS["Euler"]())
    first = sampler.scheduler
    with guard(sampler) as run:
        sampler()
        sampler.scheduler = SCHEDULERS["DPM++ 2M"]()
        sampler()
        sampler()
    assert [trace.settings.sampler.split()[0] for trace in run.traces[::2]] == ["EulerDiscrete"] + ["DPMSolverMultistep"] * 2
    assert all(len(trace.steps) == STEPS and "early" not in (trace.note or "") for trace in run.traces)
    assert clean(sampler)
    assert "step" not in vars(first)


def test_guidance_that_is_switched_off_in_the_middle(tiny_pipe):
    def off(pipe, step, _t, values):
        if step == 1:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    keywords = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    tiny_pipe.scheduler = SCHEDULERS["DDIM"]()
    plain = images_of(tiny_pipe, ["a red cat"] * 2, seeds=(1, 2), **keywords)
    with guard(tiny_pipe) as run:
        np.testing.assert_array_equal(images_of(tiny_pipe, ["a red cat"] * 2, seeds=(1, 2), **keywords), plain)
    assert run.error is None
    assert np.isfinite(run.traces[0].evaluations.guidance).tolist() == [True, True, False, False]


def test_a_network_that_is_not_called_is_missed(tiny_pipe):
    """Another network was put into the pipeline within the block."""
    other = Sampler(SCHEDULERS["DDIM"]())
    with guard(other) as run:
        other.unet = Network()
        other()
    assert [trace.verdict for trace in run.traces] == ["unscored"] * 2
    assert "no evaluation of the network was seen" in run.traces[0].note


def test_crops_of_a_larger_latent_are_not_taken_for_it():
    class Tiles(Sampler):
        def __call__(self):
            self.scheduler.set_timesteps(3)
            x = torch.randn(1, 4, 8, 16)
            for t in self.scheduler.timesteps:
                halves = [self.unet(torch.cat([crop] * 2), t)[0].chunk(2)[1] for crop in x.split(8, dim=3)]
                x = self.scheduler.step(torch.cat(halves, dim=3), t, x, return_dict=False)[0]

    sampler = Tiles(SCHEDULERS["DDIM"]())
    with guard(sampler) as run:
        sampler()
    assert run.traces[0].verdict == "unscored"
    assert "not given the latent that the scheduler steps from" in run.traces[0].note


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_compiled_networks_are_watched(way):
    sampler = Sampler(SCHEDULERS["Euler"]())
    if way == "in place":
        sampler.unet.compile(backend="eager")
    else:
        sampler.unet = torch.compile(sampler.unet, backend="eager")
    plain = sampler()  # compiled before there is a guard
    with guard(sampler) as run:
        assert torch.equal(sampler(), plain)
    assert run.error is None
    assert len(run.traces[0].evaluations) == STEPS
    before = sampler.unet._compiled_call_impl
    with guard(sampler):
        pass
    assert sampler.unet._compiled_call_impl is before


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_guards_are_left_in_any_order(order):
    """Each sees the calls while it is there, whichever of them has gone; the last one leaves nothing."""
    sampler = Sampler(SCHEDULERS["Euler"]())
    plain = sampler()
    blocks = [guard(sampler) for _ in range(3)]
    runs = [block.__enter__() for block in blocks]
    assert torch.equal(sampler(), plain)
    for left, number in enumerate(order):
        blocks[number].__exit__(None, None, None)
        assert torch.equal(sampler(), plain)
        assert clean(sampler) == (left == 2)
    for left, number in enumerate(order):
        assert len(runs[number].traces) == 2 * (left + 1)
        assert runs[number].error is None
        assert {len(trace.steps) for trace in runs[number].traces} == {STEPS}


def test_a_guard_that_is_left_first_takes_its_correction_with_it():
    sampler = Sampler(SCHEDULERS["Euler"]())
    plain = sampler()
    with guard(sampler) as run:
        sampler()
    far = profile_around(run.traces[0], scale=0.1)
    correcting, watching = guard(sampler, far, "mitigate"), guard(sampler, far)
    with contextlib.ExitStack() as stack:
        its = stack.enter_context(correcting)
        watching.__enter__()
        changed = sampler()
    assert not torch.equal(changed, plain)
    assert {trace.verdict for trace in its.traces} == {"corrected"}
    assert torch.equal(sampler(), plain)
    watching.__exit__(None, None, None)
    assert clean(sampler)


def test_a_function_that_somebody_else_put_there_comes_back():
    sampler = Sampler(SCHEDULERS["Euler"]())
    theirs = sampler.scheduler.step = functools.partial(sampler.scheduler.step)
    first, second = guard(sampler), guard(sampler)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert sampler.scheduler.step is theirs


class Held:
    """A run of a pipeline in another thread, held in its third call of the network."""

    def __init__(self, sampler):
        self.there, self.go = threading.Event(), threading.Event()

        def hold(*_):
            if sampler.unet.calls == 3:
                self.there.set()
                assert self.go.wait(20)

        self.hook = sampler.unet.register_forward_pre_hook(hold)
        self.pool = ThreadPoolExecutor(1)
        self.result = self.pool.submit(sampler)
        assert self.there.wait(20)

    def finish(self):
        self.go.set()
        found = self.result.result(20)
        self.pool.shutdown()
        self.hook.remove()
        return found


@pytest.mark.parametrize("mode", ["trace", "mitigate"])
def test_a_guard_on_a_run_of_another_thread_says_that_it_came_late(mode):
    """The image is what it would have been, and the next one is watched."""
    sampler = Sampler(SCHEDULERS["Euler"]())
    with guard(sampler) as run:
        plain = sampler()
    far = profile_around(run.traces[0], scale=0.1)
    held = Held(sampler)
    with guard(sampler, far, mode) as late:
        assert torch.equal(held.finish(), plain)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(sampler).result(20)
    note = "Watching ended early: sampling had begun before the guard was entered: enter it first"
    assert [(trace.verdict, trace.note) for trace in late.traces[:2]] == [("unscored", note)] * 2
    assert {trace.verdict for trace in late.traces[2:]} == {"corrected" if mode == "mitigate" else "likely copy"}
    assert clean(sampler)


def test_a_guard_that_leaves_a_run_of_another_thread_says_that_it_saw_a_part():
    sampler = Sampler(SCHEDULERS["Euler"]())
    plain = sampler()
    with guard(sampler) as run:
        held = Held(sampler)
    assert clean(sampler)
    assert len(run.traces) == 2
    for trace in run.traces:
        assert trace.verdict == "unscored"
        assert trace.note.startswith(f"The run ended early: 3 of {STEPS} evaluations were made")
    assert torch.equal(held.finish(), plain)
    assert len(run.traces) == 2


def test_a_pipeline_that_two_threads_call_at_once_is_not_judged():
    sampler = Sampler(SCHEDULERS["DDIM"]())
    with guard(sampler) as run:
        sampler()
    with guard(sampler, profile_around(run.traces[0])) as both:
        held = Held(sampler)
        sampler.unet.calls = 10
        for t in sampler.scheduler.timesteps[:2]:
            x = torch.zeros(2, 4, 8, 8)
            sampler.scheduler.step(x, t, x)
        sampler.unet.calls = 3
        held.finish()
    assert [trace.verdict for trace in both.traces] == ["unscored"] * 2
    assert "two threads at once" in both.traces[0].note


def test_two_threads_on_one_denoiser_are_told_apart():
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
            np.testing.assert_array_equal(found.evaluations.guidance, wanted.evaluations.guidance)
    assert not shared._forward_hooks


def test_what_the_network_said_before_a_run_is_not_of_it():
    sampler = Sampler(SCHEDULERS["Euler"]())
    with guard(sampler) as alone:
        sampler()
    with guard(sampler) as run:
        sampler.unet(torch.randn(4, 4, 8, 8), 3)  # another pipeline's, or of a run that broke off
        sampler()
        sampler.unet(torch.randn(4, 4, 8, 8), 3)
    np.testing.assert_array_equal(run.traces[0].evaluations.guidance, alone.traces[0].evaluations.guidance)


def test_what_cannot_be_watched_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match="no scheduler"), guard(object()):
        pass
    with pytest.raises(TypeError, match="no unet and no transformer"), guard(SimpleNamespace(scheduler=SCHEDULERS["DDIM"]())):
        pass
    pipe = SimpleNamespace(scheduler=SCHEDULERS["DDIM"](), unet=Network())
    with pytest.raises(ValueError, match="cannot be interrupted"), guard(pipe, mode="stop"):
        pass


def test_a_failure_of_ours_costs_no_image(monkeypatch, caplog):
    sampler = Sampler(SCHEDULERS["DDIM"]())
    plain = sampler()
    monkeypatch.setattr("memorization_guard.adapters.sampling.fingerprint", lambda _: 1 / 0)
    with guard(sampler) as run:
        assert torch.equal(sampler(), plain)
    assert [trace.verdict for trace in run.traces] == ["unscored"] * 2
    assert run.traces[0].note == "Watching ended early: division by zero"
    assert len(caplog.records) == 1


def test_mode_off_hooks_nothing():
    sampler = Sampler(SCHEDULERS["DDIM"]())
    with guard(sampler, mode="off") as run:
        assert clean(sampler)
        sampler()
    assert run.traces == []


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


def test_a_deep_copy_of_a_guarded_pipeline_is_whole_and_said_to_be_unwatched(tiny_pipe, caplog):
    plain = images_of(tiny_pipe)
    with guard(tiny_pipe) as run:
        twin = copy.deepcopy(tiny_pipe)
        with guard(twin) as its_own:
            assert np.array_equal(images_of(twin), plain)
        assert len(its_own.traces) == len(plain)
        assert not caplog.text
        assert np.array_equal(images_of(twin), plain)
        assert not run.traces
        assert caplog.text.count("does not watch a copy of a guarded pipeline") == 1
        assert np.array_equal(images_of(tiny_pipe), plain)
    assert len(run.traces) == len(plain)


@pytest.mark.parametrize("share", [copy.copy, diffusers.AutoPipelineForText2Image.from_pipe])
def test_a_pipeline_that_shares_the_scheduler_of_a_guarded_one_is_watched_with_it(tiny_pipe, share):
    plain = images_of(tiny_pipe)
    with guard(tiny_pipe) as run:
        images_of(tiny_pipe)
    with guard(tiny_pipe, profile_around(run.traces[0], scale=0.1), "mitigate") as run:
        sharing = share(tiny_pipe)
        changed = images_of(sharing)
    assert not np.array_equal(changed, plain)
    assert {trace.verdict for trace in run.traces} == {"corrected"}
    np.testing.assert_array_equal(images_of(sharing), plain)
    np.testing.assert_array_equal(images_of(tiny_pipe), plain)
    assert len(run.traces) == len(plain)
    assert not tiny_pipe.unet._forward_hooks


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
        with guard(pipes[number], profile, mode="mitigate" if mitigate else "trace") as run:
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
    assert verdicts[0] == verdicts[2] == ("corrected" if mitigate else "likely copy")
    assert not pipe.unet._forward_hooks


def test_a_call_that_finds_a_hook_half_set_goes_through():
    """torch keeps the wish for keywords apart from the hook: a call in another thread can come between the two."""
    module, seen = torch.nn.Linear(2, 2), []
    with calls_of(module, lambda keywords: keywords, lambda *call: seen.append(call)):
        module(input=torch.zeros(1, 2))
        module._forward_hooks_with_kwargs.clear()
        module(torch.zeros(1, 2))
    assert [keywords.keys() for _, _, keywords, _ in seen] == [{"input"}]


def test_several_images_a_prompt_and_several_calls_come_in_image_order(tiny_pipe):
    with guard(tiny_pipe) as run:
        for seed in (5, 6):
            images_of(tiny_pipe, ["a red cat", "a blue dog"], seeds=range(seed, seed + 4), num_images_per_prompt=2)
    assert len(run.traces) == 8
    with guard(tiny_pipe) as alone:
        images_of(tiny_pipe, "a blue dog", seeds=(7,))
    np.testing.assert_allclose(run.traces[2].steps.update_norm, alone.traces[0].steps.update_norm, rtol=1e-4)


def test_a_live_view_that_fails_costs_no_image(tiny_pipe):
    plain = images_of(tiny_pipe)
    with guard(tiny_pipe, on_step=lambda event: 1 / 0) as run:
        np.testing.assert_array_equal(images_of(tiny_pipe), plain)
    assert len(run.traces) == 1


def test_thresholds_reach_the_traces(tiny_pipe):
    with guard(tiny_pipe, thresholds=Thresholds(tau_mild=2.0)) as run:
        images_of(tiny_pipe)
    assert run.traces[0].thresholds.tau_mild == 2.0


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


def test_the_pipeline_still_sees_the_scheduler_signatures():
    sampler = Sampler(SCHEDULERS["DDIM"]())
    wanted = inspect.signature(sampler.scheduler.step), inspect.signature(sampler.scheduler.set_timesteps)
    with guard(sampler):
        assert (inspect.signature(sampler.scheduler.step), inspect.signature(sampler.scheduler.set_timesteps)) == wanted
