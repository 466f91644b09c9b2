"""The frame of our pages, and the demo's report: a self-contained HTML page, and one picture of the same."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..core.trace import STATEMENT, Trace, rarity
from . import graph
from .charts import text


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt sampled twice from the same noise.

    Attributes:
        prompt, group: the text, and where it comes from (``"exact"``, ``"ordinary"``, ...).
        training_image: the image that was duplicated in training under this prompt, if one was.
        plain_image, plain_trace: without mitigation. mitigated_image, mitigated_trace: with it.
        plain_copy, mitigated_copy: copy score of each, or ``None`` where there is no training image.
    """

    prompt: str
    group: str
    training_image: Image.Image | None
    plain_image: Image.Image
    plain_trace: Trace
    mitigated_image: Image.Image
    mitigated_trace: Trace
    plain_copy: float | None = None
    mitigated_copy: float | None = None


#: The look of a page of ours, light and dark.
STYLE = """
:root{--page:#f7f8fa;--card:#fff;--text:#1c2430;--muted:#667085;--line:#e4e7ec;--bad:#c2410c;--good:#00805c}
@media(prefers-color-scheme:dark){:root{--page:#0c111d;--card:#161b22;--text:#e8ecf2;--muted:#98a2b3;--line:#344054;
--bad:#ff9466;--good:#3ddbaa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:26px;line-height:1.2;margin:8px 0}
p{max-width:72ch}
.muted{color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
td:first-child{min-width:190px}
th,td{text-align:left;padding:6px 10px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:20px 0}
article h2{font-size:16px;margin:0 0 12px;overflow-wrap:anywhere}
.tag{font-size:12px;border:1px solid var(--line);border-radius:99px;padding:1px 9px;margin-right:8px;color:var(--muted)}
.sides{display:grid;grid-template-columns:minmax(110px,170px) 1fr 1fr;gap:16px}
.sides>figure{margin:0;min-width:0}
figure img{width:100%;height:auto;max-width:170px;border-radius:6px;image-rendering:auto;display:block}
figcaption{font-size:13px;margin:6px 0}
.graph{height:230px;margin:8px -8px 0}
.graph>p{margin:0 8px;font-size:13px;white-space:pre-line}
.bad{color:var(--bad);font-weight:600}.good{color:var(--good);font-weight:600}
details{margin-top:12px;font-size:13px}
pre{overflow:auto;max-height:320px;background:var(--page);padding:10px;border-radius:6px}
@media(max-width:760px){.sides{grid-template-columns:1fr 1fr}.sides>.training{grid-column:1/-1}
.sides>.training img{max-width:120px}}
@media(max-width:520px){.sides{grid-template-columns:1fr}}
"""


#: What draws the graphs of a page, after the source of graph.js.
_DRAW = """
const traces = JSON.parse(document.getElementById("traces").textContent);
for (const box of document.querySelectorAll("[data-trace]")) {
  box.replaceChildren();
  new StabilityGraph(box).show(runOf([traces[box.dataset.trace]]));
}
"""


def graph_script() -> str:
    """The source of ``js/graph.js``, which stands inside the installed package, and in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "js" / "graph.js"
    return (inside if inside.exists() else package.parent / "js" / "graph.js").read_text(encoding="utf-8")


def html_report(comparisons: Sequence[Comparison], *, title: str, introduction: str, copy_threshold: float) -> str:
    """The page: one file that asks for no other, follows light and dark, readable on a phone, and without scripts as text.

    Args:
        comparisons: what was sampled.
        title, introduction: text over the table.
        copy_threshold: copy score from which an image counts as a copy.
    """
    rows = "".join(_row(comparison, copy_threshold) for comparison in comparisons)
    cards = "".join(_card(comparison, copy_threshold, 2 * index) for index, comparison in enumerate(comparisons))
    traces = [trace.to_dict() for comparison in comparisons for trace in (comparison.plain_trace, comparison.mitigated_trace)]
    body = f"""<p>{escape(introduction)}</p>
<div class="scroll"><table><thead><tr><th>prompt</th><th>group</th><th>verdict</th><th class="number">S_mem</th>
<th class="number">trigger step</th><th class="number">copy score without</th><th class="number">with mitigation</th>
</tr></thead><tbody>{rows}</tbody></table></div>{cards}"""
    return page(title, body, data={"traces": traces}, script=graph_script() + _DRAW)


def page(title: str, body: str, *, style: str = "", data: Mapping[str, object] | None = None, script: str = "") -> str:
    """A page of ours: one file that asks for no other, with the statement at its end.

    Args:
        title: text. body: HTML. style: CSS after :data:`STYLE`.
        data: what the script reads, as JSON, each in an element of that id.
        script: a module; the only one that may run.
    """
    # Nothing may be loaded, and no other script run: a second line of defence should a text ever be taken for HTML.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    scripts = "".join(
        f'<script type="application/json" id="{name}">{_script_json(value)}</script>\n' for name, value in (data or {}).items()
    )
    if script:
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{allowed}'"
        scripts += f'<script type="module">{script}</script>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title><style>{STYLE}{style}</style></head>
<body><main><h1>{text(title)}</h1>{body}
<p class="muted">{escape(STATEMENT)}</p></main>
{scripts}</body></html>
"""


