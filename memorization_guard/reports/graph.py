"""The stability graph of one trace as a picture: the size of the latent's updates, and the band of ordinary prompts.

One layout, two forms: :func:`svg` for files, :func:`image` for hosts that show pictures. The latter needs Pillow alone, from
version 9.5 on, which the WebUI has. In pages ``js/graph.js`` draws the same graph, also while a run is sampled.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.trace import Trace
from .axis import Axis

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_WIDTH, _HEIGHT = 640, 300
_AXIS_TITLE = "size of the latent update"

# Blue, vermilion and bluish green after Okabe & Ito (2008), which people with any common kind of colour vision can tell apart.
# Whatever a colour says is also said by shape or text.
LIGHT = {
    "ground": "#ffffff",
    "ink": "#1b2430",
    "muted": "#5b6675",
    "grid": "#e6eaef",
    "band": "#d3e4f4",
    "mean": "#8db5da",
    "alarm": "#bf4600",
    "corrected": "#007a5e",
}
DARK = {
    "ground": "#161b22",
    "ink": "#eef2f6",
    "muted": "#9ba7b5",
    "grid": "#29313b",
    "band": "#1d3d5c",
    "mean": "#4a80b3",
    "alarm": "#ff9455",
    "corrected": "#3ddcae",
}


@dataclass(frozen=True)
class _Style:
    """How a role is drawn: palette names of fill and stroke, stroke width or font size in pixels, radius of a dot."""

    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    radius: float = 0.0
    font: float = 0.0


_STYLES = {
    "ground": _Style(fill="ground"),
    "band": _Style(fill="band"),
    "grid": _Style(stroke="grid"),
    "mean": _Style(stroke="mean", width=1.2),
    "axis": _Style(stroke="muted"),
    "trigger": _Style(stroke="alarm", width=1.2),
    "broken": _Style(stroke="muted", width=1.2),
    "run": _Style(stroke="ink", width=1.8),
    "point": _Style(fill="ink", radius=1.5),
    "corrected": _Style(fill="corrected", radius=2.2),
    "badge": _Style(stroke="muted"),
    "badge-alarm": _Style(stroke="alarm"),
    "badge-solid": _Style(fill="alarm", stroke="alarm"),
    "caption": _Style(fill="ink", font=12),
    "caption-alarm": _Style(fill="alarm", font=12),
    "caption-solid": _Style(fill="ground", font=12),
    "tick": _Style(fill="muted", font=11),
    "label-trigger": _Style(fill="alarm", font=11),
}

#: Roles of the badge and its text, for each verdict.
_BADGES = {
    "stable": ("badge", "caption"),
    "corrected": ("badge-alarm", "caption-alarm"),
    "likely copy": ("badge-solid", "caption-solid"),
    "mild": ("badge-alarm", "caption-alarm"),
    "strong": ("badge-solid", "caption-solid"),
    "unscored": ("badge", "tick"),
}


@dataclass(frozen=True)
class _Shape:
    """One thing to draw, in pixels from the upper left corner. A text stands on the baseline at its only point."""

    kind: Literal["area", "line", "dot", "badge", "text"]
    role: str
    points: Sequence[tuple[float, float]]
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"


def svg(trace: Trace) -> str:
    """The graph as one ``<svg>`` element of 640 x 300 pixels, which follows the reader's light or dark theme."""
    size = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "width": str(_WIDTH), "height": str(_HEIGHT)}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "mg-graph", "role": "img", **size})

    def add(tag: str, text: str | None = None, **attributes: object) -> None:
        written = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
        element = ET.SubElement(root, tag, written)
        # XML cannot hold these characters at all.
        element.text = text and re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)

    add("title", "Stability graph: " + ", ".join(filter(None, (trace.verdict, _score(trace)))))
    add("desc", _description(trace))
    add("style", _css())
    for shape in _layout(trace, _WIDTH, _HEIGHT):
        role, points = f"mg-{shape.role}", [(round(float(x), 1), round(float(y), 1)) for x, y in shape.points]
        (x, y), (x_end, y_end) = points[0], points[-1]
        if shape.kind == "text":
            add("text", shape.text, class_=role, x=x, y=y, text_anchor=shape.anchor)
        elif shape.kind == "dot":
            add("circle", class_=role, cx=x, cy=y, r=_STYLES[shape.role].radius)
        elif shape.kind == "badge":
            add("rect", class_=role, x=x, y=y, width=x_end - x, height=y_end - y, rx=(y_end - y) / 2)
        else:
            path = " ".join(f"{x},{y}" for x, y in points)
            add("polygon" if shape.kind == "area" else "polyline", class_=role, points=path)
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
    for role, look in _STYLES.items():
        rule = f"fill:{f'var(--mg-{look.fill})' if look.fill else 'none'};"
        rule += f"stroke:var(--mg-{look.stroke});stroke-width:{look.width:g};" if look.stroke else ""
        rule += f"font-size:{look.font:g}px;" if look.font else ""
        rules.append(f".mg-{role}{{{rule}}}")
    return "".join(rules)


