"""Loads diffusers pipelines from this machine's disk. Nothing is downloaded, and nothing is unpickled."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .loras import check_numbers, check_taken, read_by
from .model_files import ModelError as ModelError
from .model_files import check_safetensors, components, pipeline_index

#: What diffusers warns of when a file and a model do not have the same tensors.
_PARTIAL = re.compile(r"(were not used when|newly) initializ|led to (unexpected|missing) keys", re.IGNORECASE)


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
            ModelError: if the weight is no number, or the file is missing, no ``.safetensors`` file, or holds values that
                are no numbers.
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
        check_safetensors(Path(name))
        check_numbers(Path(name))
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
    if not model.exists():
        raise ModelError(f"there is no model at {model}: give a diffusers folder or a .safetensors checkpoint")
    if model.is_file():
        check_safetensors(model)
    if config is not None and not (config / "model_index.json").is_file():
        raise ModelError(
            f"--config {config} holds no model_index.json: give the folder of a diffusers pipeline of the same kind"
        )
    import torch

    quiet_libraries()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    number_type = getattr(torch, dtype, None)
    if not isinstance(number_type, torch.dtype):
        raise ModelError(f"{dtype!r} is no number type: give float32, float16, bfloat16 or auto")
    pipe = load_folder(model, number_type) if model.is_dir() else _load_checkpoint(model, config, number_type)
    try:
        pipe = pipe.to(device)
    except Exception as error:
        raise _unloadable(model, error) from error
    parts = pipe.components
    for name in (name for name, part in parts.items() if name.startswith("text_encoder") and part is not None):
        if parts.get(tokenizer := name.replace("text_encoder", "tokenizer"), pipe) is None:
            raise ModelError(f"{model} has a {name} but no {tokenizer}, so it reads no prompt: get the model again")
    for lora in loras:
        _merge(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_folder(folder: Path, dtype: Any = None) -> Any:
    """The pipeline of a diffusers folder, on the CPU.

    Args:
        folder: holds ``model_index.json``.
        dtype: torch's number type for the weights; float32 if ``None``.

    Raises:
        ModelError: if it cannot be loaded, if loading it would run code, or if a model's tensors are not those of its file.
    """
    index = pipeline_index(folder)
    from diffusers import DiffusionPipeline

    # diffusers wants to be told of parts that are left out, such as SD 3's third text encoder.
    parts: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    for name, library, kind in components(index):
        if (model := _load_model(folder, name, library, kind, dtype)) is not None:
            parts[name] = model
    try:
        return DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **_number_type(dtype), **parts
        )
    except Exception as error:
        raise _unloadable(folder, error) from error


def load_part(folder: Path, name: str) -> Any:
    """One of the models of a diffusers folder, such as ``"vae"``, in float32.

    Raises:
        ModelError: as for :func:`load_folder`, or if there is none of this name.
    """
    for each, library, kind in components(pipeline_index(folder)):
        if each == name and (model := _load_model(folder, name, library, kind, None)) is not None:
            return model
    raise ModelError(f"{folder} has no model called {name}")


def _load_model(folder: Path, name: str, library: str, kind: str, dtype: Any) -> Any:
    """A model of a pipeline with all of its tensors; ``None`` for a part without weights, which diffusers loads by itself."""
    import diffusers
    import transformers

    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(diffusers.pipelines, library)
    found = getattr(home, kind, None)
    if not isinstance(found, type) or not issubclass(found, (diffusers.ModelMixin, transformers.PreTrainedModel)):
        return None
    load: Any = found.from_pretrained
    try:
        # Both libraries start a tensor that is not in the file at random, with no more than a warning.
        model, told = load(
            folder / name,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            output_loading_info=True,
            **_number_type(dtype),
        )
    except Exception as error:
        raise _unloadable(folder / name, error) from error
    differing = {
        "missing": {*told["missing_keys"], *_empty(model)},
        "unknown": told["unexpected_keys"],
        "of another size": told["mismatched_keys"],
    }
    problems = [f"{len(keys)} are {word} ({sorted(map(str, keys))[0]})" for word, keys in differing.items() if keys]
    if problems:
        raise ModelError(
            f"{folder / name} does not hold the tensors of a {kind}: {' and '.join(problems)}. Get the model again, or use "
            "the versions of diffusers and transformers that it was made with"
        )
    # Where nothing is said, transformers 5 keeps the number type of the file.
    return model.float() if dtype is None else model


def _empty(model: Any) -> list[str]:
    """Tensors that have a size and no values, which is what the libraries may leave of those that a file lacks."""
    from torch import nn

    return [name for name, value in model.state_dict().items() if value.is_meta] if isinstance(model, nn.Module) else []


def _number_type(dtype: Any) -> dict[str, Any]:
    """The libraries' option, which the newer ones warn of: only where it is needed."""
    return {} if dtype is None else {"torch_dtype": dtype}


