"""What users wire around the guard: traced images are the same to the bit, and mitigation reaches every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memorization_guard.lab import copy_score, prompts

EXACT = prompts("exact", "tuning")[0]
ORDINARY = prompts("ordinary", "tuning")[0]
CFG = 7.5

# Ways to sample: name -> (what it does with a bench, runs that a guard sees, steps of each, whether the profile fits)


def two_ksamplers(b: Any) -> Any:
    first = b.advanced(end_at_step=12, return_with_leftover_noise="enable")
    return b.advanced(latent_image=first, add_noise="disable", start_at_step=12)


def second_pass(b: Any) -> Any:
    first = b.ksampler()
    larger = b.g.node("LatentUpscale", samples=first, upscale_method="bilinear", width=192, height=192, crop="disabled")[0]
    return b.ksampler(latent_image=larger, denoise=0.5, steps=10)


def inpaint(b: Any) -> Any:
    mask = b.g.node("SolidMask", value=1.0, width=64, height=64)[0]
    hole = b.g.node("SolidMask", value=0.0, width=32, height=64)[0]
    mask = b.g.node("MaskComposite", destination=mask, source=hole, x=0, y=0, operation="multiply")[0]
    return b.ksampler(latent_image=b.g.node("SetLatentNoiseMask", samples=b.ksampler(seed=9), mask=mask)[0])


def from_batch(b: Any) -> Any:
    many = b.g.node("RepeatLatentBatch", samples=b.latent, amount=3)[0]
    return b.ksampler(latent_image=b.g.node("LatentFromBatch", samples=many, batch_index=1, length=2)[0])


def regional(b: Any) -> Any:
    area = b.g.node("ConditioningSetArea", conditioning=b.text(ORDINARY), width=64, height=128, x=0, y=0, strength=1.0)[0]
    both = b.g.node("ConditioningCombine", conditioning_1=b.positive, conditioning_2=area)[0]
    timed = b.g.node("ConditioningSetTimestepRange", conditioning=both, start=0.0, end=0.8)[0]
    return b.ksampler(positive=b.g.node("ConditioningCombine", conditioning_1=timed, conditioning_2=b.positive)[0])


def rescaled(b: Any) -> Any:
    b.model = b.g.node("RescaleCFG", model=b.model, multiplier=0.7)[0]  # a sampler cfg function, set after ours
    return b.ksampler()


def with_lora(b: Any) -> Any:
    b.model = b.lora()
    return b.ksampler()


def hooked(b: Any) -> Any:
    hooks = b.g.node("CreateHookLora", lora_name="small.safetensors", strength_model=1.0, strength_clip=0.0)[0]
    frames = b.g.node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.5)[0]
    hooks = b.g.node("SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]
    positive = b.g.node("ConditioningSetProperties", cond_NEW=b.positive, strength=1.0, set_cond_area="default", hooks=hooks)[
        0
    ]
    return b.ksampler(positive=positive)


def freeu(b: Any) -> Any:
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


def perp_neg(b: Any) -> Any:
    inputs = {"positive": b.positive, "negative": b.text(ORDINARY), "empty_conditioning": b.negative}
    return b.custom("PerpNegGuider", cfg=CFG, neg_scale=1.0, **inputs)


def dual(b: Any) -> Any:
    inputs = {"cond1": b.positive, "cond2": b.text(ORDINARY), "negative": b.negative}
    return b.custom("DualCFGGuider", cfg_conds=CFG, cfg_cond2_negative=2.0, style="regular", **inputs)


def flipped(b: Any) -> Any:
    sigmas = b.g.node("FlipSigmas", sigmas=b.sigmas())[0]
    return b.sampler_custom(add_noise=False, cfg=1.0, sigmas=sigmas, latent_image=b.ksampler())


#: How the lab's profile meets a run: as it is, transferred, or not at all.
FITS, TRANSFERRED, NEVER = "fits", "transferred", "does not fit"

WAYS: dict[str, tuple[Callable[[Any], Any], list[int], list[str]]] = {
    "KSampler": (lambda b: b.ksampler(), [30], [FITS]),
    "KSamplerAdvanced, one after the other": (two_ksamplers, [12, 18], [FITS, FITS]),
    "KSamplerAdvanced, ended early": (lambda b: b.advanced(end_at_step=12), [12], [TRANSFERRED]),
    "SamplerCustom": (lambda b: b.sampler_custom(), [30], [FITS]),
    "CFGGuider": (lambda b: b.custom("CFGGuider", positive=b.positive, negative=b.negative, cfg=CFG), [30], [FITS]),
    "BasicGuider": (lambda b: b.custom("BasicGuider", conditioning=b.positive), [30], [TRANSFERRED]),
    "DualCFGGuider": (dual, [30], [FITS]),
    "PerpNegGuider": (perp_neg, [30], [FITS]),
    "denoise 0.5": (
        lambda b: b.ksampler(latent_image=b.ksampler(seed=9), denoise=0.5, steps=10),
        [30, 10],
        [FITS, TRANSFERRED],
    ),
    "a second pass": (second_pass, [30, 10], [FITS, TRANSFERRED]),
    "inpainting": (inpaint, [30, 30], [FITS, FITS]),
    "latent from a batch": (from_batch, [30], [FITS]),
    "cfg 1": (lambda b: b.ksampler(cfg=1.0), [30], [TRANSFERRED]),
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
    "flipped sigmas": (flipped, [30, 30], [FITS, TRANSFERRED]),
}


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
            else:
                assert "transferred" not in (trace.note or "")  # the verdict does not depend on it


def test_a_sampler_that_chooses_its_own_steps_is_scored(bench: Any, finish: Any) -> None:
    for text, verdict in ((EXACT, "likely copy"), (ORDINARY, "stable")):
        trace = finish(b := bench("trace", text=text), b.ksampler(sampler_name="dpm_adaptive")).runs[0][0]
        assert trace.verdict == verdict
        assert trace.note is None
        assert trace.score is None


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
    # Some ways paint no copy to begin with, and a sampler that goes on from another's noise is judged anew.
    if way not in ("inpainting", "regional and timed conditioning", "KSamplerAdvanced, one after the other"):
        assert copy_score(plain.images[0], EXACT) > 0.75 > copy_score(mitigated.images[0], EXACT)


def test_weights_that_hooks_change_are_said_to_weaken_the_verdict(bench: Any, finish: Any) -> None:
    trace = finish(b := bench("trace"), hooked(b)).runs[0][0]
    assert trace.verdict != "unscored"
    assert trace.note.startswith("The profile fits this run with less certainty (model: ")
    assert trace.note.endswith("with hooks).")
