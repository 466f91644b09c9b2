"""The prompt list that was read first is the one that is audited, whatever happens to its file meanwhile."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorization_guard import StabilityProfile
from memorization_guard.audit import AuditError
from memorization_guard.audit import plan as planning
from memorization_guard.audit.dataset import read_manifest
from memorization_guard.audit.plan import Plan
from memorization_guard.audit.run import Local, audit
from memorization_guard.audit.worker import Recipe
from memorization_guard.core.profile import Norms
from memorization_guard.prompts import PromptListError

from .conftest import MadeUp


class Working(MadeUp):
    """Workers that make up their rows; ``meanwhile()`` happens once, after the first batch."""

    def __init__(self, audits, meanwhile=lambda: None):
        self._audits, self._meanwhile = audits, meanwhile

    def sample(self, batches, profile):
        for batch in batches:
            made = [self._audits.row(job.image, job.prompt, self._audits.trace(), seed=job.seed) for job in batch.jobs]
            yield batch, made
            self._meanwhile()
            self._meanwhile = lambda: None


@pytest.fixture
def run(audits, tmp_path, monkeypatch):
    """Audits a list of which 20 prompts are read at once, and gives the prompts of the rows."""
    monkeypatch.setattr(planning, "BLOCK", 20)
    profile, folder = tmp_path / "profile.safetensors", tmp_path / "audit"
    norms = Norms(*np.ones((3, 1)))
    StabilityProfile(mean=norms, std=norms, count=9).save(profile)

    def run_audit(plan, meanwhile=lambda: None, before=lambda: None):
        options = {"profile": profile, "batch_size": 8, "progress": False}
        audit(Recipe(model="none"), plan, folder, lambda: before() or Working(audits, meanwhile), **options)
        return [row["prompt"] for row in pq.read_table(folder / "results").to_pylist()]

    run_audit.folder = folder
    return run_audit


def numbered(first, last, what="prompt"):
    """Long ones, since a file is read some kilobytes ahead."""
    return "".join(f"{what} {n} {'of many ' * 30}".strip() + "\n" for n in range(first, last))


@pytest.mark.parametrize(
    "changed",
    [
        numbered(0, 205),
        numbered(0, 199),
        numbered(0, 180),  # whole blocks are missing
        numbered(0, 200) + numbered(0, 20),
        numbered(0, 100) + numbered(100, 200, "another"),
        numbered(200, 400),
        numbered(0, 150) + "\xff",
        "",
    ],
)
def test_a_list_that_is_changed_ends_the_audit_which_goes_on_once_it_is_put_back(run, tmp_path, changed):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(numbered(0, 200))
    plan = Plan.of(prompts)
    with pytest.raises(PromptListError, match=r"prompts\.txt was changed during the audit: put it back as it was"):
        run(plan, lambda: prompts.write_bytes(changed.encode("latin-1")))
    assert read_manifest(run.folder)["finished"] is None
    journals = [path.read_text() for path in (run.folder / ".work").glob("*.jsonl")]
    assert any("prompt 7" in journal for journal in journals) or any((run.folder / "results").iterdir()), "nothing was kept"
    prompts.write_text(numbered(0, 200))
    assert run(Plan.of(prompts)) == numbered(0, 200).splitlines()


def test_a_list_that_was_changed_before_the_first_image_is_noticed(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"a red cat {n}", "kind": "cat", "seed": n} for n in range(30)]
    for change in ({"prompt": "a red dog 29"}, {"kind": "dog"}, {"seed": 30}, {"seed": None}):
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plan = Plan.of(prompts)
        prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | change]))
        with pytest.raises(PromptListError, match="was changed during the audit"):
            list(plan.parts(64))


def test_a_parquet_list_that_is_replaced_is_noticed_between_two_calls_of_its_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "BLOCK", 20)
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt {n}" for n in range(200)]}), prompts)
    plan = Plan.of(prompts)
    pq.write_table(pa.table({"prompt": [f"prompt {n}" for n in range(180)]}), prompts)
    with pytest.raises(PromptListError, match="was changed during the audit"):
        list(plan.parts(64))


def test_another_list_is_refused_even_if_its_audit_began_while_the_model_was_loaded(run, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(numbered(0, 70))
    second.write_text(numbered(0, 75))
    with pytest.raises(AuditError, match="other prompts: file"):
        run(Plan.of(second), before=lambda: run(Plan.of(first)) and None)
    assert [row["prompt"] for row in pq.read_table(run.folder / "results").to_pylist()] == numbered(0, 70).splitlines()


def test_a_list_that_is_still_being_written_is_not_begun(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")

    def read(path, column):
        yield from stream(path, column)
        with open(prompts, "a") as file:
            file.write("a red dog\n")

    stream = planning.stream_prompts
    monkeypatch.setattr(planning, "stream_prompts", read)
    with pytest.raises(PromptListError, match="was changed while it was read: call again"):
        Plan.of(prompts)


def test_a_changed_list_is_one_line_and_an_exit_code(call, model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "BLOCK", 4)
    prompts, reference = tmp_path / "prompts.txt", tmp_path / "reference.txt"
    prompts.write_text(numbered(0, 70))
    reference.write_text(numbered(0, 9, "a red cat"))
    sample = Local.sample

    def meanwhile(workers, batches, profile):
        for made in sample(workers, batches, profile):
            prompts.write_text(numbered(0, 75))
            yield made

    monkeypatch.setattr(Local, "sample", meanwhile)
    quick = ("--steps", 1, "--height", 16, "--width", 16, "--device", "cpu", "--batch-size", 16)
    result = call("audit", model, prompts, "-o", tmp_path / "audit", "--reference", reference, *quick)
    assert result.exit_code == 2, result.output
    told = f"{prompts} was changed during the audit: put it back as it was; what was made is kept in {tmp_path / 'audit'}"
    assert result.stderr.strip().splitlines()[-1] == f"memorization-guard: {told}: call again to go on"
