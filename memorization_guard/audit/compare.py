"""Two audits held against each other, image by image: a model against its fine-tune, without mitigation against with it."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..core.trace import Trace, rarity
from ..evaluation.statistics import clustered_difference, clustered_rate, mcnemar
from ..files import write_whole
from ..reports import charts
from ..reports.charts import count, text
from ..reports.html import page
from . import dataset, report

#: Prompts that a comparison names, of each sort; and those that its page shows with images and graphs.
LISTED, SHOWN = 10_000, 24

#: Rows of the tables of a page.
_TABLE_ROWS = 300

#: What prompts are sorted into, by whether an image of theirs triggers.
CHANGES = ("became", "no_longer", "stays")

_ROW = pa.schema(
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
        ("seed", pa.int64()),
        ("image_a", pa.int64()),
        ("image_b", pa.int64()),
        ("file_a", pa.string()),
        ("file_b", pa.string()),
    ]
)

#: Settings that change no image.
_HARMLESS = ("images", "batch_size")

#: Settings that are what is compared, where they differ.
_COMPARED = ("mitigate", "stop")


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What changed from audit ``a`` to audit ``b``, ready for JSON. Images are paired by the text of their prompt and by seed.

    Memory is that of some numbers an image (under half a gigabyte for a million images a side); traces are not read.

    Returns:
        ``"a"``, ``"b"``: ``{"folder", "model", "finished", "images", "prompts", "mitigate", "stop", "triggered",
        "prompts_triggered", "corrected", "uncorrected"}``: the first counts are of the whole audit, the rates of the pairs, as
        ``metrics.clustered_rate`` gives them; ``corrected`` and ``uncorrected`` are paired images that triggered and had
        steps corrected, or had none.
        ``"pairs"``: ``{"images", "prompts", "unscored", "only_a", "only_b", "duplicates"}``: pairs of images in which both are
        scored, and their prompts, of which all that follows is; pairs left out because one is not scored; ``{"images",
        "prompts"}`` that only one audit has; images left out for having prompt and seed of one before.
        ``"images"``: ``{"became", "no_longer", "stays", "never", "difference"}``: pairs that trigger only in ``b``, only in
        ``a``, in both, in neither; ``difference`` of the rates, ``b`` less ``a``, with its 95 % interval over prompts
        (``metrics.clustered_difference``).
        ``"prompts"``: the same of prompts, which trigger if one of their paired images does, and ``"mcnemar"``, the exact
        two-sided p of McNemar (1947).
        ``"became"``, ``"no_longer"``, ``"stays"``: such prompts, those that changed most first, at most 10,000 of each:
        ``{"prompt", "kind", "change", "images", "triggered_a", "rarest_a", "corrected_a", "triggered_b", "rarest_b",
        "corrected_b", "seed", "image_a", "image_b", "file_a", "file_b"}``: paired images, how many trigger, their lowest tail
        probability, how many that triggered were corrected, and the pair in which one is rarest.
        ``"compared"``: ``[{"field", "a", "b"}]``, in what model and mitigation differ. ``"warnings"``: whatever else differs
        and may be the cause of a change. ``"notes"``: how to read this.

    Raises:
        FileNotFoundError: if a folder holds no audit.
        AuditError: if a manifest or a part cannot be read.
    """
    manifests = [dataset.read_manifest(folder) for folder in (a, b)]
    sides = [_read(folder) for folder in (a, b)]
    # Sorted by pair, so that row i of one side is the same prompt and seed as row i of the other.
    rows = np.intersect1d(sides[0].pairs, sides[1].pairs, assume_unique=True, return_indices=True)[1:]
    scored = sides[0].scored[rows[0]] & sides[1].scored[rows[1]]
    first, second = (side.take(at[scored]) for side, at in zip(sides, rows, strict=True))
    keys, prompt_of = np.unique(first.keys, return_inverse=True)
    sizes, ones = np.bincount(prompt_of, minlength=len(keys)), np.ones(len(keys))
    triggered = [np.bincount(prompt_of, side.triggered, len(keys)) for side in (first, second)]

    result: dict[str, Any] = {}
    for name, folder, manifest, side, paired, events in zip(
        "ab", (a, b), manifests, sides, (first, second), triggered, strict=True
    ):
        settings = dataset.mapping(manifest.get("settings"))
        corrected = int((paired.triggered & paired.corrected).sum())
        result[name] = {
            "folder": str(folder),
            "model": dataset.mapping(manifest.get("model")).get("name"),
            "finished": dataset.is_finished(manifest, side.read),
            "images": side.read,
            "prompts": len(np.unique(side.keys)),
            "mitigate": bool(settings.get("mitigate")),
            "stop": bool(settings.get("stop")),
            "triggered": clustered_rate(events, sizes),
            "prompts_triggered": clustered_rate(events > 0, ones),
            "corrected": corrected,
            "uncorrected": int(paired.triggered.sum()) - corrected,
        }
    result["pairs"] = {
        "images": len(prompt_of),
        "prompts": len(keys),
        "unscored": int((~scored).sum()),
        "only_a": _only(*sides),
        "only_b": _only(*reversed(sides)),
        "duplicates": sum(side.read - len(side.pairs) for side in sides),
    }
    sorts = _changes(triggered[0] > 0, triggered[1] > 0)
    result["images"] = {name: int(pairs.sum()) for name, pairs in _changes(first.triggered, second.triggered).items()} | {
        "difference": clustered_difference(triggered[0], triggered[1], sizes)
    }
    result["prompts"] = {name: int(members.sum()) for name, members in sorts.items()} | {
        "difference": clustered_difference(triggered[0] > 0, triggered[1] > 0, ones),
        "mcnemar": mcnemar(int(sorts["became"].sum()), int(sorts["no_longer"].sum())),
    }
    for name in CHANGES:
        result[name] = _listed(name, np.flatnonzero(sorts[name]), (a, b), (first, second), prompt_of)
    result |= _differences(*manifests)
    result["warnings"] = _coverage(result) + result["warnings"]
    result["notes"] = _notes(result)
    return result


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Writes what :func:`compare` returned, by the suffix of ``path``: the page (``.html``), everything (``.json``), or the
    prompts that trigger anywhere, a row each (``.csv``, ``.parquet``).

    The page reads images and traces from the folders that were compared.

    Raises:
        ValueError: for another suffix.
        AuditError, OSError: if a folder cannot be read any more, or the file not be written.
    """
    rows = [row for name in CHANGES for row in result[name]]
    suffix = path.suffix.lower()
    if suffix == ".html":
        write_whole(path, _page(result))
    elif suffix == ".json":
        write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    elif suffix == ".csv":
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, _ROW.names)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, sheet.getvalue())
    elif suffix == ".parquet":
        dataset.write_table(path, rows, _ROW)
    else:
        raise ValueError(f"a comparison is written as .html, .json, .csv or .parquet, and {path.name} is none of them")


# ----------------------------------------------------------------------------------------------------------------- comparing


@dataclass
class _Images:
    """Images of an audit, a number each (``[n]``), with distinct pairs of prompt and seed.

    ``pairs`` and ``keys`` stand for prompt with seed, and for prompt; ``far`` is -log10 of the tail probability, or where that
    is not known the joint score; ``read`` is how many images were read.
    """

    pairs: np.ndarray
    keys: np.ndarray
    seeds: np.ndarray
    image: np.ndarray
    triggered: np.ndarray
    scored: np.ndarray
    corrected: np.ndarray
    tail: np.ndarray
    far: np.ndarray
    read: int

    def take(self, rows: np.ndarray) -> _Images:
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _KINDS})


_KINDS = {
    "pairs": np.uint64,
    "keys": np.int64,
    "seeds": np.int64,
    "image": np.int64,
    "triggered": bool,
    "scored": bool,
    "corrected": bool,
    "tail": float,
    "far": float,
}


def _read(folder: Path) -> _Images:
    columns = ("prompt", "seed", "image", "verdict", "corrected_steps", "tail_probability", "joint_score")
    empty = {name: np.zeros(0, kind) for name, kind in _KINDS.items()}
    parts = [_Images(**empty, read=0)]
    for batch in dataset.scan(folder, columns):
        keys = report.keys_of(batch["prompt"])
        seeds, image = (batch[name].to_numpy() for name in ("seed", "image"))
        verdict = batch["verdict"]
        tail, joint, corrected = (
            report.numbers(batch, name) for name in ("tail_probability", "joint_score", "corrected_steps")
        )
        known = np.isfinite(tail)
        part = _Images(
            pairs=_mixed(keys, seeds),
            keys=keys,
            seeds=seeds,
            image=image,
            triggered=pc.is_in(verdict, pa.array(dataset.TRIGGERED)).to_numpy(zero_copy_only=False),
            scored=pc.not_equal(verdict, "unscored").to_numpy(zero_copy_only=False),
            corrected=corrected > 0,
            tail=tail,
            far=np.where(known, -np.log10(np.where(known, np.maximum(tail, 1e-300), 1.0)), np.nan_to_num(joint)),
            read=len(batch),
        )
        parts.append(part)
    columns_ = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _KINDS}
    images = _Images(**columns_, read=sum(part.read for part in parts))
    return images.take(np.unique(images.pairs, return_index=True)[1])


def _mixed(keys: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """One 64-bit number for both (the finalizer of SplitMix64, Steele et al. 2014, on their sum)."""
    mixed = keys.view(np.uint64) + seeds.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _changes(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    return {"became": ~before & after, "no_longer": before & ~after, "stays": before & after, "never": ~before & ~after}


def _only(mine: _Images, other: _Images) -> dict[str, int]:
    return {
        "images": int((~np.isin(mine.pairs, other.pairs)).sum()),
        "prompts": len(np.setdiff1d(mine.keys, other.keys)),
    }


def _listed(
    change: str, members: np.ndarray, folders: tuple[Path, Path], sides: tuple[_Images, _Images], prompt_of: np.ndarray
) -> list[dict[str, Any]]:
    """The rows of the prompts ``members``, those that changed most first, or that are rarest where none changed."""
    if not len(members):
        return []
    # Only their images matter from here on, and a prompt's stand together.
    rows = np.flatnonzero(np.isin(prompt_of, members))
    rows = rows[np.argsort(prompt_of[rows], kind="stable")]
    first, second = (side.take(rows) for side in sides)
    starts = np.flatnonzero(np.diff(prompt_of[rows], prepend=-1))
    ends = np.append(starts[1:], len(rows))
    far = [np.maximum.reduceat(side.far, starts) for side in (first, second)]
    weight = np.maximum(*far) if change == "stays" else np.abs(far[1] - far[0])
    order = np.argsort(-weight, kind="stable")[:LISTED]
    # The pair that stands for a prompt is its rarest, on whichever side.
    rarest = np.maximum(first.far, second.far)
    pairs = [int(starts[n] + np.argmax(rarest[starts[n] : ends[n]])) for n in order]
    texts = [
        _look_up(folder, side.image[pairs], columns)
        for folder, side, columns in zip(folders, (first, second), (["prompt", "kind", "file"], ["file"]), strict=True)
    ]
    listed = []
    for n, pair in zip(order, pairs, strict=True):
        mine, own = texts[0][int(first.image[pair])], slice(starts[n], ends[n])
        row = {"prompt": mine["prompt"], "kind": mine["kind"], "change": change, "images": int(ends[n] - starts[n])}
        for name, side in (("a", first), ("b", second)):
            row |= {f"triggered_{name}": int(side.triggered[own].sum()), f"rarest_{name}": _least(side.tail[own])}
            row |= {f"corrected_{name}": int((side.triggered & side.corrected)[own].sum())}
        row |= {"seed": int(first.seeds[pair]), "image_a": int(first.image[pair]), "image_b": int(second.image[pair])}
        row |= {"file_a": mine["file"], "file_b": texts[1][int(second.image[pair])]["file"]}
        listed.append(row)
    return listed


def _least(tails: np.ndarray) -> float | None:
    known = tails[np.isfinite(tails)]
    return float(known.min()) if len(known) else None


def _look_up(folder: Path, images: np.ndarray, columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Some columns of some images of an audit."""
    wanted, found = pa.array(images, pa.int64()), {}
    for batch in dataset.scan(folder, ["image", *columns]):
        for row in batch.filter(pc.is_in(batch["image"], wanted)).to_pylist():
            found[row["image"]] = row
    return found


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """``compared`` and ``warnings`` from two manifests."""
    mine, theirs = report.facts(a), report.facts(b)
    compared, warnings = [], []
    models = mine.get("model") != theirs.get("model")
    profiles = [dataset.mapping(manifest.get("profile")) for manifest in (a, b)]
    # The same file, or made from the same prompts and then not the same to the last digit.
    same = any(profiles[0].get(name) == profiles[1].get(name) is not None for name in ("sha256", "reference_sha256"))
    for section in ("model", "settings", "thresholds", "prompts", *(() if same else ("profile",))):
        left, right = mine.get(section, {}), theirs.get(section, {})
        for name in {**left, **right}:
            values = left.get(name, "-"), right.get(name, "-")
            if values[0] == values[1] or (section == "settings" and name.replace(" ", "_") in _HARMLESS):
                continue
            # A profile holds for one model: another model has another.
            if section == "model" or (section == "profile" and models) or (section == "settings" and name in _COMPARED):
                compared.append({"field": f"{section}: {name}", "a": values[0], "b": values[1]})
            # The same list under another name is the same list.
            elif section != "prompts" or name == "sha256":
                what = "the list of prompts" if section == "prompts" else f"{section}: {name}"
                warnings.append(f"The audits differ in {what}: {values[0]} in A, {values[1]} in B.")
    return {"compared": compared, "warnings": warnings}


