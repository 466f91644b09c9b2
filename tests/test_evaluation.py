"""The evaluation of a model: on the lab model through the command, and its parts on made-up numbers."""

import dataclasses
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import auc

from memorization_guard import statistics as metrics
from memorization_guard.core.calibration import Calibrator

pytest.importorskip("typer")
pytest.importorskip("diffusers")
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from memorization_guard import lab
from memorization_guard.audit import AuditError
from memorization_guard.audit.worker import Recipe
from memorization_guard.cli.app import app
from memorization_guard.core.trace import STATEMENT
from memorization_guard.diffusers import guard
from memorization_guard.evaluation import EvaluationError
from memorization_guard.evaluation import evaluate as evaluation
from memorization_guard.evaluation.copies import CopyScorer
from memorization_guard.evaluation.lists import Prompt, read_list
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.evaluation.summary import Sample, summarize
from memorization_guard.prompts import SEED_STRIDE
from memorization_guard.reports import evaluation as page_module
from memorization_guard.reports.evaluation import html_report, write_report

#: Folder of the literature's prompt lists, which are not part of the repository.
DATA = Path(os.environ.get("MEMORIZATION_GUARD_DATA", ""))


def call(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def lists(tmp_path):
    """Arguments for the three lists of the lab, with kinds."""
    paths = {name: tmp_path / name for name in ("memorized.jsonl", "ordinary.txt", "reference.txt")}
    rows = [{"caption": text, "kind": "verbatim"} for text in lab.prompts("exact")[:2]]
    rows += [{"prompt": text, "group": "template"} for text in lab.prompts("template")[:2]]
    paths["memorized.jsonl"].write_text("\n".join(map(json.dumps, rows)))
    paths["ordinary.txt"].write_text("\n".join(lab.prompts("ordinary")[:6]))
    paths["reference.txt"].write_text("\n".join(lab.prompts("reference")[:8]))
    return [part for path in paths.values() for part in (f"--{path.stem}", path)]


@pytest.fixture
def batches(monkeypatch):
    """The prompts of every batch that was sampled. The batch whose number is in ``interrupt`` raises instead."""

    class Batches(list):
        interrupt = ()

    seen, original = Batches(), StableDiffusionPipeline.__call__

    def sample(self, prompts, **keywords):
        if len(seen) in seen.interrupt:
            seen.interrupt = ()
            raise KeyboardInterrupt
        seen.append(list(prompts))
        return original(self, prompts, **keywords)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", sample)
    return seen


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def whole_page(page):
    """Reads a page, and checks that it is well-formed and loads nothing."""
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "img", "i", "em", "iframe"} & set(tags.seen)
    assert "default-src 'none'" in page
    assert re.search(r"https?:|url\(|src=|href=|@import", page) is None
    assert "NaN" not in tags.text
    assert " nan" not in page
    return tags


def test_the_lab_model_from_end_to_end_with_an_interruption(lists, batches, tmp_path):
    options = (*lists, "--steps", 6, "--device", "cpu")
    batches.interrupt = (2 + 2,)  # after both batches of the calibration and two of three of the evaluation
    result = call("lab", *options, "--save-profile", tmp_path / "p.safetensors", "-o", tmp_path / "report")
    assert result.exit_code == 130, result.output
    assert "report.partial" in result.stderr
    assert not (tmp_path / "report.html").exists()
    result = call("lab", *options, "--save-profile", tmp_path / "p.safetensors", "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    memorized, ordinary = (lab.prompts(group) for group in ("exact", "ordinary"))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 2]  # none twice
    assert batches[2][:2] == memorized[:2]
    assert batches[3] + batches[4] == ordinary[:6]
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in lists[1::2]}
    assert left == {"report.html", "report.json", "p.safetensors"}

    data = json.loads((tmp_path / "report.json").read_text())
    assert [group["name"] for group in data["groups"]] == ["memorized", "verbatim", "template"]
    assert [group["images"] for group in data["groups"]] == [4, 2, 2]
    assert data["ordinary"]["images"] == 6
    assert set(data["groups"][0]["signals"]) == set(SIGNALS)
    signal = data["groups"][0]["signals"]["guidance norm, mean"]
    assert signal["auc"] > 0.9
    assert signal["roc"]["fpr"][-1] == signal["roc"]["tpr"][-1] == 1
    assert len(data["samples"]) == 10
    assert len({sample["seed"] for sample in data["samples"]}) == 10
    assert any("rests on 6 ordinary prompts" in warning for warning in data["warnings"])
    assert data["settings"]["sampler"] == "PNDM"
    page = whole_page((tmp_path / "report.html").read_text())
    assert memorized[0] in page.text
    assert page.seen.count("figure") == 3 * 3 + len(SIGNALS)

    # The same without an interruption, with the profile kept, in other batches.
    result = call(
        "lab", *options[:4], *options[6:], "--profile", tmp_path / "p.safetensors", "--batch-size", 10, "-o", tmp_path / "b"
    )
    assert result.exit_code == 0, result.output
    again = json.loads((tmp_path / "b.json").read_text())["samples"]
    for one, other in zip(data["samples"], again, strict=True):
        assert one["signals"] == pytest.approx(other["signals"], rel=1e-3)
        assert {**one, "signals": 0} == {**other, "signals": 0}


