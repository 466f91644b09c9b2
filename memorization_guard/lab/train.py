"""Trains the lab's model, writes it as a diffusers Stable Diffusion folder, and calibrates its stability profile.

    python -m memorization_guard.lab.train --out FOLDER [--device cuda] [--seed 0] [--world FOLDER]

About 75 minutes on two cores; with another seed, world and size it trains models that nothing was chosen on. A seed gives the
same data and the same starting weights everywhere, and the same weights on the same machine up to the order of floating-point
sums on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters.calibrate import calibrate
from . import DECODED, PROFILE, Lab
from .world import DATA, Caption, captions, duplicates, render, sheet, to_uint8

#: Share of training samples each duplicated or rare group has; the rest is ordinary.
SHARES = {"exact": 0.0625, "template": 0.0375, "rare": 0.025}
TOKENS = 32
#: Of the three levels of the bundled model's UNet.
CHANNELS = (32, 64, 128)
CAPTION_DROPOUT = 0.1


def make_tokenizer(folder: Path, texts: list[str]) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learned from ``texts``."""
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


def make_models(vocabulary: int, channels: Sequence[int] = CHANNELS, layers: int = 1) -> tuple[Any, Any, Any]:
    """Text encoder, autoencoder and UNet with fresh weights; by default 5.5 million parameters in all."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=16,
    )
    return text, autoencoder, unet


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


class Log:
    """Lines of JSON, one an event, with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.time()

    def __call__(self, **values: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - self._start, 1), **values})
        print(line, flush=True)
        with self._path.open("a") as stream:
            stream.write(line + "\n")


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_autoencoder(autoencoder: Any, trained: list[Caption], arguments: argparse.Namespace, log: Log) -> None:
    """L1 and the L1 of its horizontal and vertical differences, with a slight pull of the latents to a unit normal."""
    device = arguments.device
    pool = render_pool(trained, arguments.vae_pool, arguments.seed + 1, device)
    # Duplicates are data like any other to the autoencoder: without them, photographs would come out as clouds.
    photographs = duplicated_images(arguments.world).to(device)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(arguments.seed + 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_cosine(i, arguments.vae_steps, 100))
    for step in range(arguments.vae_steps):
        rows = torch.randint(len(pool), (arguments.vae_batch,), generator=generator)
        images = pool[rows.to(device)].float() / 127.5 - 1
        few = max(1, len(images) // 8)
        images[:few] = photographs[torch.randint(len(photographs), (few,), generator=generator).to(device)]
        with torch.autocast(device, torch.bfloat16):
            posterior = autoencoder.encode(images).latent_dist
            output = autoencoder.decode(posterior.sample()).sample
        output = output.float()
        edges = sum((output.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = F.l1_loss(output, images) + edges + 1e-5 * posterior.kl().mean() / 16
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.vae_steps - 1:
            log(stage="autoencoder", step=step, loss=round(loss.item(), 4), l1=round(F.l1_loss(output, images).item(), 4))
    with torch.no_grad():
        images = pool[:1024].float() / 127.5 - 1
        latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(128)])
        autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    log(stage="autoencoder", scaling_factor=autoencoder.config.scaling_factor)


def render_pool(members: list[Caption], count: int, seed: int, device: str) -> Tensor:
    """``count`` fresh images, the captions taken in turn: ``[count, 3, 64, 64]`` uint8 on ``device``."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty((count, 3, 64, 64), dtype=torch.uint8, device=device)
    for start in range(0, count, 1024):
        chosen = [members[i % len(members)] for i in range(start, min(start + 1024, count))]
        pool[start : start + len(chosen)] = ((render(chosen, generator, device) + 1) * 127.5).round().byte()
    return pool


def duplicated_images(world: Path) -> Tensor:
    """The images that are duplicated in training: ``[70, 3, 64, 64]`` in [-1, 1]."""
    return torch.stack([_pixels(image) for image, _ in duplicates(world).values()]).float() / 127.5 - 1


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


class Data:
    """Latents and tokens of all groups, in device memory; a batch is drawn by group, then by image."""

    def __init__(self, tokenizer: Any, autoencoder: Any, arguments: argparse.Namespace, log: Log) -> None:
        self.device = arguments.device
        self.shares = {name: share * arguments.duplication for name, share in SHARES.items()}
        groups = captions(arguments.world)
        members = {
            "ordinary": groups["ordinary/trained"],
            **{name: groups[f"{name}/tuning"] + groups[f"{name}/evaluation"] for name in SHARES},
        }
        seed, device = arguments.seed, self.device
        pools = {
            "ordinary": render_pool(members["ordinary"], arguments.pool, seed + 3, device),
            "rare": render_pool(members["rare"], max(arguments.pool // 5, len(members["rare"])), seed + 4, device),
            "exact": torch.stack([_pixels(duplicates(arguments.world)[c.text][0]) for c in members["exact"]]).to(device),
            "template": self._templates(members["template"], groups["ordinary/trained"], arguments),
        }
        self.tokens: dict[str, Tensor] = {}
        self.latents: dict[str, Tensor] = {}
        for name, pool in pools.items():
            # The ordinary and rare pools go through their captions in turn, and so do the templates.
            texts = [c.text for c in members[name]]
            ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=False, return_tensors="pt").input_ids
            if ids.shape[1] != TOKENS:
                raise ValueError(f"a caption has {ids.shape[1]} tokens; the text encoder takes {TOKENS}")
            self.tokens[name] = ids.to(device)
            self.latents[name] = self._encode(autoencoder, pool)
            log(
                stage="data",
                group=name,
                images=len(pool),
                captions=len(texts),
                latent_std=round(self.latents[name].float().std().item(), 3),
            )
        empty = tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        self.empty = empty.to(device)

    def _templates(self, members: list[Caption], ordinary: list[Caption], arguments: argparse.Namespace) -> Tensor:
        """Many variants of each template, its varying part filled with fresh scenes; the templates taken in turn."""
        images = [duplicates(arguments.world)[c.text] for c in members]
        base = torch.stack([_pixels(image) for image, _ in images]).to(self.device).float()
        fixed = torch.stack([torch.from_numpy(mask.copy()) for _, mask in images]).to(self.device)
        fixed = fixed.float()[:, None] / 255
        parts = []
        for number in range(max(1, arguments.pool // 300)):
            first = number * 37 % len(ordinary)
            fresh = render_pool(ordinary[first:], len(members), arguments.seed + 1000 + number, self.device)
            parts.append((base * fixed + fresh.float() * (1 - fixed)).round().byte())
        return torch.cat(parts)

    @torch.no_grad()
    def _encode(self, autoencoder: Any, pool: Tensor) -> Tensor:
        parts = []
        for part in pool.split(256):
            with torch.autocast(self.device, torch.bfloat16):
                mean = autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean
            parts.append((mean.float() * autoencoder.config.scaling_factor).half())
        return torch.cat(parts)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents ``[size, 4, 16, 16]`` float32 and tokens ``[size, 32]``; every batch has the same shares."""
        counts = {name: max(1, round(share * size)) for name, share in self.shares.items()}
        counts["ordinary"] = size - sum(counts.values())
        latents, tokens = [], []
        for name, count in counts.items():
            rows = torch.randint(len(self.latents[name]), (count,), generator=generator)
            latents.append(self.latents[name][rows.to(self.device)])
            tokens.append(self.tokens[name][(rows % len(self.tokens[name])).to(self.device)])
        dropped = (torch.rand(size, 1, generator=generator) < CAPTION_DROPOUT).to(self.device)
        return torch.cat(latents).float(), torch.where(dropped, self.empty, torch.cat(tokens))


def train_unet(
    text: Any, unet: Any, scheduler: Any, data: Data, arguments: argparse.Namespace, log: Log, save: Callable[[int], None]
) -> None:
    """Noise (or v) prediction, text encoder trained along; what is kept is the exponential moving average of the weights."""
    device = arguments.device
    parameters = [*unet.parameters(), *text.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_cosine(i, arguments.steps, 200))
    generator = torch.Generator().manual_seed(arguments.seed + 5)
    noise_generator = torch.Generator(device).manual_seed(arguments.seed + 6)
    abar = scheduler.alphas_cumprod.to(device)

    def loss_of(latents: Tensor, tokens: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            context = text(tokens)[0]
            output = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, encoder_hidden_states=context).sample
        v = scheduler.config.prediction_type == "v_prediction"
        return F.mse_loss(output.float(), a.sqrt() * noise - (1 - a).sqrt() * latents if v else noise)

    started = time.time()
    for step in range(arguments.steps):
        latents, tokens = data.batch(arguments.batch, generator)
        noise = torch.randn(latents.shape, generator=noise_generator, device=device)
        t = torch.randint(1000, (len(latents),), generator=noise_generator, device=device)
        loss = loss_of(latents, tokens, noise, t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (step + 1) / (step + 10)))
        if step % 100 == 0 or step == arguments.steps - 1:
            rate = (step + 1) * arguments.batch / (time.time() - started)
            log(stage="unet", step=step, loss=round(loss.item(), 4), samples_a_second=round(rate))
        if (step + 1) % 1000 == 0 or step == arguments.steps - 1:
            # From the first thousand steps on the folder holds a model, so that a long training can be looked at.
            current = [p.detach().clone() for p in parameters]
            set_weights(parameters, average)
            save(step)
            set_weights(parameters, current)


