"""What the pages of one audit and of two have in common."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from ..audit.dataset import facts
from ..core.trace import Trace
from ..files import path_inside
from ..pictures import opened
from . import charts
from .html import graph_script, page
from .rendering import render
from .words import summary

#: Longer side of an image in a page, in pixels.
THUMBNAIL = 256


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG, in base64."""

    width: int
    height: int
    data: str


def thumbnail(folder: Path, file: str | None) -> Thumbnail | str:
    """A saved image of an audit, or a sentence that says why it is not shown."""
    if not file:
        return "image not saved"
    try:
        with opened(path_inside(folder, file)) as image:
            return small(image)
    except (OSError, ValueError):
        return f"image {file} is missing or cannot be read"


def small(image: Image.Image) -> Thumbnail:
    """An image for a page; ``image`` itself becomes as small."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small = image.convert("RGB")
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return Thumbnail(small.width, small.height, base64.b64encode(buffer.getvalue()).decode())


def run_summary(trace: Trace | None) -> str | None:
    """What stands where the script draws a graph until it does, and where scripts do not run."""
    return None if trace is None else summary(trace)


def share(value: float | None) -> str:
    """A share, or a difference of shares, in percent, with two digits of its distance from 0 or 100, whichever is nearer."""
    if value is None:
        return "-"
    edge = 100 * min(abs(value), 1 - abs(value))
    places = max(1, 1 - math.floor(math.log10(edge))) if edge > 1e-9 else 0
    return f"{100 * value:.{places}f} %"


def interval(ends: Sequence[float] | None) -> str:
    """An interval of shares in percent."""
    return "-" if ends is None else f"{share(ends[0])} to {share(ends[1])}"


def audit_page(
    title: str, template: str, manifests: Sequence[Mapping[str, Any]], data: Mapping[str, object], **values: Any
) -> str:
    """A page about one audit or two.

    Args:
        title: of the page.
        template: its body.
        manifests: of the audits.
        data: what the script reads, by the id of the element that holds it; compressed.
        values: what the template shows.
    """
    body = render(template, share=share, interval=interval, audited=audited(manifests), **values)
    packed = {name: _packed(value) for name, value in data.items()}
    look, script = charts.STYLE + resource("audit.css"), graph_script() + resource("audit.js")
    return page(title, body, style=look, data=packed, script=script)


def audited(manifests: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, list[str]]]]:
    """What was audited: for each section its fields, each with its value in every audit."""
    known = [facts(manifest) for manifest in manifests]
    sections = dict.fromkeys(section for one in known for section in one)
    return {
        section: [
            (name, [one.get(section, {}).get(name, "-") for one in known])
            for name in dict.fromkeys(name for one in known for name in one.get(section, {}))
        ]
        for section in sections
    }


def _packed(value: object) -> str:
    """JSON, compressed, as text; the page's script unpacks it."""
    content = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def resource(name: str) -> str:
    """The content of a file beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
