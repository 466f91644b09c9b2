"""The stability graph says what the trace says, in both forms."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from memorization_guard import Thresholds, Trace
from memorization_guard.core.settings import VERDICTS
from memorization_guard.core.trace import Steps
from memorization_guard.core.words import Words
from memorization_guard.reports import graph
from memorization_guard.reports.graph import LIGHT, image, overlay, svg

STEPS = 12
ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace():
    update = np.full(STEPS, 2.0)
    update[5:] = 6.0
    band = {"mean": np.full(STEPS, 2.0), "std": np.full(STEPS, 0.2)}
    steps = Steps(
        sigma=np.linspace(12, 1, STEPS),
        latent_norm=np.full(STEPS, 31.0),
        update_norm=update,
        denoised_norm=np.full(STEPS, 20.0),
        update_score=(update - 2) / 0.2,
        denoised_score=np.zeros(STEPS),
        mitigated=np.isin(np.arange(STEPS), [5, 6, 7, 8]),
    )
    bands = {"latent": band, "update": band, "denoised": band}
    return Trace(verdict="likely copy", trigger_step=5, steps=steps, bands=bands, reference_count=50, mode="mitigate")


def parts(text, tag, css):
    return [e for e in ET.fromstring(text).iter(f"{SVG}{tag}") if css in e.get("class", "").split()]


def points(element):
    return np.array([[float(v) for v in pair.split(",")] for pair in element.get("points").split()])


def words(text):
    return [e.text for e in ET.fromstring(text).iter(f"{SVG}text")]


@pytest.fixture
def judged(trace):
    """The same, judged by our own method: one in 1,000, by what the network was asked."""
    return dataclasses.replace(
        trace, verdict="corrected", trigger_step=0, p_value=0.001, p_value_floor=1 / 8000, judged_by="asked"
    )


def curves(text):
    """The runs' lines that go through every step: of the evidence, where it is a level, none."""
    return [line for line in map(points, parts(text, "polyline", "mg-run")) if len(line) == STEPS]


def dots(text, role):
    return [[float(e.get("cx")), float(e.get("cy"))] for e in parts(text, "circle", f"mg-{role}")]


def test_the_norms_and_their_bands_are_drawn_to_one_scale_and_corrected_steps_are_marked(judged):
    text = svg(judged)
    latent, update, denoised = curves(text)
    assert latent[0, 0] < update[0, 0] < denoised[0, 0]
    pixels = (update[0, 1] - update[5, 1]) / 4.0  # the run goes from norm 2 to 6
    assert [at for at in dots(text, "corrected") if at in update.tolist()] == update[5:9].tolist()
    band = next(b for b in map(points, parts(text, "polygon", "mg-band")) if abs(b[0, 0] - update[0, 0]) < 1 and len(b) > 4)
    spread = np.sqrt(np.log1p(0.1**2))  # of the logarithm, where mean and standard deviation are 2 and 0.2
    high, low = (2 * np.exp(sd * spread - spread**2 / 2) for sd in (3, -3))
    assert np.ptp(band[:, 1]) == pytest.approx((high - low) * pixels, abs=0.3)
    assert band[:, 1].min() == pytest.approx(update[0, 1] - (high - 2) * pixels, abs=0.3)
    assert {"latent norm", "update norm", "predicted image norm", "50 ordinary runs, ± 3 sd"} <= set(words(text))


def test_a_band_that_does_not_hold_is_not_drawn_and_that_is_said(judged):
    text = svg(dataclasses.replace(judged, bands={"denoised": judged.bands["denoised"]}))
    assert len([b for b in map(points, parts(text, "polygon", "mg-band")) if len(b) > 4]) == 1
    assert {"latent norm (no band holds)", "update norm (no band holds)", "predicted image norm"} <= set(words(text))


def test_the_tail_of_a_band_has_no_part_in_the_axis(judged):
    wide = {"mean": np.full(STEPS, 2.0), "std": np.full(STEPS, 6.0)}
    update = curves(svg(dataclasses.replace(judged, bands={"update": wide})))[1]
    assert np.ptp(update[:, 1]) > 40
    assert "log scale" not in " ".join(words(svg(judged)))


def test_the_evidence_is_a_level_with_the_mark_of_its_verdict_over_the_threshold(judged):
    text = svg(judged)
    level = points(parts(text, "polyline", "mg-run")[0])
    assert len(level) == 2
    assert level[0, 1] == level[1, 1]
    [mark] = [points(e) for e in parts(text, "polygon", "mg-mark-outlined")]
    assert mark[:, 1].mean() == pytest.approx(level[0, 1], abs=0.1)
    ticks = {w.text: float(w.get("y")) - 4 for w in ET.fromstring(text).iter(f"{SVG}text") if w.text.startswith("1 in ")}
    assert level[0, 1] == pytest.approx(ticks["1 in 1,000"], abs=0.2)
    [threshold] = [points(e) for e in parts(text, "polyline", "mg-threshold")]
    share = (ticks["1 in 100"] - threshold[0, 1]) / (ticks["1 in 100"] - ticks["1 in 1,000"])
    assert share == pytest.approx(np.log10(2), abs=0.02)
    assert {"triggers from 1 in 200 on", "9 of 10 ordinary prompts", "judged by what the network was asked"} <= set(
        words(text)
    )
    first = svg(dataclasses.replace(judged, judged_by="first", verdict="stable", p_value=0.7, trigger_step=None))
    assert len(dots(first, "mark-plain")) == 1
    assert "judged at the first evaluation" in words(first)


