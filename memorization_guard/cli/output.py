"""What commands write: files, and text and tables in the terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..core.trace import Trace


def printable(text: str) -> str:
    """``text`` from a file, without what a terminal would obey."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def print_anything() -> None:
    """Makes the output replace what its encoding does not have, as half a character of a file's name, and not fail there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """A table in the terminal. Columns whose name begins with ``#`` hold numbers."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name.removeprefix("#"), justify="right" if name.startswith("#") else "left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)


def warn(warnings: Iterable[str]) -> None:
    """Prints warnings to standard error."""
    for warning in warnings:
        print(f"memorization-guard: {printable(warning)}", file=sys.stderr)


def write_all(contents: Iterable[tuple[Path | None, bytes | str]]) -> None:
    """Writes contents that have all been made already, so that an error in making one leaves no file behind."""
    from ..files import write_whole

    for path, content in contents:
        if path is not None:
            write_whole(path, content)


def json_text(data: Any) -> str:
    """``data`` as a JSON file."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def graph_file(trace: Trace, plot: Path | None) -> bytes | str:
    """The stability graph of a run in the format of ``plot``."""
    from ..reports import graph

    if plot is None:
        return ""
    return graph.svg(trace) if plot.suffix == ".svg" else png(graph.image(trace))


def png(picture: Any) -> bytes:
    """A PIL image as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
