"""Evidence that is saved with an image: its traces, bound by hashes to its pixels and to the settings it was made with.

The hashes find accidental and casual changes: the trace of another image, an edited picture, settings or numbers edited by
hand. They are no signature, see :data:`NO_SIGNATURE`. ``docs/evidence.md`` describes the record.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .core.errors import GuardError
from .core.trace import STATEMENT, Trace
from .files import ContentError, parse_json, read_whole
from .fingerprint import content_hash
from .pictures import opened

FORMAT = "memorization-guard.evidence"
FORMAT_VERSION = 1

#: Names of the text chunks of a PNG: for the record, and for the settings of images that we make ourselves.
KEY = "memorization_guard"
SETTINGS_KEY = "memorization_guard_settings"

#: Replaces the suffix of an image's name: the name of the record beside an image that cannot carry it.
SIDECAR = ".stability.json"

NO_SIGNATURE = "These checks find changes; they are no signature: whoever can change the file can write a trace that fits."

Check = Literal["match", "differ", "unknown"]


class EvidenceError(GuardError, ValueError):
    """An image whose record cannot be checked; the message is one line, and may quote the file."""


#: Rows of an image that are hashed at a time, so that no second copy of all pixels is made.
_ROWS = 256

_WORST_FIRST: tuple[Check, ...] = ("differ", "unknown", "match")


def pixel_hash(image: Image.Image | np.ndarray) -> str:
    """SHA-256 of an image's size and RGB pixels, in hexadecimal: the same for the image in memory and in a lossless file.

    An alpha channel is ignored. Takes 2 ms for 1024 x 1024 pixels.

    Args:
        image: a PIL image, or uint8 ``[H, W, C]`` with at least three channels.

    Raises:
        ValueError: if an array is of another type or shape.
    """
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.width}x{image.height} RGB ".encode())
        for top in range(0, image.height, _ROWS):
            rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
            digest.update((rows if rows.mode == "RGB" else rows.convert("RGB")).tobytes())
        return digest.hexdigest()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] < 3:
        raise ValueError(f"pixels are uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    digest = hashlib.sha256(f"{image.shape[1]}x{image.shape[0]} RGB ".encode())
    digest.update(np.ascontiguousarray(image[..., :3]).data)
    return digest.hexdigest()


def record(
    traces: Sequence[Trace],
    *,
    pixels: Sequence[str] | None,
    settings: Any,
    settings_in: str | None,
    images: Sequence[int | None] | None = None,
    runs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The evidence record of an image or of a batch, JSON-ready.

    Args:
        traces: of the images.
        pixels: :func:`pixel_hash` of each image of the batch; ``None`` if they are not known.
        settings: what the images were made with, a text or JSON-ready; ``None`` if it is not known.
        settings_in: name of the text chunk in which the image's PNG holds the same settings.
        images: for each trace the number of its image in the batch, from 0, or ``None`` if it is about all of them. If not
            given, there is either one trace for each of ``pixels``, or every trace is about all images.
        runs: for each trace a name of its run for people (``"hires"``); empty if not given.
    """
    if images is None:
        images = range(len(traces)) if pixels is not None and len(pixels) == len(traces) else [None] * len(traces)
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "statement": STATEMENT,
        "traces": [trace.to_dict() for trace in traces],
        "images": list(images),
        "runs": [""] * len(traces) if runs is None else list(runs),
        "pixels": None if pixels is None else list(pixels),
        "settings": None if settings is None else content_hash(settings),
        "settings_in": settings_in,
    }
    return content | {"content_hash": content_hash(content)}


def png(image: Image.Image, record: Mapping[str, Any], settings: Any = None) -> bytes:
    """``image`` as a PNG file that carries ``record``, and ``settings`` as JSON under :data:`SETTINGS_KEY` if given."""
    text = PngInfo()
    text.add_text(KEY, json.dumps(record, allow_nan=False))
    if settings is not None:
        text.add_text(SETTINGS_KEY, json.dumps(settings))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def own_png(image: Image.Image, trace: Trace, settings: Any) -> bytes:
    """An image of our own making as PNG, with the record of its one run and the settings it was made with (JSON-ready)."""
    return png(image, record([trace], pixels=[pixel_hash(image)], settings=settings, settings_in=SETTINGS_KEY), settings)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        traces: of this image, or of the whole batch if it is not known which image of the batch this is.
        runs: for each trace the name of its run, or ``""``. images: for each trace the number of its image in the batch, from
            0, or ``None`` if it is about all of them.
        pixels: whether the pixels are those that the record was made for; ``"unknown"`` if none were recorded, or if the file
            format may have changed them.
        settings: whether the settings in the file are those that the record was made for; ``"unknown"`` if none were recorded,
            or if the file holds none.
        unaltered: whether the record is as it was written.
        image: number of this image in its batch, from 0. batch: number of images in the batch. ``None`` if unknown.
        found_in: the file that holds the record.
    """

    traces: tuple[Trace, ...]
    runs: tuple[str, ...]
    images: tuple[int | None, ...]
    pixels: Check
    settings: Check
    unaltered: bool
    image: int | None
    batch: int | None
    found_in: Path

    @property
    def belongs(self) -> Check:
        """Whether the traces belong to the image: ``"differ"`` if anything differs, else the answer for the pixels."""
        return "differ" if not self.unaltered or "differ" in (self.pixels, self.settings) else self.pixels


def verify(path: str | Path) -> Verification:
    """Checks an image against the record that it carries, or that lies beside it under its name with :data:`SIDECAR`.

    An image may carry several records (in ComfyUI one for each report node). Those whose pixels match are used; if there are
    none, those without pixels; else all. If any record was altered, the answer is that the traces do not belong to the image.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ContentError: if it is no image, or it or the record beside it is too large.
        EvidenceError: if it has no record, or one that is damaged or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image at {path}")
    kind, pixels, text = _read_image(path)
    found_in, source = path, text.get(KEY)
    if not source:
        found_in = path.with_suffix(SIDECAR)
        if not found_in.is_file():
            raise EvidenceError(f"{path.name} carries no trace, and there is no {found_in.name} beside it")
        source = read_whole(found_in).decode("utf-8", "replace")
    checked = [_check(data, kind, pixels, text, found_in) for data in _records(source, found_in.name)]
    # The best answer about the pixels counts, since the other records may be of other images of the same workflow.
    best = max((each.pixels for each in checked), key=_WORST_FIRST.index)
    ours = [each for each in checked if each.pixels == best]
    places = {(each.image, each.batch) for each in ours}
    image, batch = places.pop() if len(places) == 1 else (None, None)
    return Verification(
        traces=tuple(trace for each in ours for trace in each.traces),
        runs=tuple(run for each in ours for run in each.runs),
        images=tuple(number for each in ours for number in each.images),
        pixels=best,
        settings=min((each.settings for each in ours), key=_WORST_FIRST.index),
        unaltered=all(each.unaltered for each in checked),
        image=image,
        batch=batch,
        found_in=found_in,
    )


