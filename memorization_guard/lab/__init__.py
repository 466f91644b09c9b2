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
from ..pipelines import load_folder
from .copies import Images
from .world import COUNTS, DATA, SPLITS, captions, duplicates

MODEL = Path(__file__).parent / "model"
PROFILE = MODEL / "profile.safetensors"

#: Copy score from which an image counts as a copy; see "Copy score" in docs/lab.md.
COPY_THRESHOLD = 0.75

GROUPS = ("reference", *COUNTS)


class Lab:
    """A model and the world it was trained on.

    Args:
        model: folder of the pipeline, as ``lab.train`` writes it.
        world: folder of captions and duplicated images, as ``lab.world`` writes it.
    """

    def __init__(self, model: str | Path = MODEL, world: str | Path = DATA) -> None:
        self.model, self.world = Path(model), Path(world)

    def pipeline(self) -> Any:
        """The model as a diffusers pipeline on the CPU, the bundled one a ``StableDiffusionPipeline``.

        Its images have 128 x 128 pixels, its latents the shape ``[4, 16, 16]``.

        Raises:
            ImportError: if diffusers or transformers is missing; says how to install them.
            ModelError: if a tensor of the model is missing or unknown, so that what is sampled is never noise.
        """
        try:
            import diffusers  # noqa: F401
        except ImportError as error:
            raise ImportError('the lab model needs diffusers: pip install "memorization-guard[diffusers]"') from error
        pipe = load_folder(self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def profile(self) -> StabilityProfile:
        """The model's stability profile for PNDM, 50 steps, guidance 7.5, from the first 50 reference prompts."""
        return StabilityProfile.load(self.model / PROFILE.name)

    def prompts(self, group: str, split: str = "evaluation") -> list[str]:
        """Prompts of a group; no prompt is in two groups or splits.

        Args:
            group: one of these.

                - ``"reference"`` and ``"ordinary"``: captions never trained on.
                - ``"settled"``: never trained on; they leave little of the image open.
                - ``"near"``: never trained on; all words of an exact caption but the maker's.
                - ``"rare"``: trained on, with names as rare as in the groups below, each time with another image.
                - ``"exact"``: one image, seen many hundred times.
                - ``"template"``: as exact, but part of the image varies.
                - ``"quarter"``, ``"sixteenth"``: as exact, seen a fourth and a sixteenth as often.
            split: ``"evaluation"`` for figures, ``"tuning"`` for whatever is chosen; reference prompts have no split.

        Raises:
            ValueError: for an unknown group or split.
        """
        if group not in GROUPS:
            raise ValueError(f"there is no group {group!r}; there are {', '.join(GROUPS)}")
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; there are {' and '.join(SPLITS)}")
        return [caption.text for caption in captions(self.world)[group if group == "reference" else f"{group}/{split}"]]

    def training_image(self, prompt: str) -> Image.Image:
        """The image that was duplicated in training under ``prompt``; of a template, one with a sample of its varying part.

        Raises:
            KeyError: if no image was duplicated under it.
        """
        return Image.fromarray(duplicates(self.world)[self._duplicated(prompt)][0])

    def training_mask(self, prompt: str) -> np.ndarray:
        """Which pixels of the training image never varied, ``[128, 128]`` bool: all of an exact one, part of a template."""
        return duplicates(self.world)[self._duplicated(prompt)][1] > 250

    def copy_score(self, image: Image.Image | np.ndarray, prompt: str) -> float:
        """Similarity in [0, 1] of an image with the training image of ``prompt``.

        The correlation of the pixels that never varied in training, each colour channel's own mean removed; negative values
        count as 0. Brightness and contrast do not matter, so a faded copy is a copy.

        Args:
            image: 128 x 128 RGB, as an image or an array ``[128, 128, 3]`` of any number type and range.
            prompt: of a group with training images of its own.

        Raises:
            KeyError: if no image was duplicated under ``prompt``.
            ValueError: if the image has another size.
        """
        number = list(duplicates(self.world)).index(self._duplicated(prompt))
        return float(self._references.similarity(image, slice(number, number + 1))[0])

    def nearest_copy(self, image: Image.Image | np.ndarray) -> tuple[float, str]:
        """The highest copy score of an image over all duplicated training images, and the prompt it belongs to."""
        scores = self._references.similarity(image)
        best = int(scores.argmax())
        return float(scores[best]), list(duplicates(self.world))[best]

    @cached_property
    def _references(self) -> Images:
        images, masks = zip(*duplicates(self.world).values(), strict=True)
        return Images(np.stack(images), np.stack(masks) > 250)

    def _duplicated(self, prompt: str) -> str:
        if prompt not in duplicates(self.world):
            raise KeyError(f"no training image was duplicated under {prompt!r}: it is no prompt of a duplicated group")
        return prompt


#: The bundled model; its methods are this module's functions.
BUNDLED = Lab()
pipeline, profile, prompts = BUNDLED.pipeline, BUNDLED.profile, BUNDLED.prompts
training_image, training_mask = BUNDLED.training_image, BUNDLED.training_mask
copy_score, nearest_copy = BUNDLED.copy_score, BUNDLED.nearest_copy