@pytest.mark.skipif("MEMORIZATION_GUARD_DATA" not in os.environ, reason="MEMORIZATION_GUARD_DATA names no folder of lists")
def test_the_lists_of_the_literature_are_taken_as_they_are(tiny_pipe, tmp_path):
    bad, good = DATA / "sd14_memorized_prompts.jsonl", DATA / "sd14_ordinary_prompts.txt"
    prompts = [prompt.text for prompt in read_list(bad)]
    assert len(prompts) == len(set(prompts)) == 500
    assert len(read_list(good)) == 500
    shown = next(text for text in prompts if "<i>" in text)
    assert shown in whole_page(html_report(summary(samples(memorized=[shown])))).text
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "reference.txt").write_text("\n".join(f"a red cat {i}" for i in range(8)))
    options = ("--memorized", bad, "--ordinary", good, "--reference", tmp_path / "reference.txt")
    size = ("--limit", 3, "--steps", 3, "--height", 16, "--width", 16, "--device", "cpu")
    result = call(tmp_path / "model", *options, *size, "-o", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert [s["prompt"] for s in json.loads((tmp_path / "r.json").read_text())["samples"][:3]] == prompts[:3]


# Sampling both lists.

KEYWORDS = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 16}
RECIPE = {"steps": 3, "guidance": 4.0, "height": 16, "width": 16, "device": "cpu"}


@pytest.fixture
def profile(tiny_pipe):
    calibrator = Calibrator()
    with guard(tiny_pipe, serves="whole") as run:
        tiny_pipe(["a red cat"] * 9, generator=torch.Generator().manual_seed(0), output_type="latent", **KEYWORDS)
    for found in run.traces:
        calibrator.add(found)
    return calibrator.profile()


