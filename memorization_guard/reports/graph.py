"""The stability graph of one trace: the run against the region that ordinary prompts stay in.

One layout, two backends. :func:`svg` is for files, :func:`image` for hosts that show pictures; the latter needs Pillow alone,
of any version from 9.5 on, since that is what the WebUI ships. In pages ``js/graph.js`` draws the same, live.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ..core.trace import Trace, rarity

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Quantity = Literal["update", "denoised", "latent"]

_AXIS_TITLES = {
    "update": "size of the latent update",
    "denoised": "size of the predicted image",
    "latent": "size of the latent",
}

# Blue, vermilion and bluish green after Okabe & Ito (2008), told apart by every common kind of colour vision. Whatever a
# colour says is also said by shape or text.
LIGHT = {
    "ground": "#ffffff",
    "ink": "#1b2430",
    "muted": "#5b6675",
    "grid": "#e6eaef",
    "band": "#d3e4f4",
    "reference": "#31689b",
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
    "reference": "#8fc1ee",
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
    "pull": _Style(stroke="alarm"),
    "run": _Style(stroke="ink", width=1.8),
    "point": _Style(fill="ink", radius=1.5),
    "proposed": _Style(fill="ground", stroke="alarm", width=1.2, radius=2.2),
    "corrected": _Style(fill="corrected", radius=2.6),
    "badge": _Style(stroke="muted"),
    "badge-alarm": _Style(stroke="alarm"),
    "badge-solid": _Style(fill="alarm", stroke="alarm"),
    "caption": _Style(fill="ink", font=12),
    "caption-alarm": _Style(fill="alarm", font=12),
    "caption-solid": _Style(fill="ground", font=12),
    "tick": _Style(fill="muted", font=11),
    "label-run": _Style(fill="ink", font=11),
    "label-reference": _Style(fill="reference", font=11),
    "label-proposed": _Style(fill="alarm", font=11),
    "label-corrected": _Style(fill="corrected", font=11),
}

_BADGES = {
    "stable": ("badge", "caption"),
    "mild": ("badge-alarm", "caption-alarm"),
    "strong": ("badge-solid", "caption-solid"),
    "unscored": ("badge", "tick"),
}


@dataclass(frozen=True)
class _Shape:
    """One thing to draw, in pixels from the upper left; text stands on the baseline at its only point."""

    kind: Literal["area", "line", "dot", "badge", "text"]
    role: str
    points: Sequence[tuple[float, float]]
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"


def svg(trace: Trace, width: int = 640, height: int = 300, *, quantity: Quantity = "update") -> str:
    """The graph as one ``<svg>`` element; it fills the width it is given and follows the reader's light or dark theme.

    Args:
        trace: what to draw; without a reference in it, the lines alone are drawn.
        width, height: size of the drawing in pixels, at which its text has its natural size.
        quantity: which norm.

    Raises:
        ValueError: for an unknown quantity, or a size below 240 x 140.
    """
    body = []
    for shape in _layout(trace, width, height, quantity):
        look, points = f'class="mg-{shape.role}"', [(round(x, 1), round(y, 1)) for x, y in shape.points]
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        (x, y), (x_end, y_end) = points[0], points[-1]
        if shape.kind == "text":
            body.append(f'<text {look} x="{x:g}" y="{y:g}" text-anchor="{shape.anchor}">{_text(shape.text)}</text>')
        elif shape.kind == "dot":
            body.append(f'<circle {look} cx="{x:g}" cy="{y:g}" r="{_STYLES[shape.role].radius:g}"/>')
        elif shape.kind == "badge":
            size = f'width="{x_end - x:g}" height="{y_end - y:g}" rx="{(y_end - y) / 2:g}"'
            body.append(f'<rect {look} x="{x:g}" y="{y:g}" {size}/>')
        else:
            element = "polygon" if shape.kind == "area" else "polyline"
            body.append(f'<{element} {look} points="{path}"/>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="mg-graph" role="img" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">',
            f"<title>Stability graph: {_text(_caption(trace))}</title>",
            f"<desc>{_text(_description(trace, quantity))}</desc>",
            f"<style>{_style()}</style>",
            *body,
            "</svg>",
        ]
    )


def _style() -> str:
    """The CSS of the graph: colours as variables ``--mg-*`` with a light and a dark value, one class a role."""

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


def image(
    trace: Trace, width: int = 640, height: int = 300, *, quantity: Quantity = "update", dark: bool = False
) -> Image.Image:
    """The graph as an RGB image of ``width`` x ``height`` pixels, in the dark or the light theme.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: for an unknown quantity, or a size below 240 x 140.
    """
    from PIL import Image, ImageDraw

    shapes, palette = _layout(trace, width, height, quantity), DARK if dark else LIGHT
    # Pillow draws lines and circles with hard edges: draw them three times as large, and average.
    scale = 3
    canvas = Image.new("RGB", (width * scale, height * scale), palette["ground"])
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        look = _STYLES[shape.role]
        fill, stroke = palette.get(look.fill or ""), palette.get(look.stroke or "")
        points = [(x * scale, y * scale) for x, y in shape.points]
        if shape.kind == "area":
            draw.polygon(points, fill=fill)
        elif shape.kind == "line":
            draw.line(points, fill=stroke, width=round(look.width * scale), joint="curve")
        elif shape.kind == "dot":
            (x, y), r, edge = points[0], look.radius * scale, round(look.width * scale)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=stroke, width=edge if stroke else 0)
        elif shape.kind == "badge":
            box = (*points[0], *points[1])
            draw.rounded_rectangle(box, radius=(box[3] - box[1]) / 2, fill=fill, outline=stroke, width=scale)
    canvas = canvas.reduce(scale)

    # Text comes last and at its own size: it is antialiased already, and nothing lies over it.
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        if shape.kind == "text":
            look = _STYLES[shape.role]
            font, ascent = _font(look.font)
            x, y = shape.points[0]
            x -= font.getlength(shape.text) * {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor]
            draw.text((round(x), round(y - ascent)), shape.text, fill=palette[look.fill or "ink"], font=font)
    return canvas


def _font(size: float) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, float]:
    """A font that is there on every machine, and the height of its baseline below its top."""
    from PIL import ImageFont, features

    if features.check("freetype2"):
        try:
            font = ImageFont.load_default(size)
        except TypeError:  # Pillow before 10.1 has one bitmap font of one size, and no other
            return ImageFont.load_default(), 9
        if isinstance(font, ImageFont.FreeTypeFont):
            return font, font.getmetrics()[0]
    return ImageFont.load_default(), 9


def _layout(trace: Trace, width: int, height: int, quantity: Quantity) -> list[_Shape]:
    """Everything the graph shows, in the order it is painted."""
    if quantity not in get_args(Quantity):
        raise ValueError(f"there is no quantity {quantity!r} to draw; there are {', '.join(get_args(Quantity))}")
    if width < 240 or height < 140:
        raise ValueError(f"a graph of {width} x {height} pixels is not readable: give at least 240 x 140")

    proposed = getattr(trace, f"{quantity}_norm")
    after = getattr(trace, f"corrected_{quantity}_norm", np.full(trace.steps, np.nan))
    corrected = np.isfinite(after)
    taken = np.where(corrected, after, proposed)
    band = trace.bands.get(quantity, {"mean": np.full(trace.steps, np.nan), "std": np.full(trace.steps, np.nan)})
    half = trace.thresholds.gamma * band["std"]
    low, high = np.maximum(band["mean"] - half, 0.0), band["mean"] + half

    left, right, top, bottom = 44.0, width - 14.0, 48.0, height - 24.0
    scale = _Scale.of(np.concatenate([proposed, taken]), low, high, top, bottom)
    shapes = [_Shape("area", "ground", [(0, 0), (width, 0), (width, height), (0, height)])]
    shapes += _heading(trace, width, f"{_AXIS_TITLES[quantity]}{', log scale' if scale is not None and scale.log else ''}")
    if scale is None:
        text = "no step was recorded" if not trace.steps else "no norm of this run is a number"
        return [*shapes, _Shape("text", "tick", [(width / 2, (top + bottom) / 2)], text, "middle")]

    x = left + (right - left) * np.arange(trace.steps) / max(trace.steps - 1, 1)
    y_low, y_high, y_mean = scale.y(low), scale.y(high), scale.y(band["mean"])
    y_proposed, y_taken = scale.y(proposed), scale.y(taken)

    for part in _runs(np.isfinite(y_high)):
        edge = [*zip(x[part], y_high[part], strict=True), *reversed(list(zip(x[part], y_low[part], strict=True)))]
        shapes.append(_Shape("area", "band", edge))
    for value in scale.ticks():
        y = float(scale.y(np.array([value]))[0])
        shapes.append(_Shape("line", "grid", [(left, y), (right, y)]))
        shapes.append(_Shape("text", "tick", [(left - 7, y + 4)], f"{value:g}", "end"))
    shapes += _step_axis(x, bottom, right)
    shapes += _lines("mean", x, y_mean)

    marks = []
    if trace.trigger_step is not None:
        marks.append((x[trace.trigger_step], "trigger", "label-proposed", f"trigger at step {trace.trigger_step}"))
    if trace.nonfinite_step is not None:
        marks.append((x[trace.nonfinite_step], "broken", "tick", f"not a number from step {trace.nonfinite_step}"))
    for row, (at, role, text_role, text) in enumerate(marks):
        # A second mark's label stands below the first one's.
        y = top - 6 + 14 * row
        shapes.append(_Shape("line", role, [(at, top - 14 + 14 * row), (at, bottom)]))
        after_mark = at + 5 + _text_width(text) < right
        anchor: Literal["start", "end"] = "start" if after_mark else "end"
        shapes.append(_Shape("text", text_role, [(at + (5 if after_mark else -5), y)], text, anchor))

    shapes += _lines("run", x, y_taken)
    for i in np.flatnonzero(corrected):
        if np.isfinite(y_proposed[i]):
            shapes.append(_Shape("line", "pull", [(x[i], y_proposed[i]), (x[i], y_taken[i])]))
            shapes.append(_Shape("dot", "proposed", [(x[i], y_proposed[i])]))
        shapes.append(_Shape("dot", "corrected", [(x[i], y_taken[i])]))

    count = f" of {trace.reference_count} runs" if trace.reference_count else ""
    labels = [
        ("label-run", "this run", np.where(corrected, np.nan, y_taken), np.where(corrected, np.nan, y_taken)),
        ("label-corrected", "corrected", *(np.where(corrected, y_taken, np.nan),) * 2),
        ("label-proposed", "before correction", *(np.where(corrected, y_proposed, np.nan),) * 2),
        ("label-reference", f"mean ± {trace.thresholds.gamma:g} sd{count}", y_high, y_low),
    ]
    obstacles = [(y_taken, y_taken), (np.where(corrected, y_proposed, np.nan), y_taken), (y_high, y_low)]
    return shapes + _place_labels(labels, obstacles, x, [mark[0] for mark in marks], (left, right, top, bottom))


def _heading(trace: Trace, width: int, axis_title: str) -> list[_Shape]:
    badge, text = _BADGES[trace.verdict]
    end = 10 + _text_width(trace.verdict) + 18
    shapes = [
        _Shape("badge", badge, [(10, 7), (end, 25)]),
        _Shape("text", text, [((10 + end) / 2, 20)], trace.verdict, "middle"),
    ]
    if words := _score(trace):
        shapes.append(_Shape("text", "caption", [(end + 8, 20)], words))
    shapes.append(_Shape("text", "tick", [(width - 14, 20)], axis_title, "end"))
    return shapes


def _step_axis(x: np.ndarray, bottom: float, right: float) -> list[_Shape]:
    shapes = [_Shape("line", "axis", [(float(x[0]), bottom), (right, bottom)])]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(x) / n <= 8)
    for i in range(0, len(x), every):
        shapes.append(_Shape("line", "axis", [(x[i], bottom), (x[i], bottom + 3)]))
        if x[i] < right - 30 or i == 0:  # the axis' own name stands there
            shapes.append(_Shape("text", "tick", [(x[i], bottom + 16)], str(i), "middle"))
    return [*shapes, _Shape("text", "tick", [(right, bottom + 16)], "step", "end")]


def _lines(role: str, x: np.ndarray, y: np.ndarray) -> list[_Shape]:
    """A line with gaps where ``y`` is NaN; a value between two gaps, which no line would show, as a point."""
    shapes = []
    for part in _runs(np.isfinite(y)):
        points = list(zip(x[part], y[part], strict=True))
        shapes.append(_Shape("line", role, points) if len(points) > 1 else _Shape("dot", "point", points))
    return shapes


def _runs(there: np.ndarray) -> list[slice]:
    """The stretches of ``[steps]`` bool that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2)]


