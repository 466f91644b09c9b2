"""The evaluation's page: tables, ROC curves and histograms in one file that loads nothing else and runs no script."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..core.settings import VERDICTS
from ..files import write_whole
from .charts import BOTTOM, LEFT, RIGHT, SERIES, TOP, Axis, chart, line, percent, points
from .charts import STYLE as CHART_STYLE
from .html import page
from .rendering import render
from .words import short

#: What the signals are, for the reader of a page.
ABOUT = {
    "S_mem": "largest deviation of the latent update from the profile over all steps, in standard deviations",
    "joint score": "largest deviation that update and predicted image both reach at one step",
    "p-value, -log10": "how rare the run is among ordinary images, which decides the verdict: 2 is one in 100",
    "detail": "what the prompt alone settles finer than an eighth of the image, in noise; needs no profile",
    "uncalibrated score": "how much of the image the prompt alone has settled while it is noise; needs no profile",
    "guidance norm, mean": "size of the difference that the prompt makes to the predicted noise, mean over the evaluations",
    "guidance norm, first evaluation": "the same, at the first evaluation alone",
}

#: With more kinds than this, the kinds are in the tables and are not drawn.
MAX_DRAWN = 4
#: Rows of the tables of least typical prompts.
EXTREMES = 8
#: Where the logarithmic axis of the ROC curve begins.
LOWEST_FPR = 1e-3


def write_report(result: Mapping[str, Any], page: Path, data: Path) -> None:
    """Writes ``result`` as HTML to ``page`` and as JSON to ``data``: both, or on an error neither.

    Raises:
        OSError: if they cannot be written.
    """
    # A lone surrogate, which a .jsonl can hold, must not cost the report.
    contents = {
        page: html_report(result).encode("utf-8", "replace"),
        data: json.dumps(result, indent=1, allow_nan=False).encode() + b"\n",
    }
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in contents}
    try:
        for path, content in contents.items():
            write_whole(staged[path], content)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def html_report(result: Mapping[str, Any]) -> str:
    """The page of what ``evaluation.summary.summarize`` returned: follows light and dark, readable on a phone."""
    groups, ordinary = result["groups"], result["ordinary"]
    everyone = [*groups, ordinary]
    series = _series(result)
    names = [name for group in groups for name in group["signals"]]
    body = render(
        "evaluation.html",
        **{name: result[name] for name in ("groups", "ordinary", "warnings", "settings", "ranked_by")},
        about={name: meaning for name, meaning in ABOUT.items() if name in names},
        verdicts=[name for name in VERDICTS if any(name in group["verdicts"] for group in everyone)],
        with_copies=any(group["copies"] for group in everyone),
        curves=[_curve(group, ordinary["images"]) for group in _drawn(groups)],
        drawn=list(series),
        histograms=[_histogram(name, series) for name in groups[0]["signals"]],
        extremes=_extremes(result),
    )
    return page(f"How well memorization is detected: {result['settings'].get('model') or 'a model'}", body, style=CHART_STYLE)


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The kinds of memorized prompts, where there are few enough to draw."""
    kinds = [group for group in groups if group["of"] == "kind"]
    return kinds if len(kinds) <= MAX_DRAWN else []


def _drawn(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The groups whose ROC curves are drawn."""
    kinds = _kinds(groups)
    return [group for group in groups if group["of"] != "kind" or group in kinds]


def _curve(group: Mapping[str, Any], negatives: int) -> dict[str, Any]:
    """The ROC curves of a group's signals, on both axes, and what the key says of them."""
    rocs = {name: signal["roc"] for name, signal in group["signals"].items()}
    return {
        "name": group["name"],
        "charts": [Markup(_roc(group["name"], rocs, negatives, log=log)) for log in (False, True)],
        "auc": {name: signal["auc"] for name, signal in group["signals"].items()},
    }


def _roc(title: str, rocs: Mapping[str, Mapping[str, Sequence[float]]], negatives: int, *, log: bool) -> str:
    x = Axis(LOWEST_FPR if log else 0.0, 1.0, LEFT, RIGHT, log)
    y = Axis(0.0, 1.0, BOTTOM, TOP)
    chance = np.geomspace(LOWEST_FPR, 1, 40) if log else np.array([0.0, 1.0])
    body = f'<path class="chance" d="{points(x(chance), y(chance))}"/>'
    if log:
        first = float(x(1 / negatives))
        body += f'<rect class="none" x="{LEFT:g}" y="{TOP:g}" width="{first - LEFT:.1f}" height="{BOTTOM - TOP:g}"/>'
        body += f'<path class="chance" d="M{float(x(0.01)):.1f} {TOP:g}V{BOTTOM:g}"/>'
    body += "".join(line(number, points(x(roc["fpr"]), y(roc["tpr"]))) for number, roc in enumerate(rocs.values()))
    description = "True against false positive rate" + (", on a logarithmic axis." if log else ".")
    return chart(f"ROC curves: {title}", description, body, x, y, "false positive rate", "true positive rate", x_label=percent)


def _series(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The samples that the histograms show, by name: the ordinary ones, and each kind or else all memorized ones."""
    samples = result["samples"]
    series = {"ordinary": [sample for sample in samples if not sample["memorized"]]}
    for group in _kinds(result["groups"]) or result["groups"][:1]:
        series[group["name"]] = [samples[row] for row in group["samples"]]
    return series


def _histogram(name: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    values = {
        title: np.array([s["signals"][name] for s in members if s["signals"][name] is not None], dtype=float)
        for title, members in series.items()
    }
    everything = np.concatenate(list(values.values()))
    low, high = float(everything.min()), float(everything.max())
    log = low > 0 and high > 12 * float(np.median(everything))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    edges = np.geomspace(low, high, 25) if log else np.linspace(low, high, 25)
    edges[0], edges[-1] = low, high
    shares = {title: np.histogram(part, edges)[0] / max(len(part), 1) for title, part in values.items()}
    x = Axis(low, high, LEFT, RIGHT, log)
    y = Axis(0.0, 1.08 * max(float(share.max()) for share in shares.values()), BOTTOM, TOP)
    body = []
    for number, share in enumerate(shares.values()):
        at = np.repeat(x(edges), 2)
        tops = np.concatenate([[BOTTOM], np.repeat(y(share), 2), [BOTTOM]])
        path = points(at, tops)
        body.append(f'<path class="f{number % len(SERIES)}" d="{path}Z"/>{line(number, path)}')
    description = f"Share of images by {name}: " + "; ".join(
        f"{title}, median {short(float(np.median(part)))}" for title, part in values.items() if len(part)
    )
    title = f"{name}{', log scale' if log else ''}"
    return Markup(chart(f"Histogram: {name}", description + ".", "".join(body), x, y, title, "share of images"))


def _extremes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of both lists that look least like the others of their list."""
    signal = result["ranked_by"]
    sides = []
    for memorized, title in (
        (False, "Ordinary prompts that look most memorized"),
        (True, "Memorized prompts that look least so"),
    ):
        found = [s for s in result["samples"] if s["memorized"] is memorized and s["signals"].get(signal) is not None]
        found.sort(key=lambda sample: sample["signals"][signal], reverse=not memorized)
        with_copies = any(sample["copy_score"] is not None for sample in found)
        sides.append({"title": title, "samples": found[:EXTREMES], "with_copies": with_copies})
    return sides
