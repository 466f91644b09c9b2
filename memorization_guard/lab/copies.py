"""Is an image a copy of a training image? The correlation of pixels, with many training images at once."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .scene import SIZE


class Images:
    """Training images, ready to be correlated with an image, all at once.

    Args:
        images: ``[N, 128, 128, 3]`` uint8.
        masks: ``[N, 128, 128]``, the pixels that count.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self._masks = masks.reshape(len(masks), -1).astype(np.float32)
        pixels = images.reshape(len(images), -1, 3).astype(np.float32)
        weights = self._masks[..., None]
        centred = (pixels - (pixels * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True)) * weights
        self._unit = centred / np.linalg.norm(centred, axis=(1, 2), keepdims=True)

    def similarity(self, image: Image.Image | np.ndarray, which: slice = slice(None)) -> np.ndarray:
        """``[N]``: the correlation of the masked pixels, negative values as 0."""
        pixels = _pixels(image).reshape(-1, 3)
        pixels = pixels - pixels.mean(0)
        masks, unit = self._masks[which], self._unit[which]
        # A reference has no mean under its mask, so that of the image does not count in the product.
        product = np.einsum("npc,pc->n", unit, pixels, optimize=True)
        square = masks @ pixels**2 - (masks @ pixels) ** 2 / masks.sum(1, keepdims=True)
        # In single precision a flat image keeps a rest of variance that is rounding.
        norm = np.sqrt(square.sum(1).clip(min=1e-6 * (masks @ pixels**2).sum(1) + 1e-6))
        return (product / norm).clip(0, 1)


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the image has shape {pixels.shape}; the lab's images are {SIZE} x {SIZE} RGB")
    return pixels
