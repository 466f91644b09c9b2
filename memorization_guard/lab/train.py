"""Trains a lab model, writes it as a diffusers Stable Diffusion folder, and calibrates its stability profile.

    python -m memorization_guard.lab.train --out FOLDER [--device cuda] [--seed 0] [--world FOLDER]

Some hours on two cores, minutes on a GPU. A training that was stopped goes on from its last checkpoint when the same command
is given again, with the same random numbers as if it had not been stopped. A seed gives the same data and the same starting
weights everywhere, and the same weights on the same machine up to the order of floating-point sums.

What the training itself needs (checkpoints, latents, sample sheets) is kept in FOLDER/training and can be deleted afterwards.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..adapters.calibrate import calibrate
from . import PROFILE, Lab
from .autoencoder import train_autoencoder
from .data import Data
from .models import CHANNELS, make_autoencoder, make_scheduler, make_text_encoder, make_tokenizer, make_unet
from .training import Log, Run, generator, learning_rate
from .world import DATA, captions, sheet

#: Weight of a timestep's loss: its signal-to-noise ratio, at most this, over the ratio (Hang et al., ICCV 2023).
MIN_SNR = 5.0
#: Steps from one checkpoint to the next.
SAVED_EVERY = 1000


def train_unet(text: Any, unet: Any, scheduler: Any, data: Data, arguments: argparse.Namespace, log: Log, save: Any) -> None:
    """Noise (or v) prediction, the text encoder trained along; what is kept is the moving average of the weights."""
    device, steps = arguments.device, arguments.steps
    run = Run({"unet": unet, "text_encoder": text}, arguments.out / "training" / "unet.safetensors", lr=arguments.lr)
    abar = scheduler.alphas_cumprod.to(device)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    ratio = abar / (1 - abar)
    # The weight of a loss on x0 is min(SNR, 5); noise and v differ from x0 by these factors.
    weights = ratio.clamp_max(MIN_SNR) / (ratio + 1 if v_prediction else ratio)
    started, samples = time.time(), 0
    while run.step < steps:
        # A larger batch late, when the gradient is mostly noise.
        size = arguments.batch * (2 if run.step >= steps - arguments.decay else 1)
        draws = generator(arguments.seed + 5, run.step)
        latents, tokens = data.batch(size, draws)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        # Evenly spread timesteps: less noise in the gradient than independent ones.
        t = ((torch.randperm(size, generator=draws) + torch.rand(size, generator=draws)) * (1000 / size)).long().to(device)
        a = abar[t].view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            context = text(tokens)[0]
            output = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, encoder_hidden_states=context).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * latents if v_prediction else noise
        loss = ((output.float() - target).square().mean(dim=(1, 2, 3)) * weights[t]).mean()
        run.update(loss, learning_rate(run.step, steps, 300, arguments.decay))
        samples += size
        if run.step % 100 == 0 or run.step == steps:
            rate = round(samples / (time.time() - started))
            log(stage="unet", step=run.step, loss=round(loss.item(), 4), samples_a_second=rate)
        if run.step % SAVED_EVERY == 0 or run.step == steps:
            run.save()
            with run.averaged():
                save(run.step)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, default=DATA, help="captions and duplicated images, as lab.world writes them")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--vae-lr", type=float, default=1e-3)
    parser.add_argument("--vae-pool", type=int, default=8000)
    parser.add_argument("--pool", type=int, default=32_000, help="ordinary images")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--decay", type=int, default=4000, help="steps at the end over which the learning rate goes down to 0")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--channels", type=int, nargs=3, default=CHANNELS, help="of the UNet's three levels")
    parser.add_argument("--layers", type=int, default=1, help="of each of the UNet's blocks")
    parser.add_argument("--prediction-type", default="epsilon", choices=("epsilon", "v_prediction"))
    arguments = parser.parse_args(argv)

    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    scratch = arguments.out / "training"
    scratch.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "train_log.jsonl")
    torch.manual_seed(arguments.seed)
    texts = [caption.text for members in captions(arguments.world).values() for caption in members]
    tokenizer = make_tokenizer(arguments.out / "tokenizer", texts)
    device = arguments.device
    text, autoencoder, unet = (
        make_text_encoder(len(tokenizer)),
        make_autoencoder(),
        make_unet(arguments.channels, arguments.layers),
    )
    log(stage="models", **{m.__class__.__name__: sum(p.numel() for p in m.parameters()) for m in (text, autoencoder, unet)})
    for model in (text, autoencoder, unet):
        model.to(device).train()
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # faster in bfloat16 than torch's fused attention there
    train_autoencoder(
        autoencoder,
        arguments.world,
        scratch / "vae.safetensors",
        log,
        steps=arguments.vae_steps,
        batch=arguments.vae_batch,
        pool=arguments.vae_pool,
        seed=arguments.seed,
        lr=arguments.vae_lr,
        device=device,
    )
    scheduler = make_scheduler(arguments.prediction_type)
    data = Data(
        tokenizer,
        autoencoder,
        arguments.world,
        scratch / "latents.safetensors",
        log,
        pool=arguments.pool,
        seed=arguments.seed,
        device=device,
    )

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
        for path in arguments.out.glob("[!t]*/*.safetensors"):
            _halve(path)
        _halve(arguments.out / "text_encoder" / "model.safetensors")
        write_samples(Lab(arguments.out, arguments.world), scratch / f"samples-{step}.png")
        log(stage="saved", step=step)

    train_unet(text, unet, scheduler, data, arguments, log, save)
    write_profile(Lab(arguments.out, arguments.world), device)


def _halve(path: Path) -> None:
    halves = {name: value.half() for name, value in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})


def write_samples(lab: Lab, path: Path, *, count: int = 15, steps: int = 20) -> None:
    """A sheet to look at while a training runs: ordinary captions never trained on, then exact ones."""
    from diffusers import EulerDiscreteScheduler

    pipe = lab.pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    texts = lab.prompts("ordinary", "tuning")[:count] + lab.prompts("exact", "tuning")[:count]
    draws = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    images = pipe(texts, num_inference_steps=steps, guidance_scale=7.5, generator=draws, output_type="np").images
    Image.fromarray(sheet((images * 255).round().astype("uint8"))).save(path)


def write_profile(lab: Lab, device: str, *, steps: int = 50, guidance_scale: float = 7.5) -> None:
    """Calibrates the model, as it was written, with the first 50 reference prompts."""
    pipe = lab.pipeline().to(device)
    stability = calibrate(
        pipe, lab.prompts("reference")[:50], batch_size=10, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    stability.save(lab.model / PROFILE.name)


if __name__ == "__main__":
    main()
