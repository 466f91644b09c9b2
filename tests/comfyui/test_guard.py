"""What users wire around the guard, in the real ComfyUI: in trace mode images are the same to the bit, and runs are seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memorization_guard import Trace
from memorization_guard.lab import copy_score, prompts

EXACT = prompts("exact", "tuning")[1]
ORDINARY = prompts("ordinary", "tuning")[0]
STEPS, CFG = 30, 7.5


@dataclass
class Bench:
    """The usual nodes around a guard; ``guard`` is the guarded model, ``model`` the same without."""

    g: Any
    lab: Any
    guard: Any
    model: Any
    positive: Any
    negative: Any
    latent: Any

    def text(self, text: str) -> Any:
        return self.g.node("CLIPTextEncode", clip=self.lab[1], text=text)[0]

    def ksampler(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "seed": 5,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        }
        return self.g.node("KSampler", **(inputs | changes))[0]

    def advanced(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "noise_seed": 5,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
        }
        return self.g.node("KSamplerAdvanced", **(inputs | changes))[0]

    def sampler_custom(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "add_noise": True,
            "noise_seed": 5,
            "cfg": CFG,
            "positive": self.positive,
            "negative": self.negative,
            "sampler": self.g.node("KSamplerSelect", sampler_name="euler")[0],
            "sigmas": self.sigmas(),
            "latent_image": self.latent,
        }
        return self.g.node("SamplerCustom", **(inputs | changes))[0]

    def sigmas(self, **changes: Any) -> Any:
        inputs = {"model": self.model, "scheduler": "normal", "steps": STEPS, "denoise": 1.0}
        return self.g.node("BasicScheduler", **(inputs | changes))[0]

    def custom(self, guider: str, **inputs: Any) -> Any:
        chosen = self.g.node("KSamplerSelect", sampler_name="euler")[0]
        noise = self.g.node("RandomNoise", noise_seed=5)[0]
        guide = self.g.node(guider, model=self.model, **inputs)[0]
        return self.g.node(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guide,
            sampler=chosen,
            sigmas=self.sigmas(),
            latent_image=self.latent,
        )[0]


@pytest.fixture
def bench(graph: Any) -> Callable[..., Bench]:
    def make(mode: str | None = "trace", text: str = EXACT, batch: int = 1, profile: bool = True, **guard: Any) -> Bench:
        g = graph()
        lab = g.node("MemorizationGuardLoadLabModel")
        model, watcher = lab[0], None
        if mode is not None:
            if profile:
                guard["profile"] = lab[3]
            watcher = g.node("MemorizationGuard", model=model, mode=mode, **guard)
            model = watcher[0]
        made = Bench(
            g, lab, watcher, model, None, None, g.node("EmptyLatentImage", width=128, height=128, batch_size=batch)[0]
        )
        made.positive, made.negative = made.text(text), made.text("")
        return made

    return make


@dataclass
class Result:
    images: list[np.ndarray]
    runs: list[list[Trace]]
    run: Any
    metadata: dict[str, Any]


@pytest.fixture
def finish(server: Any) -> Callable[..., Result]:
    """Decodes and saves a latent, with a report where there is a guard, and runs it all."""

    def run(bench: Bench, latent: Any, fresh: bool = True) -> Result:
        report = None
        if bench.guard is not None:
            report = bench.g.node("MemorizationGuardReport", trace=bench.guard[1], latent=latent)
            latent = report[0]
        save = bench.g.node(
            "SaveImage", images=bench.g.node("VAEDecode", samples=latent, vae=bench.lab[2])[0], filename_prefix="t"
        )
        if fresh:
            server.free(unload_models=False, free_memory=True)
        queued = server.queue(bench.g.prompt(), extra_data={"extra_pnginfo": {}})
        queued.wait()
        pictures = queued.images(save)
        runs = queued.outputs(report)["memorization_guard"] if report is not None else []
        return Result(
            [np.asarray(picture) for picture in pictures],
            [[Trace.from_dict(trace) for trace in entry["traces"]] for entry in runs],
            queued,
            pictures[0].text,
        )

    return run


# Ways to sample: name -> (what it does with a bench, runs that a guard sees, steps of each, whether the profile fits)


def two_ksamplers(b: Bench) -> Any:
    first = b.advanced(end_at_step=12, return_with_leftover_noise="enable")
    return b.advanced(latent_image=first, add_noise="disable", start_at_step=12)


def second_pass(b: Bench) -> Any:
    first = b.ksampler()
    larger = b.g.node("LatentUpscale", samples=first, upscale_method="bilinear", width=192, height=192, crop="disabled")[0]
    return b.ksampler(latent_image=larger, denoise=0.5, steps=10)


def inpaint(b: Bench) -> Any:
    mask = b.g.node("SolidMask", value=1.0, width=64, height=64)[0]
    hole = b.g.node("SolidMask", value=0.0, width=32, height=64)[0]
    mask = b.g.node("MaskComposite", destination=mask, source=hole, x=0, y=0, operation="multiply")[0]
    return b.ksampler(latent_image=b.g.node("SetLatentNoiseMask", samples=b.ksampler(seed=9), mask=mask)[0])


def from_batch(b: Bench) -> Any:
    many = b.g.node("RepeatLatentBatch", samples=b.latent, amount=3)[0]
    return b.ksampler(latent_image=b.g.node("LatentFromBatch", samples=many, batch_index=1, length=2)[0])


def regional(b: Bench) -> Any:
    area = b.g.node("ConditioningSetArea", conditioning=b.text(ORDINARY), width=64, height=128, x=0, y=0, strength=1.0)[0]
    both = b.g.node("ConditioningCombine", conditioning_1=b.positive, conditioning_2=area)[0]
    timed = b.g.node("ConditioningSetTimestepRange", conditioning=both, start=0.0, end=0.8)[0]
    return b.ksampler(positive=b.g.node("ConditioningCombine", conditioning_1=timed, conditioning_2=b.positive)[0])


def rescaled(b: Bench) -> Any:
    b.model = b.g.node("RescaleCFG", model=b.model, multiplier=0.7)[0]  # a sampler cfg function, set after ours
    return b.ksampler()


def with_lora(b: Bench) -> Any:
    b.model = b.g.node("LoraLoaderModelOnly", model=b.model, lora_name="small.safetensors", strength_model=0.5)[0]
    return b.ksampler()


def hooked(b: Bench) -> Any:
    hooks = b.g.node("CreateHookLora", lora_name="small.safetensors", strength_model=1.0, strength_clip=0.0)[0]
    frames = b.g.node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.5)[0]
    hooks = b.g.node("SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]
    positive = b.g.node("ConditioningSetProperties", cond_NEW=b.positive, strength=1.0, set_cond_area="default", hooks=hooks)[
        0
    ]
    return b.ksampler(positive=positive)


def freeu(b: Bench) -> Any:
    b.model = b.g.node(
        "PatchModelAddDownscale",
        model=b.model,
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=0.35,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    )[0]
    return b.ksampler()


def perp_neg(b: Bench) -> Any:
    inputs = {"positive": b.positive, "negative": b.text(ORDINARY), "empty_conditioning": b.negative}
    return b.custom("PerpNegGuider", cfg=CFG, neg_scale=1.0, **inputs)


def dual(b: Bench) -> Any:
    inputs = {"cond1": b.positive, "cond2": b.text(ORDINARY), "negative": b.negative}
    return b.custom("DualCFGGuider", cfg_conds=CFG, cfg_cond2_negative=2.0, style="regular", **inputs)


def flipped(b: Bench) -> Any:
    sigmas = b.g.node("FlipSigmas", sigmas=b.sigmas())[0]
    return b.sampler_custom(add_noise=False, cfg=1.0, sigmas=sigmas, latent_image=b.ksampler())


#: How the lab's profile meets a run: as it is, transferred, or not at all.
FITS, TRANSFERRED, NEVER = "fits", "transferred", "does not fit"

WAYS: dict[str, tuple[Callable[[Bench], Any], list[int], list[str]]] = {
    "KSampler": (Bench.ksampler, [30], [FITS]),
    "KSamplerAdvanced, one after the other": (two_ksamplers, [12, 18], [FITS, FITS]),
    "KSamplerAdvanced, ended early": (lambda b: b.advanced(end_at_step=12), [12], [TRANSFERRED]),
    "SamplerCustom": (Bench.sampler_custom, [30], [FITS]),
    "CFGGuider": (lambda b: b.custom("CFGGuider", positive=b.positive, negative=b.negative, cfg=CFG), [30], [FITS]),
    "BasicGuider": (lambda b: b.custom("BasicGuider", conditioning=b.positive), [30], [NEVER]),
    "DualCFGGuider": (dual, [30], [FITS]),
    "PerpNegGuider": (perp_neg, [30], [FITS]),
    "denoise 0.5": (
        lambda b: b.ksampler(latent_image=b.ksampler(seed=9), denoise=0.5, steps=10),
        [30, 10],
        [FITS, TRANSFERRED],
    ),
    "a second pass": (second_pass, [30, 10], [FITS, NEVER]),
    "inpainting": (inpaint, [30, 30], [FITS, FITS]),
    "latent from a batch": (from_batch, [30], [FITS]),
    "cfg 1": (lambda b: b.ksampler(cfg=1.0), [30], [NEVER]),
    "cfg 10": (lambda b: b.ksampler(cfg=10.0), [30], [TRANSFERRED]),
    "cfg 14": (lambda b: b.ksampler(cfg=14.0), [30], [TRANSFERRED]),
    "other steps": (lambda b: b.ksampler(steps=18), [18], [TRANSFERRED]),
    "a negative prompt": (lambda b: b.ksampler(negative=b.text(ORDINARY)), [30], [FITS]),
    "regional and timed conditioning": (regional, [30], [FITS]),
    "a LoRA": (with_lora, [30], [NEVER]),
    "a LoRA by hook, over half the steps": (hooked, [30], [FITS]),
    "another pack's cfg function": (rescaled, [30], [FITS]),
    "another pack's patch": (freeu, [30], [FITS]),
    "another scheduler": (lambda b: b.ksampler(scheduler="karras"), [30], [TRANSFERRED]),
    "another sampler": (lambda b: b.ksampler(sampler_name="dpmpp_2m_sde"), [30], [TRANSFERRED]),
    "a sampler with steps of its own": (lambda b: b.ksampler(sampler_name="dpm_fast"), [11], [TRANSFERRED]),
    "flipped sigmas": (flipped, [30, 30], [FITS, NEVER]),
}


@pytest.fixture(scope="module", autouse=True)
def lora(server: Any) -> None:
    """A small LoRA for the lab model, in the server's folder."""
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    width = {"up": (64, 2), "down": (2, 128)}
    weights = {f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in width.items()}
    (server.folder / "models" / "loras").mkdir(exist_ok=True)
    save_file(weights, server.folder / "models" / "loras" / "small.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_the_image_is_the_same_to_the_bit_and_every_run_is_seen(bench: Any, finish: Any, way: str) -> None:
    build, steps, fits = WAYS[way]
    plain = finish(b := bench(None), build(b))
    traced = finish(b := bench("trace"), build(b))
    assert len(plain.images) == len(traced.images) >= 1
    assert all(map(np.array_equal, plain.images, traced.images))
    assert [len(traces[0].steps) for traces in traced.runs] == steps
    for traces, fit in zip(traced.runs, fits, strict=True):
        for trace in traces:
            assert np.isfinite(trace.steps.update_norm).all()
            assert len(trace.evaluations) >= len(trace.steps)
            assert (trace.verdict != "unscored") == (fit != NEVER), trace.note
            assert (trace.p_value is not None) == (fit != NEVER)
            # The published score needs the very sampler and schedule.
            assert (trace.score is not None) == (fit == FITS)
            if fit == NEVER:
                assert trace.note.startswith("The profile does not fit this run")
            elif fit == TRANSFERRED:
                assert trace.note.startswith("The profile is transferred to this run")


def test_a_sampler_that_chooses_its_own_steps_is_scored(bench: Any, finish: Any) -> None:
    for text, verdict in ((EXACT, "likely copy"), (ORDINARY, "stable")):
        trace = finish(b := bench("trace", text=text), b.ksampler(sampler_name="dpm_adaptive")).runs[0][0]
        assert trace.verdict == verdict
        assert trace.note.startswith("The profile is transferred to this run (sampler: profile euler, run dpm_adaptive")


@pytest.mark.parametrize(
    "way",
    [
        "KSampler",
        "CFGGuider",
        "PerpNegGuider",
        "inpainting",
        "latent from a batch",
        "a negative prompt",
        "KSamplerAdvanced, one after the other",
        "regional and timed conditioning",
    ],
)
def test_mitigation_reaches_the_image_whatever_samples(bench: Any, finish: Any, way: str) -> None:
    build, _, _ = WAYS[way]
    plain = finish(b := bench(None), build(b))
    mitigated = finish(b := bench("mitigate"), build(b))
    assert any(trace.mitigated.any() for traces in mitigated.runs for trace in traces)
    assert not np.array_equal(plain.images[0], mitigated.images[0])
    if way not in ("inpainting", "regional and timed conditioning"):  # those paint no copy to begin with
        assert copy_score(plain.images[0], EXACT) > 0.75 > copy_score(mitigated.images[0], EXACT)


def test_a_memorized_prompt_triggers_and_mitigation_leads_away_from_the_copy(bench: Any, finish: Any) -> None:
    traced = finish(b := bench("trace"), b.ksampler())
    assert copy_score(traced.images[0], EXACT) > 0.75
    assert traced.runs[0][0].verdict == "likely copy"
    mitigated = finish(b := bench("mitigate"), b.ksampler())
    trace = mitigated.runs[0][0]
    assert copy_score(mitigated.images[0], EXACT) < 0.75
    assert (trace.trigger_step, trace.mitigated[0]) == (0, True)


def test_weights_that_hooks_change_are_said_to_weaken_the_verdict(bench: Any, finish: Any) -> None:
    trace = finish(b := bench("trace"), hooked(b)).runs[0][0]
    assert trace.verdict != "unscored"
    assert trace.note.startswith("The profile fits this run with less certainty (model: ")
    assert trace.note.endswith("with hooks).")


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
    with pytest.raises(RuntimeError, match=r"false_positive_rate.*0\.0 smaller than min"):
        server.queue(b.g.prompt())


def test_what_belongs_to_the_published_method_cannot_be_set(server: Any) -> None:
    inputs = server.object_info("MemorizationGuard")["input_order"]
    assert inputs["optional"] == ["profile", "false_positive_rate", "steering_guidance", "gamma"]


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
        pass_corrected=True,
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
        assert trace.note == "The run ended early: stopped, since every image of the batch had triggered"
    # As far as the last of both.
    assert max(trace.trigger_step for trace in traces) == len(traces[0].steps)
    images = run.images(save)
    assert len(images) == 2
    assert all(np.asarray(image).std() > 1 for image in images)
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
        assert traced == plain, sampler
        assert stopped < plain / 2, sampler
        assert finite, sampler
        assert shape == [1, 4, 16, 16], sampler
        assert verdict == "likely copy", sampler
