"""Image encoders: they make of each image a unit vector, so that the product of two says how alike two images are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import GuardError
from ..fingerprint import content_hash, file_hash
from ..model_files import ModelError, check_model_folder
from . import EvaluationError


class Encoder(Protocol):
    """What makes vectors of images.

    Attributes:
        name: for a report. key: tells it from other encoders. device: where to multiply what it makes.
    """

    name: str
    key: str
    device: str

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """``[N, D]`` float32, rows of length 1."""


def open_encoder(path: str | os.PathLike[str] | None, *, device: str = "auto") -> Encoder:
    """The encoder of a TorchScript file or of a transformers folder; without one, :class:`Thumbnails`.

    Args:
        path: a file as for :class:`TorchScript`, or a folder as for :class:`VisionModel`.
        device: where to compute; ``"auto"`` is CUDA if there is any, or else the CPU.

    Raises:
        EvaluationError: if there is no encoder at ``path``, or it cannot be used.
    """
    if path is None:
        return Thumbnails(device=device)
    path = Path(path)
    if not path.exists():
        raise EvaluationError(f"there is no encoder at {path}: give a TorchScript file or a transformers folder")
    return VisionModel(path, device=device) if path.is_dir() else TorchScript(path, device=device)


class Thumbnails:
    """The middle square of an image in 32 x 32 pixels, each colour channel without its mean.

    The product of two is the normalized correlation of their pixels, so brightness and contrast do not matter. It sees only
    whole images: not one that is cropped, turned, or part of another; and two plain images of like layout are alike.
    """

    SIDE = 32
    name = f"correlation of {SIDE} x {SIDE} thumbnails"
    key = f"thumbnails-{SIDE}"

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = _device(device)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """As :class:`Encoder` says; ``D`` is 3072. An image of one colour has a vector of zeros."""
        return np.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> np.ndarray:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = (left, top, left + side, top + side)
        small = image.convert("RGB").resize((self.SIDE, self.SIDE), Image.Resampling.BOX, box=square)
        pixels = np.asarray(small, dtype=np.float32).reshape(-1, 3)
        return unit((pixels - pixels.mean(0)).reshape(1, -1))[0]


def unit(rows: np.ndarray) -> np.ndarray:
    """``[N, D]`` with rows of length 1, float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 1e-6, lengths, np.inf)).astype(np.float32)


class TorchScript:
    """SSCD (Pizzi et al., CVPR 2022) or any other descriptor of images as TorchScript.

    Args:
        file: it makes descriptors ``[1, D]`` of ImageNet-normalised images ``[1, 3, H, W]``, as
            ``sscd_disc_mixup.torchscript.pt`` does. **TorchScript is code**: open only what you trust.
        device: where to compute; ``"auto"`` is CUDA if there is any, or else the CPU.

    Raises:
        EvaluationError: if the file cannot be opened, or makes no descriptors.
    """

    #: Length of the small edge that images are resized to, and ImageNet's mean and standard deviation, as SSCD's README says.
    SIDE = 288
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, file: str | os.PathLike[str], *, device: str = "cpu") -> None:
        self.device = _device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of TorchScript: SSCD comes in no other form
                self._model = torch.jit.load(str(file), map_location=self.device).eval()
            descriptor = self.descriptor(Image.new("RGB", (32, 32), "gray"))
        except Exception as error:
            # The file is not ours, so anything may be wrong with it.
            raise EvaluationError(f"{file} cannot be used as SSCD in TorchScript: {type(error).__name__}: {error}") from error
        if descriptor.ndim != 1 or not descriptor.is_floating_point():
            raise EvaluationError(f"{file} makes {tuple(descriptor.shape)} of an image; SSCD makes a descriptor of numbers")
        self.name, self.key = f"cosine of {Path(file).name}", f"torchscript-{file_hash(file)}"

    @torch.no_grad()
    def descriptor(self, image: Image.Image) -> Tensor:
        """The descriptor ``[D]`` of an image, float32 on the CPU, of any length."""
        image = image.convert("RGB")
        scale = self.SIDE / min(image.size)
        width, height = (max(self.SIDE, int(edge * scale)) for edge in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        normalised = (pixels - np.array(self.MEAN, dtype=np.float32)) / np.array(self.STD, dtype=np.float32)
        batch = torch.from_numpy(normalised).permute(2, 0, 1)[None].to(self.device)
        found: Any = self._model(batch)
        return found[0].float().cpu()

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """As :class:`Encoder` says."""
        return _checked(np.stack([self.descriptor(image).numpy() for image in images]), self.name)


class VisionModel:
    """DINOv2, CLIP, SigLIP or another vision model of transformers, from a folder on this machine.

    Of a model with images and texts the image's embedding is taken, of others what they pool, or else their first token.

    Args:
        folder: ``config.json``, ``preprocessor_config.json`` and weights as safetensors. Nothing is fetched, nothing is
            unpickled, and a folder that brings Python code is refused.
        device: as for :class:`TorchScript`.

    Raises:
        EvaluationError: if it cannot be used.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        from ..pipelines import quiet_libraries

        quiet_libraries()
        try:
            check_model_folder(folder)
            options = {"local_files_only": True, "trust_remote_code": False}
            processor: Any = AutoImageProcessor
            self._prepare = processor.from_pretrained(folder, **options)
            model, told = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
        except ModelError as error:
            raise EvaluationError(f"the encoder cannot be used: {error}") from None
        except Exception as error:  # the folder is not ours, so anything may be wrong with it
            raise EvaluationError(f"{folder} cannot be loaded as an image encoder: {type(error).__name__}: {error}") from error
        # transformers starts a tensor that is not in the file at random.
        if lacking := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
            raise EvaluationError(f"{folder} lacks {len(lacking)} tensors of its model ({lacking[0]}): get it again")
        self.device = _device(device)
        self._model = model.to(self.device).float().eval()
        self.name = f"cosine of {folder.name} ({type(model).__name__})"
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors") and file.is_file())
        self.key = "transformers-" + content_hash([[file.name, file_hash(file)] for file in files])
        try:
            self([Image.new("RGB", (32, 32), "gray")])
        except GuardError:
            raise
        except Exception as error:
            raise EvaluationError(f"{folder} makes no vector of an image: {type(error).__name__}: {error}") from error

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """As :class:`Encoder` says."""
        prepared = self._prepare(images=[image.convert("RGB") for image in images], return_tensors="pt")
        pixels = prepared["pixel_values"].to(self.device)
        of_images: Any = getattr(self._model, "get_image_features", None)
        found = of_images(pixel_values=pixels) if of_images is not None else self._model(pixel_values=pixels)
        if not isinstance(found, Tensor):
            pooled = next((found[name] for name in ("image_embeds", "pooler_output") if found.get(name) is not None), None)
            found = found["last_hidden_state"][:, 0] if pooled is None else pooled
        return _checked(found.reshape(len(images), -1).float().cpu().numpy(), self.name)


def _checked(rows: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise EvaluationError(f"{name} makes of an image a vector that holds no numbers (NaN or infinite)")
    return unit(rows)


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