def image(trace: Trace, width: int = _WIDTH, height: int = _HEIGHT) -> Image.Image:
    """The graph as an RGB image of ``width`` x ``height`` pixels, in the light theme.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: for a size below 240 x 140.
    """
    from PIL import Image, ImageDraw

    shapes = _layout(trace, width, height)
    # Pillow draws lines and circles with hard edges. So they are drawn three times as large, and averaged.
    scale = 3
    canvas = Image.new("RGB", (width * scale, height * scale), LIGHT["ground"])
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        look = _STYLES[shape.role]
        fill, stroke = LIGHT.get(look.fill or ""), LIGHT.get(look.stroke or "")
        points = [(x * scale, y * scale) for x, y in shape.points]
        if shape.kind == "area":
            draw.polygon(points, fill=fill)
        elif shape.kind == "line":
            draw.line(points, fill=stroke, width=round(look.width * scale), joint="curve")
        elif shape.kind == "dot":
            (x, y), r = points[0], look.radius * scale
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape.kind == "badge":
            box = (*points[0], *points[1])
            draw.rounded_rectangle(box, radius=(box[3] - box[1]) / 2, fill=fill, outline=stroke, width=scale)
    canvas = canvas.reduce(scale)

    # Texts are smooth already, so they are drawn last, at their own size.
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        if shape.kind == "text":
            look = _STYLES[shape.role]
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


def _layout(trace: Trace, width: int, height: int) -> list[_Shape]:
    """Everything the graph shows, in the order it is painted."""
    if width < 240 or height < 140:
        raise ValueError(f"a graph of {width} x {height} pixels is not readable: give at least 240 x 140")

    steps, norm = len(trace.steps), trace.steps.update_norm
    band = trace.bands.get("update", {"mean": np.full(steps, np.nan), "std": np.full(steps, np.nan)})
    half = trace.thresholds.gamma * band["std"]
    low, high = np.maximum(band["mean"] - half, 0.0), band["mean"] + half

    left, right, top, bottom = 44.0, width - 14.0, 48.0, height - 40.0
    axis = _vertical_axis(norm, low, high, top, bottom)
    shapes = [_Shape("area", "ground", [(0, 0), (width, 0), (width, height), (0, height)])]
    shapes += _heading(trace, right, f"{_AXIS_TITLE}, log scale" if axis is not None and axis.log else _AXIS_TITLE)
    if axis is None:
        text = "no norm of this run is a number" if steps else "no step was recorded"
        return [*shapes, _Shape("text", "tick", [(width / 2, (top + bottom) / 2)], text, "middle")]

    x = left + (right - left) * np.arange(steps) / max(steps - 1, 1)
    y, y_low, y_high, y_mean = (axis(values) for values in (norm, low, high, band["mean"]))
    for part in _stretches(np.isfinite(y_high)):
        edge = [*zip(x[part], y_high[part], strict=True), *reversed(list(zip(x[part], y_low[part], strict=True)))]
        shapes.append(_Shape("area", "band", edge))
    for value in axis.ticks():
        at = float(axis(value))
        shapes.append(_Shape("line", "grid", [(left, at), (right, at)]))
        shapes.append(_Shape("text", "tick", [(left - 7, at + 4)], f"{value:g}", "end"))
    shapes += _step_axis(x, bottom, right)
    shapes += _lines("mean", x, y_mean)
    shapes += _marks(trace, x, top, bottom, right)
    shapes += _lines("run", x, y)
    shapes += [_Shape("dot", "corrected", [(x[i], y[i])]) for i in np.flatnonzero(trace.steps.mitigated & np.isfinite(y))]
    return shapes + _legend(trace, height - 8.0, right)