def test_what_the_references_tell_no_further_lies_beyond_the_axis(judged):
    def level(p_value):
        return points(parts(svg(dataclasses.replace(judged, p_value=p_value)), "polyline", "mg-run")[0])[0, 1]

    assert level(1 / 8000) < level(1 / 7900) - 4
    assert "rarer" in words(svg(judged))


def test_the_words_stand_under_the_evidence(judged):
    told = Words(words=("wosol", "<dethax>"), p_values=(0.1, 0.2), text="a ring, by", p_value=0.6, left_out=True)
    assert 'called up by "wosol", "<dethax>", left out' in words(svg(dataclasses.replace(judged, words=told)))
    long = dataclasses.replace(told, words=("w" * 400,), p_values=(0.1,))
    assert max(map(len, words(svg(dataclasses.replace(judged, words=long))))) < 105


def test_the_published_method_shows_its_score_with_its_thresholds(trace):
    published = dataclasses.replace(trace, verdict="strong", thresholds=Thresholds(method="published"))
    published.steps.denoised_score[:] = 20.0
    text = svg(published)
    score, *_ = curves(text)
    assert len(parts(text, "polyline", "mg-threshold")) == 2
    assert {"triggers above 3 sd", "strong above 14 sd"} <= set(words(text))
    assert dots(text, "mark-solid") == [score[5].tolist()]


@pytest.mark.parametrize("size", [(640, 440), (352, 256), (240, 140)])
@pytest.mark.parametrize("p_value", [1 / 8000, 0.0052, 0.005, 0.07, 0.3, 0.9, None])
def test_no_two_texts_overlap_and_all_lie_inside(judged, size, p_value):
    shapes = graph._layout(dataclasses.replace(judged, p_value=p_value), *size)
    boxes = []
    for shape in shapes:
        if shape.kind == "text":
            wide = 5.9 * len(shape.text)
            x = shape.points[0][0] - {"start": 0, "middle": wide / 2, "end": wide}[shape.anchor]
            boxes.append((shape.text, x, x + wide, shape.points[0][1]))
    for i, (text, left, right, y) in enumerate(boxes):
        assert left >= 0, text
        assert right <= size[0], text
        assert 9 <= y <= size[1], text
        for other, left_too, right_too, y_too in boxes[i + 1 :]:
            assert right <= left_too or right_too <= left or abs(y - y_too) >= 10, (text, other)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("quantity", ["evidence", *graph.NORMS])
def test_both_renderers_draw_the_same(judged, quantity):
    """Python's picture and the page's: the same band, line, marks and threshold, in units of the plot's own axis."""
    script = """const [trace, quantity] = JSON.parse(process.argv[1]);
      import(process.cwd() + "/js/graph.js").then(({layout, runOf}) =>
        console.log(JSON.stringify(layout(runOf([trace]), {width: 640, height: 300, quantity}).shapes)));"""
    told = json.dumps([judged.to_dict(), quantity])
    drawn = json.loads(subprocess.run(["node", "-e", script, told], cwd=ROOT, capture_output=True, check=True).stdout)

    def of(role):
        found = [a["points"] for tag, a, *_ in drawn if a["class"] == f"mg-{role}" and "points" in a]
        return np.array([[float(v) for v in pair.split(",")] for pair in found[0].split()])

    text = svg(judged)
    if quantity == "evidence":
        level, threshold = of("run")[0, 1], of("threshold")[0, 1]
        ours = [points(parts(text, "polyline", f"mg-{role}")[0])[0, 1] for role in ("run", "threshold")]
        low, high = (of(role)[[0, 2], 1] for role in ("band", "wide"))
        mine = [points(parts(text, "polygon", f"mg-{role}")[0])[[0, 2], 1] for role in ("band", "wide")]
        scale, own = low[1] - low[0], mine[0][1] - mine[0][0]
        for theirs, here in ((level, ours[0]), (threshold, ours[1]), (high[1], mine[1][1])):
            assert (theirs - low[0]) / scale == pytest.approx((here - mine[0][0]) / own, abs=0.03)
        said = {words for *_, words in drawn if isinstance(words, str)}
        assert {w for w in words(text) if w.startswith(("1 in ", "triggers", "9 of 10", "rarer"))} <= said
        return
    number = list(graph.NORMS).index(quantity)
    run, ours = of("run"), curves(text)[number]
    band = of("band")
    mine = next(
        b for b in map(points, parts(text, "polygon", "mg-band")) if abs(b[0, 0] - ours[0, 0]) < 1 and len(b) == 2 * STEPS
    )
    for theirs, here in ((run[5, 1] - band[0, 1], ours[5, 1] - mine[0, 1]), (run[0, 1] - band[0, 1], ours[0, 1] - mine[0, 1])):
        assert theirs / np.ptp(band[:, 1]) == pytest.approx(here / np.ptp(mine[:, 1]), rel=0.03)


