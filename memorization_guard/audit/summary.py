"""What came out of an audit, in numbers: how much of what the model answers looks memorized, and which prompts do.

The results are read once, some thousand rows at a time, without their traces. The counts of each prompt and the rarest rows
are kept in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..core.settings import TRIGGERED, VERDICTS, Thresholds
from ..statistics import clustered_rate
from . import dataset
from .dataset import counted, mapping

#: Rows that are kept for the page's table; of a larger audit, the rarest.
TABLE_ROWS = 100_000
#: Prompts of which the summary names the rarest image.
WORST = 48
#: Kinds that have rates of their own; of more, the largest.
KINDS = 100
#: Rows that are added before counts are summed again.
SUMMED = 1_000_000
#: Words that the summary names: those that were told for most prompts.
WORDS = 50

#: -log10 of the p-values at which their distribution is counted; what is rarer counts as less than one in a million.
LEVELS = np.arange(0, 6.05, 0.1)

#: Scores by which rows without a p-value are ordered.
SCORES = ("joint_score", "uncalibrated_score")

#: Columns of the rows that are kept.
COLUMNS = (
    "image",
    "row",
    "prompt",
    "kind",
    "seed",
    "screened_out",
    "verdict",
    "score",
    "joint_score",
    "p_value",
    "uncalibrated_score",
    "trigger_step",
    "corrected_steps",
    "note",
    "words",
    "prompt_without_words",
    "file",
)


@dataclass
class Results:
    """What was read of an audit; ``rows`` are the rarest, the rarest first, at most :data:`TABLE_ROWS`."""

    manifest: dict[str, Any]
    summary: dict[str, Any]
    rows: pa.Table


def summarize(folder: Path) -> dict[str, Any]:
    """What came out of an audit so far, ready for JSON.

    A rate is a mapping ``{"count", "of", "rate", "interval", "effective", "chance"}``. The first five are those of
    ``statistics.clustered_rate``; ``"chance"`` is how many events are expected if nothing is memorized, ``None`` for the
    published method, which has no false-positive rate.

    Returns:
        ``"finished"``: whether all planned images are there.
        ``"images"``, ``"prompts"``, ``"scored"``: how many there are; prompts are told apart by their text.
        ``"planned"``: images planned, or ``None``. ``"model"``: its name, or ``None``.
        ``"false_positive_rate"``: the nominal one, ``None`` for the published method.
        ``"p_value_floor"``: the smallest p-value that the profile's references can carry, or ``None``.
        ``"triggered"``: rate of scored images that triggered. ``"prompts_triggered"``: rate of prompts with at least one.
        ``"verdicts"``: for each verdict its rate among all images. ``"corrected"``: images with corrected steps.
        ``"screened_out"``: images that were judged by their first evaluation and not sampled, ``None`` for an audit that does
        not screen; they are counted as scored everywhere.
        ``"kinds"``: for each kind, where there are several, ``{"kind", "images", "prompts", "triggered",
        "prompts_triggered"}``, the highest rate first; ``"kinds_left_out"``: number of kinds beyond the 100 largest.
        ``"distribution"``: ``{"p_value", "share", "images", "reference_prompts"}``: two lists, the share of images whose
        p-value is at most that; of how many images; and how many prompts the profile holds an image against.
        ``"words"``: ``[{"word", "prompts"}]``, the words that call images up, as prompts spell them, and for how many prompts
        each was told, the commonest first, at most 50; ``"words_left_out"``: number of other words.
        ``"prompts_with_words"``: for how many of the prompts that triggered words were told; a rate without ``"chance"``.
        ``"unscored"``: ``[{"note", "images"}]``, why images are unscored, the commonest first, at most 10.
        ``"worst"``: for each of the 48 rarest prompts its rarest image, as in the results, without settings and trace.
        ``"warnings"``: sentences.

    Raises:
        FileNotFoundError: if the folder holds no audit.
        AuditError: if its manifest or a part cannot be read.
    """
    return read(folder).summary


def read(folder: Path) -> Results:
    """The summary of an audit with what a page needs besides; errors as for :func:`summarize`."""
    manifest = dataset.read_manifest(folder)
    totals, rarest = _Totals(), Rarest(TABLE_ROWS)
    for batch in dataset.scan(folder, COLUMNS):
        totals.add(batch)
        rarest.add(batch)
    rows = rarest.table()
    return Results(manifest, _summary(manifest, totals, rows), rows)


def keys_of(prompts: pa.StringArray) -> np.ndarray:
    """A 64-bit number for each text, the same for the same text within this process: ``[rows]`` int64.

    The probability that two of ten million texts share one is 3 in a million.
    """
    encoded = prompts.dictionary_encode()
    keys = np.fromiter((hash(prompt) for prompt in encoded.dictionary.to_pylist()), np.int64, len(encoded.dictionary))
    return keys[encoded.indices.to_numpy(zero_copy_only=False)]


#: What is counted of images: those of each verdict, and those of which words were told.
_COUNTED = (*VERDICTS, "told")


def _summed(images: pa.Table, *keys: str) -> pa.Table:
    """Images of each sort that is counted, summed over rows with equal ``keys``."""
    sums = images.group_by(list(keys), use_threads=False).aggregate([(name, "sum") for name in _COUNTED])
    counts = {name: sums[f"{name}_sum"].cast(pa.uint32()) for name in _COUNTED}
    return pa.table({key: sums[key] for key in keys} | counts)


def _matrix(images: pa.Table) -> np.ndarray:
    """The counts of :func:`_summed` as an array ``[rows, verdicts]``."""
    return np.stack([images[verdict].to_numpy() for verdict in VERDICTS], axis=1)


class _Totals:
    """Counts over an audit: of every prompt and kind, how many images there are of each verdict, and of which words were
    told; and of every word, the prompts that it was told for."""

    def __init__(self) -> None:
        self.images = self.corrected = self.screened_out = self.with_p_value = 0
        self.notes: Counter[str] = Counter()
        #: Images whose p-value is at most that of each level.
        self.reached = np.zeros(len(LEVELS), dtype=np.int64)
        self._prompts = [self._count(pa.RecordBatch.from_pylist([], schema=dataset.SCHEMA))]
        self._added = 0
        self._words = [_words(pa.RecordBatch.from_pylist([], schema=dataset.SCHEMA))]
        self._words_added = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.images += len(batch)
        self.corrected += int((numbers(batch, "corrected_steps") > 0).sum())
        self.screened_out += batch["screened_out"].true_count
        self._prompts.append(self._count(batch))
        # Summed again whenever as many rows have been added, so that no row is sorted often and no prompt is kept twice.
        self._added += len(self._prompts[-1])
        if self._added > max(SUMMED, len(self._prompts[0])):
            self._prompts, self._added = [self.by_prompt()], 0
        self._words.append(_words(batch))
        self._words_added += len(self._words[-1])
        if self._words_added > max(SUMMED, len(self._words[0])):
            self._words, self._words_added = [self._by_word()], 0
        for note, number in Counter(batch["note"].filter(pc.equal(batch["verdict"], "unscored")).to_pylist()).items():
            note = note or "no reason was recorded"
            self.notes[note if note in self.notes or len(self.notes) < 1000 else "other reasons"] += number
        p_values = numbers(batch, "p_value")
        p_values = p_values[np.isfinite(p_values)]
        self.with_p_value += len(p_values)
        # The small number keeps rounding from putting a p-value below the level that it equals.
        levels = np.searchsorted(LEVELS, -np.log10(np.clip(p_values, 1e-7, 1.0)) + 1e-9, "right")
        self.reached += np.bincount(levels, minlength=len(LEVELS) + 1)[1:][::-1].cumsum()[::-1]

    @staticmethod
    def _count(batch: pa.RecordBatch) -> pa.Table:
        columns = {"kind": batch["kind"], "prompt": keys_of(batch["prompt"]), "told": pc.is_valid(batch["words"])}
        columns |= {verdict: pc.equal(batch["verdict"], verdict) for verdict in VERDICTS}
        counts = {name: columns[name].cast(pa.uint32()) for name in _COUNTED}
        return _summed(pa.table(columns | counts), "kind", "prompt")

    def by_prompt(self) -> pa.Table:
        """A row for every kind and prompt, with the number of its images of each verdict, and of which words were told."""
        return _summed(pa.concat_tables(self._prompts), "kind", "prompt")

    def words(self) -> pa.Table:
        """A row for every word that was told, with the number of its ``prompts``, the commonest first."""
        counts = self._by_word().group_by("word", use_threads=False).aggregate([("prompt", "count")])
        counts = pa.table({"word": counts["word"], "prompts": counts["prompt_count"]})
        return counts.sort_by([("prompts", "descending"), ("word", "ascending")])

    def _by_word(self) -> pa.Table:
        return pa.concat_tables(self._words).group_by(["word", "prompt"], use_threads=False).aggregate([])


def _words(batch: pa.RecordBatch) -> pa.Table:
    """Each word that was told, with the number of its prompt, for every image."""
    told = batch.filter(pc.is_valid(batch["words"]))
    prompts = keys_of(told["prompt"])[pc.list_parent_indices(told["words"]).to_numpy()]
    return pa.table({"word": pc.list_flatten(told["words"]), "prompt": pa.array(prompts, pa.int64())})


class Rarest:
    """The rows with the lowest p-values; among rows with equal or without p-values, those with the highest :data:`SCORES`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[pa.RecordBatch] = []
        self._count = 0
        self._bound = math.inf

    def add(self, batch: pa.RecordBatch) -> None:
        p_values = numbers(batch, "p_value", missing=2.0)
        near = p_values <= self._bound
        if not near.all():
            batch = batch.filter(pa.array(near))
        self._kept.append(batch)
        self._count += len(batch)
        if self._count > 3 * self._limit:
            table = self.table()
            self._kept, self._count = table.to_batches(), len(table)
            self._bound = float(numbers(table, "p_value", missing=2.0)[-1])

    def table(self) -> pa.Table:
        """These rows, the rarest first."""
        schema = pa.schema([dataset.SCHEMA.field(name) for name in COLUMNS])
        table = pa.Table.from_batches(self._kept) if self._kept else schema.empty_table()
        # Arrow puts missing values last.
        table = table.sort_by([("p_value", "ascending"), *((name, "descending") for name in SCORES), ("image", "ascending")])
        return table.slice(0, self._limit).combine_chunks()