def _heading(trace: Trace, right: float, axis_title: str) -> list[_Shape]:
    """The verdict with its number, and the title of the vertical axis if there is room for it."""
    badge, text = _BADGES[trace.verdict]
    end = 10 + _text_width(trace.verdict) + 18
    shapes = [
        _Shape("badge", badge, [(10, 7), (end, 25)]),
        _Shape("text", text, [((10 + end) / 2, 20)], trace.verdict, "middle"),
    ]
    if words := _score(trace):
        shapes.append(_Shape("text", "caption", [(end + 8, 20)], words))
    if end + _text_width(words) + _text_width(axis_title) + 16 < right:
        shapes.append(_Shape("text", "tick", [(right, 20)], axis_title, "end"))
    return shapes


def _step_axis(x: np.ndarray, bottom: float, right: float) -> list[_Shape]:
    shapes = [_Shape("line", "axis", [(float(x[0]), bottom), (right, bottom)])]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(x) / n <= 8)
    for i in range(0, len(x), every):
        shapes.append(_Shape("line", "axis", [(x[i], bottom), (x[i], bottom + 3)]))
        if x[i] < right - 30 or i == 0:  # "step" stands at the right end
            shapes.append(_Shape("text", "tick", [(x[i], bottom + 15)], str(i), "middle"))
    return [*shapes, _Shape("text", "tick", [(right, bottom + 15)], "step", "end")]


def _marks(trace: Trace, x: np.ndarray, top: float, bottom: float, right: float) -> list[_Shape]:
    """Vertical lines with labels: where the run triggered, and where it was no number any more."""
    shapes = []
    marks = [
        ("trigger", "label-trigger", trace.trigger_step, "trigger at step"),
        ("broken", "tick", trace.nonfinite_step, "not a number from step"),
    ]
    for role, text_role, step, words in marks:
        if step is None:
            continue
        at, text, y = float(x[step]), f"{words} {step}", top - 6
        shapes.append(_Shape("line", role, [(at, y - 8), (at, bottom)]))
        fits = at + 5 + _text_width(text) < right
        shapes.append(_Shape("text", text_role, [(at + (5 if fits else -5), y)], text, "start" if fits else "end"))
        top += 14  # a second label stands below the first one
    return shapes


def _legend(trace: Trace, y: float, right: float) -> list[_Shape]:
    """What is drawn, in one row below the plot."""
    entries: list[tuple[Literal["line", "dot", "area"], str, str]] = [("line", "run", "this run")]
    if trace.steps.mitigated.any():
        entries.append(("dot", "corrected", "corrected"))
    if "update" in trace.bands:
        entries.append(("area", "band", f"mean ± {trace.thresholds.gamma:g} sd"))
        count = f" of {trace.reference_count} reference runs"
        wide = sum(38 + _text_width(words) for _, _, words in entries) + _text_width(count)
        if trace.reference_count and wide < right:
            entries[-1] = ("area", "band", entries[-1][2] + count)
    shapes, x = [], 10.0
    swatches = {"line": [(0, -4), (18, -4)], "dot": [(9, -4)], "area": [(0, -8), (18, -8), (18, 0), (0, 0)]}
    for kind, role, words in entries:
        shapes.append(_Shape(kind, role, [(x + dx, y + dy) for dx, dy in swatches[kind]]))
        shapes.append(_Shape("text", "tick", [(x + 24, y)], words))
        x += 38 + _text_width(words)
    return shapes


