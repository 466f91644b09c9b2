"""A fast fingerprint of a model's weights, the same at any floating-point precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

#: Values looked at in each tensor.
SAMPLES = 4096


@torch.no_grad()
def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that tell one set of weights from another.

    Hashes the name and shape of every tensor, and the signs of up to 4096 values spread over it. Casting between float32,
    float16 and bfloat16 keeps every sign, so a profile made at one precision is known to fit the model at another; training
    or a merged LoRA flips some signs of small weights. Waits for each device once; takes milliseconds.
    """
    tensors = sorted((model.state_dict() if isinstance(model, nn.Module) else model).items())
    digest = hashlib.sha256()
    signs: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta":  # offloaded weights: name and shape have to do
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        signs.setdefault(tensor.device, []).append(torch.signbit(sample.float()))
    for _, parts in sorted(signs.items(), key=lambda item: str(item[0])):
        digest.update(np.packbits(torch.cat(parts).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