def _script_json(value: object) -> str:
    """JSON that no text in it can end: HTML looks for ``</script`` and ``<!--``, JSON has another way to write ``<``."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _row(comparison: Comparison, threshold: float) -> str:
    trace = comparison.plain_trace
    return (
        f"<tr><td>{escape(comparison.prompt)}</td><td>{escape(comparison.group)}</td><td>{_verdict(trace)}</td>"
        f'<td class="number">{_or_dash(trace.score, ".1f")}</td><td class="number">{_or_dash(trace.trigger_step, "d")}</td>'
        f'<td class="number">{_copy(comparison.plain_copy, threshold)}</td>'
        f'<td class="number">{_copy(comparison.mitigated_copy, threshold)}</td></tr>'
    )


def _card(comparison: Comparison, threshold: float, first_trace: int) -> str:
    training = ""
    if comparison.training_image is not None:
        training = _figure("training", comparison.training_image, "training image")
    return (
        f'<article><h2><span class="tag">{escape(comparison.group)}</span>{escape(comparison.prompt)}</h2><div class="sides">'
        + (
            training
            or '<figure class="training"><figcaption class="muted">no training image under this prompt</figcaption></figure>'
        )
        + _figure(
            "plain",
            comparison.plain_image,
            f"without mitigation{_copy_note(comparison.plain_copy, threshold)}",
            _graph(comparison.plain_trace, first_trace),
        )
        + _figure(
            "mitigated",
            comparison.mitigated_image,
            f"with mitigation{_copy_note(comparison.mitigated_copy, threshold)}",
            _graph(comparison.mitigated_trace, first_trace + 1),
        )
        + f"</div><details><summary>Numbers of the run without mitigation</summary><pre>"
        f"{escape(json.dumps(comparison.plain_trace.to_dict(), indent=1))}</pre></details></article>"
    )


def _graph(trace: Trace, index: int) -> str:
    """Where the script draws the graph; until it does, and where it may not, its summary stands there."""
    return f'<div class="graph" data-trace="{index}"><p class="muted">{escape(summary(trace))}</p></div>'


def summary(trace: Trace, title: str = "Image 1") -> str:
    """A run in words after ``title``, those of ``summarize`` in ``js/graph.js``."""
    parts = [f"{title}: {trace.verdict}"]
    if trace.trigger_step is not None:
        parts.append(f"left the region at step {trace.trigger_step}")
    if trace.score is not None:
        parts.append(f"S_mem {trace.score:.1f}" if trace.score < 1000 else "S_mem over 1000")
    if trace.tail_probability is not None:
        parts.append(f"as far as {rarity(trace.tail_probability)} ordinary images")
    if corrected := int(trace.mitigated.sum()):
        parts.append(f"{corrected} {'step' if corrected == 1 else 'steps'} corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"not a number from step {trace.nonfinite_step}")
    note = trace.note or ("no profile: not scored" if trace.verdict == "unscored" and not trace.bands else "")
    return ", ".join(parts) + "." + (f"\n{note.removesuffix('.')}." if note else "")


def _figure(kind: str, image: Image.Image, caption: str, drawing: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure class="{kind}"><img alt="{escape(kind)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption>{drawing}</figure>'
    )


def _verdict(trace: Trace) -> str:
    kind = "good" if trace.verdict == "stable" else "bad" if trace.trigger_step is not None else "muted"
    return f'<span class="{kind}">{trace.verdict}</span>'


def _copy(score: float | None, threshold: float) -> str:
    if score is None:
        return "-"
    return f'<span class="{"bad" if score > threshold else "good"}">{score:.2f}</span>'


def _copy_note(score: float | None, threshold: float) -> str:
    return "" if score is None else f" · copy score {_copy(score, threshold)}"


def _or_dash(value: float | None, format_: str) -> str:
    return "-" if value is None else format(value, format_)


def contact_sheet(comparisons: Sequence[Comparison], *, copy_threshold: float) -> Image.Image:
    """The same as one picture, 1200 pixels wide: a row a prompt, its training image, and both images over their graphs."""
    side, gap, head = 168, 16, 46
    graph_width = (1200 - 6 * gap - 3 * side) // 2
    row = head + side + gap
    sheet = Image.new("RGB", (1200, row * len(comparisons) + 2 * gap + 18), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    ink, muted = graph.LIGHT["ink"], graph.LIGHT["muted"]
    columns = [gap + i * (side + gap) for i in range(4)]
    columns.append(columns[3] + graph_width + gap)
    for number, name in enumerate(("training image", "without mitigation", "with mitigation", "without", "with mitigation")):
        draw.text((columns[number], gap), name, muted, font=small)
    for index, comparison in enumerate(comparisons):
        top = gap + 18 + index * row
        draw.text((gap, top + 14), f"{comparison.group}:  {comparison.prompt}", ink, font=font)
        top += head
        for place, picture, score in (
            (0, comparison.training_image, None),
            (1, comparison.plain_image, comparison.plain_copy),
            (2, comparison.mitigated_image, comparison.mitigated_copy),
        ):
            if picture is None:
                draw.text((columns[place], top + side // 2), "none under this prompt", muted, font=small)
                continue
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (columns[place], top))
            if score is not None:
                color = graph.LIGHT["alarm" if score > copy_threshold else "corrected"]
                draw.rectangle((columns[place], top + side - 20, columns[place] + 74, top + side), fill="#ffffff")
                draw.text((columns[place] + 4, top + side - 18), f"copy {score:.2f}", color, font=small)
        for place, trace in ((3, comparison.plain_trace), (4, comparison.mitigated_trace)):
            sheet.paste(graph.image(trace, graph_width, side), (columns[place], top))
    return sheet
