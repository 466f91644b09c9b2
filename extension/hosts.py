"""Where the WebUI, Forge and reForge differ, for what the guard needs; in everything else they are the same."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..memorization_guard.adapters.kdiffusion import SamplerWatch
from ..memorization_guard.adapters.timesteps import TimestepWatch

#: Whether this is Forge or reForge, which sample through a patcher of the UNet as ComfyUI does.
HAS_UNET_PATCHER = importlib.util.find_spec("modules_forge") is not None


def load_model(p: Any) -> Any:
    """The model that ``p`` samples; Forge loads it, and tells ``p``, only when it begins to."""
    from modules import sd_models

    if hasattr(sd_models, "forge_model_reload"):
        p.sd_model, _ = sd_models.forge_model_reload()
    return p.sd_model


def _is_forge(unet: Any) -> bool:
    return hasattr(unet, "lora_loader")


def prediction_type(sd_model: Any) -> str:
    """What the model predicts, by the core's name."""
    if not HAS_UNET_PATCHER:
        if getattr(sd_model, "is_sd3", False):
            return "flow_prediction"
        kind = getattr(sd_model, "parameterization", "eps")
        return {"eps": "epsilon", "v": "v_prediction"}.get(kind, str(kind))
    model = sd_model.forge_objects.unet.model
    if (predictor := getattr(model, "predictor", None)) is not None:  # Forge
        kind = predictor.prediction_type
        return {"const": "flow_prediction"}.get(kind, kind)
    classes = {cls.__name__ for cls in type(model.model_sampling).__mro__}  # reForge
    names = {"CONST": "flow_prediction", "V_PREDICTION": "v_prediction", "X0": "sample", "EPS": "epsilon"}
    return next((name for cls, name in names.items() if cls in classes), type(model.model_sampling).__name__)


def weights(sd_model: Any) -> dict[str, torch.Tensor]:
    """The denoiser's weights as the checkpoint has them, whatever networks are merged into them right now.

    Names are those that ComfyUI has, so that a profile fits in either.
    """
    if not HAS_UNET_PATCHER:
        unet = sd_model.model.diffusion_model
        found = unet.state_dict()
        for name, module in unet.named_modules():
            for kind, kept in (("weight", "network_weights_backup"), ("bias", "network_bias_backup")):
                backup = getattr(module, kept, None)
                if isinstance(backup, torch.Tensor) and f"{name}.{kind}" in found:
                    found[f"{name}.{kind}"] = backup
        return {f"diffusion_model.{name}": weight for name, weight in found.items()}
    unet = sd_model.forge_objects.unet
    found = {f"diffusion_model.{name}": weight for name, weight in unet.model.diffusion_model.state_dict().items()}
    backup = unet.lora_loader.backup if _is_forge(unet) else unet.backup
    found.update({name: getattr(weight, "weight", weight) for name, weight in backup.items() if name in found})
    return found


def guidance_seen(denoiser: Any, sd_model: Any, watch: SamplerWatch) -> contextlib.AbstractContextManager[None]:
    """While it is entered, ``watch`` is told the predictions with and without the prompt.

    Args:
        denoiser: the host's ``CFGDenoiser``. sd_model: the model that is sampled.
    """
    return _seen_through_patcher(sd_model, watch) if HAS_UNET_PATCHER else _seen_in_denoiser(denoiser, watch)


@contextlib.contextmanager
def _seen_in_denoiser(denoiser: Any, watch: SamplerWatch) -> Iterator[None]:
    combine = denoiser.combine_denoised
    tell: Callable[..., None] = watch.saw_noise if isinstance(watch, TimestepWatch) else watch.saw_guidance

    def combine_denoised(
        x_out: torch.Tensor, conds_list: Any, uncond: Any, cond_scale: float, *args: Any, **kwargs: Any
    ) -> Any:
        wanted = denoiser.sampler.sampler_extra_args["cond_scale"] * denoiser.cond_scale_miltiplier
        if cond_scale == wanted:  # otherwise "skip early CFG" or the like left the unconditional prediction out
            without = x_out[-len(conds_list) :]
            tell(_combined(x_out, without, conds_list), without)
        return combine(x_out, conds_list, uncond, cond_scale, *args, **kwargs)

    with _replaced(denoiser, "combine_denoised", combine_denoised):
        yield


def _combined(x_out: torch.Tensor, without: torch.Tensor, conds_list: Any) -> torch.Tensor:
    """Prediction with the prompt, ``[B, ...]``; where prompts are joined by AND, at their weights."""
    if all(len(conds) == 1 and conds[0][1] == 1.0 for conds in conds_list):
        first = conds_list[0][0][0]
        if [conds[0][0] for conds in conds_list] == list(range(first, first + len(conds_list))):
            return x_out[first : first + len(conds_list)]
    return torch.stack(
        [
            without[i] + sum(weight * (x_out[index] - without[i]) for index, weight in conds)
            for i, conds in enumerate(conds_list)
        ]
    )


@contextlib.contextmanager
def _seen_through_patcher(sd_model: Any, watch: SamplerWatch) -> Iterator[None]:
    objects = sd_model.forge_objects
    unet = objects.unet
    evaluated = True

    def before(model: Any, cond: Any, uncond: Any, *rest: Any) -> Any:
        nonlocal evaluated
        evaluated = uncond is not None
        return model, cond, uncond, *rest

    def after(args: dict[str, Any]) -> torch.Tensor:
        # Without an unconditional prediction (CFG 1, "skip early CFG") Forge has zeros in its place, reForge nothing.
        if evaluated and args["uncond"] is not None and args["uncond_denoised"] is not None:
            # In timestep samplers the model is called on another scale than the sampler's.
            x = None if isinstance(watch, TimestepWatch) else args["input"]
            watch.saw_guidance(args["cond_denoised"], args["uncond_denoised"], x)
        return args["denoised"]

    guarded = unet.clone()
    if _is_forge(unet):
        guarded.set_model_sampler_pre_cfg_function(before)
    guarded.set_model_sampler_post_cfg_function(after)
    objects.unet = guarded
    try:
        yield
    finally:
        if objects.unet is guarded:
            objects.unet = unet


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While it is entered, ``owner`` itself, not its class, has ``value`` under ``name``; afterwards all is as it was."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if vars(owner).get(name) is value:  # otherwise somebody has wrapped it since, and takes it back
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
