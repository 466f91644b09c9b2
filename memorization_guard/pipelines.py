"""Loads diffusers pipelines from this machine's disk. Nothing is downloaded, and nothing is unpickled."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core.errors import GuardError


class ModelError(GuardError):
    """A model that cannot be loaded."""


@dataclass(frozen=True)
class Lora:
    """A LoRA and the weight it is added with.

    Attributes:
        file: a ``.safetensors`` file; :meth:`parse` makes its path absolute.
        weight: factor of its change to the model; 1 as it was trained.
    """

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:WEIGHT``.

        Raises:
            ModelError: if the weight is no number, or the file is missing or no ``.safetensors`` file.
        """
        name, colon, weight = text.rpartition(":")
        # C:\loras\style.safetensors has a colon too.
        if not colon or Path(text).is_file() or weight.lower().endswith(".safetensors"):
            name, weight = text, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ModelError(f"--lora {text}: {weight!r} is no number; give FILE or FILE:WEIGHT")
        if not Path(name).is_file():
            raise ModelError(f"there is no LoRA at {name}")
        if Path(name).suffix.lower() != ".safetensors":
            raise ModelError(f"{name} is no .safetensors file: other LoRAs can run code when opened, convert it first")
        return cls(Path(name).absolute(), factor)


def load_pipeline(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    loras: Sequence[Lora] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> Any:
    """A pipeline from a diffusers folder or a ``.safetensors`` checkpoint, ready to sample, without a progress bar.

    Args:
        model: folder or file; ``"lab"`` is our own small model, unless a file or folder has this name.
        config: for a checkpoint, a diffusers folder of the same kind of model.
        loras: merged into the weights one after the other; the model's fingerprint is then that of the sum.
        device: ``"cpu"``, ``"cuda"``, ``"mps"``, or ``"auto"``.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"``: float16 on CUDA, float32 elsewhere.

    Raises:
        ModelError: if a file is missing or cannot be loaded.
    """
    model = model_path(model)
    config = None if config is None else Path(config)
    # Without this, diffusers asks the hub for what a single-file checkpoint lacks, even with local_files_only.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not model.exists():
        raise ModelError(f"there is no model at {model}: give a diffusers folder or a .safetensors checkpoint")
    if model.is_file() and model.suffix != ".safetensors":
        raise ModelError(f"{model.name} is no .safetensors file: other checkpoints can run code when opened, convert it first")
    if model.is_dir() and not (model / "model_index.json").is_file():
        raise ModelError(f"{model} holds no model_index.json: it is not a diffusers pipeline folder")
    if config is not None and not (config / "model_index.json").is_file():
        raise ModelError(
            f"--config {config} holds no model_index.json: give the folder of a diffusers pipeline of the same kind"
        )
    import torch

    quiet_libraries()
    from diffusers import DiffusionPipeline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    try:
        options = {"torch_dtype": getattr(torch, dtype), "local_files_only": True}
        if model.is_dir():
            pipe: Any = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **options)
        else:
            if config is not None:
                options["config"] = str(config)
            pipe = _single_file_class(model, config).from_single_file(str(model), **options)
        pipe = pipe.to(device)
    except Exception as error:
        hint = ""
        if model.is_file() and config is None:
            hint = " A checkpoint holds weights only: with --config FOLDER give a diffusers folder of the same kind of model."
        raise ModelError(f"{model} cannot be loaded as a pipeline: {type(error).__name__}: {error}{hint}") from error
    for lora in loras:
        _merge(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_path(model: str | os.PathLike[str]) -> Path:
    """The path of a model: ``model`` itself, or for ``"lab"`` the folder of our own model."""
    if os.fspath(model) == "lab" and not Path(model).exists():
        from .lab import MODEL

        return MODEL
    return Path(model)


def _single_file_class(checkpoint: Path, config: Path | None) -> Any:
    """The pipeline class that ``config`` names; without it the class that fits the checkpoint's tensors."""
    import diffusers

    if config is not None:
        return getattr(diffusers, json.loads((config / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(checkpoint)))
    families = {"xl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
    return getattr(
        diffusers, next((name for prefix, name in families.items() if kind.startswith(prefix)), "StableDiffusionPipeline")
    )


def _merge(pipe: Any, lora: Lora) -> None:
    """Adds a LoRA to the pipeline's weights and removes its adapter."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"{type(pipe).__name__} takes no LoRA")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError('LoRAs need peft: pip install "memorization-guard[audit]"') from None
    try:
        # Diffusers looks on the hub unless folder and name are given separately.
        pipe.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, local_files_only=True)
        pipe.fuse_lora(lora_scale=lora.weight)
        pipe.unload_lora_weights()
    except Exception as error:
        raise ModelError(f"{lora.file} does not go with this model: {type(error).__name__}: {error}") from error


def quiet_libraries() -> None:
    """Turns off the progress bars and hints of diffusers and transformers; errors are still shown.

    Raises:
        ModelError: if they are not installed.
    """
    try:
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging
    except ImportError:
        raise ModelError('diffusers is missing: pip install "memorization-guard[diffusers]"') from None
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
