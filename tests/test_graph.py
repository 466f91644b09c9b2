"""The stability graph says what the trace says, in both forms."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from memorization_guard import Trace
from memorization_guard.core.settings import VERDICTS
from memorization_guard.core.trace import Steps
from memorization_guard.reports.graph import LIGHT, image, overlay, svg

STEPS = 12
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


def test_the_run_and_the_band_are_drawn_to_one_scale_and_corrected_steps_are_marked(trace):
    text = svg(trace)
    run = points(parts(text, "polyline", "mg-run")[0])
    assert len(run) == STEPS
    pixels = (run[0, 1] - run[5, 1]) / 4.0  # the run goes from norm 2 to 6
    *corrected, legend = [[float(e.get("cx")), float(e.get("cy"))] for e in parts(text, "circle", "mg-corrected")]
    assert corrected == run[5:9].tolist()
    assert legend[1] > run[:, 1].max()
    band = points(parts(text, "polygon", "mg-band")[0])
    assert np.ptp(band[:, 1]) == pytest.approx(2 * 3 * 0.2 * pixels, abs=0.2)
    trigger = points(parts(text, "polyline", "mg-trigger")[0])
    assert set(trigger[:, 0]) == {run[5, 0]}
    said = {"likely copy", "S_mem 20.0", "trigger at step 5", "this run", "corrected", "mean ± 3 sd of 50 reference runs"}
    assert said <= set(words(text))


def test_everything_lies_inside_the_drawing(trace):
    for tag in ("polyline", "polygon"):
        for element in ET.fromstring(svg(trace)).iter(f"{SVG}{tag}"):
            xy = points(element)
            assert (xy >= 0).all()
            assert (xy[:, 0] <= 640).all()
            assert (xy[:, 1] <= 300).all()


def test_without_a_profile_there_is_a_line_and_no_band(trace):
    trace.steps.update_score[:] = np.nan
    text = svg(dataclasses.replace(trace, verdict="unscored", trigger_step=None, bands={}))
    assert not parts(text, "polygon", "mg-band")
    assert len(parts(text, "polyline", "mg-run")) == 2  # the run and its swatch in the legend
    assert "unscored" in words(text)
    assert not any(word.startswith(("S_mem", "mean")) for word in words(text))


def test_missing_values_leave_a_gap(trace):
    trace.steps.update_norm[8:10] = np.nan
    text = svg(dataclasses.replace(trace, nonfinite_step=8))
    assert [len(points(e)) for e in parts(text, "polyline", "mg-run")] == [8, 2, 2]
    assert len(parts(text, "circle", "mg-corrected")) == 4  # three steps, and the legend
    assert "not a number from step 8" in words(text)


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_any_steps_are_no_error(steps):
    columns = {f.name: np.ones(steps, dtype=bool if f.name == "mitigated" else float) for f in dataclasses.fields(Steps)}
    trace = Trace(steps=Steps(**columns))
    ET.fromstring(svg(trace))
    assert image(trace).size == (640, 300)


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
    assert "4 steps were corrected" in description
    assert "prefers-color-scheme:dark" in svg(trace)
    styles = root.find(f"{SVG}style").text
    for name in set(re.findall(r'class="(mg-[\w-]+)', svg(trace))):
        assert f".{name}{{" in styles


def test_the_picture_shows_the_same_things_in_the_same_places(trace):
    picture = np.asarray(image(trace)).astype(int)
    assert picture.shape == (300, 640, 3)

    def near(name):
        color = [int(LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        return np.argwhere(np.abs(picture - color).sum(axis=2) < 24)

    for dot in parts(svg(trace), "circle", "mg-corrected"):
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