def _coverage(result: Mapping[str, Any]) -> list[str]:
    """Warnings of what of the audits is not compared."""
    pairs, told = result["pairs"], []
    for name in "ab":
        if not result[name]["finished"]:
            told.append(f"Audit {name.upper()} is not finished.")
        if only := pairs[f"only_{name}"]["images"]:
            whole = count(pairs[f"only_{name}"]["prompts"], "whole prompt")
            told.append(
                f"{count(only, 'image')} ({whole}) of audit {name.upper()} have no counterpart of the same prompt and seed."
            )
    if pairs["unscored"]:
        told.append(f"{count(pairs['unscored'], 'pair')} left out: one of the two could not be scored.")
    if pairs["duplicates"]:
        told.append(f"{count(pairs['duplicates'], 'image')} left out: the same prompt with the same seed came before.")
    if not pairs["images"]:
        told.append("No image of one audit has a scored counterpart in the other: there is nothing to compare.")
    return told


def _notes(result: Mapping[str, Any]) -> list[str]:
    """How to read it: with mitigation, the verdict is that of the trigger."""
    a, b = result["a"], result["b"]
    told = []
    for name in "ab":
        side, total = result[name], result[name]["triggered"]["count"]
        if side["stop"]:
            told.append(f"Runs of {name.upper()} were given up once they triggered: those {total:,} images were not made.")
        elif side["mitigate"]:
            told.append(
                f"{name.upper()} was made with mitigation. An image that triggers is corrected from that step on, and keeps "
                f"the verdict of the trigger: of {count(total, 'image')} that triggered, {side['corrected']:,} were corrected "
                f"and {side['uncorrected']:,} were not."
            )
    if (a["mitigate"], a["stop"]) != (b["mitigate"], b["stop"]):
        told.append(
            "Up to the trigger both runs are the same, so prompts are to stay as they are; that is no failure of the "
            "mitigation. What it made of the images is seen by looking at them: no number here says whether a corrected one "
            "is still a copy."
        )
    return told


