"""The evaluation's page: tables, ROC curves and histograms in one file that asks for no other and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .charts import BOTTOM, LEFT, RIGHT, SERIES, TOP, Axis, chart, count, line, percent, points, short, table, text
from .charts import STYLE as CHART_STYLE
from .html import page

#: What the signals are, for the reader of a page; one that is not named here is drawn without.
ABOUT = {
    "S_mem": "largest deviation of the latent update from the profile over all steps, in standard deviations",
    "joint score": "largest deviation that update and predicted image reach at one step",
    "tail probability, -log10": "share of ordinary images that get as far, which the verdict goes by: 2 is one in 100",
    "local score": "largest deviation of the part of the latent that is most out of the ordinary",
    "uncalibrated score": "how much of the image the prompt alone has settled while it is noise; needs no profile",
    "guidance norm, mean": "size of the difference that the prompt makes to the predicted noise, mean over the steps",
    "guidance norm, first step": "the same, first step alone",
    "alignment": "cosine between that difference and the prediction without prompt, at the last step that has one",
}

#: Kinds beyond this many stand in the tables and are not drawn.
MAX_DRAWN = 4
#: Rows of the tables of least typical prompts.
EXTREMES = 8
#: Where the logarithmic axis of the ROC curve begins.
LOWEST_FPR = 1e-3


def html_report(result: Mapping[str, Any]) -> str:
    """The page of what ``evaluation.summarize`` returned: follows light and dark, readable on a phone."""
    settings = result["settings"]
    groups, ordinary = result["groups"], result["ordinary"]
    title = f"How well memorization is detected: {settings.get('model') or 'a model'}"
    introduction = (
        f"{_size(groups[0])} said to be memorized, held against {_size(ordinary)} said to be ordinary. Nothing was mitigated."
    )
    body = "".join(
        [
            *(f'<p class="warning">{escape(warning)}</p>' for warning in result["warnings"]),
            _detection(groups, ordinary),
            _triggers(groups, ordinary),
            _curves(groups, ordinary["images"]),
            _histograms(result),
            _extremes(result),
            _settings(settings),
        ]
    )
    return page(title, f"<p>{introduction}</p>{body}", style=CHART_STYLE)


def _size(group: Mapping[str, Any]) -> str:
    return f"{count(group['images'], 'image')} of {count(group['prompts'], 'prompt')}"


def _interval(figure: Mapping[str, Any], name: str, format_: str) -> str:
    low, high = (format(bound, format_) for bound in figure[f"{name}_95"])
    return f'<td class="number">{format(figure[name], format_)} <span class="interval">{low} to {high}</span></td>'


def _detection(groups: Sequence[Mapping[str, Any]], ordinary: Mapping[str, Any]) -> str:
    bodies = []
    for group in groups:
        rows = "".join(
            f"<tr><td>{text(name)}</td>{_interval(signal, 'auc', '.4f')}{_interval(signal, 'tpr_at_1_fpr', '.1%')}"
            f'<td class="number">{short(signal["median"])}</td>'
            f'<td class="number">{short(ordinary["signals"][name]["median"])}</td></tr>'
            for name, signal in group["signals"].items()
        )
        title = f'{text(group["name"])} <span class="muted">{_size(group)}</span>'
        head = f'<tr><th class="group" colspan="5">{title}</th></tr>'
        bodies.append(f"<tbody>{head}{rows}</tbody>")
    names = list(dict.fromkeys(name for group in groups for name in group["signals"]))
    about = "".join(f"<li><b>{text(name)}</b>: {text(ABOUT[name])}</li>" for name in names if name in ABOUT)
    columns = ("signal", "#AUC", "#TPR at 1 % FPR", "#median", "#median, ordinary")
    return (
        f"<article><h2>Detection</h2>{table(columns, ''.join(bodies))}"
        '<p class="muted">Higher is taken to mean memorized: an AUC below 0.5 says that a signal points the other way here. '
        "The ranges are 95 % intervals, from a bootstrap over prompts.</p>"
        f"<details><summary>What the signals are</summary><ul>{about}</ul></details></article>"
    )


def _triggers(groups: Sequence[Mapping[str, Any]], ordinary: Mapping[str, Any]) -> str:
    everyone = [*groups, ordinary]
    with_copies = any(group["copies"] for group in everyone)
    verdicts = [name for name in ("stable", "mild", "strong", "unscored") if any(name in g["verdicts"] for g in everyone)]
    rows = []
    for group in everyone:
        row = f"<td>{text(group['name'])}</td>{_interval(group['triggered'], 'mean', '.1%')}"
        row += "".join(f'<td class="number">{group["verdicts"].get(name, 0):,}</td>' for name in verdicts)
        if with_copies:
            copies = group["copies"]
            row += _interval(copies["rate"], "mean", ".1%") if copies else '<td class="number">-</td>'
            row += f'<td class="number">{short(copies["median"] if copies else None)}</td>'
            row += f'<td class="number">{copies["images"] if copies else 0:,}</td>'
        rows.append(f"<tr>{row}</tr>")
    columns = ["group", "#triggered", *(f"#{name}" for name in verdicts)]
    columns += ["#copies", "#median similarity", "#images compared"] if with_copies else []
    return f"<article><h2>Verdicts</h2>{table(columns, ''.join(rows))}</article>"


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The kinds of memorized prompts, where there are few enough to draw."""
    kinds = [group for group in groups if group["of"] == "kind"]
    return kinds if len(kinds) <= MAX_DRAWN else []


