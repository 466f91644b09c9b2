"""An audit on a Ray cluster of several nodes in this machine: what is lost is made elsewhere, and everything once."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

import ray

from memorization_guard.audit import AuditError, cluster
from memorization_guard.audit.cluster import Cluster, _Actor
from memorization_guard.audit.dataset import read_manifest
from memorization_guard.audit.plan import Job
from memorization_guard.audit.run import Batch, _Parts
from memorization_guard.pipelines import ModelError

# One module has all of it, so that the cluster is started once.
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def nodes():
    """A head without room for workers, and nodes with room for one each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's workers give way to everything else, and here that is the rest of the tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's spelling)
    from ray.cluster_utils import Cluster as LocalCluster

    made = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(cluster, "LOOK", 1.0)
    monkeypatch.setattr(cluster, "TRIES", 2)


class Actor:
    """In place of the real one: answers at once, but for prompts that say what is to happen."""

    def __init__(self, recipe):
        self._folder = recipe.model

    def describe(self):
        about = {"pipeline": "None", "components": {}, "loras": [], "scheduler": {}, "dtype": "float32", "versions": {}}
        return about | {"files": {}, "device": "cpu", "pid": os.getpid()}

    def sample(self, jobs, profile, screens):
        time.sleep(0.05)
        for job in jobs:
            if job.prompt == "die" or (job.prompt == "die once" and self._first(job)):
                os.kill(os.getpid(), signal.SIGKILL)
            if job.prompt == "fail" or (job.prompt == "fail once" and self._first(job)):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if job.prompt == "unfit":
                raise AuditError("The profile does not fit this run")
        settled = [job for job in jobs if not screens or job.prompt != "suspicious"]
        return [{"image": job.image, "pid": os.getpid(), "screened_out": screens} for job in settled]

    def _first(self, job):
        path = os.path.join(self._folder, str(job.image))
        return not os.path.exists(path) and open(path, "w").close() is None


@pytest.fixture
def sample(nodes, recipe, monkeypatch, tmp_path):
    """Has made-up workers sample prompts, and gives the rows as they come."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(cluster, "_Actor", Actor)

    def run(prompts, batch_size=2, workers=1):
        hands = Cluster(dataclasses.replace(recipe, model=str(tmp_path)), address=nodes.address)
        try:
            jobs = [Job(image=n, row=n, prompt=text, kind=None, seed=n) for n, text in enumerate(prompts)]

            def batches():
                while hands.count < workers:
                    time.sleep(0.1)
                    yield None
                for first in range(0, len(jobs), batch_size):
                    yield Batch(None, jobs[first : first + batch_size])

            return [row for made in hands.sample(batches(), None) if made for row in made[1]]
        finally:
            hands.close()

    yield run
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_every_worker_works_and_every_image_comes_once(sample):
    made = sample(["a"] * 60, workers=2)
    assert sorted(row["image"] for row in made) == list(range(60))
    assert len({row["pid"] for row in made}) == 2


@pytest.mark.parametrize("what", ["die once", "fail once"])
def test_what_a_lost_worker_had_is_made_by_another(sample, what):
    made = sample(["a"] * 9 + [what] + ["a"] * 30 + [what] + ["a"] * 9)
    assert sorted(row["image"] for row in made) == list(range(50))


@pytest.mark.parametrize(("what", "message"), [("die", "images 4 to 5 failed 2 times"), ("fail", "illegal memory access")])
def test_a_batch_that_fails_everywhere_is_named(sample, what, message):
    with pytest.raises(AuditError, match=message):
        sample(["a"] * 5 + [what] + ["a"] * 6)


def test_a_profile_that_does_not_fit_is_no_failure_of_a_worker(sample):
    began = time.monotonic()
    with pytest.raises(AuditError, match="The profile does not fit this run"):
        sample(["unfit"])
    assert time.monotonic() - began < 60


def test_a_model_that_no_worker_can_load_is_said(nodes, recipe, tmp_path):
    hands = Cluster(dataclasses.replace(recipe, model=str(tmp_path / "gone")), address=nodes.address)
    try:
        with pytest.raises(ModelError, match="there is no model at"):
            hands.describe()
    finally:
        hands.close()


def test_no_cluster_is_said(recipe):
    with pytest.raises(AuditError, match="there is no Ray cluster at 127"):
        Cluster(recipe, address="127.0.0.1:1")


def test_an_audit_survives_the_loss_of_a_worker_and_of_a_node(nodes, run, recipe, prompts, tmp_path, monkeypatch):
    """With the real worker and a real model: a worker is killed and a node goes while it runs."""
    monkeypatch.setattr(cluster, "TRIES", 5)  # a batch may well be lost with both
    prompts.write_text("".join(f'{{"caption": "a red cat {n}"}}\n' for n in range(200)))
    run(tmp_path / "alone", recipe=recipe, prompts=prompts, seeds_per_prompt=1)
    taken = nodes.add_node(num_cpus=1)
    lost = []

    def disturb():
        journals = tmp_path / "audit" / ".work"
        while not any(path.stat().st_size > 30_000 for path in journals.glob("*.jsonl")):
            time.sleep(0.02)
        found = subprocess.run(["pgrep", "-f", f"ray::{_Actor.__name__}"], capture_output=True, check=True).stdout.split()
        os.kill(int(found[0]), signal.SIGKILL)
        lost.append("worker")
        nodes.remove_node(taken, allow_graceful=False)
        lost.append("node")

    thread = threading.Thread(target=disturb)
    thread.start()
    assert run(workers=lambda: Cluster(recipe, address=nodes.address), seeds_per_prompt=1) is True
    thread.join()
    assert lost == ["worker", "node"]
    alone, together = (pq.read_table(tmp_path / name / "results").to_pylist() for name in ("alone", "audit"))
    assert [row["image"] for row in together] == list(range(200))
    for mine, theirs in zip(alone, together, strict=True):
        assert (mine["prompt"], mine["seed"]) == (theirs["prompt"], theirs["seed"])
        assert mine["score"] == pytest.approx(theirs["score"], rel=1e-2)
    models = [read_manifest(tmp_path / name)["model"]["components"] for name in ("alone", "audit")]
    assert models[0] == models[1]


@pytest.mark.parametrize("lost", ["a", "die once"])
def test_what_is_suspicious_is_sampled_by_whichever_worker_is_free(nodes, recipe, monkeypatch, tmp_path, lost):
    """Batches come back out of order, and a worker that dies while it screens costs nothing but time."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(cluster, "_Actor", Actor)
    prompts = ["suspicious" if n % 5 == 0 else lost if n == 33 else "a" for n in range(150)]

    class Kept:
        def __init__(self, jobs):
            self.missing, self.found, self.finished = jobs, 0, False

    class Claims:
        def done(self, number):
            return False

        def claim(self, number, jobs):
            return Kept(jobs)

    jobs = [Job(image=n, row=n, prompt=text, kind=None, seed=n) for n, text in enumerate(prompts)]
    parts = _Parts(Claims(), iter([jobs[:64], jobs[64:128], jobs[128:]]), 2, screen=True)
    hands = Cluster(dataclasses.replace(recipe, model=str(tmp_path)), address=nodes.address)
    rows = []
    try:
        for made in hands.sample(parts.batches(), None):
            if made is not None:
                parts.take_in(*made)
                rows += made[1]
    finally:
        hands.close()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(row["image"] for row in rows) == list(range(150))
    assert {row["image"] for row in rows if not row["screened_out"]} == set(range(0, 150, 5))
