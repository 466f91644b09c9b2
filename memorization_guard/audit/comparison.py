"""Two audits compared image by image, in numbers: a model and its fine-tune, without mitigation and with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..core.settings import TRIGGERED
from ..statistics import clustered_difference, clustered_rate, mcnemar
from . import dataset
from .dataset import counted, mapping
from .summary import keys_of, numbers

#: Prompts that a comparison names, of each sort.
LISTED = 10_000

#: How prompts are sorted, by whether an image of theirs triggers.
CHANGES = ("became", "no_longer", "stays")

#: Settings that change no image and no verdict.
_HARMLESS = ("images", "batch_size", "screen")

#: The setting that may be what is compared.
_COMPARED = "mode"


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What changed from audit ``a`` to audit ``b``, ready for JSON. Images are paired by the text of their prompt and by seed.

    Some numbers of each image are kept in memory (under half a gigabyte for a million images a side); traces are not read.

    Returns:
        ``"a"``, ``"b"``: ``{"folder", "model", "finished", "images", "prompts", "screened_out", "mode", "p_value_floor",
        "triggered", "prompts_triggered", "corrected", "uncorrected"}``: the numbers of images and prompts are of the whole
        audit, and so are the images screened out (``None`` in an audit that does not screen); the rates (as
        ``statistics.clustered_rate`` gives them) are of the pairs. ``corrected`` and ``uncorrected`` are paired images that
        triggered, with steps corrected or without.
        ``"pairs"``: ``{"images", "prompts", "unscored", "only_a", "only_b", "duplicates"}``: pairs of images that are both
        scored, and their prompts, which is what everything below is about; pairs left out because one is not scored;
        ``{"images", "prompts"}`` that only one audit has; images left out because another has the same prompt and seed.
        ``"images"``: ``{"became", "no_longer", "stays", "never", "difference"}``: pairs that trigger only in ``b``, only in
        ``a``, in both, in neither; ``difference`` of the rates, ``b`` less ``a``, with its 95 % interval over prompts
        (``statistics.clustered_difference``).
        ``"prompts"``: the same of prompts, which trigger if one of their paired images does, and ``"mcnemar"``, the exact
        two-sided p-value of McNemar's test (1947).
        ``"became"``, ``"no_longer"``, ``"stays"``: such prompts, those that changed most first, at most 10,000 of each:
        ``{"prompt", "kind", "change", "images", "triggered_a", "rarest_a", "corrected_a", "triggered_b", "rarest_b",
        "corrected_b", "words_a", "words_b", "seed", "image_a", "image_b", "file_a", "file_b"}``: paired images, how many
        trigger, their lowest p-value, how many that triggered were corrected, the words that call the image up (those of the
        first paired image that they were told for, or ``None``), and the pair in which an image is rarest.
        ``"compared"``: ``[{"field", "a", "b"}]``, how model and mode differ. ``"warnings"``: every other difference, which may
        be the cause of a change. ``"notes"``: how to read this.

    Raises:
        FileNotFoundError: if a folder holds no audit.
        AuditError: if a manifest or a part cannot be read.
    """
    folders, manifests = (a, b), [dataset.read_manifest(folder) for folder in (a, b)]
    images, unpaired, screened_out = zip(*(_read(folder) for folder in folders), strict=True)
    paired = images[0].join(images[1], ["prompt", "seed"], join_type="inner", left_suffix="_a", right_suffix="_b")
    scored = paired.filter(pc.and_(paired["scored_a"], paired["scored_b"])).sort_by("image_a")
    prompts = _Prompts(scored)
    sorts = _changes(prompts.sums["triggered_a"] > 0, prompts.sums["triggered_b"] > 0)

    result: dict[str, Any] = {}
    sides = zip("ab", folders, manifests, images, unpaired, screened_out, strict=True)
    for name, folder, manifest, own, duplicates, out in sides:
        events, corrected = prompts.sums[f"triggered_{name}"], int(prompts.sums[f"corrected_{name}"].sum())
        result[name] = {
            "folder": str(folder),
            "model": mapping(manifest.get("model")).get("name"),
            "finished": dataset.is_finished(manifest, len(own) + duplicates),
            "images": len(own) + duplicates,
            "prompts": pc.count_distinct(own["prompt"]).as_py(),
            "screened_out": out if dataset.screens(manifest) else None,
            "mode": mapping(manifest.get("settings")).get("mode"),
            "p_value_floor": dataset.p_value_floor(manifest),
            "triggered": clustered_rate(events, prompts.sizes),
            "prompts_triggered": clustered_rate(events > 0, np.ones(len(events))),
            "corrected": corrected,
            "uncorrected": int(events.sum()) - corrected,
        }
    result["pairs"] = {
        "images": len(scored),
        "prompts": len(prompts.sizes),
        "unscored": len(paired) - len(scored),
        "only_a": _only(images[0], images[1], paired),
        "only_b": _only(images[1], images[0], paired),
        "duplicates": sum(unpaired),
    }
    before, after = (prompts.sums[f"triggered_{side}"] for side in "ab")
    changed = _changes(*(scored[f"triggered_{side}"].to_numpy() for side in "ab"))
    result["images"] = {name: int(pairs.sum()) for name, pairs in changed.items()} | {
        "difference": clustered_difference(before, after, prompts.sizes)
    }
    result["prompts"] = {name: int(members.sum()) for name, members in sorts.items()} | {
        "difference": clustered_difference(before > 0, after > 0, np.ones(len(prompts.sizes))),
        "mcnemar": mcnemar(int(sorts["became"].sum()), int(sorts["no_longer"].sum())),
    }
    for name in CHANGES:
        result[name] = _listed(name, prompts, np.flatnonzero(sorts[name]), folders)
    result |= _differences(*manifests)
    result["warnings"] = _coverage(result) + result["warnings"]
    result["notes"] = _notes(result)
    return result


