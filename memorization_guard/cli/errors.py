"""Errors as a user of the command sees them: one line that says what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from ..core.errors import GuardError
from .output import print_anything, printable

#: The extra that brings a package.
_EXTRAS = dict.fromkeys(("pyarrow", "filelock", "jinja2", "scipy", "sklearn"), "audit") | {
    "ray": "cluster",
    "diffusers": "diffusers",
}


#: Characters of an error, which may quote a file.
LONGEST = 2000


class UsageError(GuardError):
    """Options or files that a command cannot work with."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors that the user can put right into one line and exit code 2, and an interruption into exit code 130."""
    print_anything()
    try:
        yield
    except (GuardError, OSError) as error:
        _fail(_told(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).split(".")[0])
        if extra is None:
            raise
        _fail(f'{error.name} is missing: pip install "memorization-guard[{extra}]"')
    except KeyboardInterrupt:
        _interrupted()


def _fail(message: str) -> NoReturn:
    line = printable(" ".join(message.split()))
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
    print(f"memorization-guard: {line}", file=sys.stderr)
    raise typer.Exit(2) from None


def _interrupted(kept: str = "") -> NoReturn:
    print(f"memorization-guard: interrupted{kept}", file=sys.stderr)
    raise typer.Exit(130) from None


def _told(error: Exception, file: object = "output") -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or file}: {error.strerror}"
    return str(error)


@contextmanager
def resumable(kept: Callable[[], str], folder: Path) -> Iterator[None]:
    """Around sampling that can go on later: whatever stops it, the message says what is kept.

    Args:
        kept: ends the sentence; asked when it is needed.
        folder: where files are written, for a message about a full disk.
    """
    try:
        with sampling_errors():
            yield
    except KeyboardInterrupt:
        _interrupted(kept())
    except (GuardError, OSError) as error:
        raise UsageError(f"{_told(error, folder)}{kept()}") from error


@contextmanager
def sampling_errors() -> Iterator[None]:
    """Around a pipeline: what it refuses (a size, a scheduler, a full GPU) becomes a :class:`UsageError`."""
    try:
        yield
    except GuardError:
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError, LookupError, ArithmeticError) as error:
        hint = " (a smaller --batch-size needs less)" if "memory" in f"{type(error).__name__} {error}".lower() else ""
        if isinstance(error, LookupError):  # a scheduler's tables end
            hint = " (the scheduler may not have so many --steps)"
        raise UsageError(f"sampling failed: {error or type(error).__name__}{hint}") from error


def writable(*paths: Path | None) -> None:
    """Refuses an output that cannot be written before minutes of sampling, not after."""
    for path in paths:
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}: name a file")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"the folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} cannot be written to")
