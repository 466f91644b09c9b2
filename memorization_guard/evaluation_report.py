"""The evaluation's page: tables, ROC curves and histograms in one file that asks for no other and runs no script."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .report import STYLE
from .trace import STATEMENT

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

# After Okabe & Ito (2008), as in graph.py; a dash pattern says the same as the colour.
_LIGHT = ("#31689b", "#bf4600", "#007a5e", "#8e3a86", "#7a6200", "#1c2430")
_DARK = ("#8fc1ee", "#ff9455", "#3ddcae", "#e39bdb", "#e0c14a", "#e8ecf2")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")


def _colors(palette: Sequence[str]) -> str:
    return "".join(f"--c{number}:{color};" for number, color in enumerate(palette))


_SERIES_STYLE = "".join(
    f".c{n}{{stroke:var(--c{n});fill:none;stroke-width:1.8}}.f{n}{{fill:var(--c{n});opacity:.22}}" for n in range(len(_LIGHT))
)

_MORE_STYLE = f"""
:root{{{_colors(_LIGHT)}}}
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


def html_report(result: Mapping[str, Any]) -> str:
    """The page of what ``evaluation.summarize`` returned: follows light and dark, readable on a phone."""
    settings = result["settings"]
    groups, ordinary = result["groups"], result["ordinary"]
    title = f"How well memorization is detected: {settings.get('model') or 'a model'}"
    introduction = (
        f"{_size(groups[0])} said to be memorized, held against {_size(ordinary)} said to be ordinary. Nothing was mitigated."
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
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
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title)}</title><style>{STYLE}{_MORE_STYLE}</style></head>
<body><main><h1>{_text(title)}</h1><p>{introduction}</p>{body}
<p class="muted">{escape(STATEMENT)}</p></main></body></html>
"""


def _text(text: object) -> str:
    """Text as HTML; control characters, which HTML cannot hold, become replacement characters."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", str(text)))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(group: Mapping[str, Any]) -> str:
    return f"{_count(group['images'], 'image')} of {_count(group['prompts'], 'prompt')}"


def _short(value: float | None) -> str:
    """As many digits as the size asks for."""
    if value is None:
        return "-"
    return f"{value:.2g}" if abs(value) < 0.1 or abs(value) >= 10_000 else f"{value:.2f}"


def _interval(figure: Mapping[str, Any], name: str, format_: str) -> str:
    low, high = (format(bound, format_) for bound in figure[f"{name}_95"])
    return f'<td class="number">{format(figure[name], format_)} <span class="interval">{low} to {high}</span></td>'