@pytest.fixture
def evaluate(model, profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")

    def run(count=2, *, images=(), **changes):
        bad = [Prompt(text=f"a red cat {i}", kind="cat", images=images) for i in range(count)]
        good = [Prompt(text=f"a blue dog {i}") for i in range(2)]
        names = set(changes) & set(RECIPE)
        recipe = Recipe(model=str(model), **RECIPE | {name: changes.pop(name) for name in names})
        options = {"profile": tmp_path / "p.safetensors", "batch_size": 1, "progress": False} | changes
        return evaluation.evaluate(recipe, bad, good, tmp_path / "folder", **options)

    return run


def test_both_lists_are_sampled_with_seeds_of_their_own(evaluate, batches):
    found = evaluate(seeds_per_prompt=2, seed=5)
    assert [(sample.memorized, sample.kind) for sample in found] == [(True, "cat")] * 4 + [(False, None)] * 4
    assert [sample.seed for sample in found] == [5 + SEED_STRIDE + i for i in range(4)] + [
        5 + 2 * SEED_STRIDE + i for i in range(4)
    ]
    assert [sample.prompt for sample in found[::2]] == ["a red cat 0", "a red cat 1", "a blue dog 0", "a blue dog 1"]
    assert all(sample.verdict != "unscored" for sample in found)
    assert set(found[0].signals) == set(SIGNALS)
    # Nothing is sampled twice; the first batch tells whether the profile fits.
    assert len(batches) == 1 + 8
    assert evaluate(seeds_per_prompt=2, seed=5) == found
    assert len(batches) == 1 + 8


def test_an_interrupted_evaluation_goes_on_where_it_stopped(evaluate, batches):
    batches.interrupt = (3,)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    found = evaluate(batch_size=2)
    assert [len(batch) for batch in batches] == [1, 1, 1, 2]
    assert [sample.prompt for sample in found] == ["a red cat 0", "a red cat 1", "a blue dog 0", "a blue dog 1"]


def test_the_folder_of_another_evaluation_is_refused(evaluate, profile, tmp_path):
    evaluate()
    for other in ({"guidance": 5.0}, {"count": 3}, {"seed": 1}, {"seeds_per_prompt": 2}):
        with pytest.raises(AuditError, match="folder/audit holds an audit with other"):
            evaluate(**other)
    dataclasses.replace(profile, count=profile.count + 1).save(tmp_path / "p.safetensors")
    with pytest.raises(AuditError, match="other profile"):
        evaluate()


def test_a_profile_that_does_not_fit_ends_it_after_one_batch(evaluate, batches, profile, of_another_model, tmp_path):
    other = of_another_model(profile, tmp_path / "p.safetensors")
    with pytest.raises(AuditError, match="model hash: profile"):
        evaluate(profile=other)
    assert len(batches) == 1


# Copy scores.


class Grid(torch.nn.Module):
    """A descriptor in place of SSCD's: the colours of 4 x 4 fields."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, [4, 4]).flatten(1)


class Size(torch.nn.Module):
    """A descriptor of what it was given: height, width, lowest and highest value."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = [images.shape[2] * 1.0, images.shape[3] * 1.0, float(images.min()), float(images.max())]
        return torch.tensor(numbers)[None]


def saved(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has another favourite; SSCD comes as it comes
        torch.jit.script(module).save(str(path))
    return path


def test_images_reach_sscd_as_its_readme_says(tmp_path):
    scorer = CopyScorer(saved(Size(), tmp_path / "size.pt"))
    wide = Image.new("RGB", (200, 100), "white")
    wide.paste("black", (0, 0, 100, 100))
    height, width, low, high = scorer.descriptor(wide).tolist()
    assert (height, width) == (288, 576)
    assert low == pytest.approx(-0.485 / 0.229)
    assert high == pytest.approx((1 - 0.406) / 0.225)


def test_copy_scores_through_the_command(tiny_pipe, batches, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    colors = {"01.png": "red", "2.jpg": "blue", "named.png": "lime", "notes.txt": None}
    for name, color in colors.items():
        if color:
            Image.new("RGB", (40, 30), color).save(folder / name)
        else:
            (folder / name).write_text("x")
    bad = tmp_path / "bad.jsonl"
    rows = [
        {"caption": "a cat"},
        {"caption": "a dog"},
        {"caption": "a mat", "image": ["named.png", "2.jpg"]},
        {"caption": "sun"},
    ]
    bad.write_text("\n".join(map(json.dumps, rows)))
    images = [[file.name for file in prompt.images] for prompt in read_list(bad, folder)]
    assert images == [["01.png"], ["2.jpg"], ["named.png", "2.jpg"], []]

    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "good.txt").write_text("a blue dog\na red cat")
    (tmp_path / "reference.txt").write_text("\n".join(f"a red cat {i}" for i in range(8)))
    sscd = saved(Grid(), tmp_path / "grid.pt")
    lists = ("--memorized", bad, "--ordinary", tmp_path / "good.txt", "--reference", tmp_path / "reference.txt")
    size = ("--steps", 3, "--height", 16, "--width", 16, "--device", "cpu", "--seeds-per-prompt", 2)
    copies = ("--images", folder, "--sscd", sscd, "--copy-threshold", 0.1)
    result = call(tmp_path / "model", *lists, *size, *copies, "-o", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "compared are copies" in result.stdout
    data = json.loads((tmp_path / "r.json").read_text())
    scores = [sample["copy_score"] for sample in data["samples"]]
    assert scores[6:] == [None] * 6
    assert all(-1 <= score <= 1 for score in scores[:6])
    assert data["groups"][0]["copies"]["images"] == 6
    assert data["groups"][0]["copies"]["rate"]["mean"] == pytest.approx(np.mean([score > 0.1 for score in scores[:6]]))
    assert data["ordinary"]["copies"] is None
    assert "median similarity" in whole_page((tmp_path / "r.html").read_text()).text

    scorer = CopyScorer(sscd)
    assert scorer(folder / "01.png", [folder / "2.jpg", folder / "01.png"]) == pytest.approx(1, abs=1e-5)
    kept = tiny_pipe(
        "a dog", generator=torch.Generator().manual_seed(SEED_STRIDE + 2), **KEYWORDS | {"guidance_scale": 7.5}
    ).images[0]
    kept.save(tmp_path / "kept.png")
    assert scores[2] == pytest.approx(scorer(tmp_path / "kept.png", [folder / "2.jpg"]), abs=0.02)


def test_the_safety_checker_is_left_out_since_it_would_hand_out_black_images(evaluate, tiny_pipe, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the safety checker was asked")

    tiny_pipe.safety_checker = refuse
    monkeypatch.setattr("memorization_guard.audit.worker.load_pipeline", lambda *_, **__: tiny_pipe)
    file = tmp_path / "1.png"
    Image.new("RGB", (16, 16)).save(file)
    scorer = CopyScorer(saved(Grid(), tmp_path / "grid.pt"))
    samples = evaluate(copies=scorer, images=(file,))
    assert [sample.copy_score is None for sample in samples] == [False, False, True, True]


def test_what_a_user_can_get_wrong_is_said_before_the_model_is_loaded(lists, tmp_path):
    def refused(*arguments, output=tmp_path / "r"):
        result = call(tmp_path / "no model", *arguments, "-o", output)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1
        return result.stderr

    folder, file = tmp_path / "images", tmp_path / "sscd.pt"
    folder.mkdir()
    file.write_bytes(b"no TorchScript")
    assert "there is no model" in refused(*lists)
    assert "does not exist" in refused(*lists, output=tmp_path / "no" / "r")
    (tmp_path / "d.html").mkdir()
    assert "is a folder" in refused(*lists, output=tmp_path / "d")
    assert "either --reference" in refused(*lists[:4])
    assert "either --reference" in refused(*lists, "--profile", file)
    assert "no stability profile" in refused(*lists[:4], "--profile", tmp_path / "p.safetensors")
    assert "keeps the profile of --reference" in refused(*lists[:4], "--profile", file, "--save-profile", tmp_path / "s")
    assert "need both" in refused(*lists, "--images", folder)
    assert "need both" in refused(*lists, "--sscd", file)
    assert "no TorchScript file" in refused(*lists, "--images", folder, "--sscd", tmp_path / "gone.pt")
    assert "no folder of images" in refused(*lists, "--images", file, "--sscd", file)
    assert "holds no training image" in refused(*lists, "--images", folder, "--sscd", file)
    (folder / "1.png").write_bytes(b"no picture")
    assert "1.png cannot be read as an image" in refused(*lists, "--images", folder, "--sscd", file)
    assert "at least 8" in refused(*lists[:4], "--reference", lists[1])
    assert "no prompt list" in refused("--memorized", tmp_path / "gone.txt", *lists[2:])
    lists[1].write_text('{"caption": "a", "image": "gone.png"}')
    assert "line 1: there is no image at" in refused(*lists, "--images", folder, "--sscd", file)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("r.")]
    with pytest.raises(EvaluationError, match="cannot be used as SSCD"):
        CopyScorer(file)


# The figures and the page.


def samples(memorized=("m0", "m1"), ordinary=("o0", "o1", "o2"), **changes):
    """Made-up samples; memorized ones score higher."""
    return [
        Sample(
            memorized=bad,
            prompt=text,
            kind=None,
            seed=seed,
            verdict="likely copy" if bad else "stable",
            trigger_step=2 if bad else None,
            note=None,
            signals={name: number + 3.0 * bad + 0.3 * (seed % 7) for number, name in enumerate(SIGNALS)},
        )
        for bad, texts in ((True, memorized), (False, ordinary))
        for seed, text in enumerate(texts)
    ]


def summary(rows, **keywords):
    return summarize(rows, **{"settings": {"model": "m"}, "draws": 20} | keywords)


def test_a_signal_without_values_is_left_out_and_said():
    rows = samples()
    for row in rows:
        row.signals["detail"] = None
    rows[0].signals["S_mem"] = None
    result = summary(rows)
    assert "detail" not in result["groups"][0]["signals"]
    assert result["groups"][0]["signals"]["S_mem"]["images"] == 1
    assert any("detail: no memorized image has a value" in warning for warning in result["warnings"])
    assert any("S_mem: 1 of 2 memorized images" in warning for warning in result["warnings"])
    whole_page(html_report(result))


def test_without_any_signal_the_page_still_stands():
    rows = samples()
    for row in rows:
        row.signals.update(dict.fromkeys(row.signals))
    whole_page(html_report(summary(rows)))


def test_guidance_1_leaves_the_guidance_signals_out(evaluate, profile, tmp_path):
    unguided = dataclasses.replace(profile.settings, guidance_scale=1.0)
    dataclasses.replace(profile, settings=unguided).save(tmp_path / "p.safetensors")
    signals = summary(evaluate(guidance=1.0))["groups"][0]["signals"]
    assert {"S_mem", "joint score"} <= set(signals)
    assert not {"guidance norm, mean", "guidance norm, first evaluation", "uncalibrated score"} & set(signals)


def test_kinds_and_copies_are_groups_of_their_own():
    rows = samples(memorized=[f"m{i}" for i in range(6)])
    rows = [
        dataclasses.replace(row, kind="verbatim" if row.seed < 2 else None, copy_score=row.seed / 10) if row.memorized else row
        for row in rows
    ]
    result = summary(rows, copy_threshold=0.35)
    assert [(group["name"], group["images"]) for group in result["groups"]] == [
        ("memorized", 6),
        ("verbatim", 2),
        ("no kind", 4),
        ("copies (similarity over 0.35)", 2),
    ]
    assert result["groups"][0]["copies"]["rate"]["mean"] == pytest.approx(2 / 6)
    assert [result["samples"][i]["seed"] for i in result["groups"][3]["samples"]] == [4, 5]
    whole_page(html_report(result))


def test_many_kinds_stand_in_the_table_and_are_not_drawn():
    rows = samples(memorized=[f"m{i}" for i in range(9)])
    rows = [dataclasses.replace(row, kind=f"<k{row.seed}>") if row.memorized else row for row in rows]
    page = whole_page(html_report(summary(rows)))
    assert page.seen.count("h3") == 1 + 2
    assert "<k8>" in page.text


def test_a_reader_is_warned_of_prompts_in_two_lists():
    warnings = summary(samples(ordinary=("m0", "o1", "r")), reference=["r", "s"])["warnings"]
    assert any("in the memorized and in the ordinary list: 1." in warning for warning in warnings)
    assert any("reference prompts too: 1." in warning for warning in warnings)
    many = summary(samples(ordinary=[f"o{i}" for i in range(100)]))
    assert many["warnings"] == []


def test_hostile_and_odd_numbers_and_texts_are_drawn():
    rows = samples(memorized=["<script>alert(1)</script>", "\x00\ud800 &amp;"])
    for row in rows:
        row.signals["S_mem"] = 5.0
        row.signals["joint score"] = 10.0 ** (row.seed * 40)
        row.signals["detail"] = -1e-9 * row.seed
    page = whole_page(html_report(summary(rows, settings={"model": "<b>"})))
    assert "<script>alert(1)</script>" in page.text
    assert "\x00" not in page.text


def test_both_files_are_written_or_neither(tmp_path, monkeypatch):
    result = summary(samples())
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    page.write_text("before")
    original, calls = page_module.write_whole, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(page_module, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(result, page, data)
    assert page.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    write_report(result, page, data)
    assert json.loads(data.read_text()) == result
    assert result["statement"] == STATEMENT
    assert STATEMENT in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


# Metrics.


def pairwise_auc(positive, negative):
    """The share of pairs in which the positive is the higher one, ties counting half (Mann & Whitney 1947)."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def test_detection_is_that_of_counted_pairs():
    rng = np.random.default_rng(0)
    for _ in range(60):
        digits = rng.integers(0, 4)  # few digits make many ties
        positive, negative = (rng.normal(mean, 1, rng.integers(1, size)).round(digits) for mean, size in ((1, 90), (0, 700)))
        found = metrics.detection(positive, negative)
        assert found["auc"] == pytest.approx(pairwise_auc(positive, negative))
        # One in a hundred negatives may pass the threshold; it stands at the first that may not.
        limit = np.sort(negative)[len(negative) - 1 - len(negative) // 100]
        assert found["tpr_at_1_fpr"] == (positive > limit).mean()
        fpr, tpr = (np.array(axis) for axis in metrics.roc_points(positive, negative).values())
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert auc(fpr, tpr) == pytest.approx(found["auc"])


def test_detection_takes_the_last_threshold_below_one_percent():
    negative = np.arange(200.0)
    # Two of 200 negatives may lie above the threshold, not three: it lies above 197.
    assert metrics.detection(np.array([197.5, 198.5, 1.0, 1.0]), negative)["tpr_at_1_fpr"] == 0.5
    assert metrics.detection(np.array([196.5, 196.5]), negative)["tpr_at_1_fpr"] == 0.0
    assert metrics.detection(negative + 1000, negative) == {"auc": 1.0, "tpr_at_1_fpr": 1.0}
    intervals = metrics.detection_with_intervals(np.array([150.0, 250.0]), negative, ["a", "b"], draws=50)
    assert intervals["tpr_at_1_fpr_95"] == [0.0, 1.0]


def test_intervals_widen_where_there_are_few_prompts():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 120).astype(float)
    each = metrics.rate_with_interval(values, [str(i) for i in range(120)])
    few = metrics.rate_with_interval(values, [str(i // 40) for i in range(120)])
    assert each["mean"] == few["mean"] == values.mean()
    assert each["mean_95"][0] < each["mean"] < each["mean_95"][1]
    assert few == metrics.mean_with_interval(values, [str(i // 40) for i in range(120)])
    found = metrics.detection_with_intervals(values + 0.1, values, ["a"] * 120, ["b"] * 120)
    assert found["auc_95"] == [found["auc"]] * 2  # one prompt a side: nothing to draw from


@pytest.mark.parametrize(("rate", "bounds"), [(0, (0.0, 1 - 0.025 ** (1 / 30))), (1, (0.025 ** (1 / 30), 1.0))])
def test_rates_of_0_and_1_have_exact_intervals_over_prompts(rate, bounds):
    prompts = [str(i // 4) for i in range(120)]
    found = metrics.rate_with_interval(np.full(120, rate, dtype=bool), prompts)
    assert found["mean"] == rate
    assert found["mean_95"] == pytest.approx(bounds)
    # 120 memorized images of 30 prompts against 50 ordinary ones: none, or each, is higher than all of those.
    positive, negative = np.full(120, 2.0 * rate - 1), np.zeros(50)
    found = metrics.detection_with_intervals(positive, negative, prompts, draws=20)
    assert (found["auc"], found["tpr_at_1_fpr"]) == (rate, rate)
    assert found["auc_95"] == found["tpr_at_1_fpr_95"] == pytest.approx(bounds)
    # With fewer ordinary prompts than memorized ones, fewer pairs are independent.
    few = metrics.detection_with_intervals(positive, negative, prompts, ["a"] * 50, draws=20)
    assert few["auc_95"] == pytest.approx([0, 0.975] if rate == 0 else [0.025, 1])
    assert few["tpr_at_1_fpr_95"] == pytest.approx(bounds)


def test_exact_intervals_hold_the_truth_as_often_as_they_say():
    rng, truth, trials = np.random.default_rng(0), 0.995, 40
    counts = rng.binomial(trials, truth, 2000)
    inside = [low <= truth <= high for low, high in (metrics.exact_interval(int(count), trials) for count in counts)]
    assert np.mean(inside) >= 0.95
