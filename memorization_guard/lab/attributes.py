"""Does an image show what its caption says? A small classifier of the captions' attributes, for the fidelity after mitigation.

    python -m memorization_guard.lab.attributes [--model FOLDER] [--world FOLDER]    # trains it, some minutes on two cores

It is trained on fresh renderings of ordinary captions, every fifth as the model's autoencoder gives it back, never on an image
that a diffusion model made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import MODEL, Lab
from .autoencoder import to_float
from .scene import COLORS, SETTINGS, SHAPES, SIZE, render
from .training import half_precision
from .world import DATA, Caption, captions, more_captions, to_uint8

FILE = "attributes.safetensors"

#: The values of each attribute; those of a second object count as further shapes and colours of the image.
VALUES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "color": tuple(COLORS), "setting": SETTINGS}


class Classifier(nn.Module):
    """``[B, 3, 128, 128]`` in [-1, 1] -> one score a value of every attribute, ``[B, 21]``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 160)
        layers: list[nn.Module] = [nn.AvgPool2d(2)]  # what a caption names is large
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            if before > 3:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], sum(map(len, VALUES.values())))

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))


def said(caption: Caption) -> dict[str, list[str]]:
    """What a caption says, by attribute."""
    seconds = {"shape": caption.second_shape, "color": caption.second_color}
    return {name: [value for value in (getattr(caption, name), seconds.get(name)) if value] for name in VALUES}


def _targets(members: Sequence[Caption]) -> Tensor:
    rows = [
        [float(value in said(caption)[name]) for name, values in VALUES.items() for value in values] for caption in members
    ]
    return torch.tensor(rows)


def train(lab: Lab, *, images: int = 16_000, epochs: int = 5, batch: int = 32, seed: int = 0) -> Classifier:
    """Trains a classifier on renderings of the world's ordinary captions."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    autoencoder = lab.pipeline().vae
    members = [*captions(lab.world)["ordinary/trained"], *more_captions(4000, 1, lab.world)]
    chosen = [members[i % len(members)] for i in range(images)]
    pool = torch.empty((images, 3, SIZE, SIZE), dtype=torch.uint8)
    for start in range(0, images, 100):
        part = slice(start, start + 100)
        seen = render(chosen[part], generator)
        with torch.no_grad(), half_precision("cpu"):
            latents = autoencoder.encode(seen[::5]).latent_dist.mean
            # A diffusion model's latents are never quite those of an image.
            noise = torch.randn(latents.shape, generator=generator) * torch.rand(len(latents), 1, 1, 1, generator=generator)
            seen[::5] = autoencoder.decode(latents + 0.15 / autoencoder.config.scaling_factor * noise).sample.float()
        pool[part] = ((seen.clamp(-1, 1) + 1) * 127.5).round().byte()
    targets = _targets(chosen)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * images // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(images, (batch,), generator=generator)
        with half_precision("cpu"):
            scores = model(to_float(pool[rows]))
        loss = F.binary_cross_entropy_with_logits(scores.float(), targets[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load(lab: Lab) -> Classifier:
    """The classifier that was trained for the model, from its folder.

    Raises:
        FileNotFoundError: if there is none; says how to train it.
    """
    path = lab.model / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: python -m memorization_guard.lab.attributes --model {lab.model}")
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


@torch.no_grad()
def attribute_accuracy(images: np.ndarray, texts: Sequence[str], lab: Lab, *, model: Any = None) -> np.ndarray:
    """Share of the attributes in its caption that each image is seen to have: ``[N, 128, 128, 3]`` uint8 -> ``[N]``.

    Of every attribute as many values are taken as the caption names, those with the highest scores.

    Raises:
        KeyError: for a caption that is not of the lab's world.
    """
    model = model or load(lab)
    known = {caption.text: caption for members in captions(lab.world).values() for caption in members}
    pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
    scores = torch.cat([model(to_float(part)) for part in pixels.split(64)])
    result = []
    for row, text in zip(scores, texts, strict=True):
        if text not in known:
            raise KeyError(f"{text!r} is no caption of the world in {lab.world}")
        hits = total = start = 0
        for name, values in VALUES.items():
            wanted = said(known[text])[name]
            top = row[start : start + len(values)].topk(len(wanted)).indices.tolist()
            hits += sum(values[i] in wanted for i in top)
            total += len(wanted)
            start += len(values)
        result.append(hits / total)
    return np.array(result)


@torch.no_grad()
def accuracy_on_renderings(lab: Lab, count: int = 400) -> float:
    """Share of attributes seen in fresh renderings of captions never trained on, as the autoencoder gives them back."""
    held_out = (captions(lab.world)["ordinary/tuning"] + captions(lab.world)["ordinary/evaluation"])[:count]
    generator = torch.Generator().manual_seed(99)
    autoencoder = lab.pipeline().vae
    seen = []
    for start in range(0, len(held_out), 50):
        images = render(held_out[start : start + 50], generator)
        seen.append(to_uint8(autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample))
    return float(attribute_accuracy(np.concatenate(seen), [caption.text for caption in held_out], lab).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    arguments = parser.parse_args()
    lab = Lab(arguments.model, arguments.world)
    model = train(lab)
    save_file({name: value.half() for name, value in model.state_dict().items()}, lab.model / FILE)
    print(f"accuracy on renderings of captions never trained on: {accuracy_on_renderings(lab):.3f}")


if __name__ == "__main__":
    main()
