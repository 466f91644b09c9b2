"""The page of an audit: one file that loads no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from ..audit.dataset import REPORT, mapping, read_traces
from ..audit.summary import LEVELS, read
from ..core.settings import TRIGGERED, VERDICTS
from ..core.trace import rarity
from ..core.words import marked
from ..files import write_whole
from . import charts
from .pieces import audit_page, run_summary, share, thumbnail
from .words import quoted, unusual

#: Columns of the words that call an image up.
_WORDS = ("words", "prompt_without_words")

#: Prompts whose image and graph are open from the start.
OPEN = 6
#: Words that are open from the start.
OPEN_WORDS = 8


def write_report(folder: Path) -> dict[str, Any]:
    """Writes ``report.html`` into the folder of an audit, whole or not at all.

    Returns:
        What :func:`memorization_guard.audit.summary.summarize` returns.

    Raises:
        FileNotFoundError, AuditError: as :func:`memorization_guard.audit.summary.summarize`.
        OSError: if it cannot be written.
    """
    results = read(folder)
    found = results.summary
    # What was screened out is one evaluation, of which there is nothing to draw.
    traces = read_traces(folder, (row["image"] for row in found["worst"] if not row["screened_out"]))
    data: dict[str, object] = {"traces": {str(image): trace.to_dict() for image, trace in traces.items()}}
    if found["worst"]:
        data["table-data"] = _table(results.rows, found)
    content = audit_page(
        f"Audit of {found['model'] or 'a model'}",
        "audit.html",
        [results.manifest],
        data,
        found=found,
        triggered=TRIGGERED,
        cards=[
            row
            | {
                "kind": row["kind"] if found["kinds"] else None,
                "unusual": _unusual(row, found) if row["image"] not in traces else None,
                "picture": thumbnail(folder, row["file"]),
                "pieces": marked(row["prompt"], row["words"], row["prompt_without_words"]) if row["words"] else None,
                "summary": run_summary(traces.get(row["image"])),
            }
            for row in found["worst"]
        ],
        open=OPEN,
        open_words=OPEN_WORDS,
        shown=len(results.rows),
        chart=_distribution(found, results.manifest),
        about=_about,
        rarity=rarity,
        quoted=quoted,
    )
    write_whole(folder / REPORT, content)
    return found


def _unusual(row: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    return None if row["p_value"] is None else unusual(rarity(row["p_value"], found["p_value_floor"]))


def _about(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 9.5 else f"{number:.2g}"


def _distribution(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of images up to a p-value, beside that of ordinary images, which is the p-value itself.

    It is not compared with the profile's references: a p-value is an image's rank among them, and of 400 none is expected
    below 1 in 400.
    """
    distribution, nominal, floor = found["distribution"], found["false_positive_rate"], found["p_value_floor"]
    if not distribution["images"]:
        return None
    shares = np.array(distribution["share"])
    seen = shares > 0
    lowest = float(np.clip(10.0 ** -math.ceil(math.log10(distribution["images"])), 1e-6, 1e-3))
    x = charts.Axis(0.0, 6.0, charts.LEFT, charts.RIGHT)
    y = charts.Axis(lowest, 1.0, charts.BOTTOM, charts.TOP, log=True)
    straight = np.array([0.0, -math.log10(lowest)])
    body = f'<path class="chance" d="{charts.points(x(straight), y(10.0**-straight))}"/>'
    if nominal is not None:
        at = float(x(-math.log10(nominal)))
        body += f'<path class="axis" d="M{at:.1f} {charts.TOP:g}V{charts.BOTTOM:g}"/>'
        body += f'<text x="{at + 4:.1f}" y="{charts.TOP + 10:g}">trigger</text>'
    body += charts.line(1, charts.points(x(LEVELS[seen]), y(shares[seen])))
    drawing = charts.chart(
        "How far images get",
        f"Share of images that are as rare as a level or rarer; of ordinary images 1 in 1,000 is as rare as 1 in 1,000, here "
        f"{share(float(shares[30]))} are.",
        body,
        x,
        y,
        "as far as 1 in ... ordinary images",
        "% of images that are as rare or rarer",
        x_label=_one_in,
        y_label=lambda tick: _level(tick).removesuffix(" %"),
    )
    mode = mapping(manifest.get("settings")).get("mode")
    return {
        "drawing": Markup(drawing),
        "rows": [
            (rarity(10.0**-level), _level(10.0**-level), share(float(shares[10 * level])))
            for level in range(1, 7)
            if floor is None or 10.0**-level >= floor
        ],
        "references": distribution["reference_prompts"],
        "floor": floor,
        "ended": {"stop": "stopped", "mitigate": "corrected"}.get(mode) if isinstance(mode, str) else None,
    }


