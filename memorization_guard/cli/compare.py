"""``memorization-guard compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError, writable
from .output import print_table, printable, warn

#: Prompts that the terminal names, of each sort.
LISTED = 10


def compare(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="Folder of an audit: the base model, or without mitigation.")],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="Folder of another: the fine-tune, or with mitigation.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the comparison here: .html, .json, .csv or .parquet.")
    ] = None,
) -> None:
    """Find out which prompts became memorized from one audit to another."""
    writable(output)
    if output is not None and output.suffix not in (".html", ".json", ".csv", ".parquet"):
        raise UsageError(f"{output.name}: a comparison is written as .html, .json, .csv or .parquet")
    from ..audit.comparison import compare as compare_audits
    from ..reports.comparison import write_comparison

    result = compare_audits(a, b)
    if output is not None:
        write_comparison(result, output)
    _print(result)


def _print(result: dict[str, Any]) -> None:
    from ..reports.words import called_up

    warn(result["warnings"])
    pairs = result["pairs"]
    rows = []
    for name in ("images", "prompts"):
        found = result[name]
        change = "-"
        if found["difference"]["rate"] is not None:
            change = "{:+.2%} ({:+.2%} to {:+.2%})".format(found["difference"]["rate"], *found["difference"]["interval"])
        rows.append((name, *(f"{found[sort]:,}" for sort in ("became", "no_longer", "stays", "never")), change))
    columns = ("", "#became memorized", "#no longer", "#stays", "#never", "#difference")
    print_table(f"{pairs['images']:,} images of {pairs['prompts']:,} prompts that are in both", columns, rows)
    for title, changed, side in (("became memorized", result["became"], "b"), ("no longer", result["no_longer"], "a")):
        for row in changed[:LISTED]:
            called = called_up(row[f"words_{side}"])
            print(printable(f"{title}: {row['prompt']}{called and f' ({called})'}"))
        if len(changed) > LISTED:
            print(f"{title}: {len(changed) - LISTED:,} more; --output names them")
    for note in result["notes"]:
        print(note)