def test_everything_lies_inside_the_drawing(trace):
    for tag in ("polyline", "polygon"):
        for element in ET.fromstring(svg(trace)).iter(f"{SVG}{tag}"):
            xy = points(element)
            assert (xy >= 0).all()
            assert (xy[:, 0] <= 640).all()
            assert (xy[:, 1] <= 440).all()


def test_without_a_profile_there_is_a_line_and_no_band(trace):
    trace.steps.update_score[:] = np.nan
    text = svg(dataclasses.replace(trace, verdict="unscored", trigger_step=None, bands={}, reference_count=None))
    assert not parts(text, "polygon", "mg-band")
    assert len(curves(text)) == 3
    assert "unscored" in words(text)
    assert "not judged: how unusual the prompt is is not known" in words(text)
    assert not any(word.startswith("S_mem") for word in words(text))


def test_missing_values_leave_a_gap(trace):
    trace.steps.update_norm[8:10] = np.nan
    text = svg(dataclasses.replace(trace, nonfinite_step=8))
    assert [len(points(e)) for e in parts(text, "polyline", "mg-run")] == [STEPS, 8, 2, STEPS, 2]  # last, the legend
    assert len(parts(text, "circle", "mg-corrected")) == 4 + 3 + 4 + 1
    assert len(parts(text, "polyline", "mg-broken")) == 3
    assert "From step 8 on the latent is not a number" in ET.fromstring(text).find(f"{SVG}desc").text


def test_the_level_of_a_run_ends_where_its_latent_is_no_number_any_more(judged):
    whole, broken = (
        points(parts(svg(dataclasses.replace(judged, nonfinite_step=step)), "polyline", "mg-run")[0])[1, 0]
        for step in (None, 8)
    )
    assert broken < whole - 100


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_any_steps_are_no_error(steps):
    columns = {f.name: np.ones(steps, dtype=bool if f.name == "mitigated" else float) for f in dataclasses.fields(Steps)}
    trace = Trace(steps=Steps(**columns))
    ET.fromstring(svg(trace))
    assert image(trace).size == (640, 440)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_has_a_badge(trace, verdict):
    assert verdict in words(svg(dataclasses.replace(trace, verdict=verdict)))


def test_no_text_of_a_trace_becomes_markup(trace):
    note = "<b>&</desc> \x00"
    root = ET.fromstring(svg(dataclasses.replace(trace, note=note)))
    assert root.find(f"{SVG}desc").text.endswith("<b>&</desc> \ufffd.")


def test_it_is_described_for_those_who_cannot_see_it_and_styles_itself(trace):
    root = ET.fromstring(svg(trace))
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "Stability graph: likely copy, S_mem 20.0"
    description = root.find(f"{SVG}desc").text
    assert "triggered at step 5" in description
    assert "4 of 12 steps were corrected" in description
    assert "prefers-color-scheme:dark" in svg(trace)
    styles = root.find(f"{SVG}style").text
    for name in set(re.findall(r'class="(mg-[\w-]+)', svg(trace))):
        assert f".{name}{{" in styles


def test_the_description_says_why(judged):
    description = ET.fromstring(svg(judged)).find(f"{SVG}desc").text
    assert "The prompt is as far as 1 in 1,000 ordinary images; 1 in 200 triggers" in description
    assert "It was judged by what the network was asked" in description


def test_a_trace_shows_itself_in_a_notebook(judged):
    assert judged._repr_svg_() == svg(judged)  # what IPython asks for


def test_the_picture_shows_the_same_things_in_the_same_places(judged):
    picture = np.asarray(image(judged)).astype(int)
    assert picture.shape == (440, 640, 3)

    def near(name):
        color = [int(LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        return np.argwhere(np.abs(picture - color).sum(axis=2) < 24)

    for dot in parts(svg(judged), "circle", "mg-corrected"):
        place = np.array([float(dot.get("cy")), float(dot.get("cx"))])
        assert np.linalg.norm(near("corrected") - place, axis=1).min() < 2
    assert len(near("band")) > 500


def test_a_graph_too_small_to_read_is_refused(trace):
    with pytest.raises(ValueError, match="at least 240 x 140"):
        image(trace, 100, 80)


def test_the_rarity_stands_beside_the_verdict_where_it_is_known(trace):
    rare = dataclasses.replace(trace, p_value=0.00005)
    assert "1 in 20,000" in words(svg(rare))
    assert "S_mem 20.0" not in words(svg(rare))


def test_the_local_map_is_laid_over_the_image(trace):
    from PIL import Image

    with pytest.raises(ValueError, match="no local map"):
        overlay(Image.new("RGB", (64, 64)), trace)
    mapped = dataclasses.replace(trace, local_map=np.array([[8.0, 0.0], [0.0, np.nan]]))
    pixels = np.asarray(overlay(Image.new("RGB", (64, 64), (90, 120, 90)), mapped)).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[5, 5] > 50
    assert redness[60, 60] == redness[60, 5] == 0
