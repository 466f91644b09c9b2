"""The lab model sampled by ComfyUI in this process, with and without guidance methods; for benchmarks and tests."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

CFG = 7.5
#: The scale of CFG++ is another one, of 1 to 2.
CFG_PP = 1.5


def load() -> Any:
    """ComfyUI's modules on the path, and this repository as a pack of it: ``module("nodes.lab")`` gives a module."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import main  # noqa: F401

    import nodes

    if not asyncio.run(nodes.load_custom_node(str(REPOSITORY))):
        raise SystemExit("ComfyUI could not load the pack")
    name = str(REPOSITORY).replace(".", "_x_")
    return lambda part: importlib.import_module(f".{part}", name)


@dataclass(frozen=True)
class Method:
    """A way to mix predictions: what patches a model for it, and the guider, where it needs one of its own."""

    patch: Callable[[Any], Any] = lambda model: model
    guider: Callable[[Any, Any, Any], Any] | None = None
    #: Whether it takes images of a batch for one; those are sampled one by one.
    single: bool = False


@dataclass(frozen=True)
class Sampled:
    """What came of some prompts: latents, their traces (none without a guard), and the processor's time in seconds."""

    latents: Any
    traces: list[Any]
    seconds: float


class Lab:
    """The lab model, sampled by ComfyUI; ``module`` gives modules of the pack."""

    def __init__(self, module: Any) -> None:
        self.sampling, self.lab = module("nodes.sampling"), module("memorization_guard.lab")
        self._encoder = module("nodes.prompts").Encoder
        self.model, self.clip, self.vae, self.profile = module("nodes.lab").LoadLabModel.execute().args

    def sample(
        self,
        prompts: list[str],
        seed: int,
        *,
        sampler: str = "euler",
        steps: int = 20,
        scheduler: str = "normal",
        method: Method | None = None,
        guard_first: bool = False,
        **guard: Any,
    ) -> Sampled:
        """Samples the prompts as one batch, image ``i`` from the noise of ``seed + i``.

        Args:
            guard_first: whether the guard comes before the method's patch.
            guard: settings of the guard; with none, the model is not guarded.
        """
        import comfy.sample
        import comfy.samplers
        import torch

        method, model, logs = method or Method(), self.model, []

        def guarded(model: Any) -> Any:
            if guard:
                model, log = self.sampling.guard(model, **guard)
                logs.append(log)
            return model

        model = method.patch(guarded(model)) if guard_first else guarded(method.patch(model))
        positive, negative = self.encoded(prompts), self.encoded([""])
        if method.guider is not None:
            guider = method.guider(model, positive, negative)
        else:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(CFG_PP if sampler.endswith("cfg_pp") else CFG)
        # Some samplers take another part of the schedule, which ComfyUI's own KSampler knows.
        schedule = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, scheduler).sigmas
        latent = torch.zeros(len(prompts), 4, 16, 16)
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed + i) for i in range(len(prompts))])
        began = time.process_time()
        with torch.inference_mode():
            chosen = comfy.samplers.sampler_object(sampler)
            latents = guider.sample(noise, latent, chosen, schedule, disable_pbar=True, seed=seed)
        return Sampled(latents, logs[0].runs()[0].traces if logs else [], time.process_time() - began)

    def encoder(self, prompts: list[str]) -> Any:
        """What a guard with the CLIP connected finds these prompts with."""
        return self._encoder(self.clip, lambda: prompts)

    def encoded(self, prompts: list[str]) -> Any:
        """One conditioning for a batch of prompts."""
        import torch

        each = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))[0] for prompt in prompts]
        options = {"pooled_output": torch.cat([one[1]["pooled_output"] for one in each])}
        return [[torch.cat([one[0] for one in each]), options]]

    def copies(self, latents: Any, prompts: list[str]) -> list[bool]:
        """Which latents are copies of what was duplicated under their prompts."""
        import torch

        with torch.inference_mode():
            images = (self.vae.decode(latents).clamp(0, 1) * 255).round().byte().numpy()
        scores = [self.lab.copy_score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [score > self.lab.COPY_THRESHOLD for score in scores]


def methods() -> dict[str, Method]:
    """Ways to mix predictions that ComfyUI has, and dynamic thresholding, with the settings that their nodes propose."""
    from comfy_extras import (
        nodes_apg,
        nodes_cfg,
        nodes_custom_sampler,
        nodes_eps,
        nodes_fresca,
        nodes_lumina2,
        nodes_mahiro,
        nodes_model_advanced,
        nodes_pag,
        nodes_perpneg,
        nodes_sag,
        nodes_slg,
        nodes_tcfg,
    )

    def node(kind: Any, *values: Any, single: bool = False) -> Method:
        return Method(lambda model: kind.execute(model, *values).args[0], single=single)

    def perp_neg(model: Any, positive: Any, negative: Any) -> Any:
        guider = nodes_perpneg.Guider_PerpNeg(model)
        guider.set_conds(positive, negative, negative)
        guider.set_cfg(CFG, 1.0)
        return guider

    def dual(nested: bool) -> Callable[[Any, Any, Any], Any]:
        def guider(model: Any, positive: Any, negative: Any) -> Any:
            guider = nodes_custom_sampler.Guider_DualCFG(model)
            guider.set_conds(positive, negative, negative)
            guider.set_cfg(CFG, 1.5, nested)
            return guider

        return guider

    return {
        "CFG": Method(),
        "RescaleCFG": Method(lambda model: nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0]),
        "APG": node(nodes_apg.APG, 1.0, 5.0, 0.0),
        "TCFG": node(nodes_tcfg.TCFG),
        "CFGNorm": node(nodes_cfg.CFGNorm, 1.0),
        "CFG-Zero*": node(nodes_cfg.CFGZeroStar),
        "Mahiro": node(nodes_mahiro.Mahiro),
        "RenormCFG": node(nodes_lumina2.RenormCFG, 100, 1.0, single=True),
        "dynamic thresholding": Method(_dynamic_thresholding),
        "FreSca": node(nodes_fresca.FreSca, 1.0, 1.25, 20),
        "Epsilon Scaling": node(nodes_eps.EpsilonScaling, 1.005),
        "PAG": node(nodes_pag.PerturbedAttentionGuidance, 3.0),
        "SAG": node(nodes_sag.SelfAttentionGuidance, 0.5, 2.0),
        "SLG": node(nodes_slg.SkipLayerGuidanceDiT, 3.0, 0.01, 0.15, "7, 8, 9", "7, 8, 9"),
        "SLG, simple": node(nodes_slg.SkipLayerGuidanceDiTSimple, 0.0, 1.0, "7, 8, 9", "7, 8, 9"),
        "PerpNeg": Method(guider=perp_neg),
        "DualCFG": Method(guider=dual(False)),
        "DualCFG, nested": Method(guider=dual(True)),
    }


