"""``memorization-guard verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import writable
from .options import Json, Plot
from .output import graph_file, json_text, printable, write_all
from .trace import is_graph

if TYPE_CHECKING:
    from ..evidence import Verification

#: Exit code of each answer.
_EXIT_CODES = {"match": 0, "differ": 1, "unknown": 3}


def verify(
    file: Annotated[Path, typer.Argument(help="An image with a trace in it, or with its .stability.json beside it.")],
    plot: Plot = None,
    json_file: Json = None,
) -> None:
    """Check whether the trace that comes with an image belongs to it, and show it.

    Exit code 0: it belongs. 1: it does not, as the pixels, the settings or the
    trace itself have been changed. 3: nothing is known to have changed, but the
    pixels could not be compared, as of a JPEG. 2: no such image or trace.
    """
    writable(json_file, plot)
    is_graph(plot)
    from .. import evidence
    from ..core.trace import STATEMENT, worst
    from ..reports.words import summary

    found = evidence.verify(file)
    write_all(
        [
            (json_file, json_text([trace.to_dict() for trace in found.traces])),
            (plot, graph_file(worst(found.traces), plot)),
        ]
    )
    _print(file, found)
    for trace, run, image in zip(found.traces, found.runs, found.images, strict=True):
        title = "Every image" if image is None and found.batch != 1 else f"Image {(image or 0) + 1}"
        print(printable(summary(trace, f"{title}, {run}" if run else title)))
    print(f"{STATEMENT}\n{evidence.NO_SIGNATURE}")
    if found.belongs != "match":
        raise typer.Exit(_EXIT_CODES[found.belongs])


def _print(file: Path, found: Verification) -> None:
    answer = {
        "match": "the trace belongs to this image",
        "differ": "the trace does NOT belong to this image as it is now",
        "unknown": "whether the trace belongs to this image cannot be told",
    }
    pixels = {
        "match": "as recorded",
        "differ": "not those that the trace was recorded for",
        "unknown": "none were recorded" if found.batch is None else "this format may have changed them: not compared",
    }
    settings = {
        "match": "as recorded",
        "differ": "not those that the trace was recorded for",
        "unknown": "none were recorded, or the file holds none",
    }
    beside = "" if found.found_in == file else f", in {found.found_in.name}"
    print(printable(f"{file.name}: {answer[found.belongs]}"))
    print(f"pixels: {pixels[found.pixels]}\nsettings: {settings[found.settings]}")
    print(printable(f"trace: {'unaltered' if found.unaltered else 'altered since it was recorded'}{beside}"))
    if found.image is not None and found.batch != 1:
        print(f"image {found.image + 1} of a batch of {found.batch}")
