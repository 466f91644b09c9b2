"""How far one profile carries to runs that begin at other noise levels.

    python benchmarks/transfer.py --model FOLDER --world FOLDER --runs FOLDER --json FILE [--split tuning]

The verdict comes from a run's first evaluation, and where that is suspicious from two more in a noise that is the same for all
prompts. No solver, step count or guidance scale has a part in it; what a schedule still settles is the noise level at which a
run begins, and a profile's reference runs say how detail changes with that. So runs of a setting (sampler, steps) are judged
by one profile, and by the same reference prompts evaluated where those runs begin. Of every prompt these evaluations alone are
taken, but for the profile's runs. The traces are kept in --runs and read from there by the next call. No reference prompt or
seed is in another group. What the verdict is worth at one setting is in ``first_evaluation.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from samplers import SAMPLERS, reference_runs, texts_of
from tqdm import tqdm

from memorization_guard import NoiseLevel, Thresholds, Trace
from memorization_guard.core.calibration import WHOLE_RUNS, ReferenceRuns
from memorization_guard.core.judge import decided
from memorization_guard.core.reference import OPEN_SIGMA, Reference, Tail
from memorization_guard.core.settings import Serves
from memorization_guard.files import write_whole
from memorization_guard.lab import MODEL, Lab
from memorization_guard.lab.world import DATA
from memorization_guard.statistics import detection

SETTINGS = ("PNDM", "DDIM", "Euler", "DPM++ 2M", "UniPC", "Heun", "Euler ancestral", "DPM++ 2M SDE")
STEPS = (4, 8, 15, 20, 30, 50, 100)
GROUPS = ("reference", "ordinary", "exact", "template")
FIRST_SEED = {"tuning": 5_000_000, "evaluation": 6_000_000}
#: Sampler and steps that the profile is made with.
USUAL = ("Euler", 20)


class Group:
    """What the first evaluation said of each image of a group, and what the network was asked: each ``[N]``."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.level = NoiseLevel.from_model(float(traces[0].evaluations.sigma[0]), traces[0].settings.prediction_type)
        self.first = np.array([trace.evaluations.detail[0] for trace in traces])
        self.asked = np.array([trace.asked for trace in traces], dtype=np.float64)

    def p_values(self, first: Tail, asked: Tail) -> np.ndarray:
        """As the guard judges: by the first evaluation, and by what was asked where that is suspicious or not in noise."""
        alone = first.p_value(self.first) if self.level.sigma > OPEN_SIGMA else np.full(len(self.first), np.nan)
        return decided(alone, asked.p_value(self.asked))


class Runs:
    """The traces of every group at every setting, sampled when first asked for."""

    def __init__(self, lab: Lab, split: str, folder: Path, batch: int = 16) -> None:
        self._lab, self._split, self._folder, self._batch = lab, split, folder, batch
        self._pipe = lab.pipeline()
        self._config = dict(self._pipe.scheduler.config)

    def __call__(self, setting: tuple[str, int], group: str, count: int, *, whole: int = 0) -> list[Trace]:
        """``count`` traces: the first ``whole`` of runs that were sampled to their end, the others of the first evaluation."""
        name = f"{setting[0]} {setting[1]} {group} {count} whole {whole}"
        path = self._folder / f"{name.replace(' ', '-').replace('++', 'pp')}.json"
        if path.is_file():
            return [Trace.from_dict(data) for data in json.loads(path.read_text())]
        self._pipe.scheduler = SAMPLERS[setting[0]](self._config)
        texts = texts_of(self._lab, group, self._split, count)
        seed = FIRST_SEED[self._split] + 100_000 * GROUPS.index(group)
        traces = self._sampled(texts[:whole], seed, setting[1], "whole")
        traces += self._sampled(texts[whole:], seed + whole, setting[1], "first")
        write_whole(path, json.dumps([trace.to_dict() for trace in traces]))
        return traces

    def _sampled(self, texts: list[str], first_seed: int, steps: int, serves: Serves) -> list[Trace]:
        batches = reference_runs(self._pipe, texts, first_seed, serves, steps=steps, batch=self._batch)
        return [trace for traces in batches for trace in traces]

    def reference(self, count: int) -> Reference:
        """That of a profile of so many prompts."""
        runs = ReferenceRuns(None, None)
        runs.add(self(USUAL, "reference", count, whole=min(count, WHOLE_RUNS)), count)
        found = runs.profile()[0].reference
        assert found is not None
        return found


def figures(groups: dict[str, Group], first: Tail, asked: Tail) -> dict[str, Any]:
    """AUC and TPR at 1 % FPR of the p-value, and the share that triggers with the usual thresholds, of each group."""
    rate = max(Thresholds().false_positive_rate, asked.lowest)
    p_values = {name: group.p_values(first, asked) for name, group in groups.items()}
    result: dict[str, Any] = {"false_triggers": float((p_values["ordinary"] <= rate).mean())}
    for name in ("exact", "template"):
        result[name] = detection(-np.log(p_values[name]), -np.log(p_values["ordinary"]))
        result[name]["triggered"] = float((p_values[name] <= rate).mean())
    return result


def transfer(runs: Runs, counts: dict[str, int], samplers: Sequence[str], steps: Sequence[int]) -> list[dict[str, Any]]:
    """A row a setting: the noise level at which its runs begin, and the figures by either."""
    reference, rows = runs.reference(counts["reference"]), []
    for setting in tqdm(list(itertools.product(samplers, steps)), unit="setting"):
        own, *others = (Group(runs(setting, group, counts[group])) for group in GROUPS)
        groups = dict(zip(GROUPS[1:], others, strict=True))
        carried = figures(groups, reference.tail(own.level.angle), reference.answers)
        there = figures(groups, Tail(np.log(own.first)), Tail(np.log(own.asked)))
        row: dict[str, Any] = {"sampler": setting[0], "steps": setting[1], "sigma": own.level.sigma}
        rows.append(row | {"carried": carried, "calibrated there": there})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps the traces")
    parser.add_argument("--split", default="evaluation", choices=list(FIRST_SEED))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--samplers", nargs="+", default=SETTINGS, choices=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--images", nargs=4, type=int, default=(400, 400, 60, 48), metavar=GROUPS, help="of each group")
    arguments = parser.parse_args()

    arguments.runs.mkdir(parents=True, exist_ok=True)
    counts = dict(zip(GROUPS, arguments.images, strict=True))
    runs = Runs(Lab(arguments.model, arguments.world), arguments.split, arguments.runs)
    rows = transfer(runs, counts, arguments.samplers, arguments.steps)
    text = json.dumps({"images": counts, "split": arguments.split, "calibrated": list(USUAL), "settings": rows}, indent=1)
    if arguments.json:
        write_whole(arguments.json, text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
