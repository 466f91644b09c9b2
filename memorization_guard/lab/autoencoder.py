"""Training of the lab's autoencoder, and how well it gives images back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from torch import Tensor

from .scene import SIZE, render
from .training import Log, Run, generator, half_precision, learning_rate
from .world import Caption, captions, duplicates, members

#: Share of a batch that are duplicated images: without them, photographs would come out as clouds.
DUPLICATES_SHARE = 0.25
#: Fresh renderings with which a trained autoencoder is measured.
MEASURED = 512


def render_pool(shown: list[Caption], count: int, seed: int, device: str) -> Tensor:
    """``count`` fresh images, the captions taken in turn: ``[count, 3, 128, 128]`` uint8."""
    draws = torch.Generator().manual_seed(seed)
    pool = torch.empty((count, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    for start in range(0, count, 256):
        chosen = [shown[i % len(shown)] for i in range(start, min(start + 256, count))]
        pool[start : start + len(chosen)] = ((render(chosen, draws, device) + 1) * 127.5).round().byte()
    return pool


def duplicated_images(world: Path, group: str | None = None) -> Tensor:
    """The images that are duplicated in training, all or those of one group: ``[N, 3, 128, 128]`` uint8."""
    texts = None
    if group is not None:
        texts = {caption.text for caption in members(captions(world), group)}
    images = [image for text, (image, _) in duplicates(world).items() if texts is None or text in texts]
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images])


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_autoencoder(
    model: Any,
    world: Path,
    checkpoint: Path,
    log: Log,
    *,
    steps: int,
    batch: int,
    pool: int,
    seed: int,
    lr: float,
    device: str,
) -> None:
    """L1, squares, L1 of a coarser picture and of the differences, and a pull of the latents to a unit normal."""
    run = Run({"vae": model}, checkpoint, lr=lr, decay=0.995)
    if run.step < steps:
        trained = captions(world)["ordinary/trained"]
        images = render_pool(trained, pool, seed + 1, device)
        repeated = torch.cat([duplicated_images(world), *[duplicated_images(world, "exact")] * 3]).to(device)
    while run.step < steps:
        draws = generator(seed + 2, run.step)
        few = max(1, round(batch * DUPLICATES_SHARE))
        rows = torch.randint(len(images), (batch - few,), generator=draws)
        others = torch.randint(len(repeated), (few,), generator=draws)
        wanted = to_float(torch.cat([images[rows.to(device)], repeated[others.to(device)]]))
        with half_precision(device):
            posterior = model.encode(wanted).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draws).to(device)
            output = model.decode(latents).sample
        output = output.float()
        edges = sum((output.diff(dim=d) - wanted.diff(dim=d)).abs().mean() for d in (2, 3))
        coarse = F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(wanted, 4))
        pixels = F.l1_loss(output, wanted) + 2 * F.mse_loss(output, wanted)
        loss = pixels + 0.5 * edges + coarse + 3e-6 * posterior.kl().mean()
        run.update(loss, learning_rate(run.step, steps, 50, max(1, steps // 2)))
        if run.step % 100 == 0 or run.step == steps:
            log(stage="autoencoder", step=run.step, loss=round(loss.item(), 4), kl=round(posterior.kl().mean().item()))
        if run.step % 500 == 0 or run.step == steps:
            run.save()
    with run.averaged():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    model.eval()
    fresh = render_pool(captions(world)["ordinary/trained"], MEASURED, seed + 3, device)
    with torch.no_grad():
        means = torch.cat([model.encode(to_float(part)).latent_dist.mean for part in fresh.split(64)])
    model.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    log(stage="autoencoder", scaling_factor=model.config.scaling_factor, **reconstruction(model, world, seed, device))


@torch.no_grad()
def reconstruction(model: Any, world: Path, seed: int, device: str) -> dict[str, list[float]]:
    """PSNR in dB of red, green and blue, over fresh ordinary images and over the exact group's images."""
    held_out = [*captions(world)["ordinary/evaluation"], *captions(world)["ordinary/tuning"]][:MEASURED]
    result = {}
    for name, images in (
        ("psnr_ordinary", render_pool(held_out, MEASURED, seed + 99, device)),
        ("psnr_exact", duplicated_images(world, "exact").to(device)),
    ):
        wanted = to_float(images)
        seen = torch.cat(
            [model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in wanted.split(32)]
        )
        error = ((seen - wanted) / 2).square().mean(dim=(0, 2, 3))
        result[name] = [round(value, 2) for value in (-10 * error.log10()).tolist()]
    return result