def _table(columns: Sequence[str], rows: str) -> str:
    """A table whose columns are numbers where their name begins with ``#``."""
    head = "".join(
        f'<th class="number">{escape(name[1:])}</th>' if name.startswith("#") else f"<th>{escape(name)}</th>"
        for name in columns
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'


def _detection(groups: Sequence[Mapping[str, Any]], ordinary: Mapping[str, Any]) -> str:
    bodies = []
    for group in groups:
        rows = "".join(
            f"<tr><td>{_text(name)}</td>{_interval(signal, 'auc', '.4f')}{_interval(signal, 'tpr_at_1_fpr', '.1%')}"
            f'<td class="number">{_short(signal["median"])}</td>'
            f'<td class="number">{_short(ordinary["signals"][name]["median"])}</td></tr>'
            for name, signal in group["signals"].items()
        )
        title = f'{_text(group["name"])} <span class="muted">{_size(group)}</span>'
        head = f'<tr><th class="group" colspan="5">{title}</th></tr>'
        bodies.append(f"<tbody>{head}{rows}</tbody>")
    names = list(dict.fromkeys(name for group in groups for name in group["signals"]))
    about = "".join(f"<li><b>{_text(name)}</b>: {_text(ABOUT[name])}</li>" for name in names if name in ABOUT)
    columns = ("signal", "#AUC", "#TPR at 1 % FPR", "#median", "#median, ordinary")
    return (
        f"<article><h2>Detection</h2>{_table(columns, ''.join(bodies))}"
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
        row = f"<td>{_text(group['name'])}</td>{_interval(group['triggered'], 'mean', '.1%')}"
        row += "".join(f'<td class="number">{group["verdicts"].get(name, 0):,}</td>' for name in verdicts)
        if with_copies:
            copies = group["copies"]
            row += _interval(copies["rate"], "mean", ".1%") if copies else '<td class="number">-</td>'
            row += f'<td class="number">{_short(copies["median"] if copies else None)}</td>'
            row += f'<td class="number">{copies["images"] if copies else 0:,}</td>'
        rows.append(f"<tr>{row}</tr>")
    columns = ["group", "#triggered", *(f"#{name}" for name in verdicts)]
    columns += ["#copies", "#median similarity", "#images compared"] if with_copies else []
    return f"<article><h2>Verdicts</h2>{_table(columns, ''.join(rows))}</article>"


# Charts. Pixels of a viewBox that is drawn at about its own size on a phone as on a desk, so that text stays readable.
_WIDTH, _HEIGHT = 340, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, _WIDTH - 12.0, 24.0, _HEIGHT - 40.0


@dataclass(frozen=True)
class _Axis:
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


def _chart(title: str, description: str, body: str, x: _Axis, y: _Axis, x_title: str, y_title: str, *, percent: bool) -> str:
    """The frame of a chart around ``body``."""

    def name(value: float) -> str:
        return f"{100 * value:g} %" if percent else f"{value:g}"

    parts = []
    for tick in y.ticks():
        at = float(y(tick))
        parts.append(f'<path class="grid" d="M{_LEFT:g} {at:.1f}H{_RIGHT:g}"/>')
        parts.append(f'<text x="{_LEFT - 6:g}" y="{at + 4:.1f}" text-anchor="end">{100 * tick:g} %</text>')
    for tick in x.ticks():
        at = float(x(tick))
        anchor = "end" if at > _RIGHT - 8 and percent else "middle"
        parts.append(f'<path class="axis" d="M{at:.1f} {_BOTTOM:g}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{_BOTTOM + 16:g}" text-anchor="{anchor}">{name(tick)}</text>')
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"<title>{_text(title)}</title><desc>{_text(description)}</desc>"
        f'{"".join(parts)}{body}<path class="axis" d="M{_LEFT:g} {_BOTTOM:g}H{_RIGHT:g}"/>'
        f'<text class="ink" x="{(_LEFT + _RIGHT) / 2:g}" y="{_HEIGHT - 6:g}" text-anchor="middle">{_text(x_title)}</text>'
        f'<text x="4" y="12">{_text(y_title)}</text></svg>'
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _line(number: int, path: str) -> str:
    dash = _DASHES[(number + number // len(_LIGHT)) % len(_DASHES)]  # the seventh line has the first one's colour
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="c{number % len(_LIGHT)}"{dash} d="{path}"/>'


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
            f'<li><svg width="34" height="10">{_line(number, "M1 5H33")}</svg>'
            f'{_text(name)} <span class="muted">{signal["auc"]:.4f}</span></li>'
            for number, (name, signal) in enumerate(group["signals"].items())
        )
        parts.append(
            f'<h3>{_text(group["name"])}</h3><div class="charts"><figure>{_roc(group["name"], rocs, negatives, log=False)}'
            f"</figure><figure>{_roc(group['name'], rocs, negatives, log=True)}</figure>"
            f'<figure><figcaption class="muted">signal, AUC</figcaption><ul class="key">{key}</ul></figure></div>'
        )
    return (
        f"<article><h2>ROC curves</h2>{''.join(parts)}"
        '<p class="muted">The second axis is logarithmic: what a detector is worth where false alarms are rare. Where it is '
        f"shaded, the false alarms would be fewer than one of {_count(negatives, 'ordinary image')}.</p></article>"
    )


def _roc(title: str, rocs: Mapping[str, Mapping[str, Sequence[float]]], negatives: int, *, log: bool) -> str:
    x = _Axis(LOWEST_FPR if log else 0.0, 1.0, _LEFT, _RIGHT, log)
    y = _Axis(0.0, 1.0, _BOTTOM, _TOP)
    chance = np.geomspace(LOWEST_FPR, 1, 40) if log else np.array([0.0, 1.0])
    body = f'<path class="chance" d="{_path(x(chance), y(chance))}"/>'
    if log:
        first = float(x(1 / negatives))
        body += f'<rect class="none" x="{_LEFT:g}" y="{_TOP:g}" width="{first - _LEFT:.1f}" height="{_BOTTOM - _TOP:g}"/>'
        body += f'<path class="chance" d="M{float(x(0.01)):.1f} {_TOP:g}V{_BOTTOM:g}"/>'
    body += "".join(_line(number, _path(x(roc["fpr"]), y(roc["tpr"]))) for number, roc in enumerate(rocs.values()))
    description = "True against false positive rate" + (", on a logarithmic axis." if log else ".")
    return _chart(f"ROC curves: {title}", description, body, x, y, "false positive rate", "true positive rate", percent=True)


def _histograms(result: Mapping[str, Any]) -> str:
    samples = result["samples"]
    series = {"ordinary": [sample for sample in samples if not sample["memorized"]]}
    for group in _kinds(result["groups"]) or result["groups"][:1]:
        series[group["name"]] = [samples[row] for row in group["samples"]]
    key = "".join(
        f'<li><svg width="34" height="12"><rect class="f{number}" width="34" height="12"/>{_line(number, "M1 11H33")}</svg>'
        f"{_text(name)}</li>"
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
    x = _Axis(low, high, _LEFT, _RIGHT, log)
    y = _Axis(0.0, 1.08 * max(float(share.max()) for share in shares.values()), _BOTTOM, _TOP)
    body = []
    for number, share in enumerate(shares.values()):
        at = np.repeat(x(edges), 2)
        tops = np.concatenate([[_BOTTOM], np.repeat(y(share), 2), [_BOTTOM]])
        path = _path(at, tops)
        body.append(f'<path class="f{number % len(_LIGHT)}" d="{path}Z"/>{_line(number, path)}')
    description = f"Share of images by {name}: " + "; ".join(
        f"{title}, median {_short(float(np.median(part)))}" for title, part in values.items() if len(part)
    )
    title = f"{name}{', log scale' if log else ''}"
    return _chart(f"Histogram: {name}", description + ".", "".join(body), x, y, title, "share of images", percent=False)


def _extremes(result: Mapping[str, Any]) -> str:
    from .evaluation import rank

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
            row = (
                f'<td class="prompt">{_text(sample["prompt"])}</td><td class="number">{_short(sample["signals"][signal])}</td>'
            )
            row += f"<td>{_text(sample['verdict'])}</td>"
            row += f'<td class="number">{"-" if sample["trigger_step"] is None else sample["trigger_step"]}</td>'
            row += f'<td class="number">{_short(sample["copy_score"])}</td>' if with_copies else ""
            rows.append(f'<tr>{row}<td class="number">{sample["seed"]}</td></tr>')
        columns = ["prompt", f"#{signal}", "verdict", "#trigger step", *(["#similarity"] if with_copies else []), "#seed"]
        tables.append(f"<h3>{title}</h3>{_table(columns, ''.join(rows))}")
    return f"<article><h2>Least typical</h2>{''.join(tables)}</article>"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td><td>{_text(_value(value))}</td></tr>"
        for name, value in settings.items()
        if value is not None
    )
    return f'<article><h2>Settings</h2><div class="scroll"><table><tbody>{rows}</tbody></table></div></article>'


def _value(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
