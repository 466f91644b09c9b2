"""The modes of the guard, its events and its traces, in the real ComfyUI."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from memorization_guard import Trace
from memorization_guard.lab import copy_score, prompts

EXACT = prompts("exact", "tuning")[0]
ORDINARY = prompts("ordinary", "tuning")[0]
STEPS = 30


def test_a_memorized_prompt_triggers_and_mitigation_leads_away_from_the_copy(bench: Any, finish: Any) -> None:
    traced = finish(b := bench("trace"), b.ksampler())
    assert copy_score(traced.images[0], EXACT) > 0.75
    assert traced.runs[0][0].verdict == "likely copy"
    mitigated = finish(b := bench("mitigate"), b.ksampler())
    trace = mitigated.runs[0][0]
    assert copy_score(mitigated.images[0], EXACT) < 0.75
    assert (trace.trigger_step, trace.mitigated[0]) == (0, True)


def test_an_ordinary_prompt_is_stable_and_mitigation_leaves_it_alone(bench: Any, finish: Any) -> None:
    plain = finish(b := bench(None, text=ORDINARY), b.ksampler())
    mitigated = finish(b := bench("mitigate", text=ORDINARY), b.ksampler())
    assert mitigated.runs[0][0].verdict == "stable"
    assert np.array_equal(plain.images[0], mitigated.images[0])


def test_without_a_profile_nothing_is_judged(bench: Any, finish: Any) -> None:
    result = finish(b := bench("mitigate", profile=False), b.ksampler())
    plain = finish(b := bench(None), b.ksampler())
    assert result.runs[0][0].verdict == "unscored"
    assert result.runs[0][0].bands == {}
    assert np.array_equal(plain.images[0], result.images[0])


def test_off_is_off(bench: Any, finish: Any) -> None:
    result = finish(b := bench("off"), b.ksampler())
    assert len(result.runs[0][0].steps) == 0
    assert "mode may be off" in result.runs[0][0].note


def test_several_guards_in_one_graph_and_on_one_model_see_their_own_runs(bench: Any, server: Any) -> None:
    b = bench("trace")
    second = b.g.node("MemorizationGuard", model=b.lab[0], mode="trace", profile=b.lab[3])
    inner = b.g.node("MemorizationGuard", model=second[0], mode="trace", profile=b.lab[3])
    ours, others = b.ksampler(), b.ksampler(model=inner[0], positive=b.text(ORDINARY))
    reports = [
        b.g.node("MemorizationGuardReport", trace=guard[1], latent=latent)
        for guard, latent in ((b.guard, ours), (second, others), (inner, others), (b.guard, others))
    ]
    server.free(unload_models=False, free_memory=True)
    run = server.queue(b.g.prompt())
    run.wait()
    verdicts = [run.outputs(report)["memorization_guard"][0]["traces"][0]["verdict"] for report in reports]
    assert verdicts == ["likely copy", "stable", "stable", "unscored"]
    told = {(e.data["node"], e.data["run"].split(":")[1]) for e in run.events if e.type == "memorization_guard"}
    assert told == {(b.guard.id, ours[0]), (second.id, others[0]), (inner.id, others[0])}


def test_events_are_small_and_in_order_and_the_last_one_is_the_trace(bench: Any, finish: Any) -> None:
    result = finish(b := bench("trace", batch=2), b.ksampler())
    events = [event for event in result.run.events if event.type == "memorization_guard"]
    assert [event.data["kind"] for event in events] == ["begin", *["step"] * STEPS, "end"]
    assert [event.data["step"] for event in events[1:-1]] == list(range(STEPS))
    assert max(len(json.dumps(event.data)) for event in events[1:-1]) < 700
    assert events[0].data["steps"] == STEPS
    assert len(events[0].data["bands"]["update"]["mean"]) == STEPS
    assert events[-1].data["traces"] == [trace.to_dict() for trace in result.runs[0]]
    # While the sampler runs, not after it.
    assert events[STEPS].time - events[1].time > 0.3 * (events[-1].time - events[0].time)


def test_the_trace_travels_with_the_picture(bench: Any, finish: Any) -> None:
    result = finish(b := bench("trace"), b.ksampler())
    (record,) = json.loads(result.metadata["memorization_guard"]).values()
    assert Trace.from_dict(record["traces"][0]).verdict == result.runs[0][0].verdict


def test_a_cached_result_keeps_its_report(bench: Any, finish: Any, server: Any) -> None:
    b = bench("trace")
    first = finish(b, b.ksampler())
    again = server.queue(b.g.prompt())
    again.wait()
    assert not [event for event in again.events if event.type == "memorization_guard"], "the sampler ran again"
    assert list(again.history()["outputs"].values()) == list(first.run.history()["outputs"].values())


def test_a_run_that_is_cancelled_is_closed_and_the_next_one_is_whole(bench: Any, finish: Any, server: Any) -> None:
    b = bench("trace")
    latent = b.ksampler(steps=400)
    save = b.g.node("SaveImage", images=b.g.node("VAEDecode", samples=latent, vae=b.lab[2])[0], filename_prefix="t")
    run = server.queue(b.g.prompt())
    while sum(event.type == "memorization_guard" for event in run.events) < 10:
        time.sleep(0.02)
    server.interrupt()
    with pytest.raises(RuntimeError, match="interrupted"):
        run.wait()
    assert run.outputs(save) == {}
    end = [event.data for event in run.events if event.type == "memorization_guard"][-1]
    assert end["kind"] == "end"
    trace = end["traces"][0]
    assert "ended early" in trace["note"]
    assert 5 < len(trace["steps"]["sigma"]) < 400

    result = finish(b := bench("trace"), b.ksampler())
    plain = finish(b := bench(None), b.ksampler())
    assert np.array_equal(result.images[0], plain.images[0])
    assert result.runs[0][0].note is None


def test_models_that_were_unloaded_in_between_are_the_same_model(bench: Any, finish: Any, server: Any) -> None:
    first = finish(b := bench("trace"), b.ksampler())
    server.free(unload_models=True, free_memory=True)
    second = finish(b := bench("trace"), b.ksampler())
    assert np.array_equal(first.images[0], second.images[0])
    assert first.runs[0][0].to_dict() == second.runs[0][0].to_dict()


def test_a_rate_that_is_none_is_refused_before_anything_runs(bench: Any, server: Any) -> None:
    b = bench("trace", false_positive_rate=0.0)
    b.g.node("MemorizationGuardReport", trace=b.guard[1], latent=b.ksampler())
    with pytest.raises(RuntimeError, match=r"0\.0 smaller than min.*false_positive_rate"):
        server.queue(b.g.prompt())


def test_what_belongs_to_the_published_method_cannot_be_set(server: Any) -> None:
    inputs = server.object_info("MemorizationGuard")["input_order"]
    assert inputs["optional"] == ["profile", "clip", "false_positive_rate", "steering_guidance", "gamma", "correction"]


# Mode stop


def test_a_memorized_run_is_stopped_and_what_is_behind_it_still_runs(bench: Any, server: Any) -> None:
    b = bench("stop", batch=2)
    latent = b.ksampler()
    report = b.g.node("MemorizationGuardReport", trace=b.guard[1], latent=latent)
    image = b.g.node("VAEDecode", samples=report[0], vae=b.lab[2])[0]
    save = b.g.node("SaveImage", images=image, filename_prefix="stopped")
    gate = b.g.node(
        "MemorizationGuardGate",
        image=image,
        trace=b.guard[1],
        when_empty="block",
        pass_unscored=True,
        pass_corrected="all",
    )
    passed = b.g.node("PreviewImage", images=gate[0])
    stable, held, why = (b.g.node("PreviewAny", source=source) for source in (report[2], gate[1], gate[2]))
    server.free(unload_models=False, free_memory=True)
    run = server.queue(b.g.prompt(), extra_data={"extra_pnginfo": {}})
    run.wait()

    (entry,) = run.outputs(report)["memorization_guard"]
    traces = [Trace.from_dict(trace) for trace in entry["traces"]]
    assert len(traces) == 2
    for trace in traces:
        assert trace.verdict == "likely copy"
        assert len(trace.steps) < STEPS
        assert trace.note == (
            "The run ended early: stopped, since every image of the batch had triggered. Nothing of the image is handed on: "
            "if a picture comes out, it is a plain one."
        )
    # As far as the last of both.
    assert max(trace.trigger_step for trace in traces) == len(traces[0].steps)
    images = run.images(save)
    assert len(images) == 2
    assert all(copy_score(image, EXACT) < 0.5 for image in images)
    assert run.outputs(passed) == {}
    assert run.outputs(stable)["text"] == ["False"]
    assert run.outputs(held)["text"] == ["2"]
    (said,) = run.outputs(why)["text"]
    assert said.startswith("0 of 2 images passed.\nImage 1 held back: ")
    assert "triggered at step" in said
    assert " ordinary images" in said


def test_an_ordinary_run_is_not_stopped(bench: Any, finish: Any) -> None:
    plain = finish(b := bench(None, text=ORDINARY), b.ksampler())
    result = finish(b := bench("stop", text=ORDINARY), b.ksampler())
    assert (result.runs[0][0].verdict, len(result.runs[0][0].steps), result.runs[0][0].note) == ("stable", STEPS, None)
    assert np.array_equal(plain.images[0], result.images[0])


def test_the_whole_prompt_ends_if_that_is_chosen(bench: Any, finish: Any, server: Any) -> None:
    b = bench("stop and end prompt")
    save = b.g.node("SaveImage", images=b.g.node("VAEDecode", samples=b.ksampler(), vae=b.lab[2])[0], filename_prefix="t")
    server.free(unload_models=False, free_memory=True)
    run = server.queue(b.g.prompt())
    with pytest.raises(RuntimeError, match=r"interrupted at node .* \(KSampler\)"):
        run.wait()
    assert run.outputs(save) == {}
    (trace,) = [event.data for event in run.events if event.type == "memorization_guard"][-1]["traces"]
    assert trace["verdict"] == "likely copy"
    assert trace["note"].startswith(
        "The run ended early: stopped, since every image of the batch had triggered, and the prompt with it. "
    )
    stable = finish(b := bench("stop and end prompt", text=ORDINARY), b.ksampler())
    assert (stable.runs[0][0].verdict, len(stable.images)) == ("stable", 1)


def test_nothing_is_stopped_without_a_profile(bench: Any, finish: Any) -> None:
    result = finish(b := bench("stop", profile=False), b.ksampler())
    assert (result.runs[0][0].verdict, len(result.runs[0][0].steps)) == ("unscored", STEPS)


def test_stopping_saves_calls_of_the_model_whatever_samples(in_comfyui: Any) -> None:
    result = in_comfyui(
        """
