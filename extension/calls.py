"""What the places of all hosts between network and guidance have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from modules import script_callbacks
from torch import Tensor

from ..memorization_guard import StabilityMonitor
from ..memorization_guard.core.asking import Ask, Prompts


class Predicted(Protocol):
    """Takes a latent, its noise level, the predictions with and without the prompt, and what asks the network for others.

    Gives the prediction with the prompt to go on with.
    """

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor | None, /, *, ask: Ask, prompts: Prompts | None
    ) -> Tensor: ...


@contextlib.contextmanager
def called_back(register: Callable[..., None], callback: Callable[[Any], None]) -> Iterator[None]:
    register(callback)
    try:
        yield
    finally:
        script_callbacks.remove_callbacks_for_function(callback)


@contextlib.contextmanager
def told(monitor: StabilityMonitor) -> Iterator[None]:
    """Errors go to the monitor, and nowhere else."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        monitor.fail(error)


@contextlib.contextmanager
def tiling_kept() -> Iterator[None]:
    """What Hypertile draws at random while it is entered, it draws again afterwards: it has a generator of its own."""
    tiling = getattr(sys.modules.get("hypertile"), "RNG_INSTANCE", None)
    state = None if tiling is None else tiling.getstate()
    try:
        yield
    finally:
        if tiling is not None:
            tiling.setstate(state)
