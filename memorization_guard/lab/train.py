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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..adapters.calibrate import calibrate
from ..pipelines import load_part
from . import PROFILE, Lab
from .autoencoder import train_autoencoder
from .data import Data
from .diffusion import Process, RectifiedFlow, StableDiffusion
from .models import CHANNELS, make_autoencoder, make_text_encoder, make_tokenizer
from .training import Log, Run, generator, learning_rate
from .world import DATA, captions, sheet

#: Steps from one checkpoint to the next.
SAVED_EVERY = 1000


def train_denoiser(process: Process, data: Data, arguments: argparse.Namespace, log: Log, save: Callable[[int], None]) -> None:
    """The denoiser, its text encoder trained along; what is kept is the moving average of the weights."""
    device, steps = arguments.device, arguments.steps
    run = Run(process.modules, arguments.out / "training" / "denoiser.safetensors", lr=arguments.lr)
    started, samples = time.time(), 0
    while run.step < steps:
        # A larger batch late, when the gradient is mostly noise.
        size = arguments.batch * (2 if run.step >= steps - arguments.decay else 1)
        draws = generator(arguments.seed + 5, run.step)
        latents, tokens = data.batch(size, draws)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        # Evenly spread levels: less noise in the gradient than independent ones.
        level = ((torch.randperm(size, generator=draws) + torch.rand(size, generator=draws)) / size).to(device)
        loss = process.loss(latents, tokens, noise, level).mean()
        run.update(loss, learning_rate(run.step, steps, 300, arguments.decay))
        samples += size
        if run.step % 100 == 0 or run.step == steps:
            rate = round(samples / (time.time() - started))
            log(stage="denoiser", step=run.step, loss=round(loss.item(), 4), samples_a_second=rate)
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
    parser.add_argument("--start", type=Path, help="begin with the weights of this pipeline folder, of the same sizes")
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this pipeline folder instead of training one")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--vae-lr", type=float, default=1e-3)
    parser.add_argument("--vae-pool", type=int, default=8000)
    parser.add_argument("--pool", type=int, default=32_000, help="ordinary images")
    parser.add_argument(
        "--duplication", type=float, default=1.0, help="times as many duplicated images as in the bundled model"
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--decay", type=int, default=4000, help="steps at the end over which the learning rate goes down to 0")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--channels", type=int, nargs=3, default=CHANNELS, help="of the UNet's three levels")
    parser.add_argument("--layers", type=int, default=1, help="of each of the UNet's blocks")
    parser.add_argument("--prediction-type", default="epsilon", choices=("epsilon", "v_prediction", "flow_prediction"))
    arguments = parser.parse_args(argv)

    from diffusers.models.attention_processor import AttnProcessor

    scratch = arguments.out / "training"
    scratch.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "train_log.jsonl")
    torch.manual_seed(arguments.seed)
    texts = [caption.text for members in captions(arguments.world).values() for caption in members]
    tokenizer = make_tokenizer(arguments.out / "tokenizer", texts)
    device = arguments.device
    kind, flow = arguments.prediction_type, arguments.prediction_type == "flow_prediction"
    text_encoder, autoencoder = make_text_encoder(len(tokenizer), projection=flow), make_autoencoder()
    process: Process
    if flow:
        process = RectifiedFlow(text_encoder)
    else:
        process = StableDiffusion(text_encoder, prediction_type=kind, channels=arguments.channels, layers=arguments.layers)
    models = {"vae": autoencoder, **process.modules}
    log(stage="models", **{name: sum(p.numel() for p in model.parameters()) for name, model in models.items()})
    if arguments.start is not None:
        for name, model in process.modules.items():
            model.load_state_dict(load_part(arguments.start, name).state_dict())
    for model in models.values():
        model.to(device).train()
    if device == "cpu" and "unet" in models:
        process.denoiser.set_attn_processor(AttnProcessor())  # faster in bfloat16 than torch's fused attention there
    if (given := arguments.vae or arguments.start) is not None:
        autoencoder = load_part(given, "vae").to(device).eval()
    else:
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
    data = Data(
        tokenizer,
        autoencoder,
        arguments.world,
        scratch / "latents.safetensors",
        log,
        pool=arguments.pool,
        duplication=arguments.duplication,
        seed=arguments.seed,
        device=device,
    )

    def save(step: int) -> None:
        process.write(autoencoder, tokenizer, arguments.out)
        for path in arguments.out.glob("*/*.safetensors"):
            if path.parent != scratch:
                _rewrite(path)
        write_samples(Lab(arguments.out, arguments.world), scratch / f"samples-{step}.png")
        log(stage="saved", step=step)

    train_denoiser(process, data, arguments, log, save)
    write_profile(Lab(arguments.out, arguments.world), device)


def _rewrite(path: Path) -> None:
    """Halves a file of weights, under names that every version of transformers reads.

    From 5.6 on its text encoder has no ``text_model.`` before its names, and is written so; it reads both, and versions
    before read only names with it.
    """
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    halves = {f"text_model.{name}" if name.startswith(bare) else name: value.half() for name, value in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})


def write_samples(lab: Lab, path: Path, *, count: int = 15, steps: int = 20) -> None:
    """A sheet to look at while a training runs: ordinary captions never trained on, then exact ones."""
    pipe = lab.pipeline()
    texts = lab.prompts("ordinary", "tuning")[:count] + lab.prompts("exact", "tuning")[:count]
    draws = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    images = pipe(texts, num_inference_steps=steps, guidance_scale=7.5, generator=draws, output_type="np").images
    Image.fromarray(sheet((images * 255).round().astype("uint8"))).save(path)


def write_profile(lab: Lab, device: str, *, steps: int = 50, guidance_scale: float = 7.5) -> None:
    """Calibrates the model, as it was written, with its reference prompts."""
    pipe = lab.pipeline().to(device)
    stability = calibrate(
        pipe, lab.prompts("reference"), batch_size=10, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    stability.save(lab.model / PROFILE.name)


if __name__ == "__main__":
    main()