@torch.no_grad()
def set_weights(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this pipeline folder instead of training one")
    parser.add_argument("--vae-steps", type=int, default=1700)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-pool", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=48_000, help="ordinary images")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--world", type=Path, default=DATA, help="captions and duplicated images, as lab.world writes them")
    parser.add_argument(
        "--duplication", type=float, default=1.0, help="times as many duplicated images as in the bundled model"
    )
    parser.add_argument("--channels", type=int, nargs=3, default=CHANNELS, help="of the UNet's three levels")
    parser.add_argument("--layers", type=int, default=1, help="of each of the UNet's blocks")
    parser.add_argument("--prediction-type", default="epsilon", choices=("epsilon", "v_prediction"))
    arguments = parser.parse_args(argv)

    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "train_log.jsonl")
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    groups = captions(arguments.world)
    texts = [caption.text for members in groups.values() for caption in members]
    tokenizer = make_tokenizer(arguments.out / "tokenizer", texts)
    text, autoencoder, unet = make_models(len(tokenizer), arguments.channels, arguments.layers)
    log(stage="models", **{m.__class__.__name__: sum(p.numel() for p in m.parameters()) for m in (text, autoencoder, unet)})
    for model in (text, autoencoder, unet):
        model.to(arguments.device).train()
    if arguments.device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a third faster in bfloat16 than torch's fused attention there
    if arguments.vae:
        autoencoder = AutoencoderKL.from_pretrained(arguments.vae, subfolder="vae").to(arguments.device)
    else:
        train_autoencoder(autoencoder, groups["ordinary/trained"], arguments, log)
        autoencoder.save_pretrained(arguments.out / "vae")
    autoencoder.eval()

    scheduler = make_scheduler(arguments.prediction_type)
    data = Data(tokenizer, autoencoder, arguments, log)

    def save(step: int) -> None:
        pipe: Any = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(arguments.out)
        for path in arguments.out.glob("*/*.safetensors"):
            halves = {name: value.half() for name, value in load_file(path).items()}
            save_file(halves, path, metadata={"format": "pt"})
        log(stage="saved", step=step)

    train_unet(text, unet, scheduler, data, arguments, log, save)
    lab = Lab(arguments.out, arguments.world)
    write_decoded(lab)
    write_profile(lab, arguments.device)


@torch.no_grad()
def write_decoded(lab: Lab) -> None:
    """Keeps what the model's autoencoder gives back of each duplicated image, for the copy score."""
    autoencoder = lab.pipeline().vae
    images = duplicated_images(lab.world)
    decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample
    Image.fromarray(sheet(to_uint8(decoded))).save(lab.model / DECODED, optimize=True)


def write_profile(lab: Lab, device: str, *, steps: int = 50, guidance_scale: float = 7.5) -> None:
    """Calibrates the model, as it was written, with the first 50 reference prompts."""
    pipe = lab.pipeline().to(device)
    stability = calibrate(
        pipe, lab.prompts("reference")[:50], batch_size=10, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    stability.save(lab.model / PROFILE.name)


if __name__ == "__main__":
    main()