def numbers(rows: pa.RecordBatch | pa.Table, column: str, missing: float = math.nan) -> np.ndarray:
    """A column of numbers, with ``missing`` where there is none: ``[rows]`` float64."""
    values = pc.fill_null(rows[column].cast(pa.float64()), missing)
    return np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def _summary(manifest: Mapping[str, Any], totals: _Totals, rows: pa.Table) -> dict[str, Any]:
    by_prompt = totals.by_prompt()
    kinds = _summed(by_prompt, "kind")
    everyone = _matrix(_summed(by_prompt, "prompt"))
    nominal, words = _false_positive_rate(manifest), totals.words()
    rates = _rates(everyone, nominal)
    finished = dataset.is_finished(manifest, totals.images)
    return {
        "finished": finished,
        "images": totals.images,
        "planned": dataset.planned_images(manifest),
        "prompts": len(everyone),
        "scored": rates["triggered"]["of"],
        "model": mapping(manifest.get("model")).get("name"),
        "false_positive_rate": nominal,
        "p_value_floor": dataset.p_value_floor(manifest),
        **rates,
        "verdicts": {
            verdict: clustered_rate(everyone[:, number], everyone.sum(axis=1)) | {"chance": None}
            for number, verdict in enumerate(VERDICTS)
        },
        "corrected": totals.corrected,
        "screened_out": totals.screened_out if dataset.screens(manifest) else None,
        "kinds": _by_kind(by_prompt, kinds, nominal) if len(kinds) > 1 else [],
        "kinds_left_out": max(0, len(kinds) - KINDS),
        "distribution": {
            "p_value": [float(f"{share:.4g}") for share in 10.0**-LEVELS],
            "share": (totals.reached / max(totals.with_p_value, 1)).tolist(),
            "images": totals.with_p_value,
            "reference_prompts": dataset.reference_prompts(manifest),
        },
        "words": words.slice(0, WORDS).to_pylist(),
        "words_left_out": max(0, len(words) - WORDS),
        "prompts_with_words": _with_words(by_prompt),
        "unscored": [{"note": note, "images": number} for note, number in totals.notes.most_common(10)],
        "worst": _worst(rows),
        "warnings": _warnings(totals.images, rates["triggered"]["of"], dataset.planned_images(manifest), finished=finished),
    }