def context_windows(model: Any) -> Any:
    """A clone of the model that sees its latents, of 16 places a side, through windows of 15."""
    from comfy.context_windows import IndexListContextHandler, get_matching_context_schedule, get_matching_fuse_method

    model = model.clone()
    model.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule("standard_static"),
        fuse_method=get_matching_fuse_method("pyramid"),
        context_length=15,
        context_overlap=14,
        dim=3,
    )
    return model


def _dynamic_thresholding(model: Any, mimic: float = 4.0, percentile: float = 0.995) -> Any:
    """sd-dynamic-thresholding as its simple node has it: values as guidance of scale ``mimic`` would have spread them."""
    import torch

    def thresholded(args: Any) -> Any:
        cond, uncond, scale = args["cond_denoised"], args["uncond_denoised"], args["cond_scale"]
        low, high = ((uncond + (cond - uncond) * s).flatten(2) for s in (mimic, scale))
        means = high.mean(dim=2, keepdim=True)
        spread = (low - low.mean(dim=2, keepdim=True)).abs().max()
        limit = torch.maximum(spread, torch.quantile((high - means).abs(), percentile))
        return args["input"] - ((high - means).clamp(-limit, limit) / limit * spread + means).unflatten(2, cond.shape[2:])

    patched = model.clone()
    patched.set_model_sampler_cfg_function(thresholded)
    return patched
