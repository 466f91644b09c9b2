"""Samplers, schedulers and kinds of model, inside ComfyUI: what the guard sees of them, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).with_name("tiny_models.py").read_text(encoding="utf-8")

SETUP = (
    TINY
    + """
import numpy as np
sampling, models = module("nodes.sampling"), module("nodes.models")
core = sys.modules[pack.__name__ + ".memorization_guard"]
runs_of = sys.modules[core.__name__ + ".core.calibration"].ReferenceRuns
#: By which nearly every image of these models counts as a copy.
ALMOST_ALL = core.Thresholds(false_positive_rate=0.999)

def traces_of(log):
    return [trace for run in log.runs() for trace in run.traces]

def profile_of(model, name, **settings):
    guarded, log = sampling.guard(model, mode="trace")
    sample(guarded, name, batch=8, seed=11, **settings)
    runs = runs_of(None, name)
    runs.add(traces_of(log), 8)
    return runs.profile()[0]
"""
)


def test_every_sampler_on_every_kind_of_model(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
for name in ("SD 1", "SD 2 v", "SD3"):
    model = tiny(name)
    profile = profile_of(model, name)
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        if sampler == "dpm_adaptive" and name != "SD 1":
            continue  # with random weights it never ends
        plain = sample(model, name, sampler)
        guarded, log = sampling.guard(model, mode="trace", profile=profile)
        traced = sample(guarded, name, sampler)
        (run,) = log.runs()
        trace = run.traces[0]
        row = {
            "identical": torch.equal(plain, traced),
            "images": len(run.traces),
            "steps": len(trace.steps),
            "evaluations": len(trace.evaluations),
            "error": str(run.monitor.error),
            "kind": trace.settings.prediction_type,
            "sampler": trace.settings.sampler,
            "finite": bool(np.isfinite(trace.steps.update_norm).all() and np.isfinite(trace.evaluations.guidance).all()),
            "judged": trace.verdict != "unscored",
        }
        guarded, log = sampling.guard(model, mode="mitigate", profile=profile, thresholds=ALMOST_ALL)
        corrected = sample(guarded, name, sampler)
        trace = traces_of(log)[0]
        row |= {
            "corrected at once": bool(trace.evaluations.corrected[0]),
            "differs": not torch.equal(plain, corrected),
            "corrected finite": bool(torch.isfinite(corrected).all()),
            "corrected steps": len(trace.steps),
        }
        result[f"{name}, {sampler}"] = row
""",
        timeout=900,
    )
    assert len(result) > 100
    kinds = {"SD 1": "epsilon", "SD 2 v": "v_prediction", "SD3": "flow_prediction"}
    for name, row in result.items():
        model, sampler = name.split(", ")
        assert row["identical"], name
        assert row["images"] == 2, name
        assert row["error"] == "None", name
        assert row["kind"] == kinds[model], name
        assert row["finite"], name
        assert row["judged"], name
        assert row["evaluations"] >= row["steps"] > 0, name
        if sampler not in ("dpm_fast", "dpm_adaptive"):
            assert row["steps"] == 6, name
            assert row["corrected steps"] == 6, name
        assert row["corrected at once"], name
        assert row["differs"], name
        assert row["corrected finite"], name


def test_every_scheduler(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
for name in ("SD 1", "Flux"):
    model = tiny(name)
    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        plain = sample(model, name, scheduler=scheduler, steps=12)
        guarded, log = sampling.guard(model, mode="trace")
        traced = sample(guarded, name, scheduler=scheduler, steps=12)
        trace = traces_of(log)[0]
        result[f"{name}, {scheduler}"] = [
            torch.equal(plain, traced), len(trace.steps) == trace.settings.steps, trace.note,
            bool(np.all(np.diff(trace.steps.sigma) < 0)),
        ]
"""
    )
    assert len(result) >= 16
    assert all(row == [True, True, None, True] for row in result.values()), result


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_class_of_model_at_every_precision(in_comfyui: Any, dtype: str) -> None:
    result = in_comfyui(
        SETUP
        + """
for name in MODELS:
    model = tiny(name, getattr(torch, args[0]))
    plain = sample(model, name)
    guarded, log = sampling.guard(model, mode="trace")
    traced = sample(guarded, name)
    run = log.runs()[0]
    guarded, log = sampling.guard(model, mode="mitigate", profile=profile_of(model, name), thresholds=ALMOST_ALL)
    corrected = sample(guarded, name)
    settings = run.traces[0].settings
    mitigated, finite = any(trace.mitigated.any() for trace in traces_of(log)), torch.isfinite(corrected).all()
    result[name] = [
        torch.equal(plain, traced), str(run.monitor.error), len(run.traces[0].steps), settings.model, settings.prediction_type,
        list(settings.latent_shape), settings.model_hash, bool(mitigated), bool(finite),
    ]
""",
        dtype,
    )
    expected = {
        "SD 1": ("SD15", "epsilon", [4, 8, 8]),
        "SD 2 v": ("SD20", "v_prediction", [4, 8, 8]),
        "SDXL": ("SDXL", "epsilon", [4, 8, 8]),
        "SD3": ("SD3", "flow_prediction", [16, 8, 8]),
        "Flux": ("Flux", "flow_prediction", [16, 8, 8]),
        "Wan": ("WAN21_T2V", "flow_prediction", [16, 3, 8, 8]),
        "Wan, from an image": ("WAN21_I2V", "flow_prediction", [16, 3, 8, 8]),
    }
    for name, (model, kind, shape) in expected.items():
        identical, error, steps, *said, model_hash, mitigated, finite = result[name]
        assert (identical, error, steps, mitigated, finite) == (True, "None", 6, True, True), name
        assert said == [model, kind, shape], name
        assert len(model_hash) == 16, name
    assert len({row[6] for row in result.values()}) == len(expected)


def test_a_model_is_known_by_its_weights_and_patches_wherever_it_is_loaded(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
def hash_of(model):
    models._hashes.clear()
    return models.model_hash(model)

model = tiny("SD 1")
key = "diffusion_model.input_blocks.0.0.weight"
weight = dict(model.model.named_parameters())[key]
lora = model.clone()
lora.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)),))}, 0.7)
weaker = model.clone()
weaker.add_patches({key: lora.patches[key][0][1]}, 0.5)
result["plain"] = hash_of(model)
result["half"] = hash_of(tiny("SD 1", torch.float16))
result["lora"], result["weaker"] = hash_of(lora), hash_of(weaker)
sample(lora, "SD 1")
result["lora loaded"], result["plain while the lora is loaded"] = hash_of(lora), hash_of(model)
comfy.model_management.unload_all_models()
result["unloaded"] = hash_of(model)
result["cached"] = models.model_hash(model) == models.model_hash(model.clone()) == result["plain"]
"""
    )
    assert result.pop("cached")
    groups = [{"plain", "half", "plain while the lora is loaded", "unloaded"}, {"lora", "lora loaded"}, {"weaker"}]
    assert {frozenset(k for k in result if result[k] == value) for value in result.values()} == set(map(frozenset, groups))


