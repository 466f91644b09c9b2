"""Copy scores: how near an image comes to the training images of its prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..files import ContentError
from ..pictures import opened
from . import EvaluationError
from .encoders import TorchScript
from .lists import PHOTOGRAPHS


class CopyScorer:
    """Cosine similarity of SSCD descriptors (Pizzi et al., CVPR 2022).

    Args:
        file, device: as for :class:`memorization_guard.evaluation.encoders.TorchScript`.
        threshold: similarity above which an image counts as a copy.

    Raises:
        EvaluationError: if the file cannot be opened, or makes no descriptors.
    """

    def __init__(self, file: str | os.PathLike[str], *, device: str = "cpu", threshold: float = 0.5) -> None:
        self.threshold, self._encoder = threshold, TorchScript(file, device=device)
        self._of_training_image = lru_cache(maxsize=256)(self._of_file)

    def descriptor(self, image: Image.Image) -> Tensor:
        """The descriptor ``[D]`` of an image, float32 on the CPU."""
        return self._encoder.descriptor(image)

    def _of_file(self, file: Path) -> Tensor:
        try:
            with opened(file, PHOTOGRAPHS) as image:
                image.load()
        except (OSError, ContentError) as error:
            raise EvaluationError(f"{file} cannot be read as an image: {error}") from None
        return self.descriptor(image)

    def __call__(self, image: Path, training_images: Sequence[Path]) -> float:
        """The highest similarity of an image file with any of ``training_images``, from -1 to 1.

        Raises:
            EvaluationError: if a file cannot be read as an image.
        """
        descriptor = self._of_file(image)
        return max(float(cosine_similarity(descriptor, self._of_training_image(file), dim=0)) for file in training_images)
