"""Curves over audits of several checkpoints or strengths, from the files that such audits leave."""

import csv
import json

import pytest

pytest.importorskip("typer")

from memorization_guard.audit import AuditError
from memorization_guard.audit.curve import read_curve
from memorization_guard.statistics import exact_interval


def _share(count, of):
    return {"count": count, "of": of, "rate": count / of, "interval": exact_interval(count, of)}


@pytest.fixture
def held(audits):
    """``held(LoRAs, copies)`` writes an audit that was held against 40 training images; further keywords change its files."""

    def write(loras, copied, *, threshold=0.8, steps=20, **changes):
        loras = [{"file": file, "weight": weight} for file, weight in loras]
        folder = audits([], model={"name": "base", "loras": loras}, settings={"steps": steps})
        (folder / "training").mkdir()
        summary = {
            "training": {"images": 40, "captions": 40},
            "encoder": "correlation",
            "threshold": {"value": threshold},
            "images_copied": _share(copied, 40),
            "captions_copied": _share(copied, 40),
            "verdicts": {"triggered": {"copies": copied, "others": 1}, "not_triggered": {"copies": 0, "others": 39 - copied}},
            "outputs": 40,
        }
        (folder / "training/summary.json").write_text(json.dumps(summary | changes))
        return folder

    return write


@pytest.mark.parametrize(
    ("loras", "axis", "positions"),
    [
        ([("a-000004.safetensors", 1), ("a-000002.safetensors", 1), None], "number", [0, 2, 4]),
        ([("v1-e10.safetensors", 1), ("v1-e9.safetensors", 1), ("v1-e8.safetensors", 1)], "number", [8, 9, 10]),
        ([("a.safetensors", 1), ("a.safetensors", 0.5), None], "strength", [0, 0.5, 1]),
        ([("a.safetensors", 1), ("b.safetensors", 1), ("c.safetensors", 1)], "order", [1, 2, 3]),
        ([("a-1.safetensors", 1), ("a-2.safetensors", 0.5), ("a-3.safetensors", 1)], "order", [1, 2, 3]),
        ([None, None, None], "order", [1, 2, 3]),
    ],
)
def test_audits_stand_by_epoch_strength_or_order(held, loras, axis, positions):
    found = read_curve([held([] if lora is None else [lora], 5) for lora in loras])
    assert found["axis"] == axis
    assert [point["position"] for point in found["points"]] == positions


def test_the_page_and_the_table(held, call, tmp_path, browser):
    folders = [held([(f"<b>style-{epoch:06d}.safetensors", 1)], copied) for epoch, copied in ((6, 30), (2, 0), (4, 9))]
    result = call("curve", *folders, "-o", tmp_path / "curve.html")
    assert result.exit_code == 0, result.output
    assert "75.0%" in result.output
    page = browser.new_page()
    page.goto((tmp_path / "curve.html").as_uri())
    rows = page.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == [f"<b>style-{epoch:06d}.safetensors" for epoch in (2, 4, 6)]
    assert "75.0 %" in rows[2]
    lines = page.locator("svg.chart path[class^=c]")
    assert lines.count() >= 3
    heights = [float(point.split(" ")[1]) for point in lines.nth(0).get_attribute("d").removeprefix("M").split("L")]
    assert heights[0] > heights[1] > heights[2]
    page.close()
    assert call("curve", *folders, "-o", tmp_path / "curve.csv").exit_code == 0
    with open(tmp_path / "curve.csv", newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [(row["number"], row["images_copied_count"]) for row in written] == [("2.0", "0"), ("4.0", "9"), ("6.0", "30")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.7}, "another threshold"),
        ({"encoder": "other"}, "another encoder"),
        ({"training": {"images": 41, "captions": 40}}, "another training folder"),
        ({"steps": 30}, "another settings"),
        ({"images_copied": {}}, "is damaged"),
        ({"outputs": 0}, "is damaged"),
        ({"verdicts": []}, "is damaged"),
    ],
)
def test_what_is_no_curve(held, changes, message):
    with pytest.raises(AuditError, match=message):
        read_curve([held([], 1), held([], 1, **changes)])


def test_one_audit_or_one_without_a_training_folder(held, audits, call, tmp_path):
    for arguments, message in (
        ((held([], 1),), "one audit is no curve"),
        ((held([], 1), audits([])), "was not held against a training folder"),
        ((held([], 1), tmp_path), "is no audit"),
        ((held([], 1), held([], 1), "-o", tmp_path / "curve.png"), "is written as .html or .csv"),
    ):
        result = call("curve", *arguments)
        assert result.exit_code == 2
        assert message in result.output