def _by_kind(by_prompt: pa.Table, kinds: pa.Table, nominal: float | None) -> list[dict[str, Any]]:
    """The rates of each of the largest kinds, the highest first."""
    found = []
    for place in np.argsort(-_matrix(kinds).sum(axis=1, dtype=np.int64), kind="stable")[:KINDS]:
        kind = kinds["kind"][int(place)].as_py()
        own = pc.is_null(by_prompt["kind"]) if kind is None else pc.equal(by_prompt["kind"], kind)
        counts = _matrix(by_prompt.filter(own))
        found.append({"kind": kind, "images": int(counts.sum()), "prompts": len(counts), **_rates(counts, nominal)})
    return sorted(found, key=lambda group: -(group["triggered"]["rate"] or 0.0))


def _warnings(images: int, scored: int, planned: int | None, *, finished: bool) -> list[str]:
    warnings = []
    if not finished:
        part = f"{images:,} of {planned:,} planned images" if planned is not None else counted(images, "image")
        warnings.append(
            f"This audit is not finished: what follows is of {part}. Call the audit again, and it goes on from there."
        )
    if not images:
        warnings.append("No image was sampled yet.")
    elif not scored:
        warnings.append(
            "No image could be scored, so nothing here says whether one is memorized. The reasons are listed below; most "
            "often the profile was made with another model or size. Calibrate one for this model (memorization-guard "
            "calibrate) and audit again."
        )
    elif scored < images:
        warnings.append(f"{images - scored:,} of {counted(images, 'image')} could not be scored; rates are of the rest.")
    return warnings


