"""An audit that is killed, at whatever moment, loses the batch in flight and nothing else."""

import errno
import json
import os
import random
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from memorization_guard import RunSettings, StabilityProfile, Trace
from memorization_guard.audit import AuditError, store
from memorization_guard.audit.dataset import PROFILE, read_manifest
from memorization_guard.audit.plan import Plan
from memorization_guard.audit.run import audit
from memorization_guard.audit.store import PNG, Store
from memorization_guard.audit.worker import Recipe
from memorization_guard.core.profile import Norms

from .conftest import MadeUp

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")

IMAGES, BATCH = 300, 4


class Quick(MadeUp):
    """Workers that make up their rows, and write down for which images they were asked."""

    def __init__(self, log):
        self._log = log

    def sample(self, batches, profile):
        for batch in batches:
            if batch is None:
                yield None
                continue
            with open(self._log, "a") as log:
                log.write("".join(f"{job.image}\n" for job in batch.jobs))
            time.sleep(0.005)
            yield batch, [row(job) for job in batch.jobs]


def row(job):
    trace = Trace(verdict="stable")
    made = {"image": job.image, "row": job.row, "prompt": job.prompt, "kind": job.kind, "seed": job.seed, "verdict": "stable"}
    made["screened_out"] = False
    numbers = dict.fromkeys(["score", "joint_score", "detail", "uncalibrated_score"], 0.5)
    made |= numbers | {"p_value": random.Random(job.seed).random()}
    made |= {"trigger_step": None, "nonfinite_step": None, "steps": 1, "corrected_steps": 0, "note": None}
    made |= {"settings": RunSettings(steps=1).to_dict(), "trace": json.dumps(trace.to_dict())}
    if job.image % 7 == 0:
        made[PNG] = f"image {job.image}".encode()
    return made


@pytest.fixture
def begin(tmp_path):
    """Starts a process that audits, and gives its number."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a prompt, the {n}th\n" for n in range(IMAGES)))
    profile = tmp_path / "profile.safetensors"
    norms = Norms(*np.ones((3, 1)))
    StabilityProfile(mean=norms, std=norms, count=9).save(profile)

    def run(folder="audit", file_limit=None):
        if (child := os.fork()) != 0:
            return child
        code = 1
        try:
            os.close(2)
            if file_limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            recipe, plan = Recipe(model="none"), Plan.of(prompts)
            audit(
                recipe,
                plan,
                tmp_path / folder,
                lambda: Quick(tmp_path / "asked.log"),
                profile=profile,
                batch_size=BATCH,
                progress=False,
            )
            code = 0
        except OSError as error:
            code = error.errno
        finally:
            os._exit(code)

    return run


def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(folder):
    return pq.read_table(folder / "results").to_pylist()


def asked(tmp_path):
    return [int(line) for line in (tmp_path / "asked.log").read_text().split()]


def test_killed_at_random_moments(begin, tmp_path):
    assert code(begin("whole")) == 0
    whole = results(tmp_path / "whole")
    assert [one["image"] for one in whole] == list(range(IMAGES))
    (tmp_path / "asked.log").unlink()

    moments, kills = random.Random(0), 0
    while True:
        child = begin()
        time.sleep(moments.uniform(0.01, 0.12))
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills >= 5
    assert read_manifest(tmp_path / "audit")["finished"] or code(begin()) == 0
    assert results(tmp_path / "audit") == whole
    assert set(asked(tmp_path)) == set(range(IMAGES))
    assert len(asked(tmp_path)) - IMAGES <= kills * BATCH, "more was made twice than the batches in flight"
    for one in whole:
        kept = one["image"] % 7 == 0
        assert (one["file"] is not None) == kept
        assert not kept or (tmp_path / "audit" / one["file"]).read_bytes() == f"image {one['image']}".encode()
    assert (tmp_path / "audit" / PROFILE).exists()
    assert not (tmp_path / "audit" / ".work").exists()
    assert not list((tmp_path / "audit").rglob("*.part")), "half a file is left over"


def test_two_processes_of_which_one_is_killed_again_and_again(begin, tmp_path):
    moments, steady = random.Random(1), begin()
    kills = 0
    while not os.waitpid(steady, os.WNOHANG)[0]:
        other = begin()
        time.sleep(moments.uniform(0.02, 0.2))
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        kills += 1
    assert [one["image"] for one in results(tmp_path / "audit")] == list(range(IMAGES))
    assert len(asked(tmp_path)) - IMAGES <= kills * BATCH
    assert read_manifest(tmp_path / "audit")["finished"]


def test_a_full_disk_stops_it_and_loses_nothing(begin, tmp_path):
    assert code(begin("whole")) == 0
    # No file may grow beyond this: a journal is cut off in the middle of a batch, as on a full disk.
    assert code(begin(file_limit=30_000)) == errno.EFBIG
    before = len(asked(tmp_path))
    journals = list((tmp_path / "audit" / ".work").glob("*.jsonl"))
    assert not journals[0].read_bytes().endswith(b"\n")
    assert code(begin()) == 0
    assert results(tmp_path / "audit") == results(tmp_path / "whole")
    assert len(asked(tmp_path)) - before <= IMAGES


def test_a_journal_of_other_images_is_not_taken(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    jobs = next(Plan.of(prompts).parts(64))
    place = Store(tmp_path / "audit")
    with place.alone():
        pass
    part = place.claim(0, jobs)
    assert place.claim(0, jobs) is None, "a part is claimed twice"
    part.add([row(jobs[0])])
    part.release()
    again = place.claim(0, jobs)
    assert (again.found, [job.image for job in again.missing]) == (1, [1])
    again.release()
    prompts.write_text("a\nc\n")
    with pytest.raises(AuditError, match="journal of other images"):
        place.claim(0, next(Plan.of(prompts).parts(64)))


@pytest.fixture
def journal(tmp_path):
    """Begins a part of four images, of which three are in the journal, one a batch: ``(claim, its journal, jobs)``."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{n}\n" for n in range(4)))
    jobs = next(Plan.of(prompts).parts(64))
    place = Store(tmp_path / "audit")
    with place.alone():
        pass
    part = place.claim(0, jobs)
    for job in jobs[:3]:
        part.add([short(job)])
        part.add([short(job)])  # a batch that comes twice counts once
    part.release()
    (path,) = (tmp_path / "audit" / ".work").glob("*.jsonl")
    assert len(path.read_bytes().splitlines()) == 4
    return lambda: place.claim(0, jobs), path, jobs


