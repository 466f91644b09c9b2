"""Which images of an audit are copies of the model's training images, and whether the guard said so.

The captions of a training folder are the prompts, unless a list is given. When the audit is finished, the images that
triggered are sampled once more from the same noise, with mitigation, as an audit in the folder ``mitigated``. Every image is
then held against every training image.

DIR/
    pairs.csv, pairs.parquet  a row for each image
    gallery.html
    training/captions.jsonl   the prompts, where they are the captions
    training/triggered.jsonl  prompts and seeds of ``mitigated``
    training/summary.json     what was found
    mitigated/                an audit
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ..core.settings import TRIGGERED
from ..evaluation.encoders import Encoder
from ..files import ContentError, parse_json, path_inside, read_whole, write_whole
from ..fingerprint import content_hash
from ..parquet import open_parquet
from ..pictures import opened
from ..statistics import clustered_rate, exact_rate
from . import AuditError
from .dataset import PROFILE, TRAINING, read_manifest, scan, write_table
from .nearest import COMPARED, LOWEST, SAME, Found, OwnPairs, Vectors, encoded, own_pairs, search
from .plan import Plan
from .run import Workers
from .run import audit as run_audit
from .store import Store, clear
from .training import TrainingError, TrainingSet
from .worker import Recipe

MITIGATED = "mitigated"
PAIRS, GALLERY = "pairs", "gallery.html"
CAPTIONS, TRIGGERED_LIST, SUMMARY = "captions.jsonl", "triggered.jsonl", "summary.json"

#: Different images of a folder below which a threshold that is chosen from them is called rough.
FEW = 50

#: A row for each image of the audit. ``file`` is the image, relative to the audit's folder; ``nearest`` is the training image
#: that it comes nearest to, relative to the training folder; ``own`` says whether that image has the prompt as its caption.
#: The last columns are of the image that was sampled with mitigation from the same noise, null where none was.
SCHEMA = pa.schema(
    [
        pa.field("image", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("nearest", pa.string(), nullable=False),
        pa.field("similarity", pa.float64(), nullable=False),
        pa.field("is_copy", pa.bool_(), nullable=False),
        pa.field("own", pa.bool_(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("triggered", pa.bool_(), nullable=False),
        pa.field("p_value", pa.float64()),
        pa.field("mitigated_file", pa.string()),
        pa.field("mitigated_nearest", pa.string()),
        pa.field("mitigated_similarity", pa.float64()),
        pa.field("mitigated_is_copy", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class _Saved:
    """A saved image of an audit."""

    folder: Path
    file: str

    def open(self) -> Image.Image:
        """The image, decoded."""
        try:
            with opened(path_inside(self.folder, self.file)) as image:
                return image.convert("RGB")
        except (OSError, ValueError) as error:
            raise AuditError(f"{self.folder / self.file} cannot be compared: {error}") from None


class TrainingAudit:
    """An audit whose images are held against a training folder.

    Args:
        folder: of the audit. training, encoder: what to compare with, and how.
        threshold: similarity from which an image is a copy; ``None``: chosen from the folder's own nearest pairs.
        device: where to compare. progress: whether to show progress bars.
    """

    def __init__(
        self,
        folder: Path,
        training: TrainingSet,
        encoder: Encoder,
        *,
        threshold: float | None = None,
        device: str = "cpu",
        progress: bool = True,
    ) -> None:
        self.folder, self._training, self._encoder = folder, training, encoder
        self._device, self._progress, self._given = device, progress, threshold
        self._work = folder / TRAINING
        self._own: OwnPairs | None = None

    def begin(self) -> Path:
        """Writes the captions as a prompt list and encodes the training images, before hours of sampling.

        Returns:
            The prompt list.

        Raises:
            TrainingError: if a training image cannot be read, or no threshold can be chosen.
            AuditError: if the folder holds no audit but other files. OSError: if it cannot be written.
        """
        store, captions = Store(self.folder), self._work / CAPTIONS
        with store.alone():
            self._work.mkdir(exist_ok=True)
            # An audit that was begun keeps its list; another one is refused by its hash.
            write_whole(captions, self._training.prompt_list())
            if self._known() is None:
                self._compare_own()
        return captions

    def finish(
        self,
        recipe: Recipe,
        start: Callable[[Recipe], Workers],
        *,
        batch_size: int = 4,
        report: Callable[[Path], object] | None = None,
        gallery: Callable[[Path, dict[str, Any], TrainingSet], object] | None = None,
    ) -> dict[str, Any]:
        """Samples what triggered with mitigation, holds all images against the training images, and writes what was found.

        Args:
            recipe: of the audit, which is finished. start: makes workers.
            batch_size: images sampled at once.
            report: writes the page of the audit with mitigation.
            gallery: writes the gallery into the audit's folder, from what was found and the training images.

        Returns:
            What ``training/summary.json`` holds.

        Raises:
            AuditError: if an image is missing or cannot be read. OSError: if nothing can be written.
        """
        if (known := self._known()) is not None:
            if gallery is not None and not (self.folder / GALLERY).exists():
                gallery(self.folder, known, self._training)
            return known
        rows = _rows(self.folder)
        triggered = [row for row in rows if row["triggered"]]
        mitigated: list[dict[str, Any]] = []
        if triggered:
            # Under the names of columns that a prompt list has. An audit that was begun there must be of the same list.
            lines = (json.dumps({"caption": row["prompt"], "seed": row["seed"]}) + "\n" for row in triggered)
            write_whole(self._work / TRIGGERED_LIST, "".join(lines))
            again, mitigating = Plan.of(self._work / TRIGGERED_LIST), replace(recipe, mode="mitigate", keep="all")
            run_audit(
                mitigating,
                again,
                self.folder / MITIGATED,
                lambda: start(mitigating),
                profile=self.folder / PROFILE,
                batch_size=batch_size,
                report=report,
                progress=self._progress,
            )
            mitigated = _rows(self.folder / MITIGATED)
            if len(mitigated) != again.images:
                raise AuditError(f"{self.folder / MITIGATED} lacks images: call again")
        with Store(self.folder).alone():
            if (known := self._known()) is not None:  # another process was sooner
                return known
            found = self._compare(rows, triggered, mitigated)
            if gallery is not None:
                gallery(self.folder, found, self._training)
            write_whole(self._work / SUMMARY, json.dumps(found | {"key": self._key()}, indent=1, allow_nan=False) + "\n")
            Vectors.delete(self._work)
        clear(self.folder)
        return found

    def _compare_own(self) -> tuple[Vectors, OwnPairs]:
        images = self._training.images
        vectors = Vectors.make(self._work, images, self._encoder, key=self._training.key, progress=self._progress)
        if self._own is None:
            self._own = own_pairs(images, vectors, self._encoder, device=self._device)
        if self._given is None and self._own.threshold() is None:
            raise TrainingError(
                f"{self._training.folder} holds no two different images, so no threshold can be chosen: give --copy-threshold"
            )
        return vectors, self._own

    def _compare(
        self, rows: list[dict[str, Any]], triggered: list[dict[str, Any]], mitigated: list[dict[str, Any]]
    ) -> dict[str, Any]:
        vectors, own = self._compare_own()
        threshold = self._given if self._given is not None else own.threshold()
        assert threshold is not None
        images = self._training.images
        found = self._search([_Saved(self.folder, row["file"]) for row in rows], vectors)
        after = self._search([_Saved(self.folder / MITIGATED, row["file"]) for row in mitigated], vectors)
        captions = self._training.captions
        pairs = []
        for row, similarity, nearest in zip(rows, found.similarity, found.nearest, strict=True):
            about = {
                "nearest": images[nearest].name,
                "similarity": round(float(similarity), 6),
                "is_copy": bool(similarity >= threshold),
                "own": images[nearest].caption == row["prompt"],
            }
            pairs.append(dict.fromkeys(SCHEMA.names) | {name: row[name] for name in SCHEMA.names if name in row} | about)
        by_image = {pair["image"]: pair for pair in pairs}
        for before, row, similarity, nearest in zip(triggered, mitigated, after.similarity, after.nearest, strict=True):
            by_image[before["image"]] |= {
                "mitigated_file": f"{MITIGATED}/{row['file']}",
                "mitigated_nearest": images[nearest].name,
                "mitigated_similarity": round(float(similarity), 6),
                "mitigated_is_copy": bool(similarity >= threshold),
            }
        pairs.sort(key=lambda pair: (-pair["similarity"], pair["image"]))
        write_table(self.folder / f"{PAIRS}.parquet", pairs, SCHEMA)
        write_whole(self.folder / f"{PAIRS}.csv", _csv(pairs))
        copied = found.reached >= threshold
        prompts = {pair["prompt"] for pair in pairs}
        return {
            "training": {
                "folder": self._training.folder.name,
                "read_as": list(self._training.formats),
                "images": len(images),
                "captions": len(captions),
                "notes": self._training.notes(),
            },
            "encoder": self._encoder.name,
            "threshold": self._about_threshold(threshold, own),
            "images_copied": exact_rate(int(copied.sum()), len(images)),
            "captions_copied": exact_rate(
                len({p["prompt"] for p in pairs if p["is_copy"]} & captions.keys()), len(prompts & captions.keys())
            ),
            "outputs_copied": _clustered(pairs, lambda pair: pair["is_copy"]),
            "verdicts": {
                name: {
                    "copies": sum(pair["is_copy"] for pair in pairs if pair["triggered"] is flag),
                    "others": sum(not pair["is_copy"] for pair in pairs if pair["triggered"] is flag),
                }
                for name, flag in (("triggered", True), ("not_triggered", False))
            },
            "copies_found": _clustered([pair for pair in pairs if pair["is_copy"]], lambda pair: pair["triggered"]),
            "others_triggered": _clustered([pair for pair in pairs if not pair["is_copy"]], lambda pair: pair["triggered"]),
            "copies_left": _clustered(
                [pair for pair in pairs if pair["is_copy"] and pair["triggered"]], lambda pair: pair["mitigated_is_copy"]
            ),
            "outputs": len(pairs),
            "unscored": sum(pair["verdict"] == "unscored" for pair in pairs),
            "prompts": len(prompts),
        }

    def _search(self, saved: Sequence[_Saved], vectors: Vectors) -> Found:
        """The nearest training images of saved images and of their mirror images, some thousand at a time."""
        parts = []
        for start in range(0, len(saved), COMPARED):
            some = saved[start : start + COMPARED]
            views = [encoded(some, self._encoder, mirrored=mirrored) for mirrored in (False, True)]
            parts.append(search(views, vectors, device=self._device))
        if not parts:
            return Found(np.empty(0), np.empty(0, np.int64), np.empty(0))
        return Found(
            np.concatenate([part.similarity for part in parts]),
            np.concatenate([part.nearest for part in parts]),
            np.stack([part.reached for part in parts]).max(0),
        )

    def _about_threshold(self, threshold: float, own: OwnPairs) -> dict[str, Any]:
        known = own.known
        return {
            "value": round(threshold, 4),
            "given": self._given is not None,
            "bounds": [LOWEST, SAME],
            "images": len(known),
            "median": round(float(np.median(known)), 4) if len(known) else None,
            "highest": round(float(known.max()), 4) if len(known) else None,
            "looked_at": len(own.nearest),
            "doubles": own.doubles,
            "rough": self._given is None and len(known) < FEW,
        }

    def _key(self) -> str:
        """Of everything that the comparison depends on."""
        return content_hash([self._training.key, self._encoder.key, self._given, read_manifest(self.folder)["finished"]])

    def _known(self) -> dict[str, Any] | None:
        """The comparison, if it was made already."""
        try:
            found = parse_json(read_whole(self._work / SUMMARY))
            whole = found["key"] == self._key() and all(
                (self.folder / f"{PAIRS}{end}").exists() for end in (".csv", ".parquet")
            )
        except (OSError, ContentError, AuditError, KeyError, TypeError):
            return None
        return found if whole else None


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished audit whose images were all kept."""
    columns = ("image", "prompt", "seed", "verdict", "trigger_step", "p_value", "file")
    rows = [row for batch in scan(folder, columns) for row in batch.to_pylist()]
    for row in rows:
        row["triggered"] = row["verdict"] in TRIGGERED
        if not row["file"]:
            raise AuditError(f"{folder} did not keep image {row['image']}, so it cannot be compared: name another folder")
    return rows


def _csv(pairs: Sequence[dict[str, Any]]) -> str:
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, SCHEMA.names)
    writer.writeheader()
    writer.writerows(pairs)
    return sheet.getvalue()


def read_pairs(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``pairs.parquet`` that :class:`TrainingAudit` has written, the most similar first."""
    with open_parquet(folder / f"{PAIRS}.parquet") as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _clustered(pairs: Sequence[dict[str, Any]], event: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A share of images with an interval over prompts."""
    places = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    events, sizes = np.zeros(len(places)), np.zeros(len(places))
    for pair in pairs:
        events[places[pair["prompt"]]] += bool(event(pair))
        sizes[places[pair["prompt"]]] += 1
    return clustered_rate(events, sizes)
