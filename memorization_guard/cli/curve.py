"""``memorization-guard curve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError, writable
from .output import print_table, printable


def curve(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of audits with --training, two or more.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the curve here: .html or .csv.")] = None,
) -> None:
    """Find out from which epoch or strength on a LoRA copies its training images.

    Audit each checkpoint, or one LoRA at several strengths, with the same
    --training folder, and name the audits' folders here.
    """
    writable(output)
    if output is not None and output.suffix.lower() not in (".html", ".csv"):
        raise UsageError(f"{output.name}: a curve is written as .html or .csv")
    if len(folders) < 2:
        raise UsageError("one audit is no curve: name two or more")
    from ..audit.curve import SHARES, read_curve
    from ..reports.curve import write_curve

    found = read_curve(folders)
    if output is not None:
        write_curve(found, output)
    rows = [
        (
            printable(point["name"]),
            f"{point['position']:g}",
            *(f"{point[key]['rate']:.1%}" for key in SHARES),
        )
        for point in found["points"]
    ]
    columns = ("", f"#{found['axis']}", *(f"#{title}" for title in SHARES.values()))
    print_table("copies and verdicts; --output writes their intervals", columns, rows)