def _read(folder: Path) -> tuple[pa.Table, int, int]:
    """An audit's images, the first of every prompt and seed; how many others there are, and how many were screened out.

    ``prompt`` is a number for its text; ``far`` is -log10 of the p-value, or the joint score where there is none.
    """
    columns = ("prompt", "seed", "image", "verdict", "corrected_steps", "p_value", "joint_score", "screened_out")
    parts, screened_out = [], 0
    for batch in (pa.RecordBatch.from_pylist([], schema=dataset.SCHEMA), *dataset.scan(folder, columns)):
        screened_out += batch["screened_out"].true_count
        p_value = numbers(batch, "p_value")
        rare = -np.log10(np.maximum(p_value, 1e-300))
        triggered = pc.is_in(batch["verdict"], pa.array(TRIGGERED))
        parts.append(
            pa.table(
                {
                    "prompt": keys_of(batch["prompt"]),
                    "seed": batch["seed"],
                    "image": batch["image"],
                    "triggered": triggered,
                    "scored": pc.not_equal(batch["verdict"], "unscored"),
                    "corrected": pc.and_(triggered, pc.greater(batch["corrected_steps"], 0)),
                    "p_value": p_value,
                    "far": np.where(np.isfinite(p_value), rare, np.nan_to_num(numbers(batch, "joint_score"))),
                }
            )
        )
    images = pa.concat_tables(parts)
    values = [name for name in images.column_names if name not in ("prompt", "seed")]
    first = images.group_by(["prompt", "seed"], use_threads=False).aggregate([(name, "first") for name in values])
    first = pa.table({"prompt": first["prompt"], "seed": first["seed"]} | {name: first[f"{name}_first"] for name in values})
    return first, len(images) - len(first), screened_out


def _only(mine: pa.Table, other: pa.Table, paired: pa.Table) -> dict[str, int]:
    prompts = pc.unique(mine["prompt"])
    both = pc.is_in(prompts, pc.unique(other["prompt"])).true_count
    return {"images": len(mine) - len(paired), "prompts": len(prompts) - both}


