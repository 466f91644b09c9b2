"""A checkpoint of random weights in SD 1.x's layout, for Forge and reForge, which tell a model by its layout.

    FORGE_PATH=/path/to/Forge /path/to/its/python random_checkpoint.py FILE [SEED]

It is built from Forge's own classes, with a UNet of one block and two levels. Part of the UNet hands its normalised input
through, so that the norms of a latent are like those of a trained model; what it paints is noise that depends on the prompt.
"""

from __future__ import annotations

import os
import sys

import torch

PASSED = 0.95  # of the normalised input
ROOM = 0.008  # of what is random
GROUP = 10  # channels of a group in the UNet's first norm


def main(path: str, seed: int = 0) -> None:
    root = os.environ["FORGE_PATH"]
    sys.path[:0] = [root, f"{root}/packages_3rdparty", f"{root}/repositories/huggingface_guess"]
    sys.argv = [sys.argv[0], "--always-cpu"]
    os.chdir(root)
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.nn.vae import IntegratedAutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    layout = "backend/huggingface/runwayml/stable-diffusion-v1-5/"
    unet = IntegratedUNet2DConditionModel.from_config({
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
        "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": -1,
        "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "adm_in_channels": None, "num_classes": None, "use_checkpoint": False, "use_spatial_transformer": True,
        "legacy": False, "image_size": 32,
        "dropout": 0,
    })  # fmt: skip
    with torch.no_grad():
        weights = unet.state_dict()
        hand_through(weights)
        weights = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
        vae = IntegratedAutoencoderKL.from_config(IntegratedAutoencoderKL.load_config(f"{layout}vae")).state_dict()
        vae["decoder.conv_out.weight"].mul_(4)
        weights |= {f"first_stage_model.{name}": weight for name, weight in vae.items()}
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(f"{layout}text_encoder")).state_dict()
        text["text_model.final_layer_norm.bias"].add_(0.1)  # the host divides by the mean of what the encoder says
        weights |= {f"cond_stage_model.transformer.{name}": w for name, w in text.items() if "text_projection" not in name}
    save_file({name: w.detach().half().contiguous() if w.is_floating_point() else w for name, w in weights.items()}, path)


def hand_through(weights: dict[str, torch.Tensor]) -> None:
    """Makes the first 40 channels carry the input to the output, beside what the random weights do."""
    for name, weight in weights.items():
        if weight.ndim > 1 and not weight.any():  # layers that training starts at 0
            weight.normal_(0, 0.05)
        if "attn2.to_out.0.weight" in name or "attn2.to_v.weight" in name:
            weight.mul_(4)  # so that prompts differ
    channels = 4 * GROUP
    signs = torch.tensor([1.0] * (GROUP // 2) + [-1.0] * (GROUP // 2))
    first, out = weights["input_blocks.0.0.weight"], weights["out.2.weight"]
    last = f"output_blocks.{max(int(name.split('.')[1]) for name in weights if name.startswith('output_blocks.'))}."
    skip = weights[f"{last}0.skip_connection.weight"]
    for name in ("0.out_layers.3", "1.proj_out"):
        weights[f"{last}{name}.weight"][:channels] = 0
        weights[f"{last}{name}.bias"][:channels] = 0
    first[:channels] = 0
    weights["input_blocks.0.0.bias"][:channels] = 0
    skip[:channels] = 0
    weights[f"{last}0.skip_connection.bias"][:channels] = 0
    out.normal_(0, ROOM)
    weights["out.2.bias"].zero_()
    out[:, :channels] = 0
    for latent in range(4):
        group = slice(latent * GROUP, (latent + 1) * GROUP)
        first[group, latent, 1, 1] = signs
        out[latent, group, 1, 1] = signs * (PASSED / (GROUP // 2))
    for channel in range(channels):
        skip[channel, skip.shape[1] - 320 + channel, 0, 0] = 1.0


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), *map(int, sys.argv[2:]))