def _rates(counts: np.ndarray, nominal: float | None) -> dict[str, Any]:
    """``triggered`` and ``prompts_triggered`` from images of each verdict ``[prompts, verdicts]``."""
    triggered = counts[:, [VERDICTS.index(verdict) for verdict in TRIGGERED]].sum(axis=1)
    scored = counts.sum(axis=1) - counts[:, VERDICTS.index("unscored")]
    images = clustered_rate(triggered, scored)
    prompts = clustered_rate(triggered > 0, scored > 0)
    images["chance"] = None if nominal is None else nominal * images["of"]
    prompts["chance"] = None if nominal is None else float(-np.expm1(scored * np.log1p(-nominal)).sum())
    return {"triggered": images, "prompts_triggered": prompts}


def _with_words(by_prompt: pa.Table) -> dict[str, Any]:
    """Of how many prompts with an image that triggered words were told."""
    prompts = _summed(by_prompt, "prompt")
    triggered = _matrix(prompts)[:, [VERDICTS.index(verdict) for verdict in TRIGGERED]].sum(axis=1) > 0
    return clustered_rate((prompts["told"].to_numpy() > 0) & triggered, triggered)


def _false_positive_rate(manifest: Mapping[str, Any]) -> float | None:
    """The nominal rate; ``None`` for the published method, and where the manifest does not tell."""
    try:
        thresholds = Thresholds.from_dict(mapping(manifest.get("thresholds")))
    except ValueError:
        return None
    return thresholds.false_positive_rate if manifest.get("thresholds") and thresholds.method == "reference" else None


def _worst(rows: pa.Table) -> list[dict[str, Any]]:
    """The first row of each of the first prompts."""
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), 1000):
        for row in rows.slice(start, 1000).to_pylist():
            found.setdefault(row["prompt"], row)
            if len(found) == WORST:
                return list(found.values())
    return list(found.values())
