"""The frame of our pages, and the demo's report: a self-contained HTML page, and one picture of the same."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from ..core.trace import STATEMENT, Trace
from . import graph, words
from .rendering import render


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

    def lines(self, copy_threshold: float) -> tuple[str, str, str]:
        """What stands under each of the three images; one with a higher copy score than the threshold counts as a copy."""
        plain, after = (None if s is None else s > copy_threshold for s in (self.plain_copy, self.mitigated_copy))
        return (
            "training image" if self.training_image else "no training image belongs to this prompt",
            words.noticed(self.plain_trace, plain),
            words.mitigated(self.mitigated_trace, after),
        )


#: Draws the graphs of a page, after the source of graph.js.
_DRAW = """
const traces = JSON.parse(document.getElementById("traces").textContent);
for (const box of document.querySelectorAll("[data-trace]")) {
  box.replaceChildren();
  new StabilityGraph(box).show(runOf([traces[box.dataset.trace]]));
}
"""


def graph_script() -> str:
    """The source of ``js/graph.js``, which is inside the installed package, and beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "js" / "graph.js"
    return (inside if inside.exists() else package.parent / "js" / "graph.js").read_text(encoding="utf-8")


def html_report(comparisons: Sequence[Comparison], *, title: str, introduction: str, copy_threshold: float) -> str:
    """The demo's page: one file that loads no other, light and dark, readable on a phone, and as text without scripts.

    Args:
        comparisons: what was sampled.
        title, introduction: texts above the table.
        copy_threshold: an image with a higher copy score counts as a copy.
    """
    body = render(
        "demo.html",
        comparisons=comparisons,
        introduction=introduction,
        threshold=copy_threshold,
        data_url=_data_url,
        summary=words.summary,
    )
    traces = [trace.to_dict() for comparison in comparisons for trace in (comparison.plain_trace, comparison.mitigated_trace)]
    return page(title, body, data={"traces": traces}, script=graph_script() + _DRAW)


def page(title: str, body: str, *, style: str = "", data: Mapping[str, object] | None = None, script: str = "") -> str:
    """A page of ours: one file that loads no other, with the statement at its end.

    Args:
        title: text. body: HTML. style: CSS after that of ``templates/page.css``.
        data: what the script reads, as JSON, each in an element of that id.
        script: a module, the only one that may run.
    """
    html = render(
        "page.html",
        title=title,
        body=Markup(body),
        style=Markup(style),
        data=data or {},
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        statement=STATEMENT,
    )
    return str(html)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(comparisons: Sequence[Comparison], *, copy_threshold: float) -> Image.Image:
    """The same as one picture, 1200 pixels wide: a row a prompt, a line or two under each image, the graph without
    mitigation."""
    side, gap, line, two_lines = 256, 16, 26, 36
    row = line + side + two_lines + gap
    graph_width = 1200 - 5 * gap - 3 * side
    sheet = Image.new("RGB", (1200, row * len(comparisons) + gap), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    ink, muted = graph.LIGHT["ink"], graph.LIGHT["muted"]
    columns = [gap + i * (side + gap) for i in range(4)]
    for index, comparison in enumerate(comparisons):
        top = gap + index * row
        draw.text((gap, top), f"\u201c{comparison.prompt}\u201d", ink, font=font)
        top += line
        pictures = (comparison.training_image, comparison.plain_image, comparison.mitigated_image)
        alarms = (False, comparison.plain_trace.trigger_step is not None, (comparison.mitigated_copy or 0.0) > copy_threshold)
        for left, picture, text, alarm in zip(columns, pictures, comparison.lines(copy_threshold), alarms, strict=False):
            if picture is None:
                draw.rectangle((left, top, left + side - 1, top + side - 1), outline=graph.LIGHT["grid"])
            else:
                sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))
            told = _wrapped(text, side, lambda part: draw.textlength(part, font=small))
            draw.text((left, top + side + 5), told, graph.LIGHT["alarm"] if alarm else muted, font=small)
        sheet.paste(graph.image(comparison.plain_trace, graph_width, side), (columns[3], top))
    return sheet


def _wrapped(text: str, width: float, length: Callable[[str], float]) -> str:
    """``text`` in lines of at most a width, where its words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
