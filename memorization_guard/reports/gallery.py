"""The gallery of an audit with a training folder: training image, output and mitigated output side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..audit.copies import GALLERY, read_pairs
from ..audit.dataset import p_value_floor, read_manifest
from ..audit.training import TrainingError, TrainingImage, TrainingSet
from ..core.settings import TRIGGERED
from ..core.trace import rarity
from ..files import write_whole
from . import charts
from .html import page
from .pieces import Thumbnail, audited, interval, resource, share, small, thumbnail
from .rendering import render

#: Prompts that the page shows, and how many of them are open from the start.
SHOWN, OPEN = 100, 24


def write_gallery(folder: Path, found: Mapping[str, Any], training: TrainingSet) -> None:
    """Writes ``gallery.html`` into the folder of an audit, whole or not at all.

    Args:
        folder: with its ``pairs.parquet``.
        found: what :meth:`memorization_guard.audit.copies.TrainingAudit.finish` returns.
        training: the training images.

    Raises:
        OSError: if it cannot be written.
    """
    manifest = read_manifest(folder)
    by_name = {image.name: image for image in training.images}
    cards = [
        row
        | {
            "training_picture": _training(by_name.get(row["nearest"])),
            "picture": thumbnail(folder, row["file"]),
            "mitigated_picture": thumbnail(folder, row["mitigated_file"]) if row["mitigated_file"] else None,
            "rare": None if row["p_value"] is None else rarity(row["p_value"], p_value_floor(manifest)),
        }
        for row in islice(_best(read_pairs(folder)), SHOWN)
    ]
    body = render(
        "gallery.html",
        found=found,
        cards=cards,
        open=OPEN,
        prompts=found["prompts"],
        triggered=TRIGGERED,
        share=share,
        interval=interval,
        audited=audited([manifest]),
    )
    title = f"What {manifest['model'].get('name') or 'a model'} copies of its training images"
    write_whole(folder / GALLERY, page(title, body, style=charts.STYLE + resource("audit.css")))


def _best(pairs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each prompt its most similar image, which comes first."""
    seen: set[str] = set()
    for pair in pairs:
        if pair["prompt"] not in seen:
            seen.add(pair["prompt"])
            yield pair


def _training(image: TrainingImage | None) -> Thumbnail | str:
    if image is None:
        return "not in the folder any more"
    try:
        return small(image.open())
    except TrainingError:
        return f"{image.name} cannot be read"
