"""The demo's page and picture."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from memorization_guard import Trace
from memorization_guard.core.trace import STATEMENT, Steps
from memorization_guard.reports import charts
from memorization_guard.reports.html import Comparison, contact_sheet, graph_script, html_report, page
from memorization_guard.reports.words import mitigated, noticed, summary


def trace(verdict="stable", corrected=False):
    count = 10
    band = {"mean": np.full(count, 2.0), "std": np.full(count, 0.1)}
    names = ("latent_norm", "denoised_norm", "update_score", "denoised_score")
    steps = Steps(
        sigma=np.linspace(10, 1, count),
        update_norm=np.full(count, 2.1),
        mitigated=np.full(count, corrected),
        **{name: np.ones(count) for name in names},
    )
    bands = {"latent": band, "update": band, "denoised": band}
    return Trace(verdict=verdict, trigger_step=None if verdict == "stable" else 2, steps=steps, bands=bands)


def picture(color):
    return Image.new("RGB", (64, 64), color)


@pytest.fixture
def comparisons():
    return [
        Comparison(
            prompt="<script>alert('x')</script> & a cat",
            group="exact",
            training_image=picture("red"),
            plain_image=picture("red"),
            plain_trace=trace("likely copy"),
            mitigated_image=picture("blue"),
            mitigated_trace=trace("likely copy", corrected=True),
            plain_copy=0.99,
            mitigated_copy=0.12,
        ),
        Comparison(
            prompt="a dog",
            group="ordinary",
            training_image=None,
            plain_image=picture("green"),
            plain_trace=trace(),
            mitigated_image=picture("green"),
            mitigated_trace=trace(),
        ),
    ]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_no_network(comparisons):
    page = html_report(comparisons, title="T & T", introduction="i", copy_threshold=0.75)
    tags = Tags(page)
    assert tags.open == []
    images = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert len(images) == 5
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert sum("data-trace" in attributes for _, attributes in tags.seen) == 4
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme:dark" in page
    assert f'<p class="muted">{STATEMENT}</p>' in page


def test_text_from_users_is_never_html(comparisons):
    page = html_report(comparisons, title="<b>", introduction="<i>", copy_threshold=0.75)
    tags = Tags(page)
    assert {tag for tag, _ in tags.seen} & {"b", "i"} == set()
    assert "<script>alert('x')</script> & a cat" in tags.text
    scripts = [attributes for tag, attributes in tags.seen if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "traces"}, {"type": "module"}]


def test_no_text_of_a_trace_ends_the_script_it_stands_in(comparisons):
    note = "</script><script>alert(1)</script><!-- <script> \u2028 ]]>"
    comparisons[0].plain_trace.note = note
    page = html_report(comparisons, title="t", introduction="i", copy_threshold=0.75)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    assert "<" not in scripts[0]
    traces = json.loads(scripts[0])
    assert [trace["verdict"] for trace in traces] == ["likely copy", "likely copy", "stable", "stable"]
    assert traces[0]["note"] == note
    assert scripts[1].startswith(graph_script())
    assert "alert" not in scripts[1]
    assert re.search(r"</|<!--", scripts[1]) is None
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_a_trace_in_words(comparisons):
    corrected, stable = comparisons[0].mitigated_trace, comparisons[1].plain_trace
    assert summary(corrected) == "Image 1: likely copy, triggered at step 2, S_mem 1.0, 10 steps corrected."
    assert summary(stable) == "Image 1: stable, S_mem 1.0."
    stable.p_value = 0.00005
    assert summary(stable) == "Image 1: stable, S_mem 1.0, as far as 1 in 20,000 ordinary images."
    assert summary(Trace()) == "Image 1: unscored.\nno profile: not scored."
    assert summary(Trace(note="Ended early.", nonfinite_step=3)) == (
        "Image 1: unscored, not a number from step 3.\nEnded early."
    )


def test_a_copy_is_marked_by_the_threshold(comparisons):
    page = html_report(comparisons, title="t", introduction="i", copy_threshold=0.75)
    assert '<figcaption class="bad">a copy, noticed after 3 of 10 steps</figcaption>' in page
    assert "<figcaption>another image: 10 steps corrected</figcaption>" in page
    still = html_report(comparisons, title="t", introduction="i", copy_threshold=0.1)
    assert '<figcaption class="bad">still a copy</figcaption>' in still


def test_a_line_says_what_became_of_an_image(comparisons):
    found, stable = comparisons[0].plain_trace, comparisons[1].plain_trace
    found.p_value = 0.00005
    assert noticed(found, True) == "a copy, noticed after 3 of 10 steps, 1 in 20,000"
    assert noticed(found, False) == "no copy, noticed after 3 of 10 steps, 1 in 20,000"
    assert noticed(found, None) == "noticed after 3 of 10 steps, 1 in 20,000"
    assert noticed(stable, True) == "a copy, not noticed"
    assert noticed(stable, None) == "nothing noticed"
    assert mitigated(stable, None) == "the same image: nothing to correct"
    assert comparisons[1].lines(0.75)[0] == "no training image belongs to this prompt"


def test_the_picture_holds_every_image_in_its_row(comparisons):
    sheet = np.asarray(contact_sheet(comparisons, copy_threshold=0.75)).astype(int)
    assert sheet.shape[1] == 1200
    half = 16 + (sheet.shape[0] - 16) // 2

    def rows_of(color):
        return np.argwhere(np.abs(sheet - color).sum(axis=2) < 10)[:, 0]

    assert rows_of([255, 0, 0]).max() < half
    assert rows_of([0, 0, 255]).max() < half
    assert rows_of([0, 128, 0]).min() > half


def test_a_chart_escapes_its_texts_and_not_its_body():
    x = charts.Axis(0.0, 1.0, charts.LEFT, charts.RIGHT)
    y = charts.Axis(0.0, 1.0, charts.BOTTOM, charts.TOP)
    body = charts.line(0, charts.points(x(np.array([0, 1])), y(np.array([0, 1]))))
    drawn = charts.chart("<t>", "<d> \x00", body, x, y, "<x>", "<y>", y_label="<{:g}>".format)
    root = ET.fromstring(drawn)
    assert root.find("title").text == "<t>"
    assert root.find("desc").text == "<d> \ufffd"
    assert {"<x>", "<y>", "0.2", "<0.2>"} <= {element.text for element in root.iter("text")}
    assert body in drawn


def test_a_page_without_a_script_runs_none():
    text = page("t", "<p>body</p>", style=charts.STYLE)
    assert "<script" not in text
    assert "script-src" not in text
    assert "<p>body</p>" in text
    css = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    assert css.count("{") == css.count("}")
    assert "--c5:#1c2430;}" in css
