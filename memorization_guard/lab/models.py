"""The parts of a lab model with fresh weights: a whole Stable Diffusion in small, with the file layout of the large ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .scene import SIZE

TOKENS = 32
WIDTH = 128  # of the text encoder and of cross attention
HEAD = 32  # width of an attention head
#: Channels of the three levels of the bundled model's UNet.
CHANNELS = (32, 96, 160)


def make_tokenizer(folder: Path, texts: Sequence[str]) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learned from ``texts``; it is written to ``folder``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(vocabulary: int, *, projection: bool = False) -> Any:
    """A CLIP text encoder of two layers: ``[B, 32]`` tokens -> ``[B, 32, 128]``; with a projection, SD 3's kind."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def make_autoencoder() -> Any:
    """Stable Diffusion's autoencoder in small: ``[B, 3, 128, 128]`` <-> ``[B, 4, 16, 16]``."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )
    _start_linear(model)
    return model


@torch.no_grad()
def _start_linear(model: Any) -> None:
    """Weights with which the autoencoder is a blur at first: averages on the way down, interpolation on the way up.

    From the usual random weights it gives back grey for the first thousand steps.
    """
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    tent = torch.tensor([0.25, 0.5, 0.25])
    single = torch.zeros(3, 3)
    single[1, 1] = 1.0
    kernels = {1: torch.ones(1, 1), 2: torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4, 3: single}

    def start(conv: Any, kernel: Tensor) -> None:
        out, into = conv.weight.shape[:2]
        size = max(out, into)
        mix = torch.linalg.qr(torch.randn(size, size))[0][:out, :into]
        conv.weight.copy_(mix[:, :, None, None] * kernel + 0.02 * conv.weight)
        conv.bias.zero_()

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()  # the block adds nothing yet
            if module.conv_shortcut is not None:
                start(module.conv_shortcut, kernels[1])
        elif isinstance(module, Downsample2D):
            start(module.conv, kernels[2])
        elif isinstance(module, Upsample2D):
            start(module.conv, tent[:, None] * tent)
    for conv in (model.encoder.conv_in, model.encoder.conv_out, model.decoder.conv_in):
        start(conv, kernels[3])
    for conv in (model.quant_conv, model.post_quant_conv):
        start(conv, kernels[1])
    # Little noise in the latents: their logarithmic variance.
    model.quant_conv.weight[4:] *= 0.1
    model.quant_conv.bias[4:] = -6.0


def make_unet(channels: Sequence[int] = CHANNELS, layers: int = 1) -> Any:
    """Stable Diffusion's UNet in small, with cross attention at its two lower levels."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        # This argument is the number of heads. CompVis' UNet knows one width of a head for all levels.
        attention_head_dim=tuple(width // HEAD for width in channels),
        norm_num_groups=16,
    )
    # Every residual branch adds nothing at first, as in CompVis' UNet; diffusers starts them at random.
    for name, parameter in model.named_parameters():
        if name.startswith("conv_out.") or ".conv2." in name or ".proj_out." in name:
            nn.init.zeros_(parameter)
    return model


def make_transformer() -> Any:
    """SD 3's transformer in small: patches of 2 x 2, a width of 128."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=HEAD,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=4 * HEAD,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )


class OneForMany:
    """SD 3's joint attention, in which the last token of the text stands for ``count`` equal ones.

    Text tokens have no places in this transformer, so the zeros that stand for a missing T5 stay equal in every block. One
    of them, with ``log count`` added to its attention logits, does what all do, in a third of the time.
    """

    def __init__(self, count: int) -> None:
        self._added = math.log(count)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        def heads(*projections: Any, of: Tensor) -> list[Tensor]:
            return [project(of).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in projections]

        ours = heads(attn.to_q, attn.to_k, attn.to_v, of=hidden_states)
        theirs = heads(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, of=encoder_hidden_states)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(ours, theirs, strict=True))
        logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        bias = logits.new_zeros(key.shape[2])
        bias[-1] = self._added
        mixed = ((logits + bias).softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def make_scheduler(prediction_type: str = "epsilon") -> Any:
    """Stable Diffusion 1.x: PNDM (PLMS) over its betas."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
