"""Audits with a training folder: the bundled model returns its exact images, and not its ordinary ones."""

import csv
import json
import re
import shutil

import pytest
from PIL import Image

pytest.importorskip("pyarrow")
pytest.importorskip("typer")

import pyarrow.parquet as pq
from typer.testing import CliRunner

from memorization_guard.audit import copies
from memorization_guard.audit.dataset import scan
from memorization_guard.lab import PROFILE
from memorization_guard.lab.folder import write_folder

EXACT, ORDINARY = 4, 5
#: A file and a caption that would be HTML.
NAME, CAPTION = "<img src=x onerror=alert(1)>&amp;.png", "a huge <script>alert(1)</script> circle & 'more'"


def _audit(training, output, *options):
    from memorization_guard.cli.app import app

    how = ("--profile", PROFILE, "--steps", 12, "--guidance", 3, "--device", "cpu")
    arguments = ("audit", "lab", "--training", training, "-o", output, *how, *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "set"
    write_folder(folder, exact=EXACT, ordinary=ORDINARY)
    Image.radial_gradient("L").convert("RGB").save(folder / "1_ordinary" / NAME)
    (folder / "1_ordinary" / NAME).with_suffix(".txt").write_text(CAPTION)
    return folder


@pytest.fixture(scope="module")
def audited(training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "audit"
    result = _audit(training, folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def again(audited, tmp_path):
    """The finished audit, to be changed."""
    return shutil.copytree(audited[0], tmp_path / "audit")


def _pairs(folder):
    return {row["prompt"]: row for row in copies.read_pairs(folder)}


def test_memorized_images_are_copies_and_found_and_mitigated(audited, training):
    pairs = _pairs(audited[0])
    assert len(pairs) == EXACT + ORDINARY + 1
    for number in range(EXACT):
        row = pairs[(training / f"40_exact/{number:03d}.txt").read_text().strip()]
        assert row["nearest"] == f"40_exact/{number:03d}.png"
        assert row["is_copy"]
        assert row["own"]
        assert row["triggered"]
        assert row["verdict"] == "likely copy"
        assert row["similarity"] > 0.8
        assert row["mitigated_is_copy"] is False
        assert (audited[0] / row["mitigated_file"]).is_file()
    others = [row for row in pairs.values() if not row["nearest"].startswith("40_exact") or not row["is_copy"]]
    assert len(others) == ORDINARY + 1
    assert not any(row["triggered"] for row in others)
    assert all(row["mitigated_file"] is None for row in others)


def test_every_image_has_a_row_the_most_similar_first(audited):
    rows = list(copies.read_pairs(audited[0]))
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)
    table = pq.read_table(audited[0] / "pairs.parquet")
    assert table.schema.equals(copies.SCHEMA)
    assert sorted(table["image"].to_pylist()) == list(range(EXACT + ORDINARY + 1))
    with open(audited[0] / "pairs.csv", newline="", encoding="utf-8") as stream:
        written = list(csv.DictReader(stream))
    for row, text in zip(rows, written, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == text
    results = {
        row["image"]: row for batch in scan(audited[0], ("image", "seed", "p_value", "file")) for row in batch.to_pylist()
    }
    assert all({name: row[name] for name in results[0]} == results[row["image"]] for row in rows)


def test_shares_are_those_of_the_pairs(audited):
    found = json.loads((audited[0] / "training/summary.json").read_text())
    rows = list(copies.read_pairs(audited[0]))
    copied = [row for row in rows if row["is_copy"]]
    assert found["verdicts"]["triggered"] == {"copies": EXACT, "others": 0}
    assert found["verdicts"]["not_triggered"]["copies"] == len(copied) - EXACT
    assert found["captions_copied"]["count"] == len(copied)
    assert found["images_copied"]["of"] == len(rows)
    assert found["images_copied"]["count"] >= len({row["nearest"] for row in copied})
    low, high = found["images_copied"]["interval"]
    assert 0 < low < found["images_copied"]["rate"] < high < 1
    assert found["copies_left"]["count"] == 0
    assert all(row["is_copy"] is (row["similarity"] >= found["threshold"]["value"]) for row in rows)
    assert found["threshold"]["rough"]
    assert "the threshold is rough" in audited[1]
    assert "repeated 1 to 40 times" in audited[1]


def test_no_vectors_of_training_images_are_left(audited):
    assert sorted(file.name for file in (audited[0] / "training").iterdir()) == [
        "captions.jsonl",
        "summary.json",
        "triggered.jsonl",
    ]
    assert not (audited[0] / ".work").exists()


def test_the_gallery_shows_training_image_output_and_mitigated_output(audited, browser):
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto((audited[0] / "gallery.html").as_uri())
    cards = page.locator("#gallery article")
    assert cards.count() == EXACT + ORDINARY + 1
    first = cards.nth(0)
    assert first.locator("img").count() == 3
    sizes = first.locator("img").evaluate_all("all => all.map(image => [image.naturalWidth, image.complete])")
    assert sizes == [[128, True]] * 3
    assert re.search(r"a copy, similarity 0\.9\d\d", first.inner_text())
    assert "no copy, similarity" in first.inner_text()
    last = cards.nth(EXACT + ORDINARY)
    assert last.locator("img").count() == 2
    assert "nothing was mitigated" in last.inner_text()
    cells = page.locator("#verdicts tbody td").all_inner_texts()
    assert cells[:3] == ["the guard triggered", str(EXACT), "0"]
    text = page.inner_text("main")
    assert CAPTION in text
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("#gallery script").count() == 0
    assert not errors
    page.close()


def test_what_would_be_html_is_text(audited):
    page = (audited[0] / "gallery.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page


def test_a_finished_comparison_is_not_made_again(audited, training, monkeypatch):
    before = {
        file: file.stat().st_mtime_ns for file in audited[0].rglob("*") if file.is_file() and "captions" not in file.name
    }
    monkeypatch.setattr(copies.TrainingAudit, "_compare", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr("memorization_guard.audit.run.Local", lambda *_: pytest.fail("a model was loaded"))
    result = _audit(training, audited[0])
    assert result.exit_code == 0, result.output
    assert "is finished: nothing was left to do" in result.output
    assert "training images that came back" in result.output
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_another_threshold_compares_anew_and_samples_nothing(again, training, monkeypatch):
    monkeypatch.setattr("memorization_guard.audit.run.Local", lambda *_: pytest.fail("a model was loaded"))
    result = _audit(training, again, "--copy-threshold", 0.9999)
    assert result.exit_code == 0, result.output
    assert not any(row["is_copy"] for row in copies.read_pairs(again))
    assert "The threshold was given." in (again / "gallery.html").read_text()


def test_an_interrupted_comparison_is_gone_on_with(training, again, monkeypatch):
    before = (again / "pairs.csv").read_text()
    for name in ("pairs.csv", "pairs.parquet", "gallery.html", "training/summary.json"):
        (again / name).unlink()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copies, "write_table", killed)
        result = _audit(training, again)
    assert result.exit_code == 130
    assert "call again to go on" in result.output
    assert not (again / "pairs.csv").exists()
    assert _audit(training, again).exit_code == 0
    assert (again / "pairs.csv").read_text() == before


def test_a_damaged_output_is_named(training, again):
    (again / "training/summary.json").unlink()
    row = next(copies.read_pairs(again))
    (again / row["file"]).write_bytes(b"no image")
    result = _audit(training, again)
    assert result.exit_code == 2
    assert f"{row['file']} cannot be compared" in result.output.replace("\n", "")


def test_an_audit_of_other_captions_is_another_audit(training, again, tmp_path):
    other = shutil.copytree(training, tmp_path / "other")
    (other / "40_exact/000.txt").write_text("a red circle on grass, by nobody")
    result = _audit(other, again)
    assert result.exit_code == 2
    assert "holds an audit with other prompts" in result.output


def test_a_broken_training_image_is_named_before_anything_is_sampled(training, tmp_path, monkeypatch):
    monkeypatch.setattr("memorization_guard.audit.run.Local", lambda *_: pytest.fail("a model was loaded"))
    broken = shutil.copytree(training, tmp_path / "broken")
    (broken / "40_exact/002.png").write_bytes(b"no image")
    result = _audit(broken, tmp_path / "audit")
    assert result.exit_code == 2
    assert "training image 40_exact/002.png cannot be read as an image" in result.output


def test_one_picture_gives_no_threshold(tmp_path):
    write_folder(tmp_path / "one", exact=1, ordinary=0)
    result = _audit(tmp_path / "one", tmp_path / "audit")
    assert result.exit_code == 2
    assert "no two different images, so no threshold can be chosen: give --copy-threshold" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "mitigate"), "leave --mode mitigate out"),
        (("--mode", "stop"), "leave --mode stop out"),
        (("--images", "none"), "leave --images none out"),
        (("--encoder", "gone"), "there is no encoder at gone"),
    ],
)
def test_options_that_do_not_go_together(training, tmp_path, options, message):
    result = _audit(training, tmp_path / "audit", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_prompts_or_a_training_folder_have_to_be_given(call, tmp_path):
    for arguments, message in (
        ((), "give PROMPTS, a list of prompts, or --training"),
        (("x.txt", "--encoder", "a"), "--encoder and --copy-threshold are for --training"),
        (("x.txt", "--copy-threshold", "0.5"), "--encoder and --copy-threshold are for --training"),
        (("--training", tmp_path / "gone"), "there is no training folder at"),
    ):
        result = call("audit", "lab", *arguments, "-o", tmp_path / "audit")
        assert result.exit_code == 2
        assert message in result.output


def test_a_list_of_prompts_is_held_against_the_folder(training, tmp_path):
    """Prompts that are no captions, with a seed each."""
    prompt = (training / "40_exact/001.txt").read_text().strip()
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": f"{prompt} ", "seed": 7}) + "\n")
    result = _audit(training, tmp_path / "audit", tmp_path / "list.jsonl")
    assert result.exit_code == 0, result.output
    (row,) = copies.read_pairs(tmp_path / "audit")
    assert row["seed"] == 7
    assert row["nearest"] == "40_exact/001.png"
    assert row["is_copy"]


def test_outputs_that_were_not_judged_are_told(audited, again, training):
    """The guard must not look on and be off: a table of verdicts in which none were made says so."""
    from memorization_guard.audit.dataset import SCHEMA, parts, write_table

    (part,) = parts(again)
    rows = pq.read_table(part).to_pylist()
    write_table(part, [row | {"verdict": "unscored", "trigger_step": None, "p_value": None} for row in rows], SCHEMA)
    (again / "training/summary.json").unlink()
    result = _audit(training, again)
    assert result.exit_code == 0, result.output
    assert "10 of 10 outputs were not judged: they count as not triggered" in result.output
    assert "10 of 10 outputs were not judged by the guard" in (again / "gallery.html").read_text()


def test_a_deleted_gallery_or_table_is_made_again(again, training):
    (again / "gallery.html").unlink()
    assert _audit(training, again).exit_code == 0
    assert (again / "gallery.html").exists()
    (again / "pairs.csv").unlink()
    assert _audit(training, again).exit_code == 0
    assert (again / "pairs.csv").exists()
