"""Charts of our pages: SVG that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from markupsafe import Markup

from .axis import Axis
from .rendering import render
from .series import DARK_SERIES, SERIES, line

__all__ = ["BOTTOM", "LEFT", "RIGHT", "SERIES", "STYLE", "TOP", "Axis", "chart", "line", "percent", "points"]

#: The style of tables and charts, for :func:`reports.html.page`.
STYLE = str(render("charts.css", light=SERIES, dark=DARK_SERIES))

# Pixels of a chart, which is drawn at about this size on a phone and on a desk, so that its text stays readable.
_WIDTH, _HEIGHT = 340, 260
LEFT, RIGHT, TOP, BOTTOM = 44.0, _WIDTH - 12.0, 24.0, _HEIGHT - 40.0


def percent(share: float) -> str:
    """A share as the label of a tick."""
    return f"{100 * share:g} %"


def points(x: np.ndarray, y: np.ndarray) -> str:
    """The data of an SVG path through points given in pixels."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


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
) -> Markup:
    """The axes with their titles, and a grid, around ``body``, which is SVG. ``x_label`` and ``y_label`` name the ticks."""
    return render(
        "chart.svg",
        title=title,
        description=description,
        body=Markup(body),
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