# ------------------------------------------------------------------------------------------------------------------ the page

_TITLES = {
    "became": "became memorized",
    "no_longer": "no longer memorized",
    "stays": "memorized in both",
    "never": "in neither",
}


def _page(result: Mapping[str, Any]) -> str:
    folders = {name: Path(result[name]["folder"]) for name in "ab"}
    mitigation = any(result["a"][name] != result["b"][name] for name in ("mitigate", "stop"))
    # The first of each, in turn; what stays is worth a look where mitigation is what was compared.
    lists = [result[name] for name in CHANGES if name != "stays" or mitigation]
    shown = [row for together in itertools.zip_longest(*lists) for row in together if row is not None][:SHOWN]
    traces = {name: report.read_traces(folders[name], (row[f"image_{name}"] for row in shown)) for name in "ab"}
    cards = [_card(row, folders, traces) for row in shown]
    names = [f"{name.upper()}: {result[name]['model'] or 'a model'}" for name in "ab"]
    pairs = result["pairs"]
    body = [
        f"<p>{text(names[0])}, {text(names[1])}. {count(pairs['images'], 'image')} of {count(pairs['prompts'], 'prompt')}, "
        "made by both with the same prompt and seed. A prompt counts as memorized here if one of its images triggers.</p>",
        *(f'<p class="warning">{text(warning)}</p>' for warning in result["warnings"]),
        *(f"<p>{text(note)}</p>" for note in result["notes"]),
        _rates(result),
    ]
    title = "Prompts to look at" if mitigation else "Prompts that changed most"
    if cards:
        body.append(f'<section id="changed"><h2>{title}</h2><div class="cards wide">{"".join(cards)}</div></section>')
    body += [_prompts(name, result) for name in CHANGES if result[name]]
    body.append(report.details_page(*(dataset.read_manifest(folder) for folder in folders.values())))
    data = {"traces": report.packed({f"{name}{image}": t.to_dict() for name in "ab" for image, t in traces[name].items()})}
    return page("Two audits compared", "".join(body), style=report.style(), data=data, script=report.script())


