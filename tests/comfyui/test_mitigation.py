"""What mitigation leaves of the lab model's copies, and what it does not touch, whatever samples and mixes predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

SETUP = """
sys.path.insert(0, args[0])
import torch, comfy.samplers
from comfyui_lab import Lab, Method, context_windows, methods
lab = Lab(module)
exact, ordinary = lab.lab.prompts("exact", "tuning")[0:9:8], lab.lab.prompts("ordinary", "tuning")[:2]

def sample(prompts, **how):
    how = {"steps": 12} | how
    size = 1 if how.get("method", Method()).single else len(prompts)
    parts = [lab.sample(prompts[i : i + size], 5 + i, **how) for i in range(0, len(prompts), size)]
    return torch.cat([part.latents for part in parts]), [trace for part in parts for trace in part.traces]

def earliest(flags):
    return int(flags.argmax()) if flags.any() else None

def row(trace=True, **how):
    # What comes of memorized and of ordinary prompts, without a guard, traced, and mitigated. They are two batches, since some
    # methods and samplers take a batch for one.
    found = {"identical": True, "finite": True}
    for name, prompts in (("exact", exact), ("ordinary", ordinary)):
        plain, _ = sample(prompts, **how)
        mitigated, corrected = sample(prompts, **how, mode="mitigate", profile=lab.profile)
        traced, traces = sample(prompts, **how, mode="trace", profile=lab.profile) if trace else (plain, corrected)
        found["identical"] &= torch.equal(plain, traced)
        found["finite"] &= bool(torch.isfinite(mitigated).all())
        found[name] = {
            "detail": [trace.detail for trace in traces],
            "verdicts": sorted({trace.verdict for trace in (*traces, *corrected)}),
            "triggered": [trace.trigger_step for trace in corrected],
            "corrected": [earliest(t.evaluations.corrected) for t in corrected],
            "untouched": torch.equal(plain, mitigated),
            "note": traces[0].note,
        }
        if prompts is exact:
            found["copies"], found["left"] = sum(lab.copies(plain, exact)), sum(lab.copies(mitigated, exact))
    return found
"""


def check(row: dict[str, Any], name: str, ordinary: bool = True) -> None:
    """Memorized prompts trigger, are corrected from then on, and leave no copy; ordinary images are what they were."""
    exact = row["exact"]
    assert row["identical"], name
    assert row["finite"], name
    assert exact["verdicts"] in (["corrected"], ["corrected", "likely copy"]), name
    assert None not in exact["triggered"], name
    assert exact["corrected"] == exact["triggered"], name
    assert row["left"] == 0, name
    if ordinary:
        assert row["ordinary"]["verdicts"] == ["stable"], name
        assert row["ordinary"]["untouched"], name


def test_every_sampler_is_corrected_from_its_first_evaluation_on(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP + "for sampler in comfy.samplers.KSampler.SAMPLERS: result[sampler] = row(sampler=sampler, trace=False)",
        BENCHMARKS,
        timeout=1200,
    )
    assert len(result) >= 42
    for sampler, found in result.items():
        # In 12 steps at this scale the third-order ones paint a mess of ordinary prompts, which is no ordinary image.
        check(found, sampler, ordinary=not sampler.startswith("dpmpp_3m_sde"))
    # Some paint no copy in 12 steps to begin with.
    assert sum(row["copies"] for row in result.values()) > len(result)


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
    for name, found in result.items():
        check(found, name)
        for group in ("exact", "ordinary"):
            # All begin with the same noise and the same predictions, whatever is made of them. SAG puts another attention into
            # the network, and where images are sampled one by one it is another batch, which both round differently.
            expected = result["CFG, guard after"][group]["detail"]
            assert found[group]["detail"] == pytest.approx(expected, rel=1e-3), name
    assert sum(row["copies"] for row in result.values()) > len(result)


def test_what_wraps_the_sampling_before_and_after_the_guard_leaves_no_copy(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
import comfy_extras.nodes_easycache as cache

def others(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, p: apply(p["input"], p["timestep"], **p["c"]))
    model.add_wrapper_with_key("calc_cond_batch", "theirs", lambda executor, *a: executor(*a))
    model.add_wrapper_with_key("predict_noise", "theirs", lambda executor, *a: executor(*a))
    model.set_model_sampler_pre_cfg_function(lambda a: [0.99 * a["conds_out"][0], *a["conds_out"][1:]])
    return model.clone()

ways = {
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


def test_predictions_of_context_windows_are_judged_joined_or_said_not_to_be_judged(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
for name in ("CFG", "PerpNeg"):
    how = {"method": Method(context_windows, methods()[name].guider)}
    plain, _ = sample(exact[:1], **how)
    mitigated, (trace,) = sample(exact[:1], **how, mode="mitigate", profile=lab.profile)
    result[name] = {
        "evaluations": len(trace.evaluations),
        "verdict": trace.verdict,
        "note": trace.note,
        "copies": lab.copies(plain, exact[:1]) + lab.copies(mitigated, exact[:1]),
    }
""",
        BENCHMARKS,
    )
    joined, apart = result["CFG"], result["PerpNeg"]
    assert (joined["evaluations"], joined["verdict"], joined["copies"]) == (12, "corrected", [True, False])
    assert (apart["evaluations"], apart["verdict"], apart["copies"]) == (0, "unscored", [True, True])
    assert apart["note"].startswith("In 12 of 12 steps no prediction of the network reached the guard")


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
        latents, _ = sample([*exact, *ordinary], method=Method(guarded, methods()[guider].guider))
        traces = [[trace for trace in log.runs()[0].traces] for log in logs]
        result[f"{guider}: {', then '.join(modes)}"] = {
            "left": sum(lab.copies(latents[:2], exact)),
            "verdicts": [[trace.verdict for trace in each] for each in traces],
            "corrected": [[bool(trace.evaluations.corrected.any()) for trace in each] for each in traces],
        }
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        modes = name.partition(": ")[2].split(", then ")
        assert found["left"] == (0 if "mitigate" in modes else 2), name
        # One of them sees the predictions as the network made them.
        seen = (["likely copy"] * 2 + ["stable"] * 2, ["corrected"] * 2 + ["stable"] * 2)
        assert any(each in found["verdicts"] for each in seen), name
        corrected = [mode for mode, images in zip(modes, found["corrected"], strict=True) if any(images)]
        assert set(corrected) <= {"mitigate"}, name
        assert len(corrected) >= (1 if "mitigate" in modes else 0), name


