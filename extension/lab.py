"""The bundled lab model as a checkpoint that the WebUI loads: a model that really memorizes, to try the guard on.

:func:`write` puts the weights, under the names of an SD 1 checkpoint, and a ``.yaml`` beside them into a folder. That
configuration names the functions below, which make the host's own classes in the lab's sizes. Forge and reForge tell a model
by its layout, and know none of this size.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..memorization_guard.files import write_whole
from ..memorization_guard.lab import MODEL

NAME = "memorization-guard-lab"
#: Statistics of the lab model under Euler, 30 steps, CFG 7.5, 128 x 128; the same that ComfyUI's half has.
PROFILE = MODEL / "profile-comfyui.safetensors"


def write(folder: Path) -> Path:
    """Writes ``memorization-guard-lab.safetensors`` and its ``.yaml`` into ``folder``, each whole or not at all.

    Raises:
        OSError: if they cannot be written.
    """
    weights = {}
    for part, prefix, rename in (
        ("unet/diffusion_pytorch_model", "model.diffusion_model.", _unet_name),
        ("vae/diffusion_pytorch_model", "first_stage_model.", _vae_name),
        ("text_encoder/model", "cond_stage_model.model.", str),
    ):
        for name, weight in load_file(MODEL / f"{part}.safetensors").items():
            weights[prefix + rename(name)] = weight
    path = folder / f"{NAME}.safetensors"
    write_whole(path.with_suffix(".yaml"), _CONFIG.format(here=__name__, scale=_config("vae")["scaling_factor"]))
    return write_whole(path, save(weights))


@functools.cache  # asked for at every weight
def _config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODEL / part / "config.json").read_text(encoding="utf-8"))
    return config


def _unet_name(name: str) -> str:
    """The name that CompVis' UNet has for a weight of diffusers'; one layer a block."""
    for pattern, replacement in (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^down_blocks\.(\d)\.resnets\.0\.", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0."),
        (r"^down_blocks\.(\d)\.attentions\.0\.", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1."),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op."),
        (r"^up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0."),
        (r"^up_blocks\.(\d)\.attentions\.(\d)\.", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1."),
        (r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.2.conv."),
        (r"\.norm1\.(?=\w+$)(?<!transformer_blocks.0.norm1.)", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.(?=\w+$)(?<!transformer_blocks.0.norm2.)", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _vae_name(name: str) -> str:
    last = len(_config("vae")["block_out_channels"]) - 1
    for pattern, replacement in (
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block."),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


_CONFIG = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {scale}
    use_ema: false
    unet_config: {{target: {here}.unet, params: {{}}}}
    first_stage_config: {{target: {here}.autoencoder, params: {{ddconfig: {{}}}}}}
    cond_stage_config: {{target: {here}.TextEncoder, params: {{}}}}
"""


# ------------------------------------------------------------------------------------------------------- inside the host


def unet(**_: object) -> nn.Module:
    """CompVis' UNet in the lab's size."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = _config("unet")
    first, *_ = channels = config["block_out_channels"]
    model: nn.Module = UNetModel(
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=first,
        channel_mult=[width // first for width in channels],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[2**level for level, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind],
        num_head_channels=channels[-1] // config["attention_head_dim"][-1],
        use_spatial_transformer=True,
        context_dim=config["cross_attention_dim"],
        legacy=False,
    )
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
    return model


def autoencoder(**_: object) -> nn.Module:
    """CompVis' autoencoder in the lab's size."""
    from ldm.models.autoencoder import AutoencoderKL
    from ldm.modules.diffusionmodules import model as parts

    config = _config("vae")
    first, *_ = channels = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": first,
        "ch_mult": [width // first for width in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    normalize, parts.Normalize = parts.Normalize, lambda width: nn.GroupNorm(config["norm_num_groups"], width, eps=1e-6)
    try:
        model: Any = AutoencoderKL(sizes, {"target": "torch.nn.Identity"}, config["latent_channels"])
    finally:
        parts.Normalize = normalize
    model.encoder.mid.attn_1 = model.decoder.mid.attn_1 = nn.Identity()
    return model


class TextEncoder(nn.Module):
    """The lab's text encoder, of up to 30 tokens; the host's prompt weights do not reach it."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        self.tokenizer = CLIPTokenizer(str(MODEL / "tokenizer/vocab.json"), str(MODEL / "tokenizer/merges.txt"))
        self.model = CLIPTextModel(CLIPTextConfig(**_config("text_encoder")))

    def forward(self, texts: list[str]) -> torch.Tensor:
        config = self.model.config
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=config.max_position_embeddings, truncation=True, return_tensors="pt"
        )
        states: torch.Tensor = self.model(tokens.input_ids.to(self.model.device)).last_hidden_state
        return states

    encode = forward

    def process_texts(self, texts: list[str]) -> tuple[None, int]:
        """For the page's counter of tokens."""
        return None, max(len(self.tokenizer(text).input_ids) - 2 for text in texts)

    def get_target_prompt_token_count(self, count: int) -> int:
        return self.model.config.max_position_embeddings - 2

    def encode_embedding_init_text(self, text: str, count: int) -> torch.Tensor:
        return torch.zeros(count, self.model.config.hidden_size)
