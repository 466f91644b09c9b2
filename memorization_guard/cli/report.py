"""``memorization-guard report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_table, printable, warn

#: Words that call images up which the terminal names.
WORDS = 5


def report(folder: Annotated[Path, typer.Argument(help="Folder of an audit, finished or not.")]) -> None:
    """Make the report of an audit anew, from its results."""
    from ..reports.audit import write_report

    print_audit(folder, write_report(folder))


def print_audit(folder: Path, summary: dict[str, Any]) -> None:
    """What came out of an audit, in the terminal."""
    from ..audit.dataset import REPORT, RESULTS

    warn(summary["warnings"])
    rates = [("images", summary["triggered"]), ("prompts", summary["prompts_triggered"])]
    rates += [(f"images, {kind['kind'] or 'no kind'}", kind["triggered"]) for kind in summary["kinds"][:8]]
    rows = []
    for name, rate in rates:
        interval = "-" if rate["interval"] is None else " ({:.2%}-{:.2%})".format(*rate["interval"])
        share = "-" if rate["rate"] is None else f"{rate['rate']:.2%}{interval}"
        chance = "-" if rate["chance"] is None else f"{rate['chance']:.1f}"
        rows.append((printable(name), f"{rate['of']:,}", f"{rate['count']:,}", share, chance))
    print_table("triggered; in brackets 95 % intervals", ("", "#of", "#triggered", "#rate", "#by chance alone"), rows)
    if (out := summary["screened_out"]) is not None:
        images = summary["images"]
        print(f"screened: {out:,} of {images:,} images were judged by their first evaluation, {images - out:,} sampled whole")
    if told := summary["prompts_with_words"]["count"]:
        often = ", ".join(f"{row['word']} ({row['prompts']:,})" for row in summary["words"][:WORDS])
        of = summary["prompts_with_words"]["of"]
        print(f"words told for {told:,} of {of:,} prompts that triggered; in most prompts: {printable(often)}")
    print(f"{folder / REPORT} shows the worst prompts; {folder / RESULTS} holds a row an image.")