def short(job):
    """A row that is no longer than it must be."""
    numbers = {"row": 0, "seed": 0, "screened_out": False, "steps": 0, "corrected_steps": 0}
    return {"image": job.image, "prompt": "", "verdict": "stable", "trace": "", "p_value": job.image / 7, **numbers}


@pytest.fixture
def written(monkeypatch):
    """Finished parts, which are not written, since that takes longest."""
    made = []
    monkeypatch.setattr(store, "write_table", lambda _, rows: made.append([row | {"file": ...} for row in rows]))
    return made


def test_a_damaged_line_of_a_journal_costs_its_batch(journal, written, caplog):
    claim, path, jobs = journal
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"', b"\0", 3)
    path.write_bytes(b"".join(lines))
    part = claim()
    assert [job.image for job in part.missing] == [1, 3]
    assert f"{path}: 1 of 4 lines are damaged; their images are made again." in caplog.text
    part.add([short(jobs[1])])
    part.release()
    caplog.clear()
    part = claim()
    assert [job.image for job in part.missing] == [3]
    assert not caplog.text, "said again, though the batch was made again"
    part.add([short(jobs[3])])
    assert written == [[short(job) | {"file": ...} for job in jobs]]


def test_whatever_byte_of_a_journal_is_changed_or_lost_the_results_are_the_same(journal, written, caplog, monkeypatch):
    claim, path, jobs = journal
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole, chance = path.read_bytes(), random.Random(0)
    for place, byte in enumerate(whole):
        changes = {byte ^ 1, ord("\n"), chance.randrange(256)} - {byte}
        for instead in (b"", *(bytes([other]) for other in sorted(changes))):
            path.write_bytes(damaged := whole[:place] + instead + whole[place + 1 :])
            caplog.clear()
            part = claim()
            assert part.found >= 1, "more than two of three batches were lost with one byte"
            # Without its end, the last line is one that was cut off by a kill.
            assert ("lines are damaged" in caplog.text) == damaged.endswith(b"\n")
            part.add([short(job) for job in part.missing])
            assert written.pop() == [short(job) | {"file": ...} for job in jobs]
