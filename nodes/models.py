"""What ComfyUI knows of a model and of a run, in the core's terms: noise levels, run settings, fingerprints."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.hooks
import comfy.model_sampling
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ..memorization_guard import NoiseLevel, RunSettings
from ..memorization_guard.adapters.kdiffusion import sampler_name
from ..memorization_guard.fingerprint import fingerprint

log = logging.getLogger(__name__)


def noise_levels(model_sampling: Any, sigmas: torch.Tensor) -> Callable[[float], NoiseLevel]:
    """A function from the model's own noise level to coefficients, for any kind of model; those of ``sigmas`` beforehand."""

    def levels(at: torch.Tensor) -> list[NoiseLevel]:
        zeros, ones = torch.zeros_like(at), torch.ones_like(at)
        # Some kinds of model scale the noise in place.
        signal = model_sampling.noise_scaling(at, zeros.clone(), ones.clone())
        noise = model_sampling.noise_scaling(at, ones, zeros)
        return [NoiseLevel(*pair) for pair in zip(signal.tolist(), noise.tolist(), strict=True)]

    known = dict(zip(sigmas.tolist(), levels(sigmas.double().cpu()), strict=True))

    def level(sigma: float) -> NoiseLevel:
        if sigma not in known:
            known[sigma] = levels(torch.tensor([sigma], dtype=torch.float64))[0]
        return known[sigma]

    return level


def run_settings(guider: Any, sampler: Any, shape: torch.Size, levels: list[NoiseLevel]) -> RunSettings:
    """The settings of a run whose schedule has these ``levels``, over latents of ``shape`` ``[B, ...]``."""
    patcher = guider.model_patcher
    kind = _prediction_type(patcher.get_model_object("model_sampling"))
    *sigmas, end = (level.model_sigma(kind) for level in levels)
    # A guider that mixes predictions in its own way may leave `cfg` at its default.
    own_way = type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise
    cfg = None if own_way and guider.cfg == 1.0 else guider.cfg
    # Hooks change the weights in the middle of a run, for some of its conditionings: no fingerprint stands for that.
    hooked = any(_changes_weights(cond) for conds in guider.conds.values() for cond in conds)
    return RunSettings(
        model=type(patcher.model.model_config).__name__ + (" with hooks" if hooked else ""),
        model_hash=None if hooked else model_hash(patcher),
        prediction_type=kind,
        sampler=_sampler_name(sampler),
        steps=len(sigmas),
        guidance_scale=None if cfg is None else float(cfg),
        latent_shape=tuple(shape[1:]),
        sigmas=tuple(sigmas),
        end_sigma=end,
    )


def _changes_weights(conditioning: Mapping[str, Any]) -> bool:
    group = conditioning.get("hooks")
    return group is not None and any(hook.hook_type == comfy.hooks.EnumHookType.Weight for hook in group.hooks)


def _prediction_type(model_sampling: Any) -> str:
    kinds = {
        comfy.model_sampling.CONST: "flow_prediction",
        comfy.model_sampling.X0: "sample",
        comfy.model_sampling.V_PREDICTION: "v_prediction",
        comfy.model_sampling.EPS: "epsilon",
    }
    return next((name for kind, name in kinds.items() if isinstance(model_sampling, kind)), type(model_sampling).__name__)


def _sampler_name(sampler: Any) -> str:
    """The name in the KSampler's list, with the options that a sampler node sets: ``euler_ancestral(eta=0.5)``."""
    name = getattr(sampler.sampler_function, "__name__", type(sampler).__name__)
    return sampler_name(name.removesuffix("_function"), sampler.extra_options)


_hashes: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def model_hash(patcher: ModelPatcher) -> str | None:
    """Fingerprint of the denoiser's own weights and of the patches on them, wherever either is loaded right now."""
    known = _hashes.setdefault(patcher.model, {})
    if patcher.patches_uuid not in known:
        weights = {}
        for name, weight in patcher.model.diffusion_model.state_dict().items():
            key = f"diffusion_model.{name}"
            weights[key] = patcher.backup[key].weight if key in patcher.backup else weight
        for key, patches in patcher.patches.items():
            # A patch is (strength, value, strength of the model's own weight, offset, function).
            for number, (strength, value, model_strength, *_) in enumerate(patches):
                # A fingerprint looks at signs: the bits of the strengths as such.
                bits = np.unpackbits(np.array([strength, model_strength], dtype=np.float64).view(np.uint8))
                weights[f"{key}.{number}.strengths"] = torch.from_numpy(bits.astype(np.float32) - 0.5)
                for part, tensor in enumerate(_tensors(value)):
                    weights[f"{key}.{number}.{part}"] = tensor
        try:
            known[patcher.patches_uuid] = fingerprint(weights)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            # Weights in a packed form that only their own loader can read.
            log.info("Memorization Guard: the weights have no fingerprint (%s); profiles are not held against them.", error)
            known[patcher.patches_uuid] = None
    return known[patcher.patches_uuid]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
