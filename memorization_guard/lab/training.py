"""What every training of the lab shares: a log, a learning rate, checkpoints from which a stopped training goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Log:
    """Lines of JSON, one an event, appended to a file and printed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.time()

    def __call__(self, **values: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - self._start, 1), **values})
        print(line, flush=True)
        with self._path.open("a") as stream:
            stream.write(line + "\n")


def learning_rate(step: int, steps: int, warmup: int, decay: int) -> float:
    """As a share of its peak: a linear warm-up, a plateau, and a linear way down to 0 over the last ``decay`` steps.

    Until the way down begins it does not depend on ``steps``, so a training can be made longer after it has begun.
    """
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, the same however often the training was stopped before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def half_precision(device: str) -> torch.autocast:
    """Bfloat16 for what is computed inside, where that is faster: on a CPU without AVX-512 it takes twelve times as long."""
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


class Run:
    """One training: weights, their exponential moving average, AdamW, and the step at which it stands.

    Args:
        modules: by name, whose parameters are trained together.
        checkpoint: file that holds the state; if it exists, the run goes on from it.
        lr: peak learning rate.
        decay: of the moving average.
    """

    def __init__(self, modules: dict[str, nn.Module], checkpoint: Path, *, lr: float, decay: float = 0.999) -> None:
        self._names = [f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters()]
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self._lr, self._decay, self.checkpoint = lr, decay, checkpoint
        self._optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
        self.step = 0
        if checkpoint.exists():
            self._load()

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of AdamW at ``rate`` times the peak learning rate, and of the moving average."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self.step += 1
        with torch.no_grad():
            keep = min(self._decay, self.step / (self.step + 9))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter, average in zip(self._names, self.parameters, self.average, strict=True):
            state = self._optimizer.state[parameter]
            tensors[f"weight/{name}"], tensors[f"average/{name}"] = parameter.detach(), average
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
        part = self.checkpoint.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        part.replace(self.checkpoint)

    def _load(self) -> None:
        with safe_open(self.checkpoint, "pt", device=str(self.parameters[0].device)) as stored, torch.no_grad():
            self.step = int(stored.get_tensor("step"))
            for name, parameter, average in zip(self._names, self.parameters, self.average, strict=True):
                parameter.copy_(stored.get_tensor(f"weight/{name}"))
                average.copy_(stored.get_tensor(f"average/{name}"))
                self._optimizer.state[parameter] = {
                    key: stored.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the modules hold the averaged weights."""
        current = [p.detach().clone() for p in self.parameters]
        _set(self.parameters, self.average)
        try:
            yield
        finally:
            _set(self.parameters, current)


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