def test_the_guard_leaves_no_mark_on_the_model_or_the_sampler(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
import copy
model = tiny("SD 1")
before = copy.deepcopy(model.model_options), copy.deepcopy(model.wrappers), dict(vars(model.model))
guarded, log = sampling.guard(model, mode="trace")
sampler = comfy.samplers.sampler_object("euler")
function = sampler.sampler_function
conds = [[[torch.randn(1, 7, 64), {}]] for _ in range(2)]
latent = torch.zeros(1, 4, 8, 8)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)

def run(model, sampler, callback=None):
    with torch.inference_mode():
        return comfy.sample.sample_custom(model, comfy.sample.prepare_noise(latent, 1), 4.0, sampler, sigmas, *conds, latent,
                                          callback=callback, disable_pbar=True, seed=1)

run(guarded, sampler)
result["sampler"] = sampler.sampler_function is function
result["options"] = model.model_options == before[0] and model.wrappers == before[1]
result["guarded"] = [sampling.is_guarded(model), sampling.is_guarded(guarded), sampling.is_guarded(guarded.clone())]

# An interrupt on the way, as ComfyUI raises it.
def stop(step, *_):
    if step == 2:
        raise comfy.model_management.InterruptProcessingException()
try:
    run(guarded, sampler, stop)
except comfy.model_management.InterruptProcessingException:
    result["interrupted"] = True
result["sampler after"] = sampler.sampler_function is function
result["note"] = traces_of(log)[-1].note
result["again"] = torch.equal(run(guarded, sampler), run(model, sampler))

# A sampler object of somebody else's, without a sampler function.
class Own(comfy.samplers.Sampler):
    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args):
        return noise * 0.5
result["own"] = torch.equal(run(guarded, Own()), run(model, Own()))
"""
    )
    assert result == {
        "sampler": True,
        "options": True,
        "guarded": [False, True, True],
        "interrupted": True,
        "sampler after": True,
        "note": "The run ended early: interrupted after 2 of 6 steps",
        "again": True,
        "own": True,
    }


def test_other_packs_patches_before_and_after_ours(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
def others(model):
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] * 0.95 + 0.05 * a["uncond_denoised"])
    model.set_model_sampler_cfg_function(lambda a: a["uncond"] + (a["cond"] - a["uncond"]) * a["cond_scale"] * 0.9)
    model.set_model_unet_function_wrapper(lambda apply, p: apply(p["input"], p["timestep"], **p["c"]) * 0.98)
    return model

model = tiny("SD 1")
plain = sample(others(model), "SD 1")
for order, guarded in {
    "before": (lambda: (lambda m, log: (others(m), log))(*sampling.guard(model, mode="trace"))),
    "after": (lambda: sampling.guard(others(model), mode="trace")),
}.items():
    guarded, log = guarded()
    same = torch.equal(plain, sample(guarded, "SD 1"))
    result[order] = [same, len(traces_of(log)[0].steps), str(log.runs()[0].monitor.error)]
"""
    )
    assert result == {"before": [True, 6, "None"], "after": [True, 6, "None"]}


@pytest.mark.parametrize("where", ["prediction", "step", "begin", "settings"])
def test_if_our_code_fails_the_run_goes_on_and_it_is_said_once(in_comfyui: Any, where: str) -> None:
    result = in_comfyui(
        SETUP
        + """
import logging
said = []
class Listen(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING and "Memorization Guard" in record.getMessage():
            said.append(record.getMessage())
logging.getLogger().addHandler(Listen())
model = tiny("SD 1")
plain = sample(model, "SD 1")

def broken(*args, **kwargs):
    raise RuntimeError("broken on purpose")
if args[0] == "prediction":
    core.core.monitor.Meter.measure = broken
elif args[0] == "step":
    core.core.monitor.row_norm = broken
elif args[0] == "begin":
    sampling.TraceLog.begin = broken
else:
    models.model_hash = broken
guarded, log = sampling.guard(model, mode="trace")
result["identical"] = torch.equal(plain, sample(guarded, "SD 1"))
result["said"] = len(said)
""",
        where,
    )
    assert result == {"identical": True, "said": 1}