def _curves(groups: Sequence[Mapping[str, Any]], negatives: int) -> str:
    parts = []
    kinds = _kinds(groups)
    for group in groups:
        if group["of"] == "kind" and group not in kinds:
            continue
        rocs = {name: signal["roc"] for name, signal in group["signals"].items()}
        key = "".join(
            f'<li><svg width="34" height="10">{line(number, "M1 5H33")}</svg>'
            f'{text(name)} <span class="muted">{signal["auc"]:.4f}</span></li>'
            for number, (name, signal) in enumerate(group["signals"].items())
        )
        parts.append(
            f'<h3>{text(group["name"])}</h3><div class="charts"><figure>{_roc(group["name"], rocs, negatives, log=False)}'
            f"</figure><figure>{_roc(group['name'], rocs, negatives, log=True)}</figure>"
            f'<figure><figcaption class="muted">signal, AUC</figcaption><ul class="key">{key}</ul></figure></div>'
        )
    return (
        f"<article><h2>ROC curves</h2>{''.join(parts)}"
        '<p class="muted">The second axis is logarithmic: what a detector is worth where false alarms are rare. Where it is '
        f"shaded, the false alarms would be fewer than one of {count(negatives, 'ordinary image')}.</p></article>"
    )


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


def _histograms(result: Mapping[str, Any]) -> str:
    samples = result["samples"]
    series = {"ordinary": [sample for sample in samples if not sample["memorized"]]}
    for group in _kinds(result["groups"]) or result["groups"][:1]:
        series[group["name"]] = [samples[row] for row in group["samples"]]
    key = "".join(
        f'<li><svg width="34" height="12"><rect class="f{number}" width="34" height="12"/>{line(number, "M1 11H33")}</svg>'
        f"{text(name)}</li>"
        for number, name in enumerate(series)
    )
    charts = []
    for name in result["groups"][0]["signals"]:
        values = {
            title: np.array([s["signals"][name] for s in members if s["signals"][name] is not None], dtype=float)
            for title, members in series.items()
        }
        charts.append(f"<figure>{_histogram(name, values)}</figure>")
    return f'<article><h2>Scores</h2><ul class="key row">{key}</ul><div class="charts">{"".join(charts)}</div></article>'


def _histogram(name: str, values: Mapping[str, np.ndarray]) -> str:
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
    return chart(f"Histogram: {name}", description + ".", "".join(body), x, y, title, "share of images")


def _extremes(result: Mapping[str, Any]) -> str:
    from ..evaluation.evaluate import rank

    signal = rank(result)
    if signal is None:
        return ""
    tables = []
    sides = {False: "Ordinary prompts that look most memorized", True: "Memorized prompts that look least so"}
    for memorized, title in sides.items():
        found = [s for s in result["samples"] if s["memorized"] is memorized and s["signals"][signal] is not None]
        found.sort(key=lambda sample: sample["signals"][signal], reverse=not memorized)
        with_copies = any(sample["copy_score"] is not None for sample in found)
        rows = []
        for sample in found[:EXTREMES]:
            row = f'<td class="prompt">{text(sample["prompt"])}</td><td class="number">{short(sample["signals"][signal])}</td>'
            row += f"<td>{text(sample['verdict'])}</td>"
            row += f'<td class="number">{"-" if sample["trigger_step"] is None else sample["trigger_step"]}</td>'
            row += f'<td class="number">{short(sample["copy_score"])}</td>' if with_copies else ""
            rows.append(f'<tr>{row}<td class="number">{sample["seed"]}</td></tr>')
        columns = ["prompt", f"#{signal}", "verdict", "#trigger step", *(["#similarity"] if with_copies else []), "#seed"]
        tables.append(f"<h3>{title}</h3>{table(columns, ''.join(rows))}")
    return f"<article><h2>Least typical</h2>{''.join(tables)}</article>"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{text(name.replace('_', ' '))}</td><td>{text(_value(value))}</td></tr>"
        for name, value in settings.items()
        if value is not None
    )
    return f'<article><h2>Settings</h2><div class="scroll"><table><tbody>{rows}</tbody></table></div></article>'


def _value(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
