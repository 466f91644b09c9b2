"""The node that loads the bundled lab model: ComfyUI's own classes around the files in ``memorization_guard/lab/model``."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import partial
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.model import Downsample, ResnetBlock, Upsample
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from ..memorization_guard.core.profile import ProfileError, StabilityProfile
from ..memorization_guard.lab import MODEL
from .guard import CATEGORY, StabilityProfileType, also_found_as

#: Reference runs of the lab model as ComfyUI samples it: euler, normal, 30 steps, cfg 7.5.
PROFILE = MODEL / "profile-comfyui.safetensors"

ops = comfy.ops.disable_weight_init


class LoadLabModel(io.ComfyNode):
    """Gives the bundled model as any checkpoint loader gives its own, and the profile that belongs to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """No inputs: there is one model, and it comes with the pack."""
        return io.Schema(
            node_id="MemorizationGuardLoadLabModel",
            display_name="Load Lab Model",
            category=CATEGORY,
            description=(
                "Loads the small Stable Diffusion that comes with Memorization Guard. It knows a world of coloured shapes, "
                "and has really memorized some of its training images, so that you can try the guard without a GPU.\n\n"
                "Set Empty Latent Image to 128 x 128, the size of its pictures. Prompts are captions of up to 30 tokens in "
                "the style of its training."
            ),
            **also_found_as("memorization", "example model", "demo"),
            outputs=[
                io.Model.Output("model", tooltip="The diffusion model. Like Stable Diffusion 1.5, it predicts noise."),
                io.Clip.Output("clip", tooltip="The text encoder. It knows the words of the lab's captions."),
                io.Vae.Output(
                    "vae",
                    tooltip="The autoencoder. Like that of Stable Diffusion, it makes images 8 times smaller.",
                ),
                StabilityProfileType.Output(
                    "profile",
                    display_name="PROFILE",
                    tooltip="The model's stability profile, measured with euler, normal, 30 steps, cfg 7.5 at 128 x 128. It "
                    "is valid for every sampler, step count and cfg.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Reads the files; ComfyUI keeps the result until the workflow changes."""
        return io.NodeOutput(load_model(), load_clip(), load_vae(), load_profile())


def load_model() -> comfy.model_patcher.ModelPatcher:
    """The UNet as a MODEL, in the number type that the server's settings ask for."""
    management = comfy.model_management
    weights, device = _weights("unet/diffusion_pytorch_model"), management.get_torch_device()
    config = _ModelConfig(_unet_config())
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    model = config.get_model(weights, "")
    _regroup(model.diffusion_model, _config("unet")["norm_num_groups"])
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({ours: weights[theirs] for theirs, ours in names.items() if theirs in weights})
    offload_device = management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model.to(offload_device), load_device=device, offload_device=offload_device)


def load_clip() -> comfy.sd.CLIP:
    """The text encoder and its tokenizer as a CLIP; keys are those of SD 1, so that LoRAs find them."""
    weights, config = _weights("text_encoder/model"), _config("text_encoder")
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(MODEL / "tokenizer"),
        max_length=config["max_position_embeddings"],
        embedding_size=config["hidden_size"],
    )
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
            partial(comfy.sd1_clip.SD1ClipModel, clip_model=_TextEncoder),
        ),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    # The projection of the pooled output, which SD 1 has no use for and its checkpoints do not hold.
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])
    missing, unexpected = clip.load_sd(weights)
    if missing or unexpected:
        raise RuntimeError(f"this ComfyUI's CLIP does not fit the lab's text encoder: {missing=}, {unexpected=}")
    return clip


def load_vae() -> comfy.sd.VAE:
    """The autoencoder as a VAE."""
    config = _config("vae")
    # ComfyUI's VAE builds its module from the keys it recognises, and ours are none of them. It is built around a small
    # autoencoder of as many latent channels, and gets the lab's in its place.
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=config["latent_channels"]).state_dict())
    autoencoder = _Autoencoder(config)
    weights = _weights("vae/diffusion_pytorch_model")
    autoencoder.load_state_dict({name.replace("conv_shortcut", "nin_shortcut"): w for name, w in weights.items()})
    vae.first_stage_model = autoencoder.eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(config["block_out_channels"]) - 1)
    return vae


def load_profile() -> StabilityProfile | ExecutionBlocker:
    """The profile; where there is none, an error for the nodes that are given it, and for them alone."""
    try:
        return StabilityProfile.load(PROFILE)
    except (FileNotFoundError, ProfileError) as error:
        return ExecutionBlocker(f"the lab model's profile could not be loaded: {error}; install Memorization Guard anew")


