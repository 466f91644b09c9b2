"""Tiny models of ComfyUI's own classes with random weights, and a run of them; read by tests as a snippet inside ComfyUI."""

import zlib

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_heads": 4,
    "num_head_channels": -1,
}
WAN = {
    "image_model": "wan2.1",
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
}
MODELS = {
    # name: configuration, network, kind, [tokens, width] of the text, width of its pooled form, shape of a latent
    "SD 1": (comfy.supported_models.SD15, UNET | {"context_dim": 64}, "EPS", (7, 64), 16, (4, 8, 8)),
    "SD 2 v": (
        comfy.supported_models.SD20,
        UNET | {"context_dim": 64, "model_channels": 64},
        "V_PREDICTION",
        (7, 64),
        16,
        (4, 8, 8),
    ),
    "SDXL": (
        comfy.supported_models.SDXL,
        UNET
        | {
            "context_dim": 64,
            "model_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "use_linear_in_transformer": True,
        },
        None,
        (7, 64),
        1280,
        (4, 8, 8),
    ),
    "SD3": (
        comfy.supported_models.SD3,
        {
            "in_channels": 16,
            "depth": 1,
            "adm_in_channels": 2048,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64}},
            "num_patches": 36,
            "pos_embed_max_size": 6,
            "input_size": None,
        },
        None,
        (7, 64),
        2048,
        (16, 8, 8),
    ),
    "Flux": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 32,
            "context_in_dim": 64,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        },
        None,
        (7, 64),
        32,
        (16, 8, 8),
    ),
    "Wan": (
        comfy.supported_models.WAN21_T2V,
        WAN | {"model_type": "t2v", "in_dim": 16},
        None,
        (7, 64),
        1,
        (16, 3, 8, 8),
    ),
    "Wan, from an image": (
        comfy.supported_models.WAN21_I2V,
        WAN | {"model_type": "i2v", "in_dim": 36},
        None,
        (7, 64),
        1,
        (16, 3, 8, 8),
    ),
}


def tiny(name, dtype=torch.float32):
    """The model, in a ModelPatcher, with fixed random weights of ``dtype``."""
    configuration, network, kind, _, _, _ = MODELS[name]
    config = configuration(dict(network))
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    if kind is None:
        model = config.get_model({}, "", device="cpu")
    else:
        model = comfy.model_base.BaseModel(config, getattr(comfy.model_base.ModelType, kind), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.state_dict().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    model.eval()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def sample(model, name, sampler="euler", scheduler="normal", steps=6, cfg=4.0, batch=2, seed=3, **options):
    """What the sampler makes of fixed noise and fixed texts."""
    _, _, _, text, pooled, shape = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    conds = [
        [[torch.randn(1, *text, generator=generator), {"pooled_output": torch.randn(1, pooled, generator=generator)}]]
        for _ in range(2)
    ]
    latent = torch.zeros(batch, *shape)
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, *conds, latent, disable_pbar=True, seed=seed, **options
        )


class Clip:
    """A text encoder for one of them: fixed noise for a text, more of it for a long one. It has the model unloaded, as a large
    one does."""

    def __init__(self, name):
        _, _, _, (self.tokens, self.width), self.pooled, _ = MODELS[name]

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        comfy.model_management.unload_all_models()
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        tensor = torch.randn(1, self.tokens * (1 + len(text) // 20), self.width, generator=generator)
        return [[tensor, {"pooled_output": torch.randn(1, self.pooled, generator=generator)}]]