def _changes(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    return {"became": ~before & after, "no_longer": before & ~after, "stays": before & after, "never": ~before & ~after}


class _Prompts:
    """Pairs of images sorted by prompt, and what follows for each prompt.

    Attributes:
        pairs: the columns of the pairs, those of a prompt one after the other.
        starts, sizes: ``[prompts]``, where each prompt's pairs begin, and how many they are.
        sums: ``[prompts]`` each, sums of ``triggered_a``, ``corrected_a`` and the same of b.
        rarest, far: by side ``[prompts]``, the lowest p-value (NaN where there is none) and the highest ``far``.
    """

    def __init__(self, pairs: pa.Table) -> None:
        columns = {name: pairs[name].to_numpy() for name in pairs.column_names}
        _, first, prompt_of = np.unique(columns["prompt"], return_index=True, return_inverse=True)
        # Prompts are in the order of their first images, so that the result does not depend on the numbers of the texts.
        order = np.lexsort((np.arange(len(pairs)), first[prompt_of]))
        self.pairs = {name: values[order] for name, values in columns.items()}
        self.starts = np.flatnonzero(np.diff(first[prompt_of][order], prepend=-1))
        self.sizes = np.diff(self.starts, append=len(pairs))
        names = [f"{name}_{side}" for name in ("triggered", "corrected") for side in "ab"]
        self.sums = {name: np.add.reduceat(self.pairs[name].astype(np.int64), self.starts) for name in names}
        self.rarest = {side: np.fmin.reduceat(self.pairs[f"p_value_{side}"], self.starts) for side in "ab"}
        self.far = {side: np.maximum.reduceat(self.pairs[f"far_{side}"], self.starts) for side in "ab"}


def _listed(change: str, prompts: _Prompts, members: np.ndarray, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of the prompts ``members``, those that changed most first, or the rarest first where none changed."""
    far = {side: prompts.far[side][members] for side in "ab"}
    weight = np.maximum(far["a"], far["b"]) if change == "stays" else np.abs(far["b"] - far["a"])
    chosen = members[np.argsort(-weight, kind="stable")[:LISTED]]
    # The pair that stands for a prompt is the one with the rarest image, on either side.
    rarest = np.maximum(prompts.pairs["far_a"], prompts.pairs["far_b"])
    starts, sizes = prompts.starts[chosen], prompts.sizes[chosen]
    places = [int(start + np.argmax(rarest[start : start + size])) for start, size in zip(starts, sizes, strict=True)]
    # All paired images of these prompts: another one than that pair may be what triggered, and have the words.
    every = [place for start, size in zip(starts, sizes, strict=True) for place in range(start, start + size)]
    texts, words = {}, {}
    for side, folder in zip("ab", folders, strict=True):
        images = prompts.pairs[f"image_{side}"]
        texts[side], words[side] = _look_up(folder, images[places], images[every])
    listed = []
    for number, place in zip(chosen, places, strict=True):
        image = {side: int(prompts.pairs[f"image_{side}"][place]) for side in "ab"}
        about = {side: texts[side][image[side]] for side in "ab"}
        row = {name: about["a"][name] for name in ("prompt", "kind")}
        row |= {"change": change, "images": int(prompts.sizes[number])}
        for side in "ab":
            lowest = float(prompts.rarest[side][number])
            row |= {
                f"triggered_{side}": int(prompts.sums[f"triggered_{side}"][number]),
                f"rarest_{side}": lowest if np.isfinite(lowest) else None,
                f"corrected_{side}": int(prompts.sums[f"corrected_{side}"][number]),
                f"words_{side}": words[side].get(row["prompt"]),
            }
        row |= {"seed": int(prompts.pairs["seed"][place]), "image_a": image["a"], "image_b": image["b"]}
        listed.append(row | {f"file_{side}": about[side]["file"] for side in "ab"})
    return listed


def _look_up(
    folder: Path, images: np.ndarray, every: np.ndarray
) -> tuple[dict[int, dict[str, Any]], dict[str, Sequence[str]]]:
    """Prompt, kind and file of some images of an audit, by their numbers; and the words of prompts, by their text, as they
    were told for the first of the images ``every``."""
    wanted, told = pa.array(images, pa.int64()), pa.array(every, pa.int64())
    found: dict[int, dict[str, Any]] = {}
    words: dict[str, Sequence[str]] = {}
    for batch in dataset.scan(folder, ("image", "prompt", "kind", "file", "words")) if len(images) else ():
        for row in batch.filter(pc.is_in(batch["image"], wanted)).to_pylist():
            found[row["image"]] = row
        spoken = batch.filter(pc.and_(pc.is_valid(batch["words"]), pc.is_in(batch["image"], told)))
        for row in spoken.to_pylist():
            words.setdefault(row["prompt"], row["words"])
    return found, words


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """``compared`` and ``warnings`` from two manifests."""
    mine, theirs = dataset.facts(a), dataset.facts(b)
    compared, warnings = [], []
    models = mine.get("model") != theirs.get("model")
    profiles = [mapping(manifest.get("profile")) for manifest in (a, b)]
    # The same file, or made again from the same prompts, which differs by rounding.
    same = any(profiles[0].get(name) == profiles[1].get(name) is not None for name in ("sha256", "reference_sha256"))
    for section in ("model", "settings", "thresholds", "prompts", *(() if same else ("profile",))):
        left, right = mine.get(section, {}), theirs.get(section, {})
        for name in {**left, **right}:
            values = left.get(name, "-"), right.get(name, "-")
            if values[0] == values[1] or (section == "settings" and name.replace(" ", "_") in _HARMLESS):
                continue
            # A profile holds for one model, so another model has another profile.
            if section == "model" or (section == "profile" and models) or (section == "settings" and name == _COMPARED):
                compared.append({"field": f"{section}: {name}", "a": values[0], "b": values[1]})
            # The name of the list does not matter.
            elif section != "prompts" or name == "sha256":
                what = "the list of prompts" if section == "prompts" else f"{section}: {name}"
                warnings.append(f"The audits differ in {what}: {values[0]} in A, {values[1]} in B.")
    return {"compared": compared, "warnings": warnings}


def _coverage(result: Mapping[str, Any]) -> list[str]:
    """Warnings about images that are not compared."""
    pairs, told = result["pairs"], []
    for name in "ab":
        if not result[name]["finished"]:
            told.append(f"Audit {name.upper()} is not finished.")
        if only := pairs[f"only_{name}"]["images"]:
            whole = counted(pairs[f"only_{name}"]["prompts"], "whole prompt")
            told.append(
                f"{counted(only, 'image')} ({whole}) of audit {name.upper()} have no counterpart of the same prompt and seed."
            )
    if pairs["unscored"]:
        told.append(f"{counted(pairs['unscored'], 'pair')} left out: one of the two could not be scored.")
    if pairs["duplicates"]:
        told.append(f"{counted(pairs['duplicates'], 'image')} left out: the same prompt with the same seed came before.")
    if not pairs["images"]:
        told.append("No image of one audit has a scored counterpart in the other: there is nothing to compare.")
    return told


def _notes(result: Mapping[str, Any]) -> list[str]:
    """How to read it: what was screened out has no picture, and with mitigation the verdict is that of the trigger."""
    a, b = result["a"], result["b"]
    told = []
    for name in "ab":
        side, total = result[name], result[name]["triggered"]["count"]
        if side["screened_out"]:
            told.append(
                f"{name.upper()} was screened: {side['screened_out']:,} of {counted(side['images'], 'image')} were judged by "
                "their first evaluation and not sampled, so there is no picture of them."
            )
        if side["mode"] == "stop":
            told.append(f"Runs of {name.upper()} were stopped at their trigger: those {total:,} images were not finished.")
        elif side["mode"] == "mitigate":
            told.append(
                f"{name.upper()} was made with mitigation. An image that triggers is corrected from there on, and keeps the "
                f"verdict of the trigger: of {counted(total, 'image')} that triggered, {side['corrected']:,} were corrected "
                f"and {side['uncorrected']:,} were not."
            )
    if a["mode"] != b["mode"]:
        told.append(
            "Up to the trigger both runs are the same, so a prompt is expected to keep its verdict; this does not mean that "
            "mitigation failed. No number here says whether a corrected image is still a copy: look at the images."
        )
    return told
