"""An audit of the lab model that is killed while it works, alone or on a Ray cluster of several nodes in this machine.

    python benchmarks/audit.py kill --output DIR [--seeds 2] [--steps 20] [--kills 3] [--json FILE]
    python benchmarks/audit.py cluster --output DIR [--seeds 2] [--steps 20] [--nodes 3]
    python benchmarks/audit.py throughput --output DIR [--workers 1 2 3]
    python benchmarks/audit.py driver --output DIR [--images 20000]

``kill`` makes images of 500 prompts of the evaluation split and kills the process with SIGKILL at random moments; ``cluster``
makes the same on nodes of one core each, kills a worker, takes a node away and adds one. Both print how long it took, how many
images were kept at each kill, how many rows and different images there are at the end, and the rates by kind of prompt at the
audit's own threshold and at others. ``throughput`` times 400 images of 10 steps on so many workers, and what one process does
without Ray. ``driver`` times the one process that keeps the rows of all workers, with workers that take no time, and the
reading of a list of ten million prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from samplers import write_result

from memorization_guard.audit import cluster
from memorization_guard.audit.plan import Job, Plan
from memorization_guard.audit.run import Batch, audit
from memorization_guard.audit.summary import summarize
from memorization_guard.audit.worker import Recipe, Worker
from memorization_guard.core.profile import StabilityProfile
from memorization_guard.lab import PROFILE, prompts

#: Prompts of each group; 500 of them.
COUNTS = {"exact": 30, "template": 24, "rare": 30, "ordinary": 416}
#: Thresholds that the rates are printed at.
RATES = (0.0005, 0.001, 0.005, 0.01)


def lists(folder: Path) -> tuple[Path, Path]:
    """The list that is audited, and the reference prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    audited, reference = folder / "prompts.jsonl", folder / "reference.txt"
    rows = [
        {"prompt": text, "kind": group} for group, count in COUNTS.items() for text in prompts(group, "evaluation")[:count]
    ]
    # In no order, like a user's list.
    random.Random(0).shuffle(rows)
    audited.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reference.write_text("\n".join(prompts("reference")) + "\n", encoding="utf-8")
    return audited, reference


def command(folder: Path, seeds: int, steps: int, *more: str) -> list[str]:
    audited, reference = lists(folder)
    call = [sys.executable, "-m", "memorization_guard", "audit", "lab", str(audited), "-o", str(folder / "audit")]
    call += ["--reference", str(reference), "--seeds-per-prompt", str(seeds), "--steps", str(steps)]
    return [*call, "--batch-size", "8", *more]


def kept(folder: Path) -> int:
    """How many images are kept whatever is killed."""
    done = sum(pq.read_metadata(part).num_rows for part in (folder / "audit" / "results").glob("part-*.parquet"))
    journals = (folder / "audit" / ".work").glob("part-*.jsonl")
    # A line is a checksum and JSON; the last one may be half written.
    lines = [line.partition(b" ")[2] for journal in journals for line in journal.read_bytes().split(b"\n")[1:-1]]
    return done + sum(len(json.loads(line)) for line in lines)


def found(folder: Path) -> dict[str, Any]:
    """What came of an audit: how many rows and different images there are, and the rates by kind of prompt."""
    rows = pq.read_table(folder / "audit" / "results", columns=["image", "kind", "p_value"]).to_pylist()
    kinds = {}
    for rate in summarize(folder / "audit")["kinds"]:
        p_values = [row["p_value"] for row in rows if row["kind"] == rate["kind"]]
        below = {str(share): float(np.mean([p_value <= share for p_value in p_values])) for share in RATES}
        kinds[rate["kind"]] = {**{name: rate[name] for name in ("triggered", "prompts_triggered")}, "below": below}
    return {"rows": len(rows), "images": len({row["image"] for row in rows}), "kinds": kinds}


def kill(folder: Path, seeds: int, steps: int, kills: int, file: Path | None) -> None:
    moments, calls = random.Random(0), []
    images = sum(COUNTS.values()) * seeds
    for number in range(kills + 1):
        start = time.time()
        process = subprocess.Popen(command(folder, seeds, steps))
        if number < kills:
            # The kills are spread over the run by the number of images that are kept.
            goal = kept(folder) + int(images * moments.uniform(0.15, 0.3))
            while process.poll() is None and kept(folder) < goal:
                time.sleep(moments.uniform(0.2, 0.8))
            process.send_signal(signal.SIGKILL)
        process.wait()
        calls.append({"seconds": round(time.time() - start), "exit": process.returncode, "kept": kept(folder)})
        print(f"\ncall {number + 1}: {calls[-1]}")
    write_result({"seeds": seeds, "steps": steps, "calls": calls, **found(folder)}, file)


