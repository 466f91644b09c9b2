"""An audit of the lab model that is killed while it works, alone or on a Ray cluster of several nodes in this machine.

    python benchmarks/audit.py kill --output DIR [--seeds 2] [--steps 20] [--kills 3] [--json FILE]
    python benchmarks/audit.py cluster --output DIR [--seeds 2] [--steps 20] [--nodes 3]
    python benchmarks/audit.py throughput --output DIR [--workers 1 2 3]
    python benchmarks/audit.py driver --output DIR [--images 20000]
    python benchmarks/audit.py screen --output DIR [--steps 50] [--json FILE]

``kill`` makes images of 500 prompts of the evaluation split and kills the process with SIGKILL at random moments; ``cluster``
makes the same on nodes of one core each, kills a worker, takes a node away and adds one. Both print how long it took, how many
images were kept at each kill, how many rows and different images there are at the end, and the rates by kind of prompt at the
audit's own threshold and at others. ``throughput`` times 400 images of 10 steps on so many workers, and what one process does
without Ray. ``driver`` times the one process that keeps the rows of all workers, with workers that take no time, and the
reading of a list of ten million prompts. ``screen`` audits 200 ordinary prompts and then a list with memorized ones, each
once whole and once with ``--screen``, and says how fast both were and how much of what the whole audit found the other found.
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
from memorization_guard.audit.run import AT_ONCE, Batch, Local, audit
from memorization_guard.audit.summary import summarize
from memorization_guard.audit.worker import NEAR, Recipe, Worker
from memorization_guard.core import asking
from memorization_guard.core.profile import StabilityProfile
from memorization_guard.core.reference import p_value_floor
from memorization_guard.core.settings import Thresholds
from memorization_guard.core.words import Memory
from memorization_guard.lab import PROFILE, prompts

#: Prompts of each group; 500 of them.
COUNTS = {"exact": 30, "template": 24, "rare": 30, "ordinary": 416}
#: Thresholds that the rates are printed at.
RATES = (0.0005, 0.001, 0.005, 0.01)

#: Prompts of each group of the list that is audited whole and screened, beside that of ordinary prompts alone.
SCREENED = {"exact": 30, "template": 24, "ordinary": 100}
ORDINARY = 200
#: Steps of the former, as in ``kill``: the verdict is that of the first evaluation.
STEPS = 20
#: P-values up to which images could be sampled whole.
BOUNDS = (0.000125, 0.0005, 0.001, 0.0025, 0.005, 0.00625, 0.01, 0.02, 0.05, 0.1)
#: Prompts of the list that is planned on paper.
MANY = 10_000_000


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


class Timed(Local):
    """The worker of this process, from its first batch to its last, with the predictions that its network made."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.took: dict[str, float] = {}
        self._predictions = 0
        unet = self._worker._pipe.unet
        forward = unet.forward

        def counted(sample: Any, *arguments: Any, **keywords: Any) -> Any:
            self._predictions += len(sample)
            return forward(sample, *arguments, **keywords)

        unet.forward = counted

    def sample(
        self, batches: Iterator[Batch | None], profile: StabilityProfile
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]] | None]:
        asking._memory = Memory()  # no words of an audit before
        self._predictions, clock, processor = 0, time.perf_counter(), time.process_time()
        yield from super().sample(batches, profile)
        self.took = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
        self.took["predictions"] = self._predictions


