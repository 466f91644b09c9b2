"""Tables and charts of our pages, as HTML and SVG that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from .axis import Axis as Axis
from .rendering import printable, render

# Colours after Okabe & Ito (2008), as in graph.py. A dash pattern says the same as the colour.
SERIES = ("#31689b", "#bf4600", "#007a5e", "#8e3a86", "#7a6200", "#1c2430")
_DARK = ("#8fc1ee", "#ff9455", "#3ddcae", "#e39bdb", "#e0c14a", "#e8ecf2")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")

#: The style of tables and charts, for :func:`reports.html.page`.
STYLE = render("charts.css", light=SERIES, dark=_DARK)


def text(text: object) -> str:
    """Text as HTML; control characters, which HTML cannot hold, become replacement characters."""
    return escape(printable(str(text)))


def count(number: int, noun: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: float | None) -> str:
    """A number with as many digits as its size needs."""
    if value is None:
        return "-"
    return f"{value:.2g}" if abs(value) < 0.1 or abs(value) >= 10_000 else f"{value:.2f}"


def table(columns: Sequence[str], rows: str) -> str:
    """A table of rows given as HTML. Columns whose name begins with ``#`` hold numbers."""
    return render("table.html", columns=columns, rows=rows)


def percent(share: float) -> str:
    """A share as the label of a tick."""
    return f"{100 * share:g} %"


# Pixels of a chart, which is drawn at about this size on a phone and on a desk, so that its text stays readable.
_WIDTH, _HEIGHT = 340, 260
LEFT, RIGHT, TOP, BOTTOM = 44.0, _WIDTH - 12.0, 24.0, _HEIGHT - 40.0


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
    """A chart as SVG: axes with their titles, and a grid, around ``body``, which is SVG; ``x_label`` and ``y_label`` name ticks."""
    return render(
        "chart.svg",
        title=title,
        description=description,
        body=body,
        x_title=x_title,
        y_title=y_title,
        x_ticks=[(round(float(x(tick)), 1), x_label(tick)) for tick in x.ticks()],
        y_ticks=[(round(float(y(tick)), 1), y_label(tick)) for tick in y.ticks()],
        width=_WIDTH,
        height=_HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
    )


def points(x: np.ndarray, y: np.ndarray) -> str:
    """The data of an SVG path through points given in pixels."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def line(number: int, path: str) -> str:
    """A path in the colour and dash pattern of series ``number``."""
    dash = _DASHES[(number + number // len(SERIES)) % len(_DASHES)]  # the seventh line has the first one's colour
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="c{number % len(SERIES)}"{dash} d="{path}"/>'
