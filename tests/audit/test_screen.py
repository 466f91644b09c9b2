"""Audits that screen: every image is judged by its first evaluation, and what is suspicious is sampled whole."""

import dataclasses
import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

from memorization_guard import StabilityProfile, Thresholds, Trace, lab
from memorization_guard.audit import AuditError
from memorization_guard.audit.comparison import compare
from memorization_guard.audit.dataset import PROFILE
from memorization_guard.audit.plan import Job, Plan
from memorization_guard.audit.run import AT_ONCE, Local, audit
from memorization_guard.audit.summary import summarize
from memorization_guard.audit.worker import NEAR, Recipe, Worker
from memorization_guard.core import judge, words

from .conftest import MadeUp, make_row, make_trace


def rows(folder):
    return sorted(pq.read_table(folder / "results").to_pylist(), key=lambda row: row["image"])


@pytest.fixture
def screening(recipe):
    """Of ordinary images, half triggers if half may. Runs of fewer steps would not begin in noise, and all be asked about."""
    return dataclasses.replace(recipe, steps=10, screen=True, thresholds=Thresholds(false_positive_rate=0.5))


def test_what_triggers_in_a_whole_audit_of_the_lab_model_is_found_by_a_screened_one(call, tmp_path, monkeypatch):
    texts = [text for kind, count in (("exact", 2), ("template", 3), ("ordinary", 5)) for text in lab.prompts(kind)[:count]]
    (tmp_path / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    told = []
    find = words.find
    monkeypatch.setattr(words, "find", lambda text, *others: told.append(text) or find(text, *others))
    monkeypatch.setattr("memorization_guard.core.asking._memory", words.Memory())
    for name, options in (("screened", ("--screen",)), ("whole", ())):
        command = ("audit", "lab", tmp_path / "prompts.txt", "-o", tmp_path / name, "--profile", lab.PROFILE, "--steps", 10)
        result = call(*command, "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        if name == "screened":
            triggered = [row["prompt"] for row in rows(tmp_path / name) if row["trigger_step"] is not None]
            assert sorted(told) == sorted(triggered), "words were searched for more than once, or for nothing"
            sampled = sum(not row["screened_out"] for row in rows(tmp_path / name))
            said = f"screened: {10 - sampled} of 10 images were judged by their first evaluation, {sampled} sampled whole"
            assert said in result.output
    whole, screened = rows(tmp_path / "whole"), rows(tmp_path / "screened")
    assert sum(row["trigger_step"] is not None for row in whole) >= 4
    assert not any(row["screened_out"] for row in whole)
    for full, first in zip(whole, screened, strict=True):
        assert (first["verdict"], first["trigger_step"], first["words"]) == (
            full["verdict"], full["trigger_step"], full["words"],
        )  # fmt: skip
        # What else is in a batch makes a difference of rounding.
        assert first["p_value"] == pytest.approx(full["p_value"], rel=1e-3)
        assert first["detail"] == pytest.approx(full["detail"], rel=1e-3)
        assert (first["file"] is None) == (full["file"] is None)
        assert first["screened_out"] == (first["p_value"] > 0.005 * NEAR)
        trace = Trace.from_dict(json.loads(first["trace"]))
        assert len(trace.evaluations) == (
            1 if first["screened_out"] else len(json.loads(full["trace"])["evaluations"]["step"])
        )
        assert trace.note is None


def test_every_image_that_a_whole_audit_finds_is_sampled_and_the_others_have_no_picture(run, screening, tmp_path):
    run(tmp_path / "whole", recipe=dataclasses.replace(screening, screen=False))
    profile = tmp_path / "whole" / PROFILE
    run(recipe=screening, profile=profile)
    whole, screened = rows(tmp_path / "whole"), rows(tmp_path / "audit")
    assert [row["image"] for row in screened] == list(range(18))
    assert 0 < sum(row["screened_out"] for row in screened) < 18
    for full, first in zip(whole, screened, strict=True):
        assert first["p_value"] == pytest.approx(full["p_value"], rel=1e-3)
        assert first["screened_out"] == (full["p_value"] > 0.5 * NEAR)
        assert (first["verdict"], first["file"] is None) == (full["verdict"], full["file"] is None)
    (tmp_path / "audit" / "report.html").unlink()
    assert run(recipe=screening, profile=profile) is False, "a finished audit was not known again"
    assert (tmp_path / "audit" / "report.html").exists()


@pytest.mark.parametrize("mode", ["mitigate", "stop"])
def test_modes_are_those_of_the_runs_that_are_sampled(run, screening, tmp_path, mode):
    run(recipe=dataclasses.replace(screening, mode=mode))
    found = rows(tmp_path / "audit")
    assert {json.loads(row["trace"])["mode"] for row in found} == {mode}
    verdict = {"mitigate": "corrected", "stop": "likely copy"}[mode]
    assert {row["verdict"] for row in found if not row["screened_out"]} >= {verdict}
    assert {row["verdict"] for row in found if row["screened_out"]} == {"stable"}


@pytest.fixture
def jobs():
    return [Job(n, n, f"a red cat {n}", None, n) for n in range(9)]


@pytest.fixture
def profile(run, screening, tmp_path):
    run(tmp_path / "first", recipe=dataclasses.replace(screening, screen=False), seeds_per_prompt=1)
    return StabilityProfile.load(tmp_path / "first" / PROFILE)


def test_a_first_look_is_one_evaluation_and_more_of_what_a_whole_run_would_ask_about(screening, jobs, profile, monkeypatch):
    monkeypatch.setattr(judge, "SUSPICIOUS", 0.5)  # so that some of nine ordinary prompts are asked about
    hands = Worker(screening)
    seen, decoded = [], []
    hands._pipe.unet.register_forward_pre_hook(lambda *call: seen.append(len(call[1][0])))
    whole = hands.sample(jobs, profile)
    monkeypatch.setattr(hands, "_decode_all", lambda *given, **options: decoded.append(given))
    asked = [row["image"] for row in whole if json.loads(row["trace"])["asked"] is not None]
    assert len(asked) == 9, "of a batch of whole runs all are asked"
    seen.clear()
    traces = hands._first_looks(jobs, profile)
    closer = [number for number, trace in enumerate(traces) if trace.asked is not None]
    assert 0 < len(closer) < 9
    # The network is asked past its hooks, by its own method.
    assert seen == [2 * 9, 2 * len(closer)]
    assert not decoded
    for trace, row in zip(traces, whole, strict=True):
        assert trace.p_value == pytest.approx(row["p_value"], rel=1e-3)


def test_what_could_not_be_judged_or_is_near_is_sampled(screening):
    hands = object.__new__(Worker)
    hands._recipe = dataclasses.replace(screening, thresholds=Thresholds(false_positive_rate=0.01))

    def suspicious(p_value, **more):
        trace = Trace(**{"verdict": "stable", "p_value": p_value, "p_value_floor": 0.001} | more)
        return hands._suspicious(trace)

    assert suspicious(None, verdict="unscored")
    assert suspicious(0.5, verdict="unscored")
    assert suspicious(0.005, verdict="likely copy")
    assert suspicious(0.01 * NEAR)
    assert not suspicious(0.011 * NEAR)
    # A rate below what the references carry triggers at that.
    assert suspicious(0.04 * NEAR, p_value_floor=0.04)
    assert not suspicious(0.041 * NEAR, p_value_floor=0.04)


def test_where_memory_is_short_fewer_are_judged_at_once(screening, jobs, profile, monkeypatch):
    hands, sizes = Worker(screening), []
    run = hands._run

    def short(jobs, profile, serves=None):
        sizes.append(len(jobs))
        if len(jobs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(jobs, profile, serves)

    with monkeypatch.context() as patched:
        patched.setattr(hands, "_run", short)
        found = hands.screen(jobs, profile)
    assert sizes[:3] == [9, 4, 2]
    assert max(sizes[3:]) == 2
    assert [row["image"] for row in found] == [row["image"] for row in hands.screen(jobs, profile)]
    monkeypatch.setattr(hands, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        hands.screen(jobs, profile)


class Suspects(MadeUp):
    """Workers that make up their rows, of which every fifth image is suspicious; and note their batches."""

    def __init__(self, log=None):
        self.batches, self._log = [], log

    def sample(self, batches, profile):
        for batch in batches:
            if batch is not None:
                self.batches.append(batch)
                yield batch, self.made(batch)

    def made(self, batch):
        images = [job.image for job in batch.jobs]
        if self._log is not None:
            with open(self._log, "a") as log:
                log.write("".join(f"{image} {batch.screens}\n" for image in images))
            time.sleep(0.005)
        chosen = [job for job in batch.jobs if not batch.screens or job.image % 5]
        return [
            make_row(job.image, job.prompt, make_trace(0.5 if batch.screens else 1e-5), screened_out=batch.screens)
            for job in chosen
        ]


@pytest.fixture
def listed(tmp_path):
    """A list of 300 prompts, as a plan, and a profile."""
    (tmp_path / "prompts.txt").write_text("".join(f"a prompt, the {n}th\n" for n in range(300)))
    return Plan.of(tmp_path / "prompts.txt"), lab.PROFILE


def test_suspicious_images_come_together_in_full_batches(listed, tmp_path):
    plan, profile = listed
    hands = Suspects()
    audit(Recipe(model="none", screen=True), plan, tmp_path / "audit", lambda: hands, profile=profile, progress=False)
    screened = [batch for batch in hands.batches if batch.screens]
    assert [job.image for batch in screened for job in batch.jobs] == list(range(300))
    assert [len(batch.jobs) for batch in screened] == [4 * AT_ONCE] * 9 + [12]
    sampled = [batch for batch in hands.batches if not batch.screens]
    assert sorted(job.image for batch in sampled for job in batch.jobs) == list(range(0, 300, 5))
    # The parts have 64 images, and the last one 44: of each, one batch may be smaller.
    assert sum(len(batch.jobs) < 4 for batch in sampled) <= 5
    found = rows(tmp_path / "audit")
    assert [row["image"] for row in found] == list(range(300))
    assert [row["screened_out"] for row in found] == [bool(n % 5) for n in range(300)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")
def test_killed_at_random_moments_every_image_is_there_once(listed, tmp_path):
    plan, profile = listed

    def begin(name):
        if (child := os.fork()) != 0:
            return child
        try:
            os.close(2)
            hands = Suspects(tmp_path / f"{name}.log")
            audit(Recipe(model="none", screen=True), plan, tmp_path / name, lambda: hands, profile=profile, progress=False)
        finally:
            os._exit(0)

    os.waitpid(begin("whole"), 0)
    kills, pause = 0, 0.1
    while True:
        child = begin("audit")
        time.sleep(pause)
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        pause *= 1.2
    assert kills >= 2
    assert rows(tmp_path / "audit") == rows(tmp_path / "whole")
    made = [line.split() for line in (tmp_path / "audit.log").read_text().splitlines()]
    sampled = [int(image) for image, screens in made if screens == "False"]
    assert set(sampled) == set(range(0, 300, 5))
    assert len(sampled) - 60 <= 4 * kills, "more was sampled twice than the batches in flight"


class Fragile(Local):
    """A worker that fails at the batch after so many."""

    def sample(self, batches, profile):
        for number, made in enumerate(super().sample(batches, profile)):
            if number == 2:
                raise RuntimeError("CUDA out of memory")
            yield made


def test_it_goes_on_where_it_stopped_and_gives_the_same(run, screening, tmp_path):
    run(tmp_path / "whole", recipe=screening, batch_size=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(recipe=screening, batch_size=1, workers=lambda: Fragile(screening))
    assert run(recipe=screening, batch_size=1) is True
    whole, found = rows(tmp_path / "whole"), rows(tmp_path / "audit")
    for one, other in zip(whole, found, strict=True):
        assert [one[name] for name in ("image", "verdict", "screened_out", "steps")] == [
            other[name] for name in ("image", "verdict", "screened_out", "steps")
        ]
        assert one["p_value"] == pytest.approx(other["p_value"], rel=1e-3)


def test_screening_is_part_of_what_an_audit_is(run, screening):
    run(recipe=screening)
    with pytest.raises(AuditError, match=r"other settings: screen \(it has True, you ask for False\)"):
        run(recipe=dataclasses.replace(screening, screen=False))


def test_what_cannot_be_screened_is_said_at_once(call, recipe, model, prompts, tmp_path, monkeypatch):
    with pytest.raises(AuditError, match="the published method judges whole runs"):
        dataclasses.replace(recipe, screen=True, thresholds=Thresholds(method="published"))
    result = call("audit", model, prompts, "-o", tmp_path / "audit", "--screen", "--images", "all")
    assert result.exit_code == 2
    assert "--images all keeps every image, and --screen samples few of them" in result.stderr
    monkeypatch.delattr("diffusers.StableDiffusionPipeline.interrupt")
    with pytest.raises(AuditError, match="runs of StableDiffusionPipeline cannot be stopped: audit without --screen"):
        Worker(dataclasses.replace(recipe, screen=True))
    assert not (tmp_path / "audit").exists()


@pytest.fixture
def two(audits):
    """An audit that screens, and one that does not, of the same three images."""
    settings = {"steps": 20, "guidance_scale": 7.5, "seeds_per_prompt": 1, "mode": "trace"}
    whole = [make_row(n, f"prompt {n}", make_trace(p)) for n, p in enumerate((1e-5, 0.3, 0.6))]
    first = [make_row(n, f"prompt {n}", make_trace(p, steps=1), screened_out=n > 0) for n, p in enumerate((1e-5, 0.3, 0.6))]
    return audits(whole, settings=settings | {"screen": False}), audits(first, settings=settings | {"screen": True})


def test_what_was_screened_out_is_counted_and_said(two, call, browser):
    whole, screened = two
    assert summarize(whole)["screened_out"] is None
    found = summarize(screened)
    assert (found["screened_out"], found["scored"], found["triggered"]["count"]) == (2, 3, 1)
    found = compare(whole, screened)
    assert (found["a"]["screened_out"], found["b"]["screened_out"]) == (None, 2)
    assert not found["warnings"], "screening changes no verdict"
    (note,) = (note for note in found["notes"] if "screened" in note)
    assert note.startswith("B was screened: 2 of 3 images were judged by their first evaluation")
    for folder, count in ((whole, 0), (screened, 2)):
        assert call("report", folder).exit_code == 0
        page = browser.new_page()
        page.goto((folder / "report.html").as_uri())
        page.wait_for_selector("#table .body .cell")
        text = page.inner_text("body")
        assert ("The audit was screened: 2 images of 3 were judged by their first evaluation" in text) == (count > 0)
        assert text.count("Screened out: judged by its first evaluation, and not sampled.") == count
        cells = page.locator("#table .body .cell", has_text="screened out")
        assert cells.count() == count
        page.close()
