"""What is written of two audits: the page, and their prompts as tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..audit import AuditError
from ..audit.comparison import CHANGES
from ..audit.dataset import read_manifest, read_traces, write_table
from ..core.trace import rarity
from ..files import write_whole
from .pieces import audit_page, run_summary, thumbnail
from .words import called_up, quoted

#: Prompts that the page shows with images and graphs, and rows of its tables.
SHOWN, ROWS = 24, 300

#: A row a prompt, as ``comparison.compare`` lists them.
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("change", pa.string()),
        ("images", pa.int64()),
        ("triggered_a", pa.int64()),
        ("rarest_a", pa.float64()),
        ("corrected_a", pa.int64()),
        ("triggered_b", pa.int64()),
        ("rarest_b", pa.float64()),
        ("corrected_b", pa.int64()),
        ("words_a", pa.list_(pa.string())),
        ("words_b", pa.list_(pa.string())),
        ("seed", pa.int64()),
        ("image_a", pa.int64()),
        ("image_b", pa.int64()),
        ("file_a", pa.string()),
        ("file_b", pa.string()),
    ]
)


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Writes what ``comparison.compare`` returned, by the suffix of ``path``: the page (``.html``), everything (``.json``), or
    the prompts that trigger anywhere, a row each (``.csv``, ``.parquet``).

    The page reads images and traces from the folders that were compared.

    Raises:
        AuditError: for another suffix, or if a folder cannot be read any more.
        OSError: if the file cannot be written.
    """
    rows = [row for name in CHANGES for row in result[name]]
    suffix = path.suffix.lower()
    if suffix == ".html":
        write_whole(path, _page(result))
    elif suffix == ".json":
        write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    elif suffix == ".csv":
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, _SCHEMA.names)
        writer.writeheader()
        # Words hold no space.
        spaced = ({side: " ".join(row[side] or ()) for side in ("words_a", "words_b")} for row in rows)
        writer.writerows(row | words for row, words in zip(rows, spaced, strict=True))
        write_whole(path, sheet.getvalue())
    elif suffix == ".parquet":
        write_table(path, rows, _SCHEMA)
    else:
        raise AuditError(f"{path.name}: a comparison is written as .html, .json, .csv or .parquet")


def _page(result: Mapping[str, Any]) -> str:
    folders = {side: Path(result[side]["folder"]) for side in "ab"}
    mitigation = result["a"]["mode"] != result["b"]["mode"]
    # The first of each list, in turn. Prompts that stay memorized matter where mitigation is what is compared.
    lists = [result[name] for name in CHANGES if name != "stays" or mitigation]
    shown = [row for together in itertools.zip_longest(*lists) for row in together if row is not None][:SHOWN]
    traces = {side: read_traces(folders[side], (row[f"image_{side}"] for row in shown)) for side in "ab"}
    cards = [
        row
        | {
            "sides": [
                {
                    "name": side.upper(),
                    "triggered": row[f"triggered_{side}"],
                    "words": called_up(row[f"words_{side}"]),
                    "picture": thumbnail(folders[side], row[f"file_{side}"]),
                    "trace_name": f"{side}{row[f'image_{side}']}",
                    "summary": run_summary(traces[side].get(row[f"image_{side}"])),
                }
                for side in "ab"
            ]
        }
        for row in shown
    ]
    return audit_page(
        "Two audits compared",
        "comparison.html",
        [read_manifest(folder) for folder in folders.values()],
        {"traces": {f"{side}{image}": trace.to_dict() for side in "ab" for image, trace in traces[side].items()}},
        found=result,
        heading="Prompts to look at" if mitigation else "Prompts that changed most",
        cards=cards,
        lists=[_list(name, result) for name in CHANGES if result[name]],
    )


def _list(change: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the prompts that changed in one way."""
    corrected = [side for side in "ab" if result[side]["mode"] == "mitigate"]
    columns = ["prompt", "#images"]
    for side in "ab":
        columns += [f"#triggered in {side.upper()}", f"#as rare as, {side.upper()}"]
        columns += [f"#corrected in {side.upper()}"] if side in corrected else []
    shown = result[change][:ROWS]
    told = [side for side in "ab" if any(row[f"words_{side}"] for row in shown)]
    columns += [f"called up in {side.upper()} by" for side in told]
    rows = []
    for row in shown:
        cells = [row["images"]]
        for side in "ab":
            rarest = row[f"rarest_{side}"]
            cells += [row[f"triggered_{side}"], "-" if rarest is None else rarity(rarest, result[side]["p_value_floor"])]
            cells += [row[f"corrected_{side}"]] if side in corrected else []
        words = [row[f"words_{side}"] for side in told]
        rows.append(
            {
                "prompt": row["prompt"],
                "numbers": cells,
                "words": [quoted(one) if one else "-" for one in words],
                "changed": len(words) == 2 and all(words) and set(words[0]) != set(words[1]),
            }
        )
    return {"change": change, "total": result["prompts"][change], "columns": columns, "rows": rows}