class _LatentFormat(comfy.latent_formats.LatentFormat):
    """How the model's latents are scaled, and how ComfyUI's previews paint them: least squares over the reference captions."""

    latent_rgb_factors = ((-0.303, 0.004, 0.113), (0.220, 0.236, 0.215), (0.026, -0.059, 0.262), (-0.058, 0.283, 0.007))
    latent_rgb_factors_bias = (-0.006, -0.039, -0.029)

    def __init__(self) -> None:
        self.scale_factor = _config("vae")["scaling_factor"]


class _ModelConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1 in all but the size of its UNet."""

    unet_config: dict[str, Any] = {}  # noqa: RUF012 (ComfyUI's own way to say it)
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    latent_format = _LatentFormat


def _unet_config() -> dict[str, Any]:
    """The UNet's settings as ComfyUI writes them."""
    config = _config("unet")
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    depths = [int(block.startswith("CrossAttn")) for block in config["down_block_types"]]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [n // channels[0] for n in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        # What diffusers calls attention_head_dim here is the number of heads; all of them are equally wide.
        "num_head_channels": channels[-1] // config["attention_head_dim"][-1],
        "legacy": False,
    }


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with a vocabulary of another size."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        self.set_input_embeddings(
            operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        )


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        config = _config("text_encoder")
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            model_class=_TextModel,
            special_tokens={
                name: config[f"{key}_token_id"] for name, key in (("start", "bos"), ("end", "eos"), ("pad", "pad"))
            },
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class _Autoencoder(nn.Module):
    """``diffusers.AutoencoderKL`` without attention, in ComfyUI's blocks; keys as in diffusers, but for ``nin_shortcut``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        channels, layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        latent = config["latent_channels"]
        block = partial(ResnetBlock, temb_channels=0, norm_op=partial(_norm, groups=groups))

        def ends(size: int, out: int) -> dict[str, nn.Module]:
            return {"conv_norm_out": _norm(size, groups), "act": nn.SiLU(), "conv_out": ops.Conv2d(size, out, 3, padding=1)}

        def blocks(first: int, size: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(in_channels=size if i else first, out_channels=size) for i in range(count)))

        def level(first: int, size: int, count: int, **resampler: nn.Module) -> nn.Sequential:
            return _named(resnets=blocks(first, size, count), **{key: nn.Sequential(m) for key, m in resampler.items()})

        down, up, last = [], [], len(channels) - 1
        for i, size in enumerate(channels):
            sampler = {} if i == last else {"downsamplers": Downsample(size, with_conv=True)}
            down.append(level(channels[max(i - 1, 0)], size, layers, **sampler))
        for i, size in reversed(list(enumerate(channels))):
            sampler = {} if i == 0 else {"upsamplers": Upsample(size, with_conv=True)}
            up.append(level(channels[min(i + 1, last)], size, layers + 1, **sampler))
        self.encoder = _named(
            conv_in=ops.Conv2d(config["in_channels"], channels[0], 3, padding=1),
            down_blocks=nn.Sequential(*down),
            mid_block=level(channels[-1], channels[-1], 2),
            **ends(channels[-1], 2 * latent),
        )
        self.decoder = _named(
            conv_in=ops.Conv2d(latent, channels[-1], 3, padding=1),
            mid_block=level(channels[-1], channels[-1], 2),
            up_blocks=nn.Sequential(*up),
            **ends(channels[0], config["out_channels"]),
        )
        self.quant_conv = ops.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = ops.Conv2d(latent, latent, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean of the latents of ``pixels`` ``[B, 3, H, W]`` in [-1, 1]: ``[B, 4, H / 8, W / 8]``, unscaled."""
        return self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        """Pixels of unscaled latents; ComfyUI may hand over options for other models."""
        return self.decoder(self.post_quant_conv(latents))


def _norm(channels: int, groups: int) -> nn.Module:
    return ops.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _regroup(module: nn.Module, groups: int) -> None:
    """ComfyUI's UNet normalises in 32 groups; the number is no weight, and may be set afterwards."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups


def _config(part: str) -> dict[str, Any]:
    return json.loads((MODEL / part / "config.json").read_text(encoding="utf-8"))


def _weights(name: str) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(str(MODEL / f"{name}.safetensors"), safe_load=True)
