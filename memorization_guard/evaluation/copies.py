"""Copy scores: how near an image comes to the training images of its prompt."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..files import ContentError
from ..pictures import opened
from . import EvaluationError
from .lists import PHOTOGRAPHS


class CopyScorer:
    """Cosine similarity of SSCD descriptors (Pizzi et al., CVPR 2022).

    Args:
        file: SSCD as TorchScript (``sscd_disc_mixup.torchscript.pt`` and the like), or any other that makes descriptors
            ``[1, D]`` of ImageNet-normalised images ``[1, 3, H, W]``. **TorchScript is code**: open only what you trust.
        device: where to compute; ``"auto"`` is CUDA if there is any, or else the CPU.
        threshold: similarity above which an image counts as a copy.

    Raises:
        EvaluationError: if the file cannot be opened, or makes no descriptors.
    """

    #: Length of the small edge that images are resized to, and ImageNet's mean and standard deviation, as SSCD's README says.
    SIDE = 288
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, file: str | os.PathLike[str], *, device: str = "cpu", threshold: float = 0.5) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.threshold, self._device = threshold, device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of TorchScript: SSCD comes in no other form
                self._model = torch.jit.load(str(file), map_location=device).eval()
            descriptor = self.descriptor(Image.new("RGB", (32, 32), "gray"))
        except Exception as error:
            # The file is not ours, so anything may be wrong with it.
            raise EvaluationError(f"{file} cannot be used as SSCD in TorchScript: {type(error).__name__}: {error}") from error
        if descriptor.ndim != 1 or not descriptor.is_floating_point():
            raise EvaluationError(f"{file} makes {tuple(descriptor.shape)} of an image; SSCD makes a descriptor of numbers")
        self._of_training_image = lru_cache(maxsize=256)(self._of_file)

    @torch.no_grad()
    def descriptor(self, image: Image.Image) -> Tensor:
        """The descriptor ``[D]`` of an image, float32 on the CPU."""
        image = image.convert("RGB")
        scale = self.SIDE / min(image.size)
        width, height = (max(self.SIDE, int(edge * scale)) for edge in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        normalised = (pixels - np.array(self.MEAN, dtype=np.float32)) / np.array(self.STD, dtype=np.float32)
        batch = torch.from_numpy(normalised).permute(2, 0, 1)[None].to(self._device)
        found: Any = self._model(batch)
        return found[0].float().cpu()

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
