"""Tables and charts of our pages: HTML and SVG as text, which ask for nothing and run nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# Colours after Okabe & Ito (2008), as in graph.py; a dash pattern says the same as the colour.
SERIES = ("#31689b", "#bf4600", "#007a5e", "#8e3a86", "#7a6200", "#1c2430")
_DARK = ("#8fc1ee", "#ff9455", "#3ddcae", "#e39bdb", "#e0c14a", "#e8ecf2")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")


def _colors(palette: Sequence[str]) -> str:
    return "".join(f"--c{number}:{color};" for number, color in enumerate(palette))


_SERIES_STYLE = "".join(
    f".c{n}{{stroke:var(--c{n});fill:none;stroke-width:1.8}}.f{n}{{fill:var(--c{n});opacity:.22}}" for n in range(len(SERIES))
)

#: What tables and charts look like, after ``report.STYLE``.
STYLE = f"""
:root{{{_colors(SERIES)}}}
@media(prefers-color-scheme:dark){{:root{{{_colors(_DARK)}}}}}
article h2{{font-size:18px}}
article h3{{font-size:15px;margin:18px 0 6px;overflow-wrap:anywhere}}
article td:first-child{{min-width:150px;overflow-wrap:anywhere}}
article td.prompt{{min-width:170px;max-width:60ch}}
thead th{{color:var(--muted);font-weight:500}}
article th.number{{white-space:normal;min-width:64px}}
td.number+td:not(.number),th.number+th:not(.number){{padding-left:12px}}
th.group{{padding-top:14px}}
.interval{{color:var(--muted);font-size:12px}}
.warning{{border-left:3px solid var(--bad);padding:2px 0 2px 12px;margin:8px 0}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:16px}}
.charts figure{{margin:0;min-width:0}}
.chart{{display:block;width:100%;max-width:400px;height:auto;font:11px system-ui,sans-serif}}
.key{{list-style:none;margin:8px 0;padding:0;font-size:13px}}
.key li{{display:flex;gap:8px;align-items:center;margin:2px 0}}
.key.row{{display:flex;flex-wrap:wrap;column-gap:18px}}
.key svg{{flex:none}}
svg text{{fill:var(--muted)}}svg .ink{{fill:var(--text)}}
.axis{{stroke:var(--muted);fill:none}}.grid{{stroke:var(--line);fill:none}}.none{{fill:var(--line);opacity:.6}}
.chance{{stroke:var(--muted);stroke-dasharray:3 4;fill:none}}
{_SERIES_STYLE}
@media(max-width:760px){{.interval{{display:block}}article td:first-child{{min-width:104px}}
article td.prompt{{min-width:180px}}article{{padding:12px}}}}
"""


def text(text: object) -> str:
    """Text as HTML; control characters, which HTML cannot hold, become replacement characters."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", str(text)))


def count(number: int, noun: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: float | None) -> str:
    """As many digits as the size asks for."""
    if value is None:
        return "-"
    return f"{value:.2g}" if abs(value) < 0.1 or abs(value) >= 10_000 else f"{value:.2f}"


def table(columns: Sequence[str], rows: str) -> str:
    """A table whose columns are numbers where their name begins with ``#``."""
    head = "".join(
        f'<th class="number">{escape(name[1:])}</th>' if name.startswith("#") else f"<th>{escape(name)}</th>"
        for name in columns
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'


def percent(share: float) -> str:
    """A share as a label of an axis."""
    return f"{100 * share:g} %"


# Charts. Pixels of a viewBox that is drawn at about its own size on a phone as on a desk, so that text stays readable.
_WIDTH, _HEIGHT = 340, 260
LEFT, RIGHT, TOP, BOTTOM = 44.0, _WIDTH - 12.0, 24.0, _HEIGHT - 40.0


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` over pixels from ``start`` to ``end``; values beyond stand on the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: Any) -> np.ndarray:
        transform: Callable[[Any], np.ndarray] = np.log if self.log else np.asarray
        low, high = transform(np.array([self.low, self.high]))
        share = (transform(np.clip(np.asarray(values, dtype=float), self.low, self.high)) - low) / (high - low)
        return self.start + (self.end - self.start) * share

    def ticks(self) -> list[float]:
        """Two to six round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [digit * 10.0**decade for decade in decades for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= 6:
                    break
            return ticks
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(step * n for n in (1, 0.5, 0.2, 0.1) if (self.high - self.low) / (step * n) >= 3)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def chart(
    title: str,
    description: str,
    body: str,
    x: Axis,
    y: Axis,
    x_title: str,
    y_title: str,
    *,
    x_label: Callable[[float], str] = "{:g}".format,
    y_label: Callable[[float], str] = percent,
) -> str:
    """The frame of a chart around ``body``: axes with their titles, and a grid; the labels say what a tick is called."""
    parts = []
    for tick in y.ticks():
        at = float(y(tick))
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{RIGHT:g}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{at + 4:.1f}" text-anchor="end">{y_label(tick)}</text>')
    for tick in x.ticks():
        at, name = float(x(tick)), x_label(tick)
        anchor = "end" if at > RIGHT - 8 and len(name) > 4 else "middle"
        parts.append(f'<path class="axis" d="M{at:.1f} {BOTTOM:g}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 16:g}" text-anchor="{anchor}">{name}</text>')
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"<title>{text(title)}</title><desc>{text(description)}</desc>"
        f'{"".join(parts)}{body}<path class="axis" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>'
        f'<text class="ink" x="{(LEFT + RIGHT) / 2:g}" y="{_HEIGHT - 6:g}" text-anchor="middle">{text(x_title)}</text>'
        f'<text x="4" y="12">{text(y_title)}</text></svg>'
    )


def points(x: np.ndarray, y: np.ndarray) -> str:
    """The data of an SVG path through points given in pixels."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def line(number: int, path: str) -> str:
    """A path in the colour and dash pattern of series ``number``."""
    dash = _DASHES[(number + number // len(SERIES)) % len(_DASHES)]  # the seventh line has the first one's colour
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="c{number % len(SERIES)}"{dash} d="{path}"/>'