def _level(value: float) -> str:
    """A power of ten in percent."""
    return f"{np.format_float_positional(float(f'{100 * value:.3g}'), trim='-')} %"


def _one_in(level: float) -> str:
    """``n`` of a share of one in ``n = 10 ** level``."""
    thousands, digits = divmod(int(level), 3)
    return f"{10**digits}{('', 'k', 'M', 'G')[thousands]}"


def _table(rows: pa.Table, found: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the page's table. Texts are numbered in their sorting order, so that the page only sorts numbers."""
    prompts, prompt_codes = _coded(rows["prompt"])
    kinds, kind_codes = _coded(rows["kind"])
    verdicts = [*TRIGGERED, *(verdict for verdict in VERDICTS if verdict not in TRIGGERED)]
    files = rows["file"].to_pylist()
    calls, call_codes = _calls(rows)
    return {
        "prompts": prompts,
        "kinds": kinds,
        "verdicts": verdicts,
        "triggered": len(TRIGGERED),
        "prompt": prompt_codes,
        "kind": kind_codes if found["kinds"] else None,
        "verdict": [verdicts.index(verdict) for verdict in rows["verdict"].to_pylist()],
        "calls": calls,
        "call": call_codes if calls else None,
        "words": [row["word"] for row in found["words"]],
        "p_value": _digits(rows, "p_value", 5),
        "p_value_floor": found["p_value_floor"],
        "score": _digits(rows, "score", 4),
        "trigger": rows["trigger_step"].to_pylist(),
        "corrected": rows["corrected_steps"].to_pylist() if found["corrected"] else None,
        "sampled": None if found["screened_out"] is None else [not out for out in rows["screened_out"].to_pylist()],
        "seed": rows["seed"].to_pylist(),
        "image": rows["image"].to_pylist(),
        "file": files if any(files) else None,
    }


def _calls(rows: pa.Table) -> tuple[list[dict[str, Any]], list[int | None]]:
    """What calls images up: each prompt for which words were told, ready to be marked; and which of these a row has."""
    told = [
        (tuple(words), prompt, without or "") if words else None
        for prompt, words, without in zip(*(rows[name].to_pylist() for name in ("prompt", *_WORDS)), strict=True)
    ]
    calls = sorted({call for call in told if call is not None}, key=lambda call: (quoted(call[0]).casefold(), call))
    places = {call: number for number, call in enumerate(calls)}
    shown = [{"words": words, "pieces": marked(prompt, words, text), "without": text} for words, prompt, text in calls]
    return shown, [None if call is None else places[call] for call in told]


def _coded(column: pa.ChunkedArray) -> tuple[list[str], list[int | None]]:
    texts = sorted(column.drop_null().unique().to_pylist(), key=lambda name: (name.casefold(), name))
    places = {name: number for number, name in enumerate(texts)}
    return texts, [None if name is None else places[name] for name in column.to_pylist()]


def _digits(rows: pa.Table, column: str, digits: int) -> list[float | None]:
    return [
        float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None
        for value in rows[column].to_pylist()
    ]
