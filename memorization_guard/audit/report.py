"""The report of an audit: how much of what the model answers looks memorized, which prompts do, and what was audited.

``summarize`` reads the results once, some thousand rows at a time, without their traces; what it keeps are counts of each
prompt (28 bytes, for a moment six times as much) and the rarest rows. ``write_report`` draws them as one page that asks for no
other file.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from ..core.detection import Thresholds
from ..core.trace import VERDICTS, Trace, rarity
from ..evaluation.statistics import clustered_rate
from ..files import path_inside, write_whole
from ..reports import charts
from ..reports.charts import count, text
from ..reports.html import graph_script, page, summary
from . import dataset

#: Rows of the table of the page; of a larger audit, the rarest.
TABLE_ROWS = 100_000
#: Prompts that stand in the page with image and graph, and how many of them are open from the start.
WORST, OPEN = 48, 6
#: Kinds that have rates of their own; of more, the largest.
KINDS = 100
#: Longer side of an image in a page, in pixels.
THUMBNAIL = 256

_COLUMNS = (
    "image",
    "row",
    "prompt",
    "kind",
    "seed",
    "verdict",
    "score",
    "joint_score",
    "tail_probability",
    "uncalibrated_score",
    "trigger_step",
    "corrected_steps",
    "note",
    "file",
)

#: -log10 of the tail probabilities at which their distribution is counted; rarer is said to be less than one in a million.
_LEVELS = np.arange(0, 6.05, 0.1)


def summarize(folder: Path) -> dict[str, Any]:
    """What came out of an audit so far, ready for JSON.

    Every rate is a mapping ``{"count", "of", "rate", "interval", "effective", "chance"}``: events, images (or prompts) that
    they are counted among, ``count / of``, its 95 % interval (``metrics.clustered_rate``; both ``None`` without images), the
    number of independent images that these are worth, and the number of events that chance alone gives, ``None`` where that is
    not known (published method).

    Returns:
        ``"finished"``: whether all planned images are there. ``"images"``, ``"prompts"``, ``"scored"``: numbers of what is
        there; prompts are told apart by their text. ``"planned"``: images planned, or ``None``. ``"model"``: its name or
        ``None``. ``"false_alarms"``: the nominal share, ``None`` for the published method.
        ``"triggered"``: rate of scored images that triggered. ``"prompts_triggered"``: rate of prompts with at least one.
        ``"verdicts"``: for each verdict its rate among all images. ``"corrected"``: images with corrected steps.
        ``"kinds"``: for each kind, where there are several, ``{"kind", "images", "prompts", "triggered",
        "prompts_triggered"}``, the highest rate first; ``"kinds_left_out"``: number of kinds beyond the 100 largest.
        ``"distribution"``: ``{"tail_probability", "share", "images", "reference_runs"}``: two lists, the share of images whose
        tail probability is at most that; of how many images, and how many runs of the profile told what is ordinary.
        ``"unscored"``: ``[{"note", "images"}]``, why images are unscored, the commonest first, at most 10.
        ``"worst"``: for each of the 48 rarest prompts its rarest image, as in the results, without settings and trace.
        ``"warnings"``: sentences.

    Raises:
        FileNotFoundError: if the folder holds no audit.
        AuditError: if its manifest or a part cannot be read.
    """
    return _read(folder).summary


def write_report(folder: Path) -> dict[str, Any]:
    """Writes ``report.html`` into the folder, whole or not at all, and returns what :func:`summarize` does.

    Raises:
        FileNotFoundError, AuditError: as :func:`summarize`.
        OSError: if it cannot be written.
    """
    found = _read(folder)
    write_whole(folder / dataset.REPORT, _page(folder, found))
    return found.summary


@dataclass
class _Found:
    """What was read of an audit; ``rows`` are those of the page's table, the rarest first."""

    manifest: dict[str, Any]
    summary: dict[str, Any]
    rows: pa.Table