def timed(folder: Path, source: Path, steps: int, *, screens: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An audit of a list with the bundled profile: what it took an image, and its rows."""
    recipe, plan = Recipe(model="lab", device="cpu", steps=steps, screen=screens), Plan.of(source)
    place = folder / f"{source.stem}-{'screened' if screens else 'whole'}"
    shutil.rmtree(place, ignore_errors=True)
    hands = Timed(recipe)
    audit(recipe, plan, place, lambda: hands, profile=PROFILE, progress=False)
    columns = ["image", "prompt", "kind", "p_value", "trigger_step", "screened_out"]
    rows = pq.read_table(place / "results", columns=columns).to_pylist()
    size = sum(part.stat().st_size for part in (place / "results").iterdir())
    found = {name: float(f"{value:.4g}") for name, value in hands.took.items()}
    found["images"], found["sampled_whole"] = plan.images, sum(not row["screened_out"] for row in rows)
    found["images_per_processor_second"] = plan.images / hands.took["processor_seconds"]
    found["predictions_per_image"] = hands.took["predictions"] / plan.images
    found["bytes_per_image"] = size / plan.images
    print(f"{place.name}: {found}", flush=True)
    return found, rows


def screen(folder: Path, steps: int, file: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ordinary, mixed = folder / "ordinary.jsonl", folder / "mixed.jsonl"
    texts = prompts("ordinary", "evaluation")
    lines = [{"prompt": text, "kind": "ordinary"} for text in texts[:ORDINARY]]
    ordinary.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    lines = [
        {"prompt": text, "kind": group} for group, count in SCREENED.items() for text in prompts(group, "evaluation")[:count]
    ]
    random.Random(0).shuffle(lines)
    mixed.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")

    speed, found, kinds, both = {}, {}, {}, []
    for screens, name in ((True, "screened"), (False, "whole")):
        speed[name], rows = timed(folder, ordinary, steps, screens=screens)
        found[name], mixed_rows = timed(folder, mixed, STEPS, screens=screens)
        both.append((rows, mixed_rows))
    screened, whole = (rows + mixed_rows for rows, mixed_rows in both)
    wanted = {id(row): full["trigger_step"] is not None for row, full in zip(screened, whole, strict=True)}
    differences = [abs(row["p_value"] / full["p_value"] - 1) for row, full in zip(screened, whole, strict=True)]
    for group in SCREENED:
        own = [row for row in screened if row["kind"] == group]
        kinds[group] = {
            "images": len(own),
            "whole": sum(wanted[id(row)] for row in own),
            "screened": sum(wanted[id(row)] and row["trigger_step"] is not None for row in own),
            "only_screened": sum(not wanted[id(row)] and row["trigger_step"] is not None for row in own),
            "sampled_whole": sum(not row["screened_out"] for row in own),
        }
    times = speed["whole"]["predictions_per_image"] / speed["screened"]["predictions_per_image"]
    curve = []
    for bound in BOUNDS:
        row: dict[str, Any] = {"p_value": bound}
        for group in SCREENED:
            own = [one for one in screened if one["kind"] == group]
            triggers = [one for one in own if wanted[id(one)]]
            row[group] = {
                "sampled_whole": float(np.mean([one["p_value"] <= bound for one in own])),
                "found": float(np.mean([one["p_value"] <= bound for one in triggers])) if triggers else None,
            }
        # A whole image costs what it costs in a whole audit, and a screened one costs that besides.
        row["times_as_fast"] = 1 / (1 / times + row["ordinary"]["sampled_whole"])
        curve.append(row)
    result = {
        "steps": {"ordinary": steps, "mixed": STEPS},
        "batch_size": 4,
        "screened_at_once": 4 * AT_ONCE,
        "near": NEAR,
        "ordinary": speed
        | {
            "times_by_processor": speed["whole"]["processor_seconds"] / speed["screened"]["processor_seconds"],
            "times_by_clock": speed["whole"]["seconds"] / speed["screened"]["seconds"],
            "times_by_predictions": times,
        },
        "mixed": found,
        "kinds": kinds,
        "largest_difference_of_p_values": max(differences),
        "curve": curve,
        "plan": plan_of(speed, found, steps),
    }
    write_result(result, file)


def plan_of(speed: dict[str, Any], found: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """What ten million ordinary prompts would take at these rates, for the usual false-positive rate and the lowest one."""
    a_second = {name: row["images_per_processor_second"] for name, row in speed.items()}
    mixed = found["screened"]
    # What is sampled whole is mostly triggered here, so that words are searched for; of ordinary prompts that are near, not.
    suspicious = (mixed["processor_seconds"] - mixed["images"] / a_second["screened"]) / mixed["sampled_whole"]
    suspicious += (steps - STEPS) / steps / a_second["whole"]
    rates = (Thresholds().false_positive_rate, p_value_floor(StabilityProfile.load(PROFILE).reference_prompts))
    return [
        {
            "images": MANY,
            "false_positive_rate": rate,
            "sampled_whole": round(MANY * rate * NEAR),
            "seconds_of_a_suspicious_image": suspicious,
            "screening_hours": MANY / a_second["screened"] / 3600,
            "suspicious_hours": MANY * rate * NEAR * suspicious / 3600,
            "hours_of_a_whole_audit": MANY / a_second["whole"] / 3600,
            "gigabytes": MANY * speed["screened"]["bytes_per_image"] / 1e9,
        }
        for rate in rates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "cluster", "throughput", "driver", "screen"))
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    parser.add_argument("--steps", type=int, help="20, or for screen 50, as in an audit by default")
    parser.add_argument("--json", type=Path, help="kill, screen: where the figures go")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    if options.what == "kill":
        kill(options.output, options.seeds, options.steps or 20, options.kills, options.json)
    elif options.what == "cluster":
        on_cluster(options.output, options.seeds, options.steps or 20, options.nodes)
    elif options.what == "screen":
        screen(options.output, options.steps or Recipe.steps, options.json)
    elif options.what == "driver":
        driver(options.output, options.images)
    else:
        throughput(options.output, options.workers)


if __name__ == "__main__":
    main()