@contextmanager
def nodes(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """A Ray cluster in this machine: a head without workers, and nodes of one core."""
    # Ray's workers give way to everything else in the machine, which is not what is to be measured.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield made, [made.add_node(num_cpus=1) for _ in range(count)]
    finally:
        made.shutdown()


def workers() -> list[int]:
    """Processes that sample for a cluster."""
    return [int(line) for line in subprocess.run(["pgrep", "-f", "ray::_Actor"], capture_output=True).stdout.split()]


def on_cluster(folder: Path, seeds: int, steps: int, count: int) -> None:
    planned = sum(COUNTS.values()) * seeds
    with nodes(count) as (made, members):
        began = time.time()
        process = subprocess.Popen(command(folder, seeds, steps, "--ray", made.address))
        done = 0
        while process.poll() is None:
            time.sleep(1)
            images = kept(folder)
            if done == 0 and images > planned / 4:
                os.kill(workers()[0], signal.SIGKILL)
                print(f"\n{time.time() - began:.0f} s, {images} images: a worker killed")
                done = 1
            elif done == 1 and images > planned / 2:
                made.remove_node(members[-1], allow_graceful=False)
                print(f"\n{time.time() - began:.0f} s, {images} images: a node taken away")
                done = 2
            elif done == 2 and images > planned * 2 / 3:
                made.add_node(num_cpus=1)
                print(f"\n{time.time() - began:.0f} s, {images} images: a node added")
                done = 3
        print(f"\n{time.time() - began:.0f} s, exit code {process.returncode}")
        write_result(found(folder), None)


def throughput(folder: Path, counts: list[int]) -> None:
    for count in [0, *counts]:
        place = folder / f"workers-{count}"
        shutil.rmtree(place, ignore_errors=True)
        call = command(place, 1, 10)
        if count == 0:
            rate(call, place)
            continue
        with nodes(count) as (made, _):
            rate([*call, "--ray", made.address], place)


def rate(call: list[str], place: Path) -> None:
    """Prints how fast images come, from the hundredth to the five hundredth."""
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    marks: list[tuple[float, int]] = []
    while process.poll() is None:
        time.sleep(0.1)
        marks.append((time.perf_counter(), kept(place)))
    inside = [mark for mark in marks if 100 <= mark[1] < 500]
    (first, few), (last, many) = inside[0], inside[-1]
    print(f"{place.name}: {(many - few) / (last - first):.2f} images a second")


class Instant:
    """Workers that take no time: they return the rows of 64 real images again and again."""

    count = 1

    def __init__(self, recipe: Recipe) -> None:
        self._worker = Worker(recipe)
        jobs = [Job(n, n, text, None, n) for n, text in enumerate(prompts("ordinary")[:64])]
        known = StabilityProfile.load(PROFILE)
        self._rows = [row for n in range(0, 64, 8) for row in self._worker.sample(jobs[n : n + 8], known)]

    def describe(self) -> dict[str, Any]:
        return self._worker.describe()

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        pass

    def sample(
        self, batches: Iterator[Batch | None], profile: StabilityProfile
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]] | None]:
        for batch in filter(None, batches):
            yield batch, self.rows(batch.jobs)

    def rows(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        names = ("image", "row", "prompt", "seed")
        return [self._rows[job.image % 64] | {name: getattr(job, name) for name in names} for job in jobs]

    def close(self) -> None:
        pass


def keep(place: Path, source: Path, batch_size: int, hands: Any, where: str) -> None:
    """Prints how fast rows are kept when they take no time to make."""
    shutil.rmtree(place, ignore_errors=True)
    plan, recipe = Plan.of(source), Recipe(model="lab", device="cpu")
    start = time.perf_counter()
    audit(recipe, plan, place, lambda: hands, profile=PROFILE, batch_size=batch_size, progress=False)
    rate = plan.images / (time.perf_counter() - start)
    size = sum(part.stat().st_size for part in (place / "results").iterdir()) / plan.images
    print(f"batches of {batch_size}{where}: {rate:.0f} images a second, {size:.0f} bytes an image in the results")


class InstantActor:
    """The same on a Ray cluster: rows take no time to make, but travel here from another process."""

    def __init__(self, recipe: Recipe) -> None:
        self._instant = Instant(recipe)

    def describe(self) -> dict[str, Any]:
        return self._instant.describe()

    def sample(self, jobs: list[Job], profile: StabilityProfile, screens: bool) -> list[dict[str, Any]]:
        return self._instant.rows(jobs)


def driver(folder: Path, images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    small, large = folder / "prompts.txt", folder / "ten-million.txt"
    small.write_text(
        "".join(f"{text}, the {n}th\n" for n, text in zip(range(images), cycle(prompts("ordinary")), strict=False))
    )
    recipe = Recipe(model="lab", device="cpu")
    for batch_size in (4, 16, 64):
        keep(folder / f"batch-{batch_size}", small, batch_size, Instant(recipe), "")
    cluster._Actor = InstantActor  # type: ignore[assignment, misc]
    with nodes(1) as (made, _):
        for batch_size in (4, 16):
            hands = cluster.Cluster(recipe, address=made.address)
            hands.describe()
            hands.trial = lambda *_: None  # type: ignore[method-assign]
            keep(folder / f"ray-{batch_size}", small, batch_size, hands, " from a worker on Ray")
    with open(large, "w") as stream:
        for n, text in zip(range(10_000_000), cycle(prompts("ordinary")), strict=False):
            stream.write(f"{text}, the {n}th\n")
    start = time.perf_counter()
    plan = Plan.of(large)
    scanned = time.perf_counter() - start
    parts = sum(1 for _ in plan.parts(plan.part_size))
    print(f"ten million prompts: read in {scanned:.0f} s, gone through again in {time.perf_counter() - start - scanned:.0f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{parts} parts; peak memory {peak:.0f} MB, most of it torch and the model")
    large.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "cluster", "throughput", "driver"))
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="kill: where the figures go")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    if options.what == "kill":
        kill(options.output, options.seeds, options.steps, options.kills, options.json)
    elif options.what == "cluster":
        on_cluster(options.output, options.seeds, options.steps, options.nodes)
    elif options.what == "driver":
        driver(options.output, options.images)
    else:
        throughput(options.output, options.workers)


if __name__ == "__main__":
    main()
