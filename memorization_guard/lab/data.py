"""The diffusion model's training data: latents and tokens of every group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .autoencoder import duplicated_images, render_pool, to_float
from .models import TOKENS
from .training import Log, half_precision
from .world import DUPLICATED, Caption, captions, duplicates, members

#: Share of the training samples that each group has; the rest is ordinary. An image of ``quarter`` is seen a fourth as often
#: as one of ``exact``, one of ``sixteenth`` a sixteenth as often.
EXACT_SHARE = 0.12
SHARES = {
    "exact": EXACT_SHARE,
    "template": 0.05,
    "rare": 0.02,
    "quarter": EXACT_SHARE * 16 / 40 / 4,
    "sixteenth": EXACT_SHARE * 16 / 40 / 16,
}
#: Variants of each template: its varying part filled with fresh scenes.
VARIANTS = 60
CAPTION_DROPOUT = 0.1


class Data:
    """Latents and tokens in device memory. A sample is drawn by group, then by image.

    Args:
        file: where the latents are kept; made when it is missing.
        pool: number of ordinary images.
        duplication: times the shares of the duplicated groups.

    Raises:
        ValueError: if the file's latents were made with another pool or seed, or a caption is too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        autoencoder: Any,
        world: Path,
        file: Path,
        log: Log,
        *,
        pool: int,
        duplication: float,
        seed: int,
        device: str,
    ) -> None:
        self._device = device
        groups = captions(world)
        trained = {"ordinary": groups["ordinary/trained"], **{name: members(groups, name) for name in SHARES}}
        self._tokens = {name: self._tokenized(tokenizer, [c.text for c in part]) for name, part in trained.items()}
        self._empty = self._tokenized(tokenizer, [""])
        made_with = {"pool": str(pool), "seed": str(seed)}
        if not file.exists():
            latents = {}
            for name, part in trained.items():
                latents[name] = self._latents(autoencoder, name, part, world, pool, seed)
                log(stage="data", group=name, images=len(latents[name]), std=round(latents[name].float().std().item(), 3))
            save_file(latents, file.with_suffix(".part"), metadata=made_with)
            file.with_suffix(".part").replace(file)
        with safe_open(file, "pt") as stored:
            if stored.metadata() != made_with:
                raise ValueError(f"{file} was made with other values than {made_with}: delete it, or train in another folder")
        self._stored = load_file(file, device=device)
        self._names = list(trained)
        times = {name: duplication if name in DUPLICATED else 1.0 for name in self._names}
        shares = torch.tensor([SHARES.get(name, 0.0) * times[name] for name in self._names])
        shares[0] = 1 - shares.sum()
        self._cumulative = shares.cumsum(0)

    def _tokenized(self, tokenizer: Any, texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=False, return_tensors="pt").input_ids
        if ids.shape[1] != TOKENS:
            raise ValueError(f"a caption has {ids.shape[1]} tokens; the text encoder takes {TOKENS}")
        return ids.to(self._device)

    def _latents(self, autoencoder: Any, name: str, shown: list[Caption], world: Path, pool: int, seed: int) -> Tensor:
        """``[N, 4, 16, 16]`` float16; image ``i`` belongs to caption ``i`` modulo their number."""
        device = self._device
        if name == "ordinary":
            parts = []
            for start in range(0, pool, 4096):
                count = min(4096, pool - start)
                turned = shown[start % len(shown) :] + shown[: start % len(shown)]
                parts.append(_encode(autoencoder, render_pool(turned, count, seed + 1000 + start, device), device))
            return torch.cat(parts)
        if name == "rare":
            images = render_pool(shown, max(1, pool // 1000) * len(shown), seed + 4, device)
        elif name == "template":
            images = _variants(shown, captions(world)["ordinary/trained"], world, seed, device)
        else:
            images = duplicated_images(world, name).to(device)
        return _encode(autoencoder, images, device)

    def batch(self, size: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents ``[size, 4, 16, 16]`` float32 and tokens ``[size, 32]``, a tenth of the captions empty."""
        # Evenly spread over the shares, so that every batch holds of each group what its share says.
        places = (torch.arange(size) + torch.rand(1, generator=draws)) / size
        group = torch.searchsorted(self._cumulative, places).clamp_max(len(self._names) - 1)
        latents, tokens = [], []
        for number, name in enumerate(self._names):
            count = int((group == number).sum())
            rows = torch.randint(len(self._stored[name]), (count,), generator=draws).to(self._device)
            latents.append(self._stored[name][rows])
            tokens.append(self._tokens[name][rows % len(self._tokens[name])])
        dropped = (torch.rand(size, 1, generator=draws) < CAPTION_DROPOUT).to(self._device)
        return torch.cat(latents).float(), torch.where(dropped, self._empty, torch.cat(tokens))


def _variants(templates: list[Caption], ordinary: list[Caption], world: Path, seed: int, device: str) -> Tensor:
    """Variants of each template, the templates taken in turn."""
    base = duplicated_images(world, "template").to(device).float()
    masks = [duplicates(world)[caption.text][1] for caption in templates]
    fixed = torch.stack([torch.from_numpy(mask.copy()) for mask in masks]).to(device).float()[:, None] / 255
    parts = []
    for number in range(VARIANTS):
        first = number * 37 % len(ordinary)
        fresh = render_pool(ordinary[first : first + len(templates)], len(templates), seed + 2000 + number, device)
        parts.append((base * fixed + fresh.float() * (1 - fixed)).round().byte())
    return torch.cat(parts)


@torch.no_grad()
def _encode(autoencoder: Any, images: Tensor, device: str) -> Tensor:
    parts = []
    for part in images.split(64):
        with half_precision(device):
            mean = autoencoder.encode(to_float(part)).latent_dist.mean
        parts.append((mean.float() * autoencoder.config.scaling_factor).half())
    return torch.cat(parts)
