"""What mitigation leaves of the lab model's copies, and what it does not touch, whatever samples and mixes predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

SETUP = """
sys.path.insert(0, args[0])
import torch, comfy.samplers
from comfyui_lab import Lab, Method, methods
lab = Lab(module)
exact, ordinary = lab.lab.prompts("exact", "tuning")[:3], lab.lab.prompts("ordinary", "tuning")[:3]
prompts, copied = [*exact, *ordinary], slice(0, 3)

def sample(**how):
    how = {"steps": 12} | how
    if how.get("method", Method()).single:
        each = [lab.sample([prompt], 5 + i, **how) for i, prompt in enumerate(prompts)]
        return torch.cat([one.latents for one in each]), [trace for one in each for trace in one.traces]
    sampled = lab.sample(prompts, 5, **how)
    return sampled.latents, sampled.traces

def row(**how):
    # What a plain, a traced and a mitigated run made of three memorized and three ordinary prompts.
    plain, _ = sample(**how)
    traced, traces = sample(**how, mode="trace", profile=lab.profile)
    mitigated, corrected = sample(**how, mode="mitigate", profile=lab.profile)
    return {
        "identical": torch.equal(plain, traced),
        "first p-values": [float(trace.evaluations.p_value[0]) for trace in traces],
        "verdicts": [trace.verdict for trace in traces],
        "verdicts when mitigated": [trace.verdict for trace in corrected],
        "first corrected": [int(e.corrected.argmax()) for e in (t.evaluations for t in corrected) if e.corrected.any()],
        "copies": sum(lab.copies(plain[copied], exact)),
        "left": sum(lab.copies(mitigated[copied], exact)),
        "ordinary untouched": torch.equal(plain[3:], mitigated[3:]),
        "finite": bool(torch.isfinite(mitigated).all()),
        "notes": sorted({str(trace.note) for trace in traces}),
    }
"""

VERDICTS = ["likely copy"] * 3 + ["stable"] * 3


def check(row: dict[str, Any], name: str) -> None:
    """A row in which memorized prompts trigger at once and no copy is left, and ordinary ones are what they were."""
    assert row["identical"], name
    assert row["verdicts"] == row["verdicts when mitigated"] == VERDICTS, name
    assert row["first corrected"] == [0, 0, 0], name
    assert row["left"] == 0, name
    assert row["ordinary untouched"], name
    assert row["finite"], name


def test_every_sampler_is_corrected_from_the_evaluation_that_triggers(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP + "for sampler in comfy.samplers.KSampler.SAMPLERS: result[sampler] = row(sampler=sampler)",
        BENCHMARKS,
        timeout=1200,
    )
    assert len(result) >= 42
    for sampler, found in result.items():
        check(found, sampler)
    # Some paint no copy in 12 steps to begin with.
    assert sum(row["copies"] for row in result.values()) > 2 * len(result)


def test_guidance_methods_before_and_after_the_guard_change_no_verdict_and_leave_no_copy(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
for name, method in methods().items():
    for first in ((False,) if method.guider else (False, True)):
        result[f"{name}, guard {'before' if first else 'after'}"] = row(method=method, guard_first=first)
""",
        BENCHMARKS,
        timeout=1200,
    )
    assert len(result) >= 30
    expected = result["CFG, guard after"]["first p-values"]
    for name, found in result.items():
        check(found, name)
        # All begin with the same noise and the same predictions, whatever is made of them; sampled one by one, these are
        # another batch, which rounds differently.
        assert found["first p-values"] == (pytest.approx(expected, rel=0.02) if "Renorm" in name else expected), name
    assert sum(row["copies"] for row in result.values()) > 2 * len(result)


def test_what_wraps_the_sampling_before_and_after_the_guard_leaves_no_copy(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
import comfy.context_windows, comfy_extras.nodes_easycache as cache
from comfy.context_windows import IndexListContextHandler, get_matching_context_schedule, get_matching_fuse_method

def windows(model):
    model = model.clone()
    model.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule("standard_static"),
        fuse_method=get_matching_fuse_method("pyramid"), context_length=12, context_overlap=6, dim=3)
    return model

def others(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, p: apply(p["input"], p["timestep"], **p["c"]))
    model.add_wrapper_with_key("calc_cond_batch", "theirs", lambda executor, *a: executor(*a))
    model.add_wrapper_with_key("predict_noise", "theirs", lambda executor, *a: executor(*a))
    model.set_model_sampler_pre_cfg_function(lambda a: [0.99 * a["conds_out"][0], *a["conds_out"][1:]])
    return model.clone()

ways = {
    "context windows": windows,
    "EasyCache": lambda model: cache.EasyCacheNode.execute(model, 0.02, 0.15, 0.95, False).args[0],
    "LazyCache": lambda model: cache.LazyCacheNode.execute(model, 0.02, 0.15, 0.95, False).args[0],
    "other packs": others,
}
for name, patch in ways.items():
    for first in (False, True):
        result[f"{name}, guard {'before' if first else 'after'}"] = row(method=Method(patch), guard_first=first)
""",
        BENCHMARKS,
        timeout=600,
    )
    for name, found in result.items():
        check(found, name)


def test_two_guards_in_a_row_both_work(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
for guider in ("CFG", "PerpNeg"):
    for modes in (("trace", "mitigate"), ("mitigate", "trace"), ("mitigate", "mitigate"), ("trace", "trace")):
        logs = []
        def guarded(model):
            for mode in modes:
                model, log = lab.sampling.guard(model, mode=mode, profile=lab.profile)
                logs.append(log)
            return model.clone()
        latents, _ = sample(method=Method(guarded, methods()[guider].guider))
        traces = [[trace for trace in log.runs()[0].traces] for log in logs]
        result[f"{guider}: {', then '.join(modes)}"] = {
            "left": sum(lab.copies(latents[copied], exact)),
            "verdicts": [[trace.verdict for trace in each] for each in traces],
            "corrected": [[bool(trace.evaluations.corrected.any()) for trace in each] for each in traces],
        }
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        modes = name.partition(": ")[2].split(", then ")
        assert found["left"] == (3 if "mitigate" not in modes else 0), name
        # One of them sees the predictions as the network made them.
        assert VERDICTS in found["verdicts"], name
        corrected = [mode for mode, images in zip(modes, found["corrected"], strict=True) if any(images)]
        assert set(corrected) <= {"mitigate"}, name
        assert len(corrected) >= (1 if "mitigate" in modes else 0), name


def test_without_guidance_the_one_prediction_is_judged_alone(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
import comfy_extras.nodes_custom_sampler as custom

def unguided(model, positive, negative):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    return guider

def basic(model, positive, negative):
    guider = custom.Guider_Basic(model)
    guider.set_conds(positive)
    return guider

for name, guider in {"CFG 1": unguided, "BasicGuider": basic}.items():
    latents, traces = sample(method=Method(guider=guider), mode="trace", profile=lab.profile)
    result[name] = {
        "guidance": bool(any((trace.evaluations.guidance == trace.evaluations.guidance).any() for trace in traces)),
        "velocity": bool(all((trace.evaluations.velocity > 0).all() for trace in traces)),
        "note": str(traces[0].note),
    } | row(method=Method(guider=guider))
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        assert found["identical"], name
        assert found["velocity"], name
        assert not found["guidance"], name