def test_another_size_a_second_pass_of_it_and_negative_prompts_change_no_verdict(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
import comfy.sample

def run(prompts, mode, size, denoise=1.0, latent=None, negative=""):
    model, log = lab.sampling.guard(lab.model, mode=mode, profile=lab.profile)
    latent = torch.zeros(len(prompts), 4, *size) if latent is None else latent
    noise = torch.cat([comfy.sample.prepare_noise(latent[:1], 5 + i) for i in range(len(prompts))])
    conds = [lab.encoded(prompts), lab.encoded([negative])]
    with torch.inference_mode():
        out = comfy.sample.sample(model, noise, 12, 7.5, "euler", "normal", *conds, latent, denoise=denoise, disable_pbar=True)
    return out, log.runs()[0].traces

LONG = "worst quality, low quality, blurry, watermark, text, ugly, deformed, extra fingers, jpeg artifacts"
for name, prompts in (("exact", exact), ("ordinary", ordinary)):
    first, _ = run(prompts, "trace", (16, 16))
    larger = torch.nn.functional.interpolate(first, size=(24, 24), mode="nearest")
    ways = {
        "wide": dict(size=(16, 24)), "tall": dict(size=(24, 16)), "large": dict(size=(32, 32)), "small": dict(size=(12, 12)),
        "second pass": dict(size=(24, 24), latent=larger, denoise=0.6),
        "a long negative prompt": dict(size=(16, 16), negative=LONG),
        "a memorized negative prompt": dict(size=(16, 16), negative=lab.lab.prompts("exact", "tuning")[1]),
    }
    for way, how in ways.items():
        out, traces = run(prompts, "mitigate", **how)
        plain, _ = run(prompts, "trace", **how)
        result[f"{name}: {way}"] = {
            "verdicts": [trace.verdict for trace in traces],
            "corrected": [bool(trace.evaluations.corrected[0]) for trace in traces],
            "untouched": torch.equal(out, plain),
            "left": sum(lab.copies(out, prompts)) if prompts is exact and out.shape[2:] == (16, 16) else 0,
        }
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        memorized = name.startswith("exact")
        assert found["verdicts"] == (["corrected"] * 2 if memorized else ["stable"] * 2), name
        assert found["corrected"] == [memorized] * 2, name
        assert found["untouched"] == (not memorized), name
        assert found["left"] == 0, name


def test_without_guidance_the_answers_are_judged(in_comfyui: Any) -> None:
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
    latents, traces = sample(exact, method=Method(guider=guider), mode="mitigate", profile=lab.profile)
    plain, _ = sample(exact, method=Method(guider=guider))
    result[name] = {
        "identical": torch.equal(latents, plain),
        "verdicts": [trace.verdict for trace in traces],
        "note": traces[0].note,
        "evaluations": len(traces[0].evaluations),
    }
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        assert not found["identical"], name
        assert found["verdicts"] == ["corrected"] * 2, name
        assert found["evaluations"] == 12, name
