"""Fingerprints: of a model's weights, the same at any floating-point precision, and of whatever JSON can write."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Values looked at in each tensor.
SAMPLES = 4096

#: Blocks looked at in a file, and their length in bytes.
FILE_BLOCKS, FILE_BLOCK = 64, 4096


@torch.no_grad()
def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str | None:
    """16 hexadecimal digits that tell one set of weights from another; ``None`` if weights are offloaded and not there.

    Hashes the name and shape of every tensor, and the signs of up to 4096 values spread over it. Casting between float32,
    float16 and bfloat16 keeps every sign, so a profile made at one precision is known to fit the model at another; training
    or a merged LoRA flips some signs of small weights. ``torch.compile`` and a spread over devices change nothing. Waits for
    each device once; takes milliseconds, and of a module whose weights are as they were, one or two.
    """
    if isinstance(model, nn.Module) and (written := _written(model)) is not None:
        known = _known.get(model)
        if known is None or known[0] != written:
            known = _known[model] = written, _hashed(model)
        return known[1]
    return _hashed(model)


#: Fingerprints of modules, and of which weights.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str | None]] = weakref.WeakKeyDictionary()


def _written(model: nn.Module) -> tuple[Any, ...] | None:
    """Where every weight lies, how often it was written to, and one of its values; ``None`` where that cannot be told.

    The value is for weights that were exchanged twice, the second time for one at the first one's place.
    """
    try:
        weights = list(itertools.chain(model.named_parameters(), model.named_buffers()))
        places = tuple((name, weight.data_ptr(), weight._version) for name, weight in weights)
        values: dict[torch.device, list[Tensor]] = {}
        for _, weight in weights:
            if weight.numel():
                values.setdefault(weight.device, []).append(weight.view(-1)[weight.numel() // 2].float())
        return places, [torch.stack(some).tolist() for some in values.values()]
    except RuntimeError:  # inference tensors, weights that are not there or lie in another order
        return None


def _hashed(model: nn.Module | Mapping[str, Tensor]) -> str | None:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = sorted(((name.replace("_orig_mod.", ""), tensor) for name, tensor in state.items()), key=itemgetter(0))
    if any(tensor.device.type == "meta" for _, tensor in tensors):
        return None
    signs: dict[torch.device, list[Tensor]] = {}
    for _, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        signs.setdefault(tensor.device, []).append(torch.signbit(sample.float()))
    arrived = {device: iter(torch.cat(parts).cpu().split([len(part) for part in parts])) for device, parts in signs.items()}
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.packbits(next(arrived[tensor.device]).numpy()).tobytes())
    return digest.hexdigest()[:16]


def component_fingerprints(pipe: Any) -> dict[str, str | None]:
    """:func:`fingerprint` of every network of a diffusers pipeline, by name."""
    return {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def content_hash(content: Any) -> str:
    """SHA-256 of JSON-ready content, whatever the order of its keys; what JSON does not know counts as it prints."""
    return hashlib.sha256(json.dumps(content, default=repr, sort_keys=True).encode()).hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits that tell one weights file from another, in milliseconds.

    Hashes the size and 64 blocks of 4096 bytes spread over the file, the first and the last among them: training changes all
    of a model's weights, so no two are alike in every block.

    Raises:
        OSError: if the file cannot be read.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for number in range(FILE_BLOCKS):
            stream.seek(max(0, size - FILE_BLOCK) * number // (FILE_BLOCKS - 1))
            digest.update(stream.read(FILE_BLOCK))
    return digest.hexdigest()[:16]


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, in hexadecimal; a second a gigabyte, or so.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
