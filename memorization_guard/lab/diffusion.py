"""What a lab model learns, and the pipeline it becomes: Stable Diffusion's noise or v prediction, or SD 3's rectified flow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .models import CHANNELS, OneForMany, make_scheduler, make_transformer, make_unet
from .training import half_precision

#: Weight of a timestep's loss: its signal-to-noise ratio, at most this, over the ratio (Hang et al., ICCV 2023).
MIN_SNR = 5.0
#: Zeros that the pipeline of SD 3 puts in the place of its third text encoder's tokens, where that is left out.
NO_T5 = 256


class Process(Protocol):
    """A denoiser with its text encoder, how it is trained, and how the pipeline that samples it is written."""

    denoiser: Any
    text_encoder: Any

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by its name in the pipeline."""
        ...

    def loss(self, latents: Tensor, tokens: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Loss of every sample ``[B]``; ``level`` in [0, 1) says how noisy each one is made."""
        ...

    def write(self, autoencoder: Any, tokenizer: Any, folder: Path) -> None:
        """Writes the diffusers pipeline."""
        ...


class StableDiffusion:
    """SD 1.x in small: a UNet that predicts noise, or v.

    Args:
        text_encoder: trained along.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        channels, layers: of the UNet's three levels, and of each of its blocks.
    """

    def __init__(
        self, text_encoder: Any, *, prediction_type: str = "epsilon", channels: Sequence[int] = CHANNELS, layers: int = 1
    ) -> None:
        self.text_encoder = text_encoder
        self.denoiser = make_unet(channels, layers)
        self._scheduler = make_scheduler(prediction_type)
        self._v_prediction = prediction_type == "v_prediction"
        self._signal = self._scheduler.alphas_cumprod
        ratio = self._signal / (1 - self._signal)
        # The weight of a loss on x0 is min(SNR, 5); noise and v differ from x0 by these factors.
        self._weights = ratio.clamp_max(MIN_SNR) / (ratio + 1 if self._v_prediction else ratio)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.denoiser, "text_encoder": self.text_encoder}

    def loss(self, latents: Tensor, tokens: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        t = (level * len(self._signal)).long()
        a = self._signal.to(latents.device)[t].view(-1, 1, 1, 1)
        with half_precision(latents.device.type):
            context = self.text_encoder(tokens)[0]
            output = self.denoiser(a.sqrt() * latents + (1 - a).sqrt() * noise, t, encoder_hidden_states=context).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * latents if self._v_prediction else noise
        return (output.float() - target).square().mean(dim=(1, 2, 3)) * self._weights.to(latents.device)[t]

    def write(self, autoencoder: Any, tokenizer: Any, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline

        pipe: Any = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.denoiser,
            scheduler=self._scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder)


class RectifiedFlow:
    """SD 3 in small: a transformer over patches of latent and text together, which predicts the flow from image to noise.

    The pipeline asks for two CLIP text encoders; here they are the same one.
    """

    def __init__(self, text_encoder: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.text_encoder = text_encoder
        self.denoiser = make_transformer()
        self.denoiser.set_attn_processor(OneForMany(NO_T5))
        self._scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.denoiser, "text_encoder": self.text_encoder}

    def loss(self, latents: Tensor, tokens: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        # Logit-normal: the middle of the way is the hard part (Esser et al., ICML 2024). The ends stay apart from 0 and 1.
        t = torch.sigmoid(torch.erfinv((2 * level - 1).clamp(-0.999, 0.999)) * 2**0.5)
        way = t.view(-1, 1, 1, 1)
        with half_precision(latents.device.type):
            said = self.text_encoder(tokens, output_hidden_states=True)
            words = torch.cat([said.hidden_states[-2]] * 2, dim=-1)
            context = torch.cat([words, words.new_zeros(len(words), 1, words.shape[2])], dim=1)
            output = self.denoiser(
                hidden_states=(1 - way) * latents + way * noise,
                timestep=t * 1000,
                encoder_hidden_states=context,
                pooled_projections=torch.cat([said.text_embeds] * 2, dim=-1),
            ).sample
        return (output.float() - (noise - latents)).square().mean(dim=(1, 2, 3))

    def write(self, autoencoder: Any, tokenizer: Any, folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline

        pipe: Any = StableDiffusion3Pipeline(
            vae=autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=self.text_encoder,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=self.denoiser,
            scheduler=self._scheduler,
        )
        pipe.save_pretrained(folder)
        # diffusers does not write down what is None.
        index = folder / "model_index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps(content | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}, indent=2))
