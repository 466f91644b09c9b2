"""What may be opened of a model: files that hold numbers and settings, and nothing that loading them would run.

diffusers loads a folder by what ``model_index.json`` says, and its versions up to 0.37 run Python files that lie in it.
Weights other than safetensors are pickles, which run code when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .core.errors import GuardError
from .files import parse_json, read_whole

#: Under these names diffusers and transformers take safetensors before they look for a pickle.
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: What stands beside a tokenizer's vocabulary.
_WORDLESS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class ModelError(GuardError):
    """A model that cannot be loaded."""


def pipeline_index(folder: Path) -> dict[str, Any]:
    """What ``model_index.json`` of a diffusers folder says; the folder is checked to hold nothing that loading it would run.

    Raises:
        ModelError: if it does, if weights are pickles, or if there is no such file that can be read.
    """
    index = _json(folder / "model_index.json", otherwise="it is not a diffusers pipeline folder")
    parts = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    for file in (file for part in parts for file in sorted(part.iterdir())):
        if file.suffix.lower() == ".py":
            raise ModelError(
                f"{folder} holds the Python file {file.relative_to(folder)}, which loading the model may run: "
                "take it out of the folder, if the model does without it"
            )
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(
            f"{folder / 'model_index.json'} names a pipeline class of its own, {index.get('_class_name')!r}, and not one of "
            "diffusers: use a model made for one of these"
        )
    for name, library, kind in components(index):
        _check_component(folder / name, name, library, kind)
    return index


def check_model_folder(folder: Path) -> None:
    """Refuses a folder of one transformers model that holds what loading it would run.

    Raises:
        ModelError: naming the file.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() == ".py":
            raise ModelError(f"{folder} holds the Python file {file.name}, which loading the model may run: take it out")
    _check_component(folder, folder.name, "transformers", "AutoModel")


def components(index: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, library and class of every part that ``model_index.json`` does not leave out."""
    for name, value in index.items():
        if isinstance(value, list) and value != [None, None]:
            if len(value) != 2 or not all(isinstance(word, str) for word in value):
                raise ModelError(f"model_index.json says {value!r} of {name!r}: that is no library and class")
            yield name, *value


def check_safetensors(file: Path) -> None:
    """Refuses whatever is no safetensors file, by its name or by what it holds.

    The name counts as it is written: diffusers opens ``.SAFETENSORS`` as a pickle.

    Raises:
        ModelError: says what to do.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        advice = "rename it" if file.suffix.lower() == ".safetensors" else "convert it first"
        raise ModelError(f"{file} is no .safetensors file: other files can run code when opened, {advice}")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({error}): get it again, or convert it") from error


def _check_component(folder: Path, name: str, library: str, kind: str) -> None:
    """Refuses a part whose class or weights are not of the kinds that run nothing."""
    import diffusers.pipelines

    if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
        raise ModelError(
            f"model_index.json takes {name} from {library!r}, which is neither diffusers nor transformers and would be run: "
            "use a model made of their parts"
        )
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    # transformers makes a tokenizer without words of a folder without a vocabulary.
    if kind.endswith(("Tokenizer", "TokenizerFast")) and not any(each not in _WORDLESS for each in names):
        raise ModelError(f"{folder} holds no vocabulary, so the model reads no prompt: get the model again")
    if not folder.is_dir():
        return
    if kind.startswith("Auto"):
        for file in sorted(folder.glob("*.json")):
            if "auto_map" in _json(file, otherwise=f"{name} cannot be loaded"):
                raise ModelError(f"{file} wants code of its own to be run (auto_map): use a model without it")
    if "adapter_config.json" in names:
        raise ModelError(f"{folder} is an adapter to another model: merge it, or give a LoRA with --lora")
    pickles = sorted(each for each in names if Path(each).suffix.lower() in _PICKLES)
    if pickles and not names & {weights + end for weights in _WEIGHTS for end in ("", ".index.json")}:
        raise ModelError(
            f"{folder} has no weights as safetensors, and {pickles[0]} can run code when opened: convert it first "
            "(load it where you trust it, and save_pretrained it with safe_serialization=True)"
        )
    for file in sorted(folder.glob("*.safetensors.index.json")):
        shards = _json(file, otherwise=f"{name} cannot be loaded").get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
                raise ModelError(f"{file} names {shard!r}, which is no .safetensors file beside it: get the model again")


def _json(file: Path, *, otherwise: str) -> dict[str, Any]:
    try:
        content = parse_json(read_whole(file))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} holds no {file.name}: {otherwise}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}): {otherwise}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings: {otherwise}")
    return content