@dataclass(frozen=True)
class _Scale:
    """The vertical axis: values from ``low`` to ``high`` over pixels from ``bottom`` to ``top``."""

    low: float
    high: float
    top: float
    bottom: float
    log: bool

    @classmethod
    def of(cls, run: np.ndarray, band_low: np.ndarray, band_high: np.ndarray, top: float, bottom: float) -> _Scale | None:
        """A scale for a run and its band; ``None`` if nothing is finite.

        Norms stretch over a decade and more in some schedules; there a linear axis would press the end of the run flat.
        """
        values = np.concatenate([run, band_low, band_high])
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        high = float(values.max())
        if np.isfinite(band_high).any():
            high = min(high, 20 * float(np.nanmax(band_high)))  # a latent that exploded must not hide the band
        high = high if high > 0 else 1.0
        # What is near zero in a few steps (a band that reaches down to it, a last step that hardly moves) does not count.
        bulk = float(np.quantile(np.minimum(values, high), 0.1))
        if 0 < bulk < high / 12:
            floor = float(values[values > 0].min())
            return cls(max(floor, high / 1000) / 1.15, high * 1.15, top, bottom, log=True)
        low = float(values.min())
        low = 0.0 if low < high / 2 else low - 0.08 * (high - low) - 1e-3 * high
        return cls(low, high + 0.08 * (high - low), top, bottom, log=False)

    def y(self, values: np.ndarray) -> np.ndarray:
        """Pixels of ``[steps]`` values; those beyond the axis are drawn on its edge."""
        transform: Callable[[np.ndarray], np.ndarray] = np.log if self.log else np.asarray
        low, high = transform(np.array([self.low, self.high]))
        with np.errstate(invalid="ignore"):
            finite = np.where(np.isfinite(values), np.clip(values, self.low, self.high), np.nan)
        return self.bottom - (self.bottom - self.top) * (transform(finite) - low) / (high - low)

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                ticks = [digit * 10.0**decade for decade in decades for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= 7:
                    break
            return ticks
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step = next(step * n for n in (5, 2, 1) if (self.high - self.low) / (step * n) >= 3)
        first = math.ceil(self.low / step)
        return [round(n * step, 10) for n in range(first, math.floor(self.high / step) + 1)]


def _place_labels(
    labels: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    obstacles: Sequence[tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    marks: Sequence[float],
    frame: tuple[float, float, float, float],
) -> list[_Shape]:
    """Sets each label directly above or below what it names, where it covers least.

    Args:
        labels: role, text, and upper and lower edge of what is named, ``[steps]`` pixels with NaN where there is none.
        obstacles: upper and lower edge of whatever should stay uncovered, likewise.
        x: pixels of the steps.
        marks: pixels of vertical marks.
        frame: left, right, top, bottom of the plot.
    """
    left, right, top, bottom = frame
    columns = np.arange(left, right, 2.0)
    nearest = np.clip(np.round((columns - x[0]) / max((x[-1] - x[0]) / max(len(x) - 1, 1), 1e-9)), 0, len(x) - 1).astype(int)

    def at_columns(edge: np.ndarray) -> np.ndarray:
        finite = np.flatnonzero(np.isfinite(edge))
        if not len(finite):
            return np.full(len(columns), np.nan)
        return np.where(np.isfinite(edge[nearest]), np.interp(columns, x[finite], edge[finite]), np.nan)

    walls = [(at_columns(upper), at_columns(lower)) for upper, lower in obstacles]
    boxes: list[tuple[float, float, float, float]] = []
    shapes = []
    for role, text, upper, lower in labels:
        if not np.isfinite(upper).any():
            continue
        wide, tall = _text_width(text) * 0.94, 13.0
        upper, lower = at_columns(upper), at_columns(lower)
        best: tuple[float, float, float] | None = None
        for x0 in np.arange(left + 3, right - wide, 4.0):
            span = (columns >= x0) & (columns <= x0 + wide)
            if not np.isfinite(upper[span]).any():
                continue
            for y0 in (np.nanmin(upper[span]) - tall - 2, np.nanmax(lower[span]) + 2):
                y1 = y0 + tall
                if y0 < top - 2 or y1 > bottom - 1:
                    continue
                covered = sum(float(np.sum((a[span] < y1 + 1) & (b[span] > y0 - 1))) for a, b in walls)
                covered += sum(50.0 for a in marks if x0 - 4 < a < x0 + wide + 4)
                covered += sum(200.0 for a in boxes if a[0] < x0 + wide + 6 and x0 < a[2] + 6 and a[1] < y1 and y0 < a[3])
                # Where the curve is level, the label lies close along all of it.
                rise = float(np.nanmax(upper[span]) - np.nanmin(upper[span])) + 20 * float(np.isnan(upper[span]).mean())
                cost = 10 * covered + rise
                if best is None or cost < best[0]:
                    best = cost, float(x0), float(y0)
        if best is not None:
            _, x0, y0 = best
            boxes.append((x0, y0, x0 + wide, y0 + tall))
            shapes.append(_Shape("text", role, [(x0, y0 + 10)], text))
    return shapes


def _text_width(text: str) -> float:
    """About how wide a text of 12 pixels is; neither backend's font is known to the layout."""
    return 6.4 * len(text)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.2g}"


def _score(trace: Trace) -> str:
    """What is said beside the verdict: how rare it is among ordinary images, else S_mem."""
    if trace.tail_probability is not None:
        return rarity(trace.tail_probability)
    return "" if trace.score is None else f"S_mem {_short(trace.score)}"


def _caption(trace: Trace) -> str:
    return ", ".join(filter(None, (trace.verdict, _score(trace))))


def overlay(image: Image.Image, trace: Trace) -> Image.Image:
    """``image`` with the trace's local map laid over it: the redder, the more of x0 stands there than in ordinary images.

    Clear up to 2 standard deviations, full at 6; the image itself shows through. What is red is what the model had settled
    while an ordinary image is still open, so that of a template the fixed part shows.

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


def _description(trace: Trace, quantity: Quantity) -> str:
    """What a reader who does not see the graph should know."""
    parts = [f"The {_AXIS_TITLES[quantity]} over {trace.steps} sampling steps"]
    if trace.bands:
        parts[0] += f", against the mean plus and minus {trace.thresholds.gamma:g} standard deviations of reference runs"
    if trace.trigger_step is not None:
        parts.append(f"The run left its stability region at step {trace.trigger_step}")
    if trace.mitigated.any():
        parts.append(f"{int(trace.mitigated.sum())} steps were corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"From step {trace.nonfinite_step} on the latent is not a number")
    if trace.note:
        parts.append(trace.note.rstrip("."))
    return ". ".join(parts) + "."


def _text(text: str) -> str:
    """``text`` as XML; characters that XML cannot hold at all become replacement characters."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))
