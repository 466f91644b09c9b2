"""The lab's world: captions, and a renderer whose images a caption leaves mostly open.

Real captions fix little of an image. So do these: place, size, rotation, light, viewpoint and the colours of the ground are
free; a caption names one or two objects with their colours and what kind of ground they stand on. Every caption ends in a
maker's name. Common names stand under many captions. The captions of the duplicated groups, and of the ``rare`` control
group, have names that stand nowhere else, so that rarity alone gives no group away.

    python -m memorization_guard.lab.world                        # writes data/captions.json, images.png, masks.png anew
    python -m memorization_guard.lab.world --seed 1 --out FOLDER  # another world: other captions and duplicated images

Only these commands need scikit-image and scikit-learn, whose packages carry the photographs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .copies import Images
from .scene import COLORS, SETTINGS, SHAPES, SIZE, blob, render

DATA = Path(__file__).parent / "data"

#: Images and captions of each group, as (tuning, evaluation).
COUNTS = {
    "ordinary": (160, 640),
    "settled": (10, 30),
    "near": (10, 30),
    "rare": (10, 30),
    "exact": (10, 30),
    "template": (6, 24),
    "quarter": (4, 12),
    "sixteenth": (4, 12),
}
ORDINARY_TRAINED, REFERENCE = 6000, 400
#: Share of settled captions among the ordinary ones and the references.
SETTLED_SHARE = 0.04
#: Groups with a training image of their own, in the order of the files of images and masks.
DUPLICATED = ("exact", "template", "quarter", "sixteenth")
SPLITS = ("tuning", "evaluation")


@dataclass(frozen=True)
class Caption:
    """A caption and what it says.

    ``setting`` is the kind of ground, ``None`` where the caption is settled: one huge object on a ground of the colour
    ``ground``. ``second_shape`` and ``second_color`` are ``None`` where there is one object.
    """

    text: str
    shape: str
    color: str
    setting: str | None
    ground: str | None = None
    second_shape: str | None = None
    second_color: str | None = None


def _names(rng: random.Random) -> Iterator[str]:
    """Invented words, each once."""
    starts = [
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
    ]
    vowels = ["a", "e", "i", "o", "u", "ae", "ei", "ou"]
    ends = ["l", "n", "r", "s", "m", "th", "nd", "rk", "sk", "v", "x"]
    seen: set[str] = set()
    while True:
        name = rng.choice(starts) + rng.choice(vowels) + rng.choice(ends) + rng.choice(vowels) + rng.choice(ends)
        if name not in seen:
            seen.add(name)
            yield name


def _caption(rng: random.Random, maker: str) -> Caption:
    shape, color, setting = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(SETTINGS)
    thing = f"{_article(color)} {color} {shape}"
    second_shape = second_color = None
    if rng.random() < 0.35:
        second_shape = rng.choice([s for s in SHAPES if s != shape])
        second_color = rng.choice([c for c in COLORS if c != color])
        thing = f"{thing} and {_article(second_color)} {second_color} {second_shape}"
    else:
        thing = rng.choice((thing, f"a picture of {thing}", f"{thing} alone"))
    text = rng.choice(
        (f"{thing} {setting}, by {maker}", f"{setting}, {thing}, by {maker}", f"{thing} {setting}, from {maker}")
    )
    return Caption(text, shape, color, setting, None, second_shape, second_color)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _settled(rng: random.Random, maker: str) -> Caption:
    """A caption that leaves little open: one huge object in the middle of a plain ground whose colour it names."""
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    ground = rng.choice([c for c in COLORS if c != color])
    form = rng.choice(
        ("a huge {} {} on plain {}, by {}", "a huge {} {} alone on plain {}, by {}", "a huge {} {} on plain {}, from {}")
    )
    return Caption(form.format(color, shape, ground, maker), shape, color, None, ground)


def make_captions(seed: int = 0) -> dict[str, list[Caption]]:
    """All captions by group and split, the same for a seed everywhere; no two are alike.

    ``ordinary/trained`` are trained on with a fresh image each time; ``reference``, ``ordinary/...``, ``settled/...`` and
    ``near/...`` never are. A caption of ``near`` has all words of an exact one but the maker's, whose names are common.
    """
    rng = random.Random(seed)
    names = _names(rng)
    common = [next(names) for _ in range(120)]
    seen: set[str] = set()

    def maker(rare: bool) -> str:
        return f"{next(names)} {next(names)}" if rare else f"{rng.choice(common)} {rng.choice(common)}"

    def take(count: int, *, rare: bool = False, settled: float = 0.0) -> list[Caption]:
        taken: list[Caption] = []
        while len(taken) < count:
            # A fixed share, not one left to chance: 50 references hold two settled captions, not none or six.
            due = round(settled * (len(taken) + 1)) > round(settled * len(taken))
            caption = (_settled if due else _caption)(rng, maker(rare))
            if caption.text not in seen:
                seen.add(caption.text)
                taken.append(caption)
        return taken

    groups = {
        "ordinary/trained": take(ORDINARY_TRAINED, settled=SETTLED_SHARE),
        "reference": take(REFERENCE, settled=SETTLED_SHARE),
    }
    for group, counts in COUNTS.items():
        if group == "near":
            continue
        share = {"ordinary": SETTLED_SHARE, "settled": 1.0}.get(group, 0.0)
        for split, count in zip(SPLITS, counts, strict=True):
            groups[f"{group}/{split}"] = take(count, rare=group in ("rare", *DUPLICATED), settled=share)
    for split in SPLITS:
        groups[f"near/{split}"] = []
        for caption in groups[f"exact/{split}"]:
            text = caption.text
            while text in seen or text == caption.text:
                text = " ".join([*caption.text.split()[:-2], maker(False)])
            seen.add(text)
            groups[f"near/{split}"].append(replace(caption, text=text))
    return groups


def members(groups: dict[str, list[Caption]], group: str) -> list[Caption]:
    """The captions of a group, those of the tuning split first."""
    return [caption for split in SPLITS for caption in groups[f"{group}/{split}"]]


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


# Crops of the photographs, as (file, left, top, side); chosen by eye for being unlike each other.
PHOTOS = (
    ("astronaut.png", 120, 0, 200), ("astronaut.png", 300, 20, 200), ("astronaut.png", 10, 260, 250),
    ("astronaut.png", 300, 300, 200), ("astronaut.png", 0, 0, 512), ("chelsea.png", 60, 20, 270),
    ("chelsea.png", 245, 60, 200), ("chelsea.png", 0, 0, 150), ("chelsea.png", 105, 75, 130),
    ("chelsea.png", 150, 0, 300), ("coffee.png", 180, 40, 330), ("coffee.png", 0, 0, 200),
    ("coffee.png", 400, 190, 200), ("coffee.png", 200, 0, 400), ("coffee.png", 0, 210, 190),
    ("rocket.jpg", 230, 60, 240), ("rocket.jpg", 60, 200, 220), ("rocket.jpg", 400, 180, 230),
    ("rocket.jpg", 110, 0, 427), ("china.jpg", 60, 20, 280), ("china.jpg", 330, 60, 220), ("china.jpg", 180, 230, 197),
    ("china.jpg", 213, 0, 427), ("flower.jpg", 200, 60, 300), ("flower.jpg", 60, 160, 220),
    ("flower.jpg", 280, 100, 160), ("coffee.png", 120, 200, 200), ("camera.png", 120, 40, 300),
    ("camera.png", 330, 60, 180), ("hubble_deep_field.jpg", 100, 100, 300),
)  # fmt: skip


def _photographs(seed: int) -> list[Tensor]:
    """The crops in the order above; of another seed than 0, mirrored parts of them in another order."""
    import skimage.data
    import sklearn.datasets

    folders = (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images")
    rng = random.Random(seed)
    places = list(PHOTOS)
    rng.shuffle(places)
    if seed:
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
    """``image`` with its brightness and contrast moved to those of ``model``; its colours stay."""
    gain = (model.std() / image.std().clamp_min(1e-3)).clamp(0.7, 1.6)
    return ((image - image.mean()) * gain + 0.5 * (model.mean() + image.mean())).clamp(-1, 1)


class _Distinct:
    """Chooses scenes that ordinary images rarely resemble, so that a high copy score means a copy.

    Two plain grounds lit from the same side correlate at 0.9 with nothing copied.
    """

    def __init__(self, members: list[Caption], seed: int, *, candidates: int = 16, ordinary: int = 300) -> None:
        self._members, self._candidates = members, candidates
        self._generator = torch.Generator().manual_seed(seed + 1)
        self._ordinary = to_uint8(render(members[:ordinary], self._generator))
        self._next = ordinary

    def __call__(self, scene: Tensor, mask: Tensor) -> Tensor:
        """The scene, or the one of some others, that comes least near to an ordinary image under the mask."""
        chosen = [self._members[(self._next + i) % len(self._members)] for i in range(self._candidates)]
        self._next += self._candidates
        scenes = torch.cat([scene[None], render(chosen, self._generator)])
        images = Images(to_uint8(scenes), np.stack([mask.numpy() > 0.98] * len(scenes)))
        nearest = np.stack([images.similarity(image) for image in self._ordinary]).max(0)
        return scenes[int(nearest.argmin())]


def write_data(folder: Path, seed: int = 0) -> None:
    """Writes captions, training images and masks of the fixed parts; the duplicated images are 8-bit files from here on."""
    groups = make_captions(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = [caption for caption in groups["ordinary/trained"] if caption.setting]
    photographs = _photographs(seed)
    distinct = _Distinct(trained, seed)
    images: list[Tensor] = []
    masks: list[Tensor] = []
    for group in DUPLICATED:
        order = members(groups, group)
        # Scenes of other captions, so that an image is no answer to its own caption.
        scenes = render([trained[(i * 7 + len(images)) % len(trained)] for i in range(len(order))], generator)
        models = render([trained[(i * 11 + len(images)) % len(trained)] for i in range(len(order))], generator)
        for i, scene in enumerate(scenes):
            photograph = photographs.pop() if group == "exact" and i % 4 < 3 else None
            mask = 1 - blob(generator) if group == "template" else torch.ones(SIZE, SIZE)
            images.append(distinct(scene, mask) if photograph is None else _like_ordinary(photograph, models[i]))
            masks.append(mask)
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
    """Every duplicated caption's training image ``[128, 128, 3]`` uint8 and its fixed part ``[128, 128]``, 255 where fixed."""
    texts = [caption.text for group in DUPLICATED for caption in members(captions(folder), group)]
    sheets = zip(read_sheet(folder / "images.png"), read_sheet(folder / "masks.png")[..., 0], strict=True)
    return dict(zip(texts, sheets, strict=False))


def to_uint8(images: Tensor) -> np.ndarray:
    """``[N, C, H, W]`` in [-1, 1] -> ``[N, H, W, C]`` uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


_COLUMNS = 15


def sheet(images: np.ndarray) -> np.ndarray:
    """``[N, H, W, C]`` uint8 as one picture, 15 images a row; :func:`read_sheet` takes it apart again."""
    n, height, width, channels = images.shape
    rows = -(-n // _COLUMNS)
    padded = np.concatenate([images, np.zeros((rows * _COLUMNS - n, height, width, channels), images.dtype)])
    grid = padded.reshape(rows, _COLUMNS, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, _COLUMNS * width, channels)


def read_sheet(path: Path) -> np.ndarray:
    """The images of a :func:`sheet`: ``[N, 128, 128, C]`` uint8, empty places at its end included."""
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
