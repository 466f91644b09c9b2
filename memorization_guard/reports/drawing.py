"""What the stability graph is painted with: its colours, its shapes, and two ways to paint them, as SVG and as pixels.

:func:`pixels` needs Pillow alone, from version 9.5 on, which the WebUI has.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image, ImageFont

# Blue, vermilion and bluish green after Okabe & Ito (2008), which people with any common kind of colour vision can tell apart.
# Whatever a colour says is also said by shape or text. The same colours are in js/graph.js.
LIGHT = {
    "ground": "#ffffff",
    "ink": "#1b2430",
    "muted": "#5b6675",
    "grid": "#e6eaef",
    "band": "#d3e4f4",
    "wide": "#edf4fa",
    "mean": "#8db5da",
    "reference": "#31689b",
    "alarm": "#bf4600",
    "corrected": "#007a5e",
}
DARK = {
    "ground": "#161b22",
    "ink": "#eef2f6",
    "muted": "#9ba7b5",
    "grid": "#29313b",
    "band": "#1d3d5c",
    "wide": "#192a3c",
    "mean": "#4a80b3",
    "reference": "#8fc1ee",
    "alarm": "#ff9455",
    "corrected": "#3ddcae",
}


@dataclass(frozen=True)
class Style:
    """How a role is drawn: palette names of fill and stroke, stroke width or font size in pixels, radius of a mark."""

    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    radius: float = 0.0
    font: float = 0.0


STYLES = {
    "ground": Style(fill="ground"),
    "band": Style(fill="band"),
    "wide": Style(fill="wide"),
    "grid": Style(stroke="grid"),
    "mean": Style(stroke="mean", width=1.2),
    "axis": Style(stroke="muted"),
    "threshold": Style(stroke="alarm", width=1.2),
    "trigger": Style(stroke="alarm", width=1.2),
    "broken": Style(stroke="muted", width=1.2),
    "run": Style(stroke="ink", width=1.8),
    "point": Style(fill="ink", radius=1.5),
    "corrected": Style(fill="corrected", radius=2.2),
    "mark-plain": Style(fill="reference", stroke="ground", radius=5),
    "mark-outlined": Style(fill="ground", stroke="alarm", width=2.2, radius=4.4),
    "mark-solid": Style(fill="alarm", stroke="ground", radius=5),
    "key": Style(fill="muted", radius=3.6),
    "badge": Style(stroke="muted"),
    "badge-outlined": Style(stroke="alarm"),
    "badge-solid": Style(fill="alarm", stroke="alarm"),
    "caption": Style(fill="ink", font=12),
    "caption-outlined": Style(fill="alarm", font=12),
    "caption-solid": Style(fill="ground", font=12),
    "tick": Style(fill="muted", font=11),
    "label-trigger": Style(fill="alarm", font=11),
}


@dataclass(frozen=True)
class Shape:
    """One thing to draw, in pixels from the upper left corner. A text stands on the baseline at its only point."""

    kind: Literal["area", "line", "dot", "diamond", "badge", "text"]
    role: str
    points: Sequence[tuple[float, float]]
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"


def text_width(text: str) -> float:
    """The approximate width of a text of 12 pixels. A layout does not know the font that will be used."""
    return 6.4 * len(text)


def tick_width(text: str) -> float:
    """As :func:`text_width`, of a text of 11 pixels."""
    return 5.9 * len(text)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """The corners of a diamond, of about the area of a dot of the same role."""
    (x, y), r = shape.points[0], 1.3 * STYLES[shape.role].radius
    return [(x - r, y), (x, y - r), (x + r, y), (x, y + r)]


def vector(shapes: Sequence[Shape], width: int, height: int, title: str, description: str) -> str:
    """The shapes as one ``<svg>`` element, which follows the reader's light or dark theme."""
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "mg-graph", "role": "img", **size})

    def add(tag: str, text: str | None = None, **attributes: object) -> None:
        written = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
        element = ET.SubElement(root, tag, written)
        # XML cannot hold these characters at all.
        element.text = text and re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)

    add("title", title)
    add("desc", description)
    add("style", _css())
    for shape in shapes:
        role = f"mg-{shape.role}"
        corners = _outline(shape) if shape.kind == "diamond" else shape.points
        points = [(round(float(x), 1), round(float(y), 1)) for x, y in corners]
        (x, y), (x_end, y_end) = points[0], points[-1]
        if shape.kind == "text":
            add("text", shape.text, class_=role, x=x, y=y, text_anchor=shape.anchor)
        elif shape.kind == "dot":
            add("circle", class_=role, cx=x, cy=y, r=STYLES[shape.role].radius)
        elif shape.kind == "badge":
            add("rect", class_=role, x=x, y=y, width=x_end - x, height=y_end - y, rx=(y_end - y) / 2)
        else:
            path = " ".join(f"{x},{y}" for x, y in points)
            add("polyline" if shape.kind == "line" else "polygon", class_=role, points=path)
    return ET.tostring(root, encoding="unicode")


