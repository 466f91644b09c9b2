"""Where the WebUI, Forge and reForge differ, for what the guard needs; in everything else they are the same."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: Whether this is Forge or reForge, which sample through a patcher of the UNet as ComfyUI does.
HAS_UNET_PATCHER = importlib.util.find_spec("modules_forge") is not None


def load_model(p: Any) -> Any:
    """The model that ``p`` samples; Forge loads it, and tells ``p``, only when it begins to."""
    from modules import sd_models

    if hasattr(sd_models, "forge_model_reload"):
        p.sd_model, _ = sd_models.forge_model_reload()
    return p.sd_model


def is_forge(unet: Any) -> bool:
    """Whether a patcher of the UNet is Forge's, and not reForge's."""
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
        kind = str(predictor.prediction_type)
        return {"const": "flow_prediction"}.get(kind, kind)
    classes = {cls.__name__ for cls in type(model.model_sampling).__mro__}  # reForge
    names = {"CONST": "flow_prediction", "V_PREDICTION": "v_prediction", "X0": "sample", "EPS": "epsilon"}
    return next((name for cls, name in names.items() if cls in classes), type(model.model_sampling).__name__)


def highest_sigma(model: Any) -> float:
    """The highest noise level of a model that a patcher of the UNet has: of a flow model 1, where its latent is all noise."""
    predictor = getattr(model, "predictor", None)
    return float((model.model_sampling if predictor is None else predictor).sigma_max)  # reForge has it as ComfyUI


@contextlib.contextmanager
def text_encoders(sd_model: Any, shape: Sequence[int]) -> Iterator[None]:
    """While it is entered, the text encoders may be used in the middle of sampling.

    What they note for the infotext of the next images is forgotten, and a network that made room for them is back.

    Args:
        shape: of the latents that are sampled.
    """
    unet = sd_model.forge_objects.unet if HAS_UNET_PATCHER else None
    with _notes_kept(unet), contextlib.nullcontext() if unet is None else _networks_kept(unet, shape):
        yield


@contextlib.contextmanager
def _notes_kept(unet: Any) -> Iterator[None]:
    if unet is not None and is_forge(unet):
        from backend.text_processing import classic_engine

        noted, classic_engine.last_extra_generation_params = classic_engine.last_extra_generation_params, {}
        try:
            yield
        finally:
            classic_engine.last_extra_generation_params = noted
        return
    from modules.sd_hijack import model_hijack

    notes = list(model_hijack.comments), dict(model_hijack.extra_generation_params)
    try:
        yield
    finally:
        model_hijack.comments, model_hijack.extra_generation_params = notes


@contextlib.contextmanager
def _networks_kept(unet: Any, shape: Sequence[int]) -> Iterator[None]:
    if is_forge(unet):
        from backend import memory_management as memory
    else:
        from ldm_patched.modules import model_management as memory
    needed = unet.model_options.get("memory_peak_estimation_modifier", unet.memory_required)
    loaded = [each.model for each in memory.current_loaded_models]
    try:
        yield
    finally:
        memory.load_models_gpu(loaded, memory_required=needed([2 * shape[0], *shape[1:]]))


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
    backup = unet.lora_loader.backup if is_forge(unet) else unet.backup
    found.update({name: getattr(weight, "weight", weight) for name, weight in backup.items() if name in found})
    return found