def _unloadable(path: Path, error: Exception, hint: str = "") -> ModelError:
    return ModelError(f"{path} cannot be loaded as a pipeline: {_reason(error)}{hint}")


def _reason(error: Exception) -> str:
    if "meta tensor" in str(error):  # a tensor that a checkpoint lacks, moved before it could be found
        return "tensors are missing"
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _load_checkpoint(checkpoint: Path, config: Path | None, dtype: Any) -> Any:
    """The pipeline of a single file, with the class and the settings of ``config``.

    Without ``config`` diffusers looks the settings up on the hub, also if told to use local files only. So it is always given
    a folder: if need be the one in the hub's cache on this machine.
    """
    import diffusers

    if find_spec("accelerate") is None:  # diffusers would start tensors at random that the checkpoint lacks
        raise ModelError('checkpoints need accelerate: pip install "memorization-guard[diffusers]"')
    hint = ""
    if config is None:
        hint = " A checkpoint holds weights only: with --config FOLDER give a diffusers folder of the same kind of model."
        try:
            config = _cached_config(checkpoint)
        except Exception as error:
            raise _unloadable(checkpoint, error, hint) from error
    name = pipeline_index(config)["_class_name"]
    try:
        with _whole_loads():
            pipe = getattr(diffusers, name).from_single_file(
                str(checkpoint), config=str(config), torch_dtype=dtype, local_files_only=True
            )
        for name, part in pipe.components.items():
            if absent := _empty(part):
                raise ModelError(f"{len(absent)} tensors of {name} are missing ({absent[0]})")
    except Exception as error:
        raise _unloadable(checkpoint, error, hint) from error
    return pipe


def _cached_config(checkpoint: Path) -> Path:
    """The folder, in the hub's cache on this machine, of the model that a checkpoint's tensors look like.

    Raises:
        ModelError: if it is not there.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = fetch_diffusers_config(load_single_file_checkpoint(str(checkpoint)))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(found, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(f"the settings of {found} are not on this machine, and nothing is fetched.") from None


def model_path(model: str | os.PathLike[str]) -> Path:
    """The path of a model: ``model`` itself, or for ``"lab"`` the folder of our own model."""
    if os.fspath(model) == "lab" and not Path(model).exists():
        from .lab import MODEL

        return MODEL
    return Path(model)


def _merge(pipe: Any, lora: Lora) -> None:
    """Adds a LoRA to the pipeline's weights and removes its adapter."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"{type(pipe).__name__} takes no LoRA")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError('LoRAs need peft: pip install "memorization-guard[audit]"') from None
    check_safetensors(lora.file)
    check_numbers(lora.file)
    try:
        with read_by(pipe) as read:
            # Diffusers looks on the hub unless folder and name are given separately.
            pipe.load_lora_weights(
                str(lora.file.parent), weight_name=lora.file.name, local_files_only=True, use_safetensors=True
            )
        check_taken(pipe, read)
        # Refuses weights that the sum makes infinite.
        pipe.fuse_lora(lora_scale=lora.weight, safe_fusing=True)
        pipe.unload_lora_weights()
    except Exception as error:
        raise ModelError(f"{lora.file} does not go with this model: {_reason(error)}") from error


@contextmanager
def _whole_loads() -> Iterator[None]:
    """Turns what diffusers only warns of, tensors that were not found or not used, into a :class:`ModelError`."""
    from diffusers.utils import logging as diffusers_logging

    logger, said = diffusers_logging.get_logger(), _Said()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers[:] = [said]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    for message in said.messages:
        # Stable Diffusion 1's checkpoints hold positions that are no weights.
        names = [name for name in re.split(r"[\s,'\[\]]+", message.partition(":")[2]) if name]
        if _PARTIAL.search(message) and not all(name.endswith(".position_ids") for name in names):
            raise ModelError(" ".join(message.split())[:300])


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


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
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