def _css() -> str:
    """The style of the graph: colours as variables ``--mg-*`` with a light and a dark value, and one class for each role."""

    def variables(palette: dict[str, str]) -> str:
        return "".join(f"--mg-{name}:{colour};" for name, colour in palette.items())

    rules = [
        f":root{{{variables(LIGHT)}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}",
        ".mg-graph{display:block;max-width:100%;height:auto;font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;"
        "stroke-linejoin:round;stroke-linecap:round}",
    ]
    for role, look in STYLES.items():
        rule = f"fill:{f'var(--mg-{look.fill})' if look.fill else 'none'};"
        rule += f"stroke:var(--mg-{look.stroke});stroke-width:{look.width:g};" if look.stroke else ""
        rule += f"font-size:{look.font:g}px;" if look.font else ""
        rules.append(f".mg-{role}{{{rule}}}")
    return "".join(rules)


def pixels(shapes: Sequence[Shape], width: int, height: int) -> Image.Image:
    """The shapes as an RGB image of ``width`` x ``height`` pixels, in the light theme.

    Raises:
        ImportError: if Pillow is missing.
    """
    from PIL import Image, ImageDraw

    # Pillow draws lines and circles with hard edges. So they are drawn three times as large, and averaged.
    scale = 3
    canvas = Image.new("RGB", (width * scale, height * scale), LIGHT["ground"])
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        look = STYLES[shape.role]
        fill, stroke = LIGHT.get(look.fill or ""), LIGHT.get(look.stroke or "")
        corners = _outline(shape) if shape.kind == "diamond" else shape.points
        points = [(x * scale, y * scale) for x, y in corners]
        if shape.kind == "area":
            draw.polygon(points, fill=fill)
        elif shape.kind == "line":
            draw.line(points, fill=stroke, width=round(look.width * scale), joint="curve")
        elif shape.kind == "diamond":
            draw.polygon(points, fill=fill)
            if stroke:
                draw.line([*points, *points[:2]], fill=stroke, width=round(look.width * scale), joint="curve")
        elif shape.kind == "dot":
            (x, y), r = points[0], (look.radius + (look.width / 2 if look.stroke else 0)) * scale
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=stroke, width=round(look.width * scale))
        elif shape.kind == "badge":
            box = (*points[0], *points[1])
            draw.rounded_rectangle(box, radius=(box[3] - box[1]) / 2, fill=fill, outline=stroke, width=scale)
    canvas = canvas.reduce(scale)

    # Texts are smooth already, so they are drawn last, at their own size.
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        if shape.kind == "text":
            look = STYLES[shape.role]
            font, ascent = font_of(look.font)
            x, y = shape.points[0]
            x -= font.getlength(shape.text) * {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor]
            draw.text((round(x), round(y - ascent)), shape.text, fill=LIGHT[look.fill or "ink"], font=font)
    return canvas


def font_of(size: float) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, float]:
    """A font that every machine has, and the distance from its top to its baseline."""
    from PIL import ImageFont, features

    if features.check("freetype2"):
        try:
            font = ImageFont.load_default(size)
        except TypeError:  # Pillow before 10.1 has one bitmap font of one size
            return ImageFont.load_default(), 9
        if isinstance(font, ImageFont.FreeTypeFont):
            return font, font.getmetrics()[0]
    return ImageFont.load_default(), 9
