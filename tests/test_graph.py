"""The stability graph says what the trace says, in both forms."""

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from memorization_guard import Trace
from memorization_guard.reports.graph import DARK, LIGHT, image, overlay, svg

STEPS = 12
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace():
    update = np.full(STEPS, 2.0)
    update[5:] = 6.0
    corrected = np.full(STEPS, np.nan)
    corrected[5:9] = 2.5
    latent = np.full(STEPS, np.nan)
    latent[5:9] = 30.0
    band = {"mean": np.full(STEPS, 2.0), "std": np.full(STEPS, 0.2)}
    return Trace(
        verdict="strong",
        trigger_step=5,
        sigma=np.linspace(12, 1, STEPS),
        latent_norm=np.full(STEPS, 31.0),
        update_norm=update,
        denoised_norm=np.full(STEPS, 20.0),
        update_score=(update - 2) / 0.2,
        denoised_score=np.zeros(STEPS),
        guidance_norm=np.zeros(STEPS),
        alignment=np.zeros(STEPS),
        corrected_latent_norm=latent,
        corrected_update_norm=corrected,
        bands={"latent": band, "update": band, "denoised": band},
        mitigation=True,
    )


def parts(text, tag, css):
    return [e for e in ET.fromstring(text).iter(f"{SVG}{tag}") if css in e.get("class", "").split()]


def points(element):
    return np.array([[float(v) for v in pair.split(",")] for pair in element.get("points").split()])


def words(text):
    return [e.text for e in ET.fromstring(text).iter(f"{SVG}text")]


def test_the_run_the_proposals_and_the_band_are_drawn_to_one_scale(trace):
    text = svg(trace)
    run = points(parts(text, "polyline", "mg-run")[0])
    assert len(run) == STEPS
    proposed = [float(e.get("cy")) for e in parts(text, "circle", "mg-proposed")]
    corrected = [float(e.get("cy")) for e in parts(text, "circle", "mg-corrected")]
    assert len(proposed) == len(corrected) == 4
    pixels = (run[0, 1] - run[10, 1]) / 4.0  # the run goes from norm 2 to 6, and was corrected to 2.5 in between
    assert corrected == pytest.approx([run[0, 1] - 0.5 * pixels] * 4, abs=0.2)
    assert run[5:9, 1] == pytest.approx(corrected)
    assert proposed == pytest.approx([run[10, 1]] * 4, abs=0.2)
    band = points(parts(text, "polygon", "mg-band")[0])
    assert np.ptp(band[:, 1]) == pytest.approx(2 * 3 * 0.2 * pixels, abs=0.2)
    trigger = points(parts(text, "polyline", "mg-trigger")[0])
    assert set(trigger[:, 0]) == {run[5, 0]}
    assert {"strong", "S_mem 20.0", "trigger at step 5", "corrected", "before correction"} <= set(words(text))


def test_everything_lies_inside_the_drawing(trace):
    for quantity in ("update", "denoised", "latent"):
        for tag in ("polyline", "polygon"):
            for element in ET.fromstring(svg(trace, quantity=quantity)).iter(f"{SVG}{tag}"):
                xy = points(element)
                assert (xy >= 0).all()
                assert (xy[:, 0] <= 640).all()
                assert (xy[:, 1] <= 300).all()


def test_without_a_profile_there_is_a_line_and_no_band(trace):
    bare = dataclasses.replace(trace, verdict="unscored", trigger_step=None, bands={}, update_score=np.full(STEPS, np.nan))
    text = svg(bare)
    assert not parts(text, "polygon", "mg-band")
    assert len(parts(text, "polyline", "mg-run")) == 1
    assert "unscored" in words(text)
    assert not any("S_mem" in word for word in words(text))


def test_missing_values_leave_a_gap(trace):
    trace.update_norm[8:10] = np.nan
    plain = dataclasses.replace(
        trace, corrected_latent_norm=np.full(STEPS, np.nan), corrected_update_norm=np.full(STEPS, np.nan), nonfinite_step=8
    )
    text = svg(plain)
    assert [len(points(e)) for e in parts(text, "polyline", "mg-run")] == [8, 2]
    assert "not a number from step 8" in words(text)


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_any_steps_are_no_error(steps):
    trace = Trace(
        **{name: np.ones(steps) for name in ("sigma", "latent_norm", "update_norm", "denoised_norm")}
        | {
            name: np.full(steps, math.nan)
            for name in (
                "update_score",
                "denoised_score",
                "guidance_norm",
                "alignment",
                "corrected_latent_norm",
                "corrected_update_norm",
            )
        }
    )
    ET.fromstring(svg(trace))
    assert image(trace).size == (640, 300)


def test_it_is_described_for_those_who_cannot_see_it_and_styles_itself(trace):
    root = ET.fromstring(svg(trace))
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "Stability graph: strong, S_mem 20.0"
    description = root.find(f"{SVG}desc").text
    assert "left its stability region at step 5" in description
    assert "4 steps were corrected" in description
    assert "prefers-color-scheme:dark" in svg(trace)
    styles = root.find(f"{SVG}style").text
    for name in set(re.findall(r'class="(mg-[\w-]+)', svg(trace))):
        assert f".{name}{{" in styles


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_the_picture_shows_the_same_things_in_the_same_places(trace, palette):
    picture = np.asarray(image(trace, dark=palette is DARK)).astype(int)
    assert picture.shape == (300, 640, 3)

    def near(name):
        color = [int(palette[name][i : i + 2], 16) for i in (1, 3, 5)]
        return np.argwhere(np.abs(picture - color).sum(axis=2) < 24)

    corrected = parts(svg(trace), "circle", "mg-corrected")
    for dot in corrected:
        place = np.array([float(dot.get("cy")), float(dot.get("cx"))])
        assert np.linalg.norm(near("corrected") - place, axis=1).min() < 2
    assert len(near("band")) > 500


def test_an_unknown_quantity_is_refused(trace):
    with pytest.raises(ValueError, match="there are update, denoised, latent"):
        svg(trace, quantity="speed")


def test_a_graph_too_small_to_read_is_refused(trace):
    with pytest.raises(ValueError, match="at least 240 x 140"):
        image(trace, 100, 80)


def test_the_rarity_stands_beside_the_verdict_where_it_is_known(trace):
    rare = dataclasses.replace(trace, tail=np.geomspace(0.1, 0.00005, STEPS))
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
