"""Damaged folders of audits: every command says in one line what is damaged."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memorization_guard.audit import AuditError, dataset
from memorization_guard.audit.plan import Job
from memorization_guard.audit.store import Store
from memorization_guard.files import MAX_DEPTH


@pytest.fixture
def folder(audits):
    rows = [audits.row(n, f"a prompt {n}", audits.trace(0.0001 if n else 0.5), seed=n) for n in range(4)]
    return audits(rows)


def one_line(result, message):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deep"),
        ("9" * 5000, "too many digits"),
        ("[1]", "cannot be read as the manifest"),
        ("", "cannot be read as the manifest"),
    ],
)
def test_a_manifest_that_is_none_is_said(folder, call, content, message):
    (folder / dataset.MANIFEST).write_text(content)
    one_line(call("report", folder), message)
    one_line(call("compare", folder, folder), message)


def test_a_huge_manifest_is_not_read(folder, call):
    os.truncate(folder / dataset.MANIFEST, 60 << 30)  # takes no space
    one_line(call("report", folder), "larger than 32 MB")


@pytest.mark.parametrize("images", [-5, 10**400, float("inf"), "4", [4], True])
def test_a_manifest_that_counts_nonsense_is_shown_without_it(folder, call, images):
    manifest = json.loads((folder / dataset.MANIFEST).read_text())
    changed = {"images": images, "profile": {"reference_prompts": images}, "model": 7, "settings": [1]}
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest | changed))
    assert call("report", folder).exit_code == 0


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("verdict", None, "the column verdict is missing"),
        ("trace", None, "the column trace is missing"),
        ("words", None, "the column words is missing"),
        ("image", pa.array(list("abcd")), "the column image is string, not int64"),
        ("p_value", pa.array(list("abcd")), "the column p_value is string, not double"),
        ("verdict", pa.array([1, 2, 3, 4]), "the column verdict is int64, not string"),
        ("verdict", pa.array(["stable", "x", "stable", "stable"]), "a verdict that is none"),
        ("prompt", pa.array([None, "a", "b", "c"]), "a row has no prompt"),
        ("seed", pa.array([None, 1, 2, 3], pa.int64()), "a row has no seed"),
    ],
)
def test_a_part_with_other_columns_is_named(folder, call, column, values, message):
    (path,) = dataset.parts(folder)
    table = pq.read_table(path)
    number = table.column_names.index(column)
    pq.write_table(table.drop_columns([column]) if values is None else table.set_column(number, column, values), path)
    for command in (("report", folder), ("compare", folder, folder, "-o", folder / "c.html")):
        one_line(call(*command), message)


@pytest.mark.parametrize("trace", ["{", "[" * 100_000 + "]" * 100_000, '{"format": 1e999}'])
def test_a_trace_that_cannot_be_read_is_left_out(folder, call, trace):
    (path,) = dataset.parts(folder)
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("trace"), "trace", pa.array([trace] * 4)), path)
    assert call("report", folder).exit_code == 0


def test_names_that_are_not_utf8_are_shown(folder, call):
    manifest = json.loads((folder / dataset.MANIFEST).read_text())
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest | {"prompts": {"file": "l\udce4nge.txt"}}))
    moved = folder.rename(folder.with_name(os.fsdecode(b"audit\xe4")))
    for command in (("report", moved), ("compare", moved, moved, "-o", moved / "c.html")):
        result = call(*command)
        assert result.exit_code == 0, result.output
    assert b"l?nge.txt" in (moved / dataset.REPORT).read_bytes()


@pytest.mark.parametrize(
    "batch", ["[" * 100_000 + "]" * 100_000, "7", "[7]", '[{"image": 0}]', '[{"image": [0]}]', '[{"image": 0, "prompt": 5}]']
)
def test_a_damaged_batch_of_a_journal_is_made_again(audits, tmp_path, batch):
    store, jobs = Store(tmp_path), [Job(n, n, f"a prompt {n}", None, n) for n in range(2)]
    with store.alone():
        part = store.claim(0, jobs)
    part.add([audits.row(1, "a prompt 1", audits.trace(), seed=1)])
    part.release()
    with open(store.work / "part-000000.jsonl", "a") as stream:
        stream.write(batch + "\n")
    again = store.claim(0, jobs)
    assert ([job.image for job in again.missing], again.found) == ([0], 1)
    again.add([audits.row(0, "a prompt 0", audits.trace(), seed=0)])
    assert again.finished


@pytest.mark.parametrize(
    "change", [{"part_size": 0}, {"part_size": "x"}, {"images": None}, {"devices": 7}, {"finished": 3}, {"settings": [1]}]
)
def test_an_audit_does_not_go_on_with_a_damaged_manifest(run, tmp_path, change):
    run()
    path = tmp_path / "audit" / dataset.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AuditError, match=r"is damaged|other settings"):
        run()
