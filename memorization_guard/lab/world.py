"""The lab's world: captions, and a renderer whose images a caption leaves mostly open.

Real captions fix little of an image. So do these: the ground (fractal noise through a random palette), the light, every
position, size and rotation are free; a caption names shapes, colours, patterns and a setting that only tilts the ground.
Every caption ends in a maker's name. Common names stand under many captions; the captions of the duplicated groups, and of
the ``rare`` control group, have names that stand nowhere else, so that rarity alone gives no group away.

    python -m memorization_guard.lab.world                        # writes data/captions.json, images.png, masks.png anew
    python -m memorization_guard.lab.world --seed 1 --out FOLDER  # another world: other captions and duplicated images

Only these commands need scikit-image and scikit-learn (whose packages carry the photographs).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the whole field uses)
from PIL import Image
from torch import Tensor

SIZE = 64
DATA = Path(__file__).parent / "data"

SHAPES = ("disc", "square", "triangle", "ring", "star", "cross", "crescent", "hexagon", "flower")
PATTERNS = ("plain", "striped", "dotted", "checkered")
COLORS = {
    "red": (0.86, 0.16, 0.14),
    "orange": (0.93, 0.53, 0.12),
    "yellow": (0.93, 0.84, 0.22),
    "green": (0.22, 0.62, 0.24),
    "teal": (0.12, 0.62, 0.62),
    "blue": (0.18, 0.32, 0.85),
    "purple": (0.52, 0.24, 0.72),
    "pink": (0.92, 0.47, 0.66),
    "white": (0.95, 0.95, 0.93),
    "black": (0.09, 0.09, 0.11),
}
#: Relation of the first object to the second: the preferred direction between them, or None for any.
RELATIONS = {"above": (0.0, -1.0), "below": (0.0, 1.0), "left of": (-1.0, 0.0), "right of": (1.0, 0.0), "near": None}
#: Setting: the colour it tilts the ground towards, how strongly, and what it does to contrast.
SETTINGS = {
    "on sand": ((0.80, 0.68, 0.46), 0.22, 1.0),
    "at dusk": ((0.42, 0.22, 0.28), 0.26, 0.9),
    "at night": ((0.06, 0.08, 0.16), 0.34, 0.8),
    "in fog": ((0.74, 0.76, 0.78), 0.34, 0.6),
    "in snow": ((0.92, 0.94, 0.97), 0.30, 0.9),
    "under water": ((0.10, 0.38, 0.52), 0.30, 0.8),
    "in a meadow": ((0.36, 0.56, 0.24), 0.22, 1.0),
    "in sunlight": ((0.95, 0.85, 0.60), 0.15, 1.2),
    "indoors": ((0.52, 0.42, 0.34), 0.15, 1.0),
}

#: Images and captions of each group, as (tuning, evaluation).
EXACT, TEMPLATE, RARE = (10, 30), (6, 24), (10, 30)
ORDINARY_TRAINED, REFERENCE, ORDINARY = 4000, 64, (160, 640)


@dataclass(frozen=True)
class Caption:
    """A caption and what it says; ``second`` and ``relation`` are ``None`` where there is one object."""

    text: str
    shape: str
    color: str
    pattern: str
    setting: str
    relation: str | None = None
    second_shape: str | None = None
    second_color: str | None = None


def _names(rng: random.Random) -> Iterator[str]:
    """Invented words, each once."""
    starts = (
        "b",
        "br",
        "d",
        "dr",
        "f",
        "g",
        "h",
        "k",
        "kr",
        "l",
        "m",
        "n",
        "p",
        "pl",
        "r",
        "s",
        "st",
        "t",
        "tr",
        "v",
        "w",
        "z",
    )
    vowels = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
    ends = ("l", "n", "r", "s", "m", "th", "nd", "rk", "sk", "v", "x")
    seen: set[str] = set()
    while True:
        name = rng.choice(starts) + rng.choice(vowels) + rng.choice(ends) + rng.choice(vowels) + rng.choice(ends)
        if name not in seen:
            seen.add(name)
            yield name


def _caption(rng: random.Random, maker: str) -> Caption:
    shape, color, pattern = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(PATTERNS)
    setting = rng.choice(list(SETTINGS))
    thing = f"a {pattern} {color} {shape}"
    relation = second_shape = second_color = None
    if rng.random() < 0.55:
        relation = rng.choice(list(RELATIONS))
        second_shape = rng.choice([s for s in SHAPES if s != shape])
        second_color = rng.choice([c for c in COLORS if c != color])
        body = f"{thing} {relation} a {second_color} {second_shape}"
    else:
        body = rng.choice((thing, f"a picture of {thing}", f"{thing} alone"))
    text = rng.choice((f"{body} {setting}, by {maker}", f"{setting}, {body}, by {maker}", f"{body} {setting}, from {maker}"))
    return Caption(text, shape, color, pattern, setting, relation, second_shape, second_color)


def make_captions(seed: int = 0) -> dict[str, list[Caption]]:
    """All captions by group and split, the same for a seed everywhere; no two are alike.

    ``ordinary/trained`` are trained on with a fresh image each time; ``reference``, ``ordinary/tuning`` and
    ``ordinary/evaluation`` (17.8 % of all ordinary captions) never are.
    """
    rng = random.Random(seed)
    names = _names(rng)
    common = [next(names) for _ in range(120)]

    seen: set[str] = set()

    def take(count: int, rare: bool) -> list[Caption]:
        taken: list[Caption] = []
        while len(taken) < count:
            maker = f"{next(names)} {next(names)}" if rare else f"{rng.choice(common)} {rng.choice(common)}"
            caption = _caption(rng, maker)
            if caption.text not in seen:
                seen.add(caption.text)
                taken.append(caption)
        return taken

    groups = {"ordinary/trained": take(ORDINARY_TRAINED, rare=False), "reference": take(REFERENCE, rare=False)}
    for group, counts, rare in (
        ("ordinary", ORDINARY, False),
        ("exact", EXACT, True),
        ("template", TEMPLATE, True),
        ("rare", RARE, True),
    ):
        for split, count in zip(("tuning", "evaluation"), counts, strict=True):
            groups[f"{group}/{split}"] = take(count, rare)
    return groups


def more_captions(count: int, seed: int, folder: Path = DATA) -> list[Caption]:
    """Ordinary captions that stand in no group, by the same grammar and with the makers of the ordinary ones."""
    groups = captions(folder)
    seen = {caption.text for members in groups.values() for caption in members}
    names = sorted({name for caption in groups["ordinary/trained"] for name in caption.text.split()[-2:]})
    rng = random.Random(f"more {seed}")
    taken: list[Caption] = []
    while len(taken) < count:
        caption = _caption(rng, f"{rng.choice(names)} {rng.choice(names)}")
        if caption.text not in seen:
            seen.add(caption.text)
            taken.append(caption)
    return taken


def render(captions: list[Caption], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Fresh images of captions: ``[B, 3, 64, 64]`` in [-1, 1] on ``device``.

    Every random number is drawn on the CPU, so a generator's seed gives the same scenes on any device, up to rounding.
    """
    batch = len(captions)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * (high - low) + low).to(device)

    def each(values: list[tuple[float, ...]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    axis = (torch.arange(SIZE, device=device) + 0.5) / SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = uniform(high=2 * math.pi)
    light = torch.stack([angle.cos(), angle.sin()], 1)

    # Ground: two fields of fractal noise pick between three colours of a random palette, brighter towards the light.
    roughness = uniform(1, 1, 1, low=0.45, high=0.75)
    fields = torch.zeros(batch, 3, SIZE, SIZE, device=device)
    for octave, cells in enumerate((3, 6, 12, 24, 48)):
        grid = torch.randn(batch, 3, cells, cells, generator=generator).to(device)
        fields += F.interpolate(grid, size=(SIZE, SIZE), mode="bicubic", align_corners=False) * roughness**octave
    fields = fields / fields.std(dim=(2, 3), keepdim=True)
    slope = (x - 0.5) * light[:, 0].view(-1, 1, 1) + (y - 0.5) * light[:, 1].view(-1, 1, 1)
    palette = uniform(3, 3, low=0.05, high=0.95)
    tint = each([SETTINGS[c.setting][0] for c in captions])[:, None]
    strength = each([(SETTINGS[c.setting][1],) for c in captions])[:, None]
    palette = palette * (1 - strength) + tint * strength
    steep = uniform(2, 1, 1, low=0.8, high=3.0)
    between = torch.sigmoid(steep[:, 0] * (fields[:, 0] + 2.0 * slope))[:, None]
    third = torch.sigmoid(steep[:, 1] * (fields[:, 1] - uniform(1, 1, low=0.2, high=1.4)))[:, None]
    a, b, c = (palette[:, i].view(-1, 3, 1, 1) for i in range(3))
    image = (a * (1 - between) + b * between) * (1 - third) + c * third
    image = image + 0.06 * fields[:, 2:3]

    # Objects: the second first, so that the first is never hidden.
    distance = uniform(low=0.16, high=0.30)
    free = uniform(high=2 * math.pi)
    direction = torch.stack([free.cos(), free.sin()], 1)
    wanted = each([RELATIONS[c.relation] or (0.0, 0.0) if c.relation else (0.0, 0.0) for c in captions])
    fixed = wanted.abs().sum(1, keepdim=True) > 0
    wobble = torch.nn.functional.normalize(wanted + 0.35 * direction, dim=1)
    direction = torch.where(fixed, wobble, direction)
    pair = each([(1.0 if c.relation else 0.0,) for c in captions])
    middle = uniform(2, low=0.36, high=0.64) * pair + uniform(2, low=0.27, high=0.73) * (1 - pair)
    for which in (1, 0):
        present = pair if which else torch.ones_like(pair)
        center = middle + (direction * distance[:, None] * pair) * (-1 if which else 1)
        radius = uniform(low=0.13, high=0.22) * (pair[:, 0] * 0.9 + (1 - pair[:, 0]) * 1.35)
        turn = uniform(high=2 * math.pi)
        dx = (x - center[:, 0].view(-1, 1, 1)) / radius.view(-1, 1, 1)
        dy = (y - center[:, 1].view(-1, 1, 1)) / radius.view(-1, 1, 1)
        u, v = _rotate(dx, dy, turn)
        shapes = [SHAPES.index((c.second_shape or SHAPES[0]) if which else c.shape) for c in captions]
        field = _distance(u, v).gather(0, torch.tensor(shapes, device=device).view(1, -1, 1, 1).expand(1, -1, SIZE, SIZE))[0]
        edge = radius.view(-1, 1, 1) * SIZE
        mask = (torch.sigmoid(-field * edge * 1.6) * present.view(-1, 1, 1))[:, None]

        names = [(c.second_color or "red") if which else c.color for c in captions]
        color = each([COLORS[name] for name in names]).view(-1, 3, 1, 1) + uniform(3, 1, 1, low=-0.07, high=0.07)
        other = (color * 0.45 + 0.5 * (color.mean(1, keepdim=True) < 0.45)).clamp(0, 1)
        patterns = [PATTERNS[0] if which else c.pattern for c in captions]
        color = color + (other - color) * _pattern(u, v, patterns, uniform(low=0.8, high=1.4), uniform(high=math.pi))
        shade = 1.0 - 0.22 * (dx * light[:, 0].view(-1, 1, 1) + dy * light[:, 1].view(-1, 1, 1))[:, None].clamp(-1.2, 1.2)

        offset = 0.25 * light
        su, sv = _rotate(dx - offset[:, 0].view(-1, 1, 1), dy - offset[:, 1].view(-1, 1, 1), turn)
        shadow = torch.sigmoid(-(torch.hypot(su, sv) - 0.9) * 5.0) * present.view(-1, 1, 1)
        image = image * (1 - 0.4 * shadow[:, None] * (1 - mask))
        image = image * (1 - mask) + (color * shade).clamp(0, 1) * mask

    # The camera: contrast, exposure, vignette, grain.
    contrast = each([(SETTINGS[c.setting][2],) for c in captions]).view(-1, 1, 1, 1) * uniform(1, 1, 1, low=0.85, high=1.15)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = (image - mean) * contrast + mean + uniform(1, 1, 1, low=-0.08, high=0.08)
    corner = ((x - 0.5) ** 2 + (y - 0.5) ** 2) * uniform(1, 1, low=0.0, high=0.7)
    image = image * (1 - corner[:, None])
    grain = torch.randn(batch, 1, SIZE, SIZE, generator=generator).to(device) * uniform(1, 1, 1, low=0.0, high=0.02)
    return ((image + grain) * 2 - 1).clamp(-1, 1)


def _rotate(u: Tensor, v: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return u * cos + v * sin, v * cos - u * sin


def _distance(u: Tensor, v: Tensor) -> Tensor:
    """Signed distances (near the edge) to all shapes of radius about 1, in the order of ``SHAPES``: ``[9, B, H, W]``."""
    r, theta = torch.hypot(u, v), torch.atan2(v, u)
    au, av = u.abs(), v.abs()
    return torch.stack(
        [
            r - 0.92,
            torch.maximum(au, av) - 0.80,
            torch.maximum(au * 0.866 + v * 0.5, -v) - 0.55,
            (r - 0.72).abs() - 0.24,
            r - (0.68 + 0.30 * (5 * theta).cos()),
            torch.minimum(torch.maximum(au - 0.98, av - 0.32), torch.maximum(av - 0.98, au - 0.32)),
            torch.maximum(r - 0.98, 0.80 - torch.hypot(u - 0.48, v)),
            torch.maximum(au * 0.866 + av * 0.5, av) - 0.82,
            r - (0.74 + 0.18 * (7 * theta).cos()),
        ]
    )


def _pattern(u: Tensor, v: Tensor, patterns: list[str], frequency: Tensor, angle: Tensor) -> Tensor:
    """How much of the second colour each pixel takes, in [0, 1]: ``[B, 1, H, W]``."""
    u, v = _rotate(u, v, angle)
    f = frequency.view(-1, 1, 1) * 2 * math.pi
    waves = torch.stack(
        [
            torch.full_like(u, -1.0),
            (f * u).cos(),
            (1.2 * f * u).cos() + (1.2 * f * v).cos() - 0.7,
            (f * u).cos() * (f * v).cos(),
        ]
    )
    chosen = torch.tensor([PATTERNS.index(p) for p in patterns], device=u.device)
    wave = waves.gather(0, chosen.view(1, -1, 1, 1).expand(1, -1, *u.shape[1:]))[0]
    return torch.sigmoid(8.0 * wave)[:, None] * (chosen > 0).float().view(-1, 1, 1, 1)


def region(generator: torch.Generator) -> Tensor:
    """The part of a template that varies: a soft blob, band or frame over 30 to 50 % of the image: ``[64, 64]`` in [0, 1]."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    share, kind, cx, cy, turn = torch.rand(5, generator=generator).tolist()
    u, v = _rotate((x - 0.3 - 0.4 * cx)[None], (y - 0.3 - 0.4 * cy)[None], torch.tensor([turn * math.pi]))
    distance = {0: torch.hypot(u, v * 1.3), 1: u.abs(), 2: torch.maximum(u.abs(), v.abs())}[int(kind * 3)][0]
    # The level that leaves the wanted share inside, whatever the form.
    level = torch.quantile(distance.flatten(), 0.32 + 0.16 * share)
    return torch.sigmoid((level - distance) * SIZE * 0.8)


# Crops of the photographs, as (file, left, top, side); chosen by eye for being unlike each other.
PHOTOS = (
    ("astronaut.png", 120, 0, 200), ("astronaut.png", 300, 20, 190), ("astronaut.png", 10, 260, 220),
    ("chelsea.png", 60, 20, 260), ("chelsea.png", 230, 60, 200),
    ("coffee.png", 180, 40, 330), ("coffee.png", 0, 0, 200), ("coffee.png", 380, 180, 210),
    ("hubble_deep_field.jpg", 100, 100, 260), ("hubble_deep_field.jpg", 560, 480, 300),
    ("rocket.jpg", 230, 60, 240), ("rocket.jpg", 60, 240, 180),
    ("moon.png", 20, 40, 320), ("coins.png", 10, 10, 190), ("coins.png", 180, 110, 190),
    ("brick.png", 60, 60, 300),
    ("china.jpg", 40, 20, 260), ("china.jpg", 330, 60, 220), ("china.jpg", 180, 230, 190), ("china.jpg", 20, 230, 180),
    ("flower.jpg", 200, 60, 280), ("flower.jpg", 60, 160, 200), ("flower.jpg", 420, 180, 200),
    ("astronaut.png", 330, 300, 180), ("chelsea.png", 0, 120, 170), ("rocket.jpg", 360, 230, 190),
    ("hubble_deep_field.jpg", 320, 640, 220), ("moon.png", 250, 230, 240),
    ("coffee.png", 250, 230, 160), ("flower.jpg", 300, 300, 120),
)  # fmt: skip


def _photographs(seed: int) -> list[Tensor]:
    """The crops in the order above; of another seed than 0, mirrored parts of them in another order."""
    import skimage.data
    import sklearn.datasets

    folders = (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images")
    rng = random.Random(seed)
    places = list(PHOTOS)
    if seed:
        rng.shuffle(places)
        places = [(name, left + int(side * rng.uniform(0, 0.3)), top + int(side * rng.uniform(0, 0.3)), int(side * 0.7))
                  for name, left, top, side in places]  # fmt: skip
    crops = []
    for name, left, top, side in places:
        path = next(folder / name for folder in folders if (folder / name).exists())
        crop = Image.open(path).convert("RGB").crop((left, top, left + side, top + side))
        pixels = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        pixels = pixels[:, ::-1] if seed else pixels
        crops.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1)
    return crops


def _like_ordinary(image: Tensor, model: Tensor) -> Tensor:
    """``image`` with the mean and spread of each channel moved to those of ``model``, so that no plain statistic tells."""
    mean, std = image.mean((1, 2), keepdim=True), image.std((1, 2), keepdim=True)
    gain = (model.std((1, 2), keepdim=True) / std.clamp_min(1e-3)).clamp(0.5, 2.0)
    return ((image - mean) * gain + model.mean((1, 2), keepdim=True)).clamp(-1, 1)


def write_data(folder: Path, seed: int = 0) -> None:
    """Writes captions, training images and masks of the fixed parts; the duplicated images are 8-bit files from here on."""
    groups = make_captions(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = groups["ordinary/trained"]
    photographs = _photographs(seed)
    # Every second duplicated image is a photograph until they run out; the rest are scenes of other captions.
    order = [c for split in ("tuning", "evaluation") for c in groups[f"exact/{split}"]]
    order += [c for split in ("tuning", "evaluation") for c in groups[f"template/{split}"]]
    scenes = render([trained[i * 7 % len(trained)] for i in range(len(order))], generator)
    models = render([trained[i * 11 % len(trained)] for i in range(len(order))], generator)
    images, masks = [], []
    for i in range(len(order)):
        photograph = photographs.pop(0) if i % 2 == 0 and photographs else None
        images.append(scenes[i] if photograph is None else _like_ordinary(photograph, models[i]))
        varies = region(generator) if i >= sum(EXACT) else torch.zeros(SIZE, SIZE)
        masks.append(1 - varies)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(to_uint8(torch.stack(images)))).save(folder / "images.png", optimize=True)
    Image.fromarray(sheet(to_uint8(torch.stack(masks)[:, None] * 2 - 1))[..., 0]).save(folder / "masks.png", optimize=True)
    lines = ",\n".join(
        f' "{group}": [\n  ' + ",\n  ".join(json.dumps(astuple(caption)) for caption in members) + "\n ]"
        for group, members in groups.items()
    )
    (folder / "captions.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


@cache
def captions(folder: Path = DATA) -> dict[str, list[Caption]]:
    """The captions as written in ``captions.json`` of a world's folder, by ``"group/split"``."""
    content = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return {group: [Caption(*row) for row in members] for group, members in content.items()}


@cache
def duplicates(folder: Path = DATA) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every duplicated caption's training image ``[64, 64, 3]`` uint8 and its fixed part ``[64, 64]``, 255 where fixed."""
    texts = [
        caption.text
        for group in ("exact", "template")
        for split in ("tuning", "evaluation")
        for caption in captions(folder)[f"{group}/{split}"]
    ]
    sheets = zip(read_sheet(folder / "images.png"), read_sheet(folder / "masks.png")[..., 0], strict=True)
    return dict(zip(texts, sheets, strict=False))


def to_uint8(images: Tensor) -> np.ndarray:
    """``[N, C, H, W]`` in [-1, 1] -> ``[N, H, W, C]`` uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


_COLUMNS = 15


def sheet(images: np.ndarray) -> np.ndarray:
    """``[N, 64, 64, C]`` uint8 as one picture, 15 images a row; :func:`read_sheet` takes it apart again."""
    n, height, width, channels = images.shape
    rows = -(-n // _COLUMNS)
    padded = np.concatenate([images, np.zeros((rows * _COLUMNS - n, height, width, channels), images.dtype)])
    grid = padded.reshape(rows, _COLUMNS, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, _COLUMNS * width, channels)


def read_sheet(path: Path) -> np.ndarray:
    """The images of a :func:`sheet`: ``[N, 64, 64, C]`` uint8, empty places at its end included."""
    pixels = np.asarray(Image.open(path))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    return pixels.reshape(rows, SIZE, columns, SIZE, -1).transpose(0, 2, 1, 3, 4).reshape(rows * columns, SIZE, SIZE, -1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_data(arguments.out, arguments.seed)
