"""What of a LoRA a model takes: checked against the tensors, since the libraries at most warn of what they leave out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .model_files import ModelError

#: The two halves of a change of low rank, as the formats name them.
_HALVES = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)


def check_numbers(file: Path) -> None:
    """Refuses a LoRA with values that are no numbers, as one whose training broke down has.

    Raises:
        ModelError: naming a tensor.
    """
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
        broken = [name for name in names if not _finite(stored.get_tensor(name))]
    if broken:
        raise ModelError(
            f"{file} holds NaN or infinite values in {len(broken)} of {len(names)} tensors ({broken[0]}): its training broke "
            "down, take an earlier one"
        )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


@contextmanager
def read_by(pipe: Any) -> Iterator[dict[str, Tensor]]:
    """In the block, ``pipe.load_lora_weights`` fills the given dictionary with the tensors as the pipeline names them."""
    read: dict[str, Tensor] = {}
    original = pipe.lora_state_dict

    def noted(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        # Some pipelines give scales and metadata beside the tensors.
        read.update(found[0] if isinstance(found, tuple) else found)
        return found

    pipe.lora_state_dict = noted
    try:
        yield read
    finally:
        del pipe.lora_state_dict


def check_taken(pipe: Any, read: Mapping[str, Tensor]) -> None:
    """Refuses a LoRA, just loaded, of which the pipeline has not taken every tensor, or which changes nothing.

    A tensor was taken if one with its values is in the pipeline's adapters, under whatever name.

    Args:
        pipe: with no other LoRA. read: from :func:`read_by`.

    Raises:
        ModelError: says how many of its tensors were taken, and names one that was not.
    """
    adapters = {adapter for names in pipe.get_list_adapters().values() for adapter in names}
    loaded = [
        (name, weight.detach())
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for name, weight in part.named_parameters()
        if adapters.intersection(name.split(".")) and not weight.is_meta
    ]
    there = Counter((weight.dtype, _values(weight)) for _, weight in loaded)
    dtypes = {weight.dtype for _, weight in loaded}
    left = []
    for name, tensor in read.items():
        for key in ((dtype, _values(tensor.to(dtype))) for dtype in dtypes):
            if there[key]:
                there[key] -= 1
                break
        else:
            left.append(name)
    if left:
        taken = f"only {len(read) - len(left)}" if len(left) < len(read) else "none"
        raise ModelError(f"{taken} of its {len(read)} tensors belong to a part of the model ({left[0]} does not)")
    if not read:
        raise ModelError("it holds no tensors of a LoRA")
    for one, other in (*_HALVES, *(pair[::-1] for pair in _HALVES)):
        alone = [name for name in read if one in name and name.replace(one, other) not in read]
        if alone:
            raise ModelError(f"{len(alone)} of its {len(read)} tensors lack their other half ({alone[0]})")
    second = [weight for name, weight in loaded if "lora_B" in name or "lora_embedding_B" in name]
    if second and not any(bool(weight.any()) for weight in second):
        raise ModelError("it changes nothing: the second half of each change is zero, as before training")


def _values(tensor: Tensor) -> str:
    """A hash of a tensor's values, whatever its shape."""
    content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()
