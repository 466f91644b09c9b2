"""The nearest training image of every output, found by comparing all with all.

The vectors of the training images are on the disk, a block a file, and are read a block at a time, so that memory does not
grow with their number. An index would find neighbours sooner, and miss some; the search takes a small part of the time in
which the outputs were sampled (docs/training-set.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from ..evaluation.encoders import Encoder
from ..files import write_whole
from ..fingerprint import content_hash

#: Training images in a file of vectors.
BLOCK = 4096
#: Images encoded at once, and outputs compared at once.
ENCODED, COMPARED = 16, 4096
#: Images of the folder whose own nearest neighbours are looked for.
SAMPLE = 2000
#: Training images from this similarity on are one picture twice, and do not count as different ones.
SAME = 0.99
#: Bounds of a chosen threshold. At half of a full similarity, images are alike in layout at best; 0.5 is also what SSCD's
#: authors take for a copy.
LOWEST = 0.5
#: The standard normal quantile of 99 %, and what makes a median absolute deviation a standard deviation.
_Z99, _MAD = 2.326, 1.4826


class Opens(Protocol):
    """An image that can be opened."""

    def open(self) -> Image.Image:
        """The image, decoded."""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of training images, in files.

    Attributes:
        folder: of the files. key: tells these images and this encoder from others. count: images.
    """

    folder: Path
    key: str
    count: int

    @classmethod
    def make(cls, folder: Path, images: Sequence[Opens], encoder: Encoder, *, key: str, progress: bool = True) -> Vectors:
        """Encodes images. Blocks that an earlier call has finished are not made again.

        Args:
            folder: for the files. key: of the images.

        Raises:
            GuardError: if an image cannot be read.
        """
        vectors = cls(folder, content_hash([key, encoder.key]), len(images))
        with tqdm(total=len(images), desc="training images", unit="image", disable=not progress) as bar:
            for number, start in enumerate(range(0, len(images), BLOCK)):
                block = images[start : start + BLOCK]
                if vectors._block(number) is None:
                    rows = encoded(block, encoder, progress=bar.update).astype(np.float16)
                    write_whole(vectors._file(number), save({"rows": rows}, {"key": vectors.key}))
                else:
                    bar.update(len(block))
        return vectors

    def blocks(self) -> Iterator[np.ndarray]:
        """The vectors of up to :data:`BLOCK` images at a time, ``[N, D]`` float32."""
        for number in range(-(-self.count // BLOCK)):
            rows = self._block(number)
            if rows is None:
                raise FileNotFoundError(2, "vectors of training images are gone: call again", str(self._file(number)))
            yield rows.astype(np.float32)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors of some images, in ascending order: ``[len(numbers), D]`` float32."""
        return np.concatenate(
            [
                rows[numbers[(numbers >= start) & (numbers < start + BLOCK)] - start]
                for start, rows in zip(range(0, self.count, BLOCK), self.blocks(), strict=True)
            ]
        )

    @staticmethod
    def delete(folder: Path) -> None:
        """Deletes the files of a folder."""
        for file in folder.glob("vectors-*.safetensors"):
            file.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"vectors-{number:06d}.safetensors"

    def _block(self, number: int) -> np.ndarray | None:
        """A block of these images; ``None`` if there is none."""
        try:
            with safe_open(self._file(number), framework="numpy") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return None
                rows: np.ndarray = stored.get_tensor("rows")
        except (SafetensorError, OSError):
            return None
        expected = min(BLOCK, self.count - number * BLOCK)
        return rows if rows.ndim == 2 and len(rows) == expected else None


def encoded(
    images: Sequence[Opens], encoder: Encoder, *, mirrored: bool = False, progress: Callable[[int], Any] | None = None
) -> np.ndarray:
    """``[N, D]`` float32, unit vectors of images, or of their mirror images."""
    parts = []
    for start in range(0, len(images), ENCODED):
        some = [image.open() for image in images[start : start + ENCODED]]
        parts.append(encoder([ImageOps.mirror(image) for image in some] if mirrored else some))
        if progress is not None:
            progress(len(some))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        similarity, nearest: of every output, ``[Q]``: the similarity of its nearest training image, and that image's number.
        reached: of every training image, ``[N]``: the highest similarity of an output.
    """

    similarity: np.ndarray
    nearest: np.ndarray
    reached: np.ndarray


def search(queries: Sequence[np.ndarray], vectors: Vectors, *, device: str = "cpu") -> Found:
    """The nearest training image of every output.

    Args:
        queries: ``[Q, D]`` each, views of the same outputs, such as they are and mirrored; the nearest view counts.
        vectors: of the training images, at least one. device: where to multiply.
    """
    best, which, reached = np.full(len(queries[0]), -np.inf, np.float32), np.zeros(len(queries[0]), np.int64), []
    views = [torch.from_numpy(view).to(device) for view in queries]
    start = 0
    for rows in vectors.blocks():
        block = torch.from_numpy(rows).to(device).T
        similarity = _product(views, block)
        value, place = (part.cpu().numpy() for part in similarity.max(1))
        better = value > best
        best[better], which[better] = value[better], place[better] + start
        reached.append(similarity.max(0).values.cpu().numpy())
        start += len(rows)
    return Found(best, which, np.concatenate(reached))


def _product(views: Sequence[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
    similarity = views[0] @ block
    for view in views[1:]:
        similarity = torch.maximum(similarity, view @ block)
    return similarity


@dataclass(frozen=True)
class OwnPairs:
    """How near different images of a training folder are to each other.

    Attributes:
        nearest: ``[S]``, the similarity of each looked-at image to its nearest different one; NaN where there is none.
        doubles: how many of those have another image that is the same picture.
    """

    nearest: np.ndarray
    doubles: int

    @property
    def known(self) -> np.ndarray:
        """Those that have a different image."""
        return self.nearest[np.isfinite(self.nearest)]

    def threshold(self) -> float | None:
        """The similarity that one in a hundred different images of the folder would reach; ``None`` where none are different.

        The 99 % quantile of a normal distribution that has the median and the median absolute deviation of Fisher's z of
        the similarities: a few images that are almost the same do not move it, as they would an ordinary quantile. It lies
        between :data:`LOWEST` and :data:`SAME`.
        """
        if not len(self.known):
            return None
        z = np.arctanh(self.known.clip(-0.999, 0.999).astype(np.float64))
        middle = float(np.median(z))
        spread = _MAD * float(np.median(np.abs(z - middle)))
        return float(np.clip(np.tanh(middle + _Z99 * spread), LOWEST, SAME))


def own_pairs(images: Sequence[Opens], vectors: Vectors, encoder: Encoder, *, device: str = "cpu") -> OwnPairs:
    """Looks for the nearest different image of up to :data:`SAMPLE` images, evenly spread over the folder.

    As of outputs, mirror images count too.
    """
    numbers = np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(np.int64))
    plain = vectors.take(numbers)
    mirrored = encoded([images[number] for number in numbers], encoder, mirrored=True)
    views = [torch.from_numpy(view).to(device) for view in (plain, mirrored)]
    best, doubled = np.full(len(numbers), np.nan, np.float32), np.zeros(len(numbers), bool)
    start = 0
    for rows in vectors.blocks():
        similarity = _product(views, torch.from_numpy(rows).to(device).T).cpu().numpy()
        here = (numbers >= start) & (numbers < start + len(rows))
        similarity[np.flatnonzero(here), numbers[here] - start] = -np.inf
        same = similarity >= SAME
        doubled |= same.any(1)
        similarity[same] = -np.inf
        value = similarity.max(1)
        best = np.fmax(best, np.where(np.isfinite(value), value, np.nan))
        start += len(rows)
    return OwnPairs(best, int(doubled.sum()))
