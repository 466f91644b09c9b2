"""The page, picture and table of several audits with one training folder, such as one of each epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..audit import AuditError
from ..audit.curve import SHARES
from ..files import write_whole
from . import charts
from .html import page
from .pieces import interval, resource, share
from .rendering import render

AXES = {
    "strength": "strength of the LoRA",
    "number": "number in the LoRA's file name (epoch or step)",
    "order": "audits in the order given",
}


def write_curve(found: Mapping[str, Any], path: Path) -> None:
    """Writes what ``audit.curve.read_curve`` returned: the page (``.html``), or a row for each audit (``.csv``).

    Raises:
        AuditError: for another suffix. OSError: if it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".html":
        body = render(
            "curve.html",
            found=found,
            shares=SHARES,
            axis=AXES[found["axis"]],
            chart=_chart(found),
            share=share,
            interval=interval,
        )
        write_whole(path, page("From where on it copies", body, style=charts.STYLE + resource("audit.css")))
    elif suffix == ".csv":
        write_whole(path, _csv(found))
    else:
        raise AuditError(f"{path.name}: a curve is written as .html or .csv")


def _chart(found: Mapping[str, Any]) -> Markup:
    """The shares over the positions, with the interval of the first as an area."""
    points = found["points"]
    places = np.array([point["position"] for point in points])
    room = 0.0 if len(set(places)) > 1 else 0.5
    x = charts.Axis(float(places.min()) - room, float(places.max()) + room, charts.LEFT, charts.RIGHT)
    y = charts.Axis(0.0, 1.0, charts.BOTTOM, charts.TOP)
    ends = np.array([point[next(iter(SHARES))]["interval"] for point in points])
    around = charts.points(x(np.concatenate([places, places[::-1]])), y(np.concatenate([ends[:, 0], ends[::-1, 1]])))
    body = f'<path class="f0" d="{around}Z"/>'
    for number, key in enumerate(SHARES):
        rates = y(np.array([point[key]["rate"] for point in points], dtype=float))
        body += charts.line(number, charts.points(x(places), rates))
    return charts.chart(
        "Copies and verdicts",
        "Shares of training images that came back, of captions that gave a copy and of outputs that triggered.",
        body,
        x,
        y,
        AXES[found["axis"]],
        "share",
    )


def _csv(found: Mapping[str, Any]) -> str:
    sheet = io.StringIO()
    ends = [f"{key}_{part}" for key in SHARES for part in ("count", "of", "rate", "low", "high")]
    writer = csv.writer(sheet)
    writer.writerow(["name", "folder", found["axis"], *ends])
    for point in found["points"]:
        numbers = [
            value
            for key in SHARES
            for value in (*(point[key][part] for part in ("count", "of", "rate")), *point[key]["interval"])
        ]
        writer.writerow([point["name"], point["folder"], point["position"], *numbers])
    return sheet.getvalue()