def _read(folder: Path) -> _Found:
    manifest = dataset.read_manifest(folder)
    totals, rarest = _Totals(), _Rarest(TABLE_ROWS)
    for batch in dataset.scan(folder, _COLUMNS):
        totals.add(batch)
        rarest.add(batch)
    rows = rarest.table()
    return _Found(manifest, _summary(manifest, totals, rows), rows)


# ------------------------------------------------------------------------------------------------------------------ counting


def keys_of(prompts: pa.StringArray) -> np.ndarray:
    """A 64-bit number for each text, the same for the same text within this process: ``[rows]`` int64.

    Two of ten million texts share one with a probability of 3 in a million.
    """
    encoded = prompts.dictionary_encode()
    keys = np.fromiter((hash(prompt) for prompt in encoded.dictionary.to_pylist()), np.int64, len(encoded.dictionary))
    return keys[encoded.indices.to_numpy(zero_copy_only=False)]


def grouped(keys: Sequence[np.ndarray], counts: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Sums ``counts`` ``[n, columns]`` over equal ``keys`` (``[n]`` each): the distinct keys, and their sums."""
    if not len(counts):
        return list(keys), counts
    order = np.lexsort(list(keys))
    keys = [key[order] for key in keys]
    first = np.zeros(len(order), dtype=bool)
    first[0] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    starts = np.flatnonzero(first)
    return [key[starts] for key in keys], np.add.reduceat(counts[order], starts, axis=0)


@dataclass
class _Totals:
    """Counts over an audit: of every prompt and kind how many images, and how many of each verdict."""

    images: int = 0
    corrected: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str | None, int] = field(default_factory=dict)
    tails: np.ndarray = field(default_factory=lambda: np.zeros(len(_LEVELS), dtype=np.int64))
    with_tail: int = 0
    _parts: list[tuple[list[np.ndarray], np.ndarray]] = field(default_factory=list)
    _fresh: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.images += len(batch)
        self.corrected += int((numbers(batch, "corrected_steps") > 0).sum())
        encoded = batch["kind"].dictionary_encode()
        codes = np.array([self.kinds.setdefault(kind, len(self.kinds)) for kind in encoded.dictionary.to_pylist()], np.int32)
        indices = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        if (indices < 0).any():
            codes = np.append(codes, np.int32(self.kinds.setdefault(None, len(self.kinds))))
        verdicts = np.array(batch["verdict"].to_pylist())
        counts = np.stack([verdicts == verdict for verdict in VERDICTS], axis=1).astype(np.uint32)
        self._parts.append(grouped([codes[indices], keys_of(batch["prompt"])], counts))
        # Put together whenever as many have come again, so that no row is sorted often and prompts are not kept twice over.
        self._fresh += len(self._parts[-1][1])
        if self._fresh > max(1_000_000, len(self._parts[0][1])):
            self._parts, self._fresh = [self._joined()], 0
        if (verdicts == "unscored").any():
            notes = batch["note"].filter(pa.array(verdicts == "unscored")).to_pylist()
            for note, number in Counter(note or "no reason was recorded" for note in notes).items():
                self.notes[note if note in self.notes or len(self.notes) < 1000 else "other reasons"] += number
        tails = numbers(batch, "tail_probability")
        tails = tails[np.isfinite(tails)]
        self.with_tail += len(tails)
        # Rounding must not put a share just below the level that it is.
        reached = np.searchsorted(_LEVELS, -np.log10(np.clip(tails, 1e-7, 1.0)) + 1e-9, "right")
        self.tails += np.bincount(reached, minlength=len(_LEVELS) + 1)[1:][::-1].cumsum()[::-1]

    def _joined(self) -> tuple[list[np.ndarray], np.ndarray]:
        parts, self._parts = self._parts, []
        keys = [np.concatenate([part[0][number] for part in parts]) for number in range(2)]
        counts = np.concatenate([part[1] for part in parts])
        del parts  # of ten million prompts this is much
        return grouped(keys, counts)

    def by_prompt(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kind and key ``[n]`` of every prompt and kind, and the images of each verdict ``[n, verdicts]``."""
        if not self._parts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((0, len(VERDICTS)), np.uint32)
        (kinds, keys), counts = self._joined()
        return kinds, keys, counts


class _Rarest:
    """The rows of an audit that are most out of the ordinary: fewest ordinary images get as far; where that is not known, the
    highest joint score, then the highest uncalibrated score."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[pa.RecordBatch] = []
        self._count = 0
        self._bound = math.inf

    def add(self, batch: pa.RecordBatch) -> None:
        tails = numbers(batch, "tail_probability", missing=2.0)
        near = tails <= self._bound
        if not near.all():
            batch = batch.filter(pa.array(near))
        self._kept.append(batch)
        self._count += len(batch)
        if self._count > 3 * self._limit:
            table = self.table()
            self._kept, self._count = table.to_batches(), len(table)
            self._bound = float(numbers(table, "tail_probability", missing=2.0)[-1])

    def table(self) -> pa.Table:
        """Those rows, the rarest first."""
        schema = pa.schema([dataset.SCHEMA.field(name) for name in _COLUMNS])
        table = pa.Table.from_batches(self._kept) if self._kept else schema.empty_table()
        keys = (
            numbers(table, "image"),
            -numbers(table, "uncalibrated_score", missing=-math.inf),
            -numbers(table, "joint_score", missing=-math.inf),
            numbers(table, "tail_probability", missing=2.0),
        )
        return table.take(pa.array(np.lexsort(keys)[: self._limit])).combine_chunks()


def numbers(rows: pa.RecordBatch | pa.Table, column: str, missing: float = math.nan) -> np.ndarray:
    """A column of numbers, with ``missing`` where there is none: ``[rows]`` float64."""
    values = pc.fill_null(rows[column].cast(pa.float64()), missing)
    return np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def _summary(manifest: Mapping[str, Any], totals: _Totals, rows: pa.Table) -> dict[str, Any]:
    kinds, keys, counts = totals.by_prompt()
    everyone = grouped([keys], counts)[1] if len(totals.kinds) > 1 else counts
    false_alarms = _false_alarms(manifest)
    rates = _rates(everyone, false_alarms)
    scored = rates["triggered"]["of"]
    planned, finished = dataset.planned_images(manifest), dataset.is_finished(manifest, totals.images)

    named = {code: kind for kind, code in totals.kinds.items()}
    by_kind = []
    if len(named) > 1:
        sizes = np.bincount(kinds, weights=counts.sum(axis=1))
        for code in np.argsort(-sizes, kind="stable")[:KINDS]:
            own = counts[kinds == code]
            by_kind.append(
                {"kind": named[int(code)], "images": int(own.sum()), "prompts": len(own), **_rates(own, false_alarms)}
            )
        by_kind.sort(key=lambda group: -(group["triggered"]["rate"] or 0.0))

    warnings = []
    if not finished:
        part = f"{totals.images:,} of {planned:,} planned images" if planned is not None else count(totals.images, "image")
        warnings.append(
            f"This audit is not finished: what follows is of {part}. Call the audit again, and it goes on from there."
        )
    if not totals.images:
        warnings.append("No image was sampled yet.")
    elif not scored:
        warnings.append(
            "No image could be scored, so nothing here says whether one is memorized. Below is why; most often the profile "
            "was made with another model or size. Calibrate one for this model (memorization-guard calibrate) and audit again."
        )
    elif scored < totals.images:
        warnings.append(
            f"{totals.images - scored:,} of {count(totals.images, 'image')} could not be scored; rates are of the rest."
        )
    reference = dataset.mapping(manifest.get("profile")).get("reference_runs")
    return {
        "finished": finished,
        "images": totals.images,
        "planned": planned,
        "prompts": len(everyone),
        "scored": scored,
        "model": dataset.mapping(manifest.get("model")).get("name"),
        "false_alarms": false_alarms,
        **rates,
        "verdicts": {
            verdict: clustered_rate(everyone[:, number], everyone.sum(axis=1)) | {"chance": None}
            for number, verdict in enumerate(VERDICTS)
        },
        "corrected": totals.corrected,
        "kinds": by_kind,
        "kinds_left_out": max(0, len(named) - KINDS),
        "distribution": {
            "tail_probability": [float(f"{share:.4g}") for share in 10.0**-_LEVELS],
            "share": (totals.tails / max(totals.with_tail, 1)).tolist(),
            "images": totals.with_tail,
            "reference_runs": reference if isinstance(reference, int) else None,
        },
        "unscored": [{"note": note, "images": number} for note, number in totals.notes.most_common(10)],
        "worst": _worst(rows),
        "warnings": warnings,
    }


def _rates(counts: np.ndarray, false_alarms: float | None) -> dict[str, Any]:
    """``triggered`` and ``prompts_triggered`` from images of each verdict ``[prompts, verdicts]``."""
    triggered = counts[:, [VERDICTS.index(verdict) for verdict in dataset.TRIGGERED]].sum(axis=1)
    scored = counts.sum(axis=1) - counts[:, VERDICTS.index("unscored")]
    images = clustered_rate(triggered, scored)
    prompts = clustered_rate(triggered > 0, scored > 0)
    images["chance"] = None if false_alarms is None else false_alarms * images["of"]
    prompts["chance"] = None if false_alarms is None else float(-np.expm1(scored * np.log1p(-false_alarms)).sum())
    return {"triggered": images, "prompts_triggered": prompts}


def _false_alarms(manifest: Mapping[str, Any]) -> float | None:
    """The nominal share of ordinary images that trigger; ``None`` where it is not what an image triggers by."""
    try:
        thresholds = Thresholds.from_dict(dataset.mapping(manifest.get("thresholds")))
    except ValueError:
        return None
    return None if thresholds.published or "thresholds" not in manifest else thresholds.false_alarms


def _worst(rows: pa.Table) -> list[dict[str, Any]]:
    """The first row of each of the first prompts."""
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), 1000):
        for row in rows.slice(start, 1000).to_pylist():
            found.setdefault(row["prompt"], row)
            if len(found) == WORST:
                return list(found.values())
    return list(found.values())


# -------------------------------------------------------------------------------------------------------- pieces of two pages


def read_traces(folder: Path, images: Iterable[int]) -> dict[int, Trace]:
    """The traces of some images of an audit; those that cannot be read are left out. Reads the row groups they are in."""
    wanted, found = set(images), {}
    for path in dataset.parts(folder):
        with pq.ParquetFile(path) as file:
            column = file.schema_arrow.get_field_index("image")
            for group in range(file.num_row_groups):
                known = file.metadata.row_group(group).column(column).statistics
                if known is not None and known.has_min_max and not any(known.min <= n <= known.max for n in wanted):
                    continue
                for batch in file.iter_batches(64, row_groups=[group], columns=["image", "trace"]):
                    inside = pc.is_in(batch["image"], pa.array(sorted(wanted), pa.int64()))
                    if not inside.true_count:
                        continue
                    for row in batch.filter(inside).to_pylist():
                        try:
                            found[row["image"]] = Trace.from_dict(json.loads(row["trace"]))
                        except ValueError:
                            continue
    return found


def picture(folder: Path, file: str | None) -> str:
    """A saved image of an audit as HTML, made small; a sentence where there is none."""
    if not file:
        return '<p class="none-saved muted">image not saved</p>'
    try:
        with Image.open(path_inside(folder, file)) as image:
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return f'<p class="none-saved muted">image {text(file)} is missing or cannot be read</p>'
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{small.width}" height="{small.height}" loading="lazy" src="data:image/jpeg;base64,{data}">'


def drawing(trace: Trace | None, name: str) -> str:
    """Where the script draws the graph called ``name``; until it does, and where it may not, its summary stands there."""
    if trace is None:
        return '<p class="muted">Its trace cannot be read.</p>'
    return f'<div class="graph" data-trace="{name}"><p class="muted">{text(summary(trace))}</p></div>'


def packed(value: object) -> str:
    """JSON, compressed, as text; the page's script unpacks it."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def script() -> str:
    """The script of an audit's page, after that of its graphs."""
    return graph_script() + _resource("report.js")


def verdict_tag(verdict: str) -> str:
    """A verdict, marked if it is one of memorization."""
    return f'<span class="{"bad" if verdict in dataset.TRIGGERED else "muted"}">{text(verdict)}</span>'


def rate_text(share: float | None) -> str:
    """A share, or a difference of shares, in percent, with two digits of how far it is from 0 or 100, whichever is nearer."""
    if share is None:
        return "-"
    edge = 100 * min(abs(share), 1 - abs(share))
    places = max(1, 1 - math.floor(math.log10(edge))) if edge > 1e-9 else 0
    return f"{100 * share:.{places}f} %"


def interval_text(interval: Sequence[float] | None) -> str:
    """An interval in percent."""
    return "-" if interval is None else f"{rate_text(interval[0])} to {rate_text(interval[1])}"


def facts(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What was audited, as text: sections of names and values; fields that are not known are shown as they are called."""
    known = ("model", "prompts", "settings", "thresholds", "profile", "devices", "versions")
    hidden = ("format", "version", "statement", "images")
    sections: dict[str, dict[str, str]] = {}
    for name in (*known, *(name for name in manifest if name not in (*known, *hidden))):
        if name in manifest:
            section = name if name in known else "other"
            sections.setdefault(section, {}).update(_flat("" if section == name else name, manifest[name]))
    return {name: section for name, section in sections.items() if section}


def _flat(name: str, value: object) -> dict[str, str]:
    if isinstance(value, dict):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        parts = {str(number + 1): part for number, part in enumerate(value)}
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value)  # type: ignore[call-overload]
        return {name.replace("_", " "): "-" if shown is None else str(shown)}
    return {key: shown for part in parts for key, shown in _flat(f"{name} {part}".strip(), parts[part]).items()}


def style() -> str:
    """The look of an audit's pages, after that of other pages."""
    return charts.STYLE + _resource("report.css")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def details_page(manifest: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> str:
    """What was audited as HTML; of two audits side by side, with what differs marked."""
    mine, theirs = facts(manifest), facts(other) if other is not None else None
    tables = []
    for section in {**mine, **(theirs or {})}:
        left, right = mine.get(section, {}), (theirs or {}).get(section, {})
        rows = []
        for name in {**left, **right}:
            cells = [left.get(name, "-")] + ([right.get(name, "-")] if theirs is not None else [])
            mark = ' class="bad"' if len(set(cells)) > 1 else ""
            rows.append(f"<tr><td>{text(name)}</td>{''.join(f'<td{mark}>{text(cell)}</td>' for cell in cells)}</tr>")
        head = "<thead><tr><th></th><th>A</th><th>B</th></tr></thead>" if theirs is not None else ""
        tables.append(f"<div><h3>{text(section)}</h3><table>{head}<tbody>{''.join(rows)}</tbody></table></div>")
    layout = "facts" if theirs is None else "facts two"
    return f'<article id="audited"><h2>What was audited</h2><div class="{layout}">{"".join(tables)}</div></article>'


# ------------------------------------------------------------------------------------------------------------------- the page


def _page(folder: Path, found: _Found) -> str:
    summary_, rows = found.summary, found.rows
    worst = summary_["worst"]
    traces = read_traces(folder, (row["image"] for row in worst))
    cards = [_card(folder, row, traces.get(row["image"]), found) for row in worst]
    sections = [_tiles(summary_), _rates_article(summary_), _distribution(summary_, found.manifest)]
    if worst:
        more = "".join(cards[OPEN:])
        if more:
            more = f'<div class="cards">{more}</div>'
            more = f'<details class="more"><summary>{len(cards) - OPEN} more</summary>{more}</details>'
        sections.append(
            f'<section id="worst"><h2>The {"rarest prompts" if len(cards) > 1 else "rarest prompt"}</h2>'
            '<p class="muted">Of each prompt the image that is most out of the ordinary, the rarest first. Whether one is a '
            "copy of a training image is seen only by looking for that image.</p>"
            f'<div class="cards">{"".join(cards[:OPEN])}</div>{more}</section>'
        )
        sections.append(_table_article(summary_, rows))
    sections.append(details_page(found.manifest))
    links = [("rates", "Rates"), ("worst", "Rarest prompts"), ("rows", "Every image"), ("audited", "What was audited")]
    links = [link for link in links if worst or link[0] not in ("worst", "rows")]
    body = "".join(
        [
            f"<p>{_introduction(summary_)}</p>",
            *(f'<p class="warning">{text(warning)}</p>' for warning in summary_["warnings"]),
            "<nav>" + "".join(f'<a href="#{name}">{title}</a>' for name, title in links) + "</nav>",
            *sections,
        ]
    )
    data: dict[str, object] = {"traces": packed({str(image): trace.to_dict() for image, trace in traces.items()})}
    if worst:
        data["table-data"] = packed(_table_data(rows, summary_))
    return page(f"Audit of {summary_['model'] or 'a model'}", body, style=style(), data=data, script=script())


def _introduction(summary_: Mapping[str, Any]) -> str:
    told = f"{count(summary_['images'], 'image')} of {count(summary_['prompts'], 'prompt')}."
    rate, nominal = summary_["triggered"], summary_["false_alarms"]
    if rate["rate"] is None:
        return told
    if nominal is None:
        told += (
            f" {count(rate['count'], 'image')} triggered. How many ordinary ones would, the published method does not tell."
        )
    else:
        low, high = rate["interval"]
        how = (
            "That is more than chance alone gives"
            if low > nominal
            else "That is less than chance alone gives"
            if high < nominal
            else "Chance alone may give as many"
        )
        told += (
            f" {count(rate['count'], 'image')} triggered. {how}: of as many ordinary images about {_about(rate['chance'])} "
            f"would, since the threshold lets {rarity(nominal)} through."
        )
    return told


def _about(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 9.5 else f"{number:.2g}"


def _tile(title: str, rate: Mapping[str, Any], noun: str) -> str:
    chance = "" if rate["chance"] is None else f"<span>chance alone: about {_about(rate['chance'])}</span>"
    return (
        f'<div class="tile"><span>{title}</span><b>{rate_text(rate["rate"])}</b>'
        f'<span class="of">{rate["count"]:,} of {count(rate["of"], noun)}</span>'
        f"<span>95 % interval {interval_text(rate['interval'])}</span>{chance}</div>"
    )


def _tiles(summary_: Mapping[str, Any]) -> str:
    if not summary_["scored"]:
        return ""
    tiles = _tile("images that triggered", summary_["triggered"], "scored image")
    tiles += _tile("prompts with such an image", summary_["prompts_triggered"], "prompt")
    tiles += _tile("strong among all images", summary_["verdicts"]["strong"], "image")
    return f'<div class="tiles">{tiles}</div>'


def rate_cell(rate: Mapping[str, Any]) -> str:
    """A rate, or a difference of rates, with its interval as a cell of a table."""
    return f'<td class="number">{rate_text(rate["rate"])} <span class="interval">{interval_text(rate["interval"])}</span></td>'


def _rate_cells(rate: Mapping[str, Any]) -> str:
    return f'<td class="number">{rate["count"]:,}</td>{rate_cell(rate)}'


def _rates_article(summary_: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{verdict_tag(verdict)}</td>{_rate_cells(rate)}</tr>" for verdict, rate in summary_["verdicts"].items()
    )
    parts = [f"<div>{charts.table(('verdict', '#images', '#share of all'), f'<tbody>{rows}</tbody>')}</div>"]
    if summary_["unscored"]:
        why = "".join(
            f'<tr><td>{text(reason["note"])}</td><td class="number">{reason["images"]:,}</td></tr>'
            for reason in summary_["unscored"]
        )
        parts.append(f"<div>{charts.table(('why unscored', '#images'), f'<tbody>{why}</tbody>')}</div>")
    body = f'<div class="beside">{"".join(parts)}</div>'
    if summary_["kinds"]:
        rows = "".join(
            f"<tr><td>{text(group['kind']) if group['kind'] is not None else '<span class=muted>without kind</span>'}</td>"
            f'<td class="number">{group["images"]:,}</td>{_rate_cells(group["triggered"])}'
            f'<td class="number">{_about(group["triggered"]["chance"])}</td>'
            f'<td class="number">{group["prompts"]:,}</td>{_rate_cells(group["prompts_triggered"])}</tr>'
            for group in summary_["kinds"]
        )
        columns = ("kind", "#images", "#triggered", "#rate", "#by chance", "#prompts", "#with one", "#rate of prompts")
        body += f"<h3>By kind</h3>{charts.table(columns, f'<tbody>{rows}</tbody>')}"
        if summary_["kinds_left_out"]:
            body += f'<p class="muted">The largest {KINDS}; {count(summary_["kinds_left_out"], "smaller kind")} left out.</p>'
    corrected = summary_["corrected"]
    body += (
        f'<p class="muted">The intervals are what other prompts of the same sort may give. Seeds of one prompt are not taken '
        f"for independent: {count(summary_['triggered']['of'], 'image')} count here as "
        f"{summary_['triggered']['effective']:,.0f} (Wilson's interval with the design effect).</p>"
        if summary_["scored"]
        else ""
    )
    if corrected:
        body += (
            f"<p>{count(corrected, 'image')} had steps corrected. Their verdict says that the run set out for a copy; what "
            "came out was led away from it from that step on.</p>"
        )
    return f'<article id="rates"><h2>Rates</h2>{body}</article>'


def _distribution(summary_: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The share of images that get as far, against ordinary images, of which it is the tail probability itself.

    The reference runs of the profile are no fairer comparison: the tail probability was fitted to them, and with 50 of them
    none is expected to be rarer than 1 in 50.
    """
    found, nominal = summary_["distribution"], summary_["false_alarms"]
    if not found["images"]:
        return ""
    tails, shares = np.array(found["tail_probability"]), np.array(found["share"])
    seen = shares > 0
    lowest = float(np.clip(10.0 ** -math.ceil(math.log10(found["images"])), 1e-6, 1e-3))
    x = charts.Axis(0.0, 6.0, charts.LEFT, charts.RIGHT)
    y = charts.Axis(lowest, 1.0, charts.BOTTOM, charts.TOP, log=True)
    levels = -np.log10(tails)
    straight = np.array([0.0, -math.log10(lowest)])
    body = f'<path class="chance" d="{charts.points(x(straight), y(10.0**-straight))}"/>'
    if nominal is not None:
        at = float(x(-math.log10(nominal)))
        body += f'<path class="axis" d="M{at:.1f} {charts.TOP:g}V{charts.BOTTOM:g}"/>'
        body += f'<text x="{at + 4:.1f}" y="{charts.TOP + 10:g}">trigger</text>'
    body += charts.line(1, charts.points(x(levels[seen]), y(shares[seen])))
    drawn = charts.chart(
        "How far images get",
        f"Share of images that are as rare as a level or rarer; of ordinary images 1 in 1,000 is as rare as 1 in 1,000, here "
        f"{rate_text(float(shares[30]))} are.",
        body,
        x,
        y,
        "as far as 1 in ... ordinary images",
        "% of images that are as rare or rarer",
        x_label=_one_in,
        y_label=lambda share: _level_share(share).removesuffix(" %"),
    )
    key = (
        f'<ul class="key"><li><svg width="34" height="10">{charts.line(1, "M1 5H33")}</svg>this audit</li>'
        '<li><svg width="34" height="10"><path class="chance" d="M1 5H33"/></svg>ordinary images, by definition</li></ul>'
    )
    rows = "".join(
        f'<tr><td>{rarity(10.0**-level)}</td><td class="number">{_level_share(10.0**-level)}</td>'
        f'<td class="number">{rate_text(float(shares[10 * level]))}</td></tr>'
        for level in range(1, 7)
    )
    runs = found["reference_runs"]
    notes = [
        "Where the line leaves the dashed one, more images are this rare than of a model that copies nothing.",
        "The dashed line is nominal"
        + (
            f": {count(runs, 'reference run')} show nothing rarer than 1 in {runs:,} themselves; beyond, it is a fit."
            if runs
            else "."
        ),
    ]
    settings = dataset.mapping(manifest.get("settings"))
    if settings.get("stop") or settings.get("mitigate"):
        what = "stopped" if settings.get("stop") else "corrected"
        notes.append(
            f"Runs that triggered were {what}: right of the trigger the line would go on higher if they had not been."
        )
    table = charts.table(("as rare as", "#ordinary", "#here"), f"<tbody>{rows}</tbody>")
    return (
        f'<article id="distribution"><h2>How far images get</h2><div class="beside">'
        f'<figure style="margin:0">{drawn}{key}</figure><div>{table}<p class="muted">{" ".join(notes)}</p></div></div>'
        "</article>"
    )


def _level_share(share: float) -> str:
    """A power of ten in percent."""
    return f"{np.format_float_positional(float(f'{100 * share:.3g}'), trim='-')} %"


def _one_in(level: float) -> str:
    """``n`` of a share of one in ``n = 10 ** level``."""
    thousands, digits = divmod(int(level), 3)
    return f"{10**digits}{('', 'k', 'M', 'G')[thousands]}"


def _card(folder: Path, row: Mapping[str, Any], trace: Trace | None, found: _Found) -> str:
    about = [verdict_tag(row["verdict"])]
    if row["tail_probability"] is not None and trace is None:
        about.append(f"as far as {rarity(row['tail_probability'])} ordinary images")
    if found.summary["kinds"] and row["kind"] is not None:
        about.append(text(row["kind"]))
    about.append(f"seed {row['seed']}")
    about.append(f"image {row['image']}")
    return (
        f"<article><h3>{prompt_html(row['prompt'])}</h3><p class='about muted'>{' · '.join(about)}</p>"
        f'<div class="look"><div>{picture(folder, row["file"])}</div>{drawing(trace, str(row["image"]))}</div></article>'
    )


def prompt_html(prompt: str) -> str:
    return text(prompt) if prompt.strip() else '<span class="muted">empty prompt</span>'


def _table_article(summary_: Mapping[str, Any], rows: pa.Table) -> str:
    shown, images = len(rows), summary_["images"]
    note = ""
    if shown < images:
        note = (
            f'<p class="warning">The table holds the {shown:,} rarest of {count(images, "image")}; the rates above are of '
            "all. Every row is in the folder, under results.</p>"
        )
    return (
        f'<article id="rows"><h2>Every image</h2>{note}<div id="table"><p class="muted">The table needs scripts, and a '
        "browser of 2023 or later; without, open the files under results, which hold the same and more.</p></div></article>"
    )


def _table_data(rows: pa.Table, summary_: Mapping[str, Any]) -> dict[str, Any]:
    """The table's columns; texts are numbered in the order they are sorted in, so that the page sorts numbers alone."""
    prompts, prompt_codes = _coded(rows["prompt"])
    kinds, kind_codes = _coded(rows["kind"])
    names = ["strong", "mild", "unscored", "stable"]
    order = {name: number for number, name in enumerate(names)}
    files = rows["file"].to_pylist()
    return {
        "prompts": prompts,
        "kinds": kinds,
        "verdicts": names,
        "prompt": prompt_codes,
        "kind": kind_codes if summary_["kinds"] else None,
        "verdict": [order[verdict] for verdict in rows["verdict"].to_pylist()],
        "tail": _digits(rows, "tail_probability", 5),
        "score": _digits(rows, "score", 4),
        "trigger": rows["trigger_step"].to_pylist(),
        "corrected": rows["corrected_steps"].to_pylist() if summary_["corrected"] else None,
        "seed": rows["seed"].to_pylist(),
        "image": rows["image"].to_pylist(),
        "file": files if any(files) else None,
    }


def _coded(column: pa.ChunkedArray) -> tuple[list[str], list[int | None]]:
    texts = sorted(column.drop_null().unique().to_pylist(), key=lambda name: (name.casefold(), name))
    places = {name: number for number, name in enumerate(texts)}
    return texts, [None if name is None else places[name] for name in column.to_pylist()]


def _digits(rows: pa.Table, column: str, digits: int) -> list[float | None]:
    return [
        float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None
        for value in rows[column].to_pylist()
    ]