def _lines(role: str, x: np.ndarray, y: np.ndarray) -> list[_Shape]:
    """A line with gaps where ``y`` is NaN. A single value between two gaps is drawn as a point."""
    shapes = []
    for part in _stretches(np.isfinite(y)):
        points = list(zip(x[part], y[part], strict=True))
        shapes.append(_Shape("line", role, points) if len(points) > 1 else _Shape("dot", "point", points))
    return shapes


def _stretches(there: np.ndarray) -> list[slice]:
    """Where ``[steps]`` bool is true, as slices without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2)]


def _vertical_axis(run: np.ndarray, band_low: np.ndarray, band_high: np.ndarray, top: float, bottom: float) -> Axis | None:
    """The axis for a run and its band; ``None`` if nothing is finite.

    It is logarithmic where the values stretch over more than a decade, as in some schedules: a linear axis would press the end
    of the run flat.
    """
    values = np.concatenate([run, band_low, band_high])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    high = float(values.max())
    if np.isfinite(band_high).any():
        high = min(high, 20 * float(np.nanmax(band_high)))  # a latent that exploded must not hide the band
    high = high if high > 0 else 1.0
    # The band decides, if there is one. Values near zero in a few steps do not count: a last step that hardly moves, say.
    band = np.concatenate([band_low, band_high])
    known = band[np.isfinite(band)] if np.isfinite(band).any() else values
    if 0 < np.quantile(known, 0.1) < known.max() / 12:
        floor = float(values[values > 0].min())
        return Axis(max(floor, high / 1000) / 1.15, high * 1.15, bottom, top, log=True)
    low = float(values.min())
    low = 0.0 if low < high / 2 else low - 0.08 * (high - low) - 1e-3 * high
    return Axis(low, high + 0.08 * (high - low), bottom, top)


def _text_width(text: str) -> float:
    """The approximate width of a text of 12 pixels. The layout does not know the font that will be used."""
    return 6.4 * len(text)


def _score(trace: Trace) -> str:
    """The number beside the verdict: how rare the run is among ordinary images, else S_mem."""
    if trace.rarity is not None:
        return trace.rarity
    if trace.score is None:
        return ""
    return f"S_mem {trace.score:.1f}" if trace.score < 1000 else f"S_mem {trace.score:.2g}"


def _description(trace: Trace) -> str:
    """What readers who do not see the graph should know."""
    parts = [f"The {_AXIS_TITLE} over {len(trace.steps)} sampling steps"]
    if trace.bands:
        parts[0] += f", against the mean plus and minus {trace.thresholds.gamma:g} standard deviations of reference runs"
    if trace.trigger_step is not None:
        parts.append(f"The run triggered at step {trace.trigger_step}")
    if trace.mitigated.any():
        parts.append(f"{int(trace.mitigated.sum())} steps were corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"From step {trace.nonfinite_step} on the latent is not a number")
    if trace.note:
        parts.append(trace.note.rstrip("."))
    return ". ".join(parts) + "."


def overlay(image: Image.Image, trace: Trace) -> Image.Image:
    """``image`` in grey, with the trace's local map laid over it in red: the redder, the more detail.

    Red begins at 2 standard deviations above ordinary prompts and is strongest at 6. It marks what the prompt settles in noise
    alone; of a template, the fixed part.

    Raises:
        ValueError: if the trace has no map (it needs a profile with reference runs, and a latent with places).
    """
    from PIL import Image

    if not trace.local_map.size:
        raise ValueError("the trace has no local map: it was made without a profile that fits, or of a latent without places")
    strength = np.clip((np.nan_to_num(trace.local_map) - 2) / 4, 0, 1)
    mask = Image.fromarray((strength * 200).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, (214, 40, 40)), grey, mask)
