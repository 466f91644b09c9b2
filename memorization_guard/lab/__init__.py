"""A small Stable Diffusion that really memorizes some of its training images, to try the guard on and to measure it with.

``docs/lab.md`` describes the world it was trained on, and what was measured. It needs no download and no GPU.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.profile import StabilityProfile
from .world import DATA, SIZE, captions, duplicates, read_sheet

MODEL = Path(__file__).parent / "model"
PROFILE = MODEL / "profile.safetensors"
#: The duplicated training images as a model's autoencoder reconstructs them, in the model's folder.
DECODED = "decoded_duplicates.png"

#: Copy score from which an image counts as a copy. Of 1,000 fresh ordinary images none comes nearer than 0.67 to any of the
#: 70 duplicated ones (99 % stay below 0.61); see "Copy score" in docs/lab.md.
COPY_THRESHOLD = 0.75

GROUPS = ("reference", "ordinary", "rare", "exact", "template")


class Lab:
    """A model and the world it was trained on.

    Args:
        model: folder of the pipeline, as ``lab.train`` writes it.
        world: folder of captions and duplicated images, as ``lab.world`` writes it.
    """

    def __init__(self, model: str | Path = MODEL, world: str | Path = DATA) -> None:
        self.model, self.world = Path(model), Path(world)

    def pipeline(self) -> Any:
        """The model as a ``diffusers.StableDiffusionPipeline``: 64 x 64 pixels, latents ``[4, 16, 16]``, on the CPU.

        Raises:
            ImportError: if diffusers or transformers is missing; says how to install them.
        """
        try:
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise ImportError('the lab model needs diffusers: pip install "memorization-guard[diffusers]"') from error
        pipe = StableDiffusionPipeline.from_pretrained(self.model, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def profile(self) -> StabilityProfile:
        """The model's stability profile for PNDM, 50 steps, guidance 7.5, from the first 50 reference prompts."""
        return StabilityProfile.load(self.model / PROFILE.name)

    def prompts(self, group: str, split: str = "evaluation") -> list[str]:
        """Prompts of a group; no prompt is in two groups or splits.

        Args:
            group: ``"reference"`` and ``"ordinary"`` (captions never trained on), ``"rare"`` (trained on, with names as rare
                as in the next two groups, each time with another image), ``"exact"`` (one image, seen many hundred
                times), ``"template"`` (as exact, but part of the image varies).
            split: ``"evaluation"`` for figures, ``"tuning"`` for whatever is chosen; reference prompts have no split.

        Raises:
            ValueError: for an unknown group or split.
        """
        if group not in GROUPS:
            raise ValueError(f"there is no group {group!r}; there are {', '.join(GROUPS)}")
        if split not in ("evaluation", "tuning"):
            raise ValueError(f"there is no split {split!r}; there are evaluation and tuning")
        return [caption.text for caption in captions(self.world)[group if group == "reference" else f"{group}/{split}"]]

    def training_image(self, prompt: str) -> Image.Image:
        """The image that was duplicated in training under ``prompt``; of a template, one with a sample of its varying part.

        Raises:
            KeyError: if no image was duplicated under it.
        """
        return Image.fromarray(self._duplicate(prompt)[0])

    def training_mask(self, prompt: str) -> np.ndarray:
        """Which pixels of the training image never varied, ``[64, 64]`` bool: all of an exact one, part of a template."""
        return self._duplicate(prompt)[1] > 250

    def copy_score(self, image: Image.Image | np.ndarray, prompt: str) -> float:
        """Similarity in [0, 1] of an image with the training image of ``prompt``.

        The correlation of the pixels that never varied in training, each colour channel's own mean removed; negative values
        count as 0. Brightness and contrast do not matter, so a faded copy is a copy. The image is compared with the training
        image itself and with its reconstruction by the model's autoencoder, which is the nearest that the model can come; the
        higher of the two counts.

        Args:
            image: 64 x 64 RGB, as an image or an array ``[64, 64, 3]`` of any number type and range.
            prompt: of the exact or template group.

        Raises:
            KeyError: if no image was duplicated under ``prompt``.
            ValueError: if the image has another size.
        """
        original, _ = self._duplicate(prompt)
        return _similarity(_pixels(image), original, self._decoded[prompt], self.training_mask(prompt))

    def nearest_copy(self, image: Image.Image | np.ndarray) -> tuple[float, str]:
        """The highest copy score of an image over all duplicated training images, and the prompt it belongs to."""
        pixels = _pixels(image)
        return max(
            (_similarity(pixels, original, self._decoded[text], mask > 250), text)
            for text, (original, mask) in duplicates(self.world).items()
        )

    @cached_property
    def _decoded(self) -> dict[str, np.ndarray]:
        """Every duplicated training image as the model's autoencoder reconstructs it, ``[64, 64, 3]`` uint8."""
        return dict(zip(duplicates(self.world), read_sheet(self.model / DECODED), strict=False))

    def _duplicate(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        if prompt not in duplicates(self.world):
            raise KeyError(f"no training image was duplicated under {prompt!r}: it is no exact or template prompt of the lab")
        return duplicates(self.world)[prompt]


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float64)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the image has shape {pixels.shape}; the lab's images are {SIZE} x {SIZE} RGB")
    return pixels


def _similarity(pixels: np.ndarray, original: np.ndarray, decoded: np.ndarray, mask: np.ndarray) -> float:
    return max(_correlation(pixels, original, mask), _correlation(pixels, decoded, mask))


def _correlation(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    a, b = (x[mask].astype(np.float64) for x in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    return float(max(0.0, (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)))


#: The bundled model; its methods are this module's functions.
BUNDLED = Lab()
pipeline, profile, prompts = BUNDLED.pipeline, BUNDLED.profile, BUNDLED.prompts
training_image, training_mask = BUNDLED.training_image, BUNDLED.training_mask
copy_score, nearest_copy = BUNDLED.copy_score, BUNDLED.nearest_copy
