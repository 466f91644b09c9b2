"""Hooks on networks and schedulers that leave nothing behind."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Called with the module, its arguments, its keyword arguments and its output.
AfterCall = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], None]

# torch counts its hooks up without a lock: two that are registered at once could get one number, and one of them be lost.
_counting = threading.Lock()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of one object for the time of a block."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            own.pop(name, None)


@contextmanager
def calls_of(module: torch.nn.Module, after: AfterCall) -> Iterator[None]:
    """Calls ``after`` after every call of the module for the time of a block."""

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], *rest: Any) -> None:
        # torch notes apart from the hook that it wants keywords. A call in another thread can come between the two, while the
        # hook is set or taken away: that call is not one of the block's.
        if len(rest) == 2:
            after(module, arguments, *rest)

    compiled: Callable[..., Any] | None = module._compiled_call_impl
    if compiled is None:
        with _counting:
            handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return

    # module.compile() was called: hooks are compiled along, and what is compiled already does not look for new ones.
    @functools.wraps(compiled)
    def call(*arguments: Any, **keywords: Any) -> Any:
        output = compiled(*arguments, **keywords)
        after(module, arguments, keywords, output)
        return output

    with replaced(module, "_compiled_call_impl", call):
        yield
