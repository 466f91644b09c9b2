"""Hooks on networks and schedulers that leave nothing behind."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

#: Called with the keyword arguments of a module; gives those that it is called with.
BeforeCall = Callable[[dict[str, Any]], Mapping[str, Any]]

#: Called with the module, its arguments, its keyword arguments and its output.
AfterCall = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], None]

# torch counts its hooks up without a lock: two that are registered at once could get one number, and one of them be lost.
_counting = threading.Lock()

log = logging.getLogger(__name__)


class _Replacement:
    """A function in the place of an object's method. A deep copy of the object has its class's own method again.

    Its block may end while a later block still has the place, which then calls what was there before. The same goes for a
    shallow copy of the object, which keeps the function.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._owner, self._name, self._function = owner, name, function
        #: What was there before, and whether it was the object's own attribute.
        self._before, self._owned = getattr(owner, name), name in vars(owner)
        self._ended = False

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return (self._before if self._ended else self._function)(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._owner))
        return self if twin is None else getattr(type(twin), self._name).__get__(twin)

    def end(self) -> None:
        """Gives the place back, and with it those that ended before and could not."""
        self._ended = True
        own = vars(self._owner)
        while isinstance(last := own.get(self._name), _Replacement) and last._ended:
            if last._owned:
                own[self._name] = last._before
            else:
                del own[self._name]


def is_replaced(owner: Any, name: str) -> bool:
    """Whether a block has taken the place of a method of the object."""
    return isinstance(vars(owner).get(name), _Replacement)


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Puts a function in the place of one object's method for the time of a block. Blocks may end in any order."""
    replacement = _Replacement(owner, name, function)
    vars(owner)[name] = replacement
    try:
        yield
    finally:
        replacement.end()


@contextmanager
def calls_of(module: torch.nn.Module, before: BeforeCall, after: AfterCall) -> Iterator[None]:
    """Calls ``before`` before and ``after`` after every call of the module for the time of a block.

    A deep copy of the module has the hooks, and no block of its own: its calls are not seen, and a warning says so.
    """
    told = False

    def hook(called: torch.nn.Module, arguments: tuple[Any, ...], *rest: Any) -> None:
        nonlocal told
        if called is not module:
            if not told and not any(getattr(one, "watches", None) is called for one in called._forward_hooks.values()):
                told = True
                log.warning("Memorization Guard does not watch a copy of a guarded pipeline: guard the copy.")
            return
        # torch notes apart from the hook that it wants keywords. A call in another thread can come between the two, while the
        # hook is set or taken away: that call is not one of the block's.
        if len(rest) == 2:
            after(module, arguments, *rest)

    def first(called: torch.nn.Module, arguments: tuple[Any, ...], *rest: Any) -> tuple[Any, Any] | None:
        if called is not module or not rest:
            return None
        given = before(rest[0])
        return None if given is rest[0] else (arguments, dict(given))

    hook.watches = module  # type: ignore[attr-defined]
    compiled: Callable[..., Any] | None = module._compiled_call_impl
    if compiled is None:
        with _counting:
            handles = (
                module.register_forward_pre_hook(first, with_kwargs=True),
                module.register_forward_hook(hook, with_kwargs=True),
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return

    # module.compile() was called: hooks are compiled along, and what is compiled already does not look for new ones.
    @functools.wraps(compiled)
    def call(*arguments: Any, **keywords: Any) -> Any:
        keywords = dict(before(keywords))
        output = compiled(*arguments, **keywords)
        after(module, arguments, keywords, output)
        return output

    with replaced(module, "_compiled_call_impl", call):
        yield