def _rates(result: Mapping[str, Any]) -> str:
    rows = []
    for what, rate in (("images", "triggered"), ("prompts", "prompts_triggered")):
        cells = [report.rate_cell(result[name][rate]) for name in "ab"]
        cells.append(report.rate_cell(result[what]["difference"]))
        cells += [f'<td class="number">{result[what][name]:,}</td>' for name in _TITLES]
        rows.append(f"<tr><td>{what}</td>{''.join(cells)}</tr>")
    columns = ("", "#triggered in A", "#triggered in B", "#B less A", *(f"#{title}" for title in _TITLES.values()))
    changed = result["prompts"]["became"] + result["prompts"]["no_longer"]
    split = (
        f" {count(changed, 'prompt')} changed; by chance alone they split into the two ways as unevenly with p = "
        f"{result['prompts']['mcnemar']:.2g} (McNemar's exact test)."
    )
    table = charts.table(columns, f"<tbody>{''.join(rows)}</tbody>")
    return (
        f'<article id="rates"><h2>Rates</h2>{table}'
        '<p class="muted">In small print 95 % intervals, of what other prompts of the same sort may give.'
        f"{split if changed else ''}</p></article>"
    )


def _prompts(name: str, result: Mapping[str, Any]) -> str:
    rows, total = result[name], result["prompts"][name]
    corrected = [side for side in "ab" if result[side]["mitigate"]]
    body = "".join(
        f'<tr><td class="prompt">{report.prompt_html(row["prompt"])}</td><td class="number">{row["images"]:,}</td>'
        + "".join(
            f'<td class="number">{row[f"triggered_{side}"]:,}</td><td class="number">{_rarity(row[f"rarest_{side}"])}</td>'
            + (f'<td class="number">{row[f"corrected_{side}"]:,}</td>' if side in corrected else "")
            for side in "ab"
        )
        + "</tr>"
        for row in rows[:_TABLE_ROWS]
    )
    columns = ["prompt", "#images"]
    for side in "AB":
        columns += [f"#triggered in {side}", f"#as rare as, {side}"]
        columns += [f"#corrected in {side}"] if side.lower() in corrected else []
    more = "" if total <= _TABLE_ROWS else f'<p class="muted">The first {_TABLE_ROWS} of {count(total, "prompt")}.</p>'
    return (
        f'<details class="more"><summary>{count(total, "prompt")} {_TITLES[name]}</summary>'
        f"<article>{charts.table(columns, f'<tbody>{body}</tbody>')}{more}</article></details>"
    )


def _rarity(tail: float | None) -> str:
    return "-" if tail is None else rarity(tail)


def _card(row: Mapping[str, Any], folders: Mapping[str, Path], traces: Mapping[str, Mapping[int, Trace]]) -> str:
    sides = []
    for name in "ab":
        image, trace = row[f"image_{name}"], traces[name].get(row[f"image_{name}"])
        look = f"<div>{report.picture(folders[name], row[f'file_{name}'])}</div>{report.drawing(trace, f'{name}{image}')}"
        about = f"{name.upper()}: {row[f'triggered_{name}']} of {count(row['images'], 'image')} triggered"
        sides.append(f'<div><p class="about muted">{about}</p><div class="look">{look}</div></div>')
    return (
        f'<article><h3>{report.prompt_html(row["prompt"])}</h3><p class="about muted">{_TITLES[row["change"]]} · seed '
        f'{row["seed"]}</p><div class="pair">{"".join(sides)}</div></article>'
    )