import comfy.sample, torch
sampling, lab = module("nodes.sampling"), module("nodes.lab")
model, clip, vae, profile = lab.LoadLabModel.execute().args
conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (args[0], "")]
latent = torch.zeros(1, 4, 16, 16)
calls = 0
def count(apply, parts):
    global calls
    calls += 1
    return apply(parts["input"], parts["timestep"], **parts["c"])
counted = model.clone()
counted.set_model_unet_function_wrapper(count)
for sampler in args[1]:
    row = []
    for mode in ("off", "trace", "stop"):
        guarded, log = sampling.guard(counted, mode=mode, profile=profile)
        calls = 0
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latent, 5)
            made = comfy.sample.sample(
                guarded, noise, 20, 7.5, sampler, "normal", *conds, latent, disable_pbar=True, seed=5
            )
        row += [calls, bool(torch.isfinite(made).all()), list(made.shape)]
    result[sampler] = [*row, log.runs()[0].traces[0].verdict]
""",
        EXACT,
        ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpm_fast", "uni_pc", "ddim", "lcm", "res_multistep"],
    )
    for sampler, (plain, *_, traced, _, _, stopped, finite, shape, verdict) in result.items():
        assert traced == plain + 3, sampler  # the prompt is suspicious, and asked about; then the run's own latent again
        assert stopped < plain / 2, sampler
        assert finite, sampler
        assert shape == [1, 4, 16, 16], sampler
        assert verdict == "likely copy", sampler