def _read_image(path: Path) -> tuple[str, str, Mapping[str, str]]:
    """Format, pixel hash and text chunks of an image file."""
    with opened(path) as image:
        image.load()
        return str(image.format), pixel_hash(image), dict(getattr(image, "text", {}))


def _records(source: str, name: str) -> list[Mapping[str, Any]]:
    """The records in a text: one, or several by the name of the node that made them; refuses other formats and versions."""
    try:
        data = parse_json(source)
    except ContentError as error:
        raise EvidenceError(f"the trace in {name} is damaged: {error}") from None
    records = list(data.values()) if isinstance(data, dict) and "format" not in data else [data]
    if not records:
        raise EvidenceError(f"{name} carries no trace")
    for each in records:
        if not isinstance(each, dict) or each.get("format") != FORMAT:
            raise EvidenceError(f"what {name} holds as its trace is no evidence record: its 'format' is not {FORMAT!r}")
        if each.get("version") != FORMAT_VERSION:
            version = repr(each.get("version"))[:20]
            raise EvidenceError(
                f"the evidence record in {name} has version {version}, this version of Memorization Guard reads "
                f"{FORMAT_VERSION}: update it"
            )
    return records


def _check(data: Mapping[str, Any], kind: str, pixels: str, text: Mapping[str, str], found_in: Path) -> Verification:
    """Compares one record with an image of this format, with these pixels and text chunks."""
    rows = _rows(data)
    known = data["pixels"]
    image, batch = None, None if known is None else len(known)
    state: Check = "unknown"
    if known is not None and pixels in known:
        # Several images of a batch may be the same, such as the black images of a safety filter.
        state, image = "match", known.index(pixels) if known.count(pixels) == 1 else None
    elif known is not None:
        # JPEG and most WebP files do not keep pixels.
        state, image = "differ" if kind == "PNG" else "unknown", 0 if batch == 1 else None
    rows = [row for row in rows if image is None or row[1] in (None, image)]
    if not rows:
        raise EvidenceError("the evidence record holds no trace of this image")
    return Verification(
        traces=tuple(trace for trace, _, _ in rows),
        images=tuple(number for _, number, _ in rows),
        runs=tuple(run for _, _, run in rows),
        pixels=state,
        settings=_check_settings(data["settings"], text.get(data["settings_in"])),
        unaltered=_has_hash({name: each for name, each in data.items() if name != "content_hash"}, data.get("content_hash")),
        image=image,
        batch=batch,
        found_in=found_in,
    )


def _check_settings(known: str | None, written: str | None) -> Check:
    if known is None or written is None:
        return "unknown"
    if _has_hash(written, known):
        return "match"
    try:
        return "match" if _has_hash(parse_json(written), known) else "differ"
    except ContentError:
        return "differ"


def _has_hash(content: Any, known: str | None) -> bool:
    return content_hash(content) == known


def _rows(data: Mapping[str, Any]) -> list[tuple[Trace, int | None, str]]:
    """The traces of a record with their images and runs; refuses a record that is not built like ours."""

    def either(value: Any, kind: type) -> bool:
        return value is None or type(value) is kind

    try:
        rows = list(zip(data["traces"], data["images"], data["runs"], strict=True))
        whole = all(either(number, int) and type(run) is str for _, number, run in rows) and bool(rows)
        whole &= either(data["pixels"], list) and all(type(each) is str for each in data["pixels"] or ())
        whole &= either(data["settings"], str) and either(data["settings_in"], str)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise EvidenceError("the evidence record is incomplete or damaged")
    try:
        traces = [Trace.from_dict(trace) for trace, _, _ in rows]
        for trace in traces:
            trace.to_dict()  # computes the scores, which fails for numbers that no run can have
    except (ArithmeticError, ValueError) as error:
        raise EvidenceError(f"a trace of the evidence record cannot be read: {error}") from None
    return [(trace, number, run) for trace, (_, number, run) in zip(traces, rows, strict=True)]
