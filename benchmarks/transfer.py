"""How far one calibration transfers: over samplers, step counts and guidance scales, to few references, and into the tail.

    python benchmarks/transfer.py --model FOLDER --world FOLDER --runs FOLDER --json FILE [--split tuning] [--parts matrix ...]

Every cell (sampler, steps, guidance scale) is sampled once with the same prompts and seeds; its traces are kept in --runs and
read from there by the next call. The traced signals are then judged by the reference runs of any other cell. No reference
prompt or seed is in another group.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samplers import SAMPLERS, texts_of
from tqdm import tqdm

from memorization_guard import Calibrator, NoiseLevel, StabilityProfile, Thresholds, Trace
from memorization_guard.core.reference import Reference
from memorization_guard.core.signals import Signals
from memorization_guard.diffusers import guard
from memorization_guard.files import write_whole
from memorization_guard.lab import MODEL, Lab
from memorization_guard.lab.world import DATA
from memorization_guard.statistics import detection

MATRIX = ("PNDM", "DDIM", "Euler", "DPM++ 2M", "UniPC", "Heun", "Euler ancestral", "DPM++ 2M SDE")
STEPS = (15, 20, 30, 50, 100)
GUIDANCE = (3.0, 5.0, 7.5, 10.0, 12.0)
REFERENCES = (8, 16, 32, 50, 100, 200)
NOMINAL = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
PARTS = ("matrix", "guidance", "references", "early", "tail")
GROUPS = ("reference", "ordinary", "exact", "template")
FIRST_SEED = {"tuning": 5_000_000, "evaluation": 6_000_000}
#: Sampler and steps of the parts that look at one cell.
USUAL = ("Euler", 20)


class Cell:
    """The traces of all groups at one sampler, step count and guidance scale."""

    def __init__(self, traces: dict[str, list[Trace]]) -> None:
        self.traces = traces

    @cached_property
    def angles(self) -> np.ndarray:
        """The noise levels of the evaluations, as angles: ``[evaluations]``."""
        trace = self.traces["ordinary"][0]
        kind = trace.settings.prediction_type
        return np.array([NoiseLevel.from_model(sigma, kind).angle for sigma in trace.evaluations.sigma])

    def profile(self, rows: Iterable[int] | None = None) -> StabilityProfile:
        """The profile of these reference runs, or of all."""
        runs, calibrator = self.traces["reference"], Calibrator()
        for row in range(len(runs)) if rows is None else rows:
            calibrator.add(runs[row])
        return calibrator.profile()

    def reference(self, rows: Iterable[int] | None = None) -> Reference:
        found = self.profile(rows).reference
        assert found is not None
        return found

    def p_values(self, reference: Reference, group: str, evaluations: int | None = None) -> np.ndarray:
        """The p-value of every image of a group after so many evaluations, or all: ``[N]``."""
        region = reference.region(self.angles)
        runs = [trace.evaluations for trace in self.traces[group]]
        signals = np.array([[getattr(run, name) for run in runs] for name in Signals._fields])  # [4, N, evaluations]
        found = [
            np.stack(region.statistics(angle, Signals(*signals[:, :, number])))
            for number, angle in enumerate(self.angles[:evaluations].tolist())
        ]
        return region.p_value(np.fmax.reduce(found))


def sampled(
    pipe: Any,
    texts: list[str],
    first_seed: int,
    steps: int,
    guidance: float,
    *,
    profile: StabilityProfile | None = None,
    only: int | None = None,
    batch: int = 16,
) -> list[Trace]:
    """The traces of one image a prompt; of the first ``only`` steps, where that is enough."""

    def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index + 1 == only or pipe._interrupt
        return tensors

    traces: list[Trace] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe, profile) as run:
            pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="latent",
                callback_on_step_end=after_step,
            )
        traces += run.traces
    return traces


class Cells:
    """All cells, sampled when first asked for."""

    def __init__(self, lab: Lab, split: str, counts: dict[str, int], folder: Path, *, only: int | None = None) -> None:
        self._lab, self._split, self._counts, self._folder, self._only = lab, split, counts, folder, only
        self._pipe = lab.pipeline()
        self._config = dict(self._pipe.scheduler.config)
        self._known: dict[tuple[str, int], Cell] = {}

    def __call__(self, sampler: str, steps: int) -> Cell:
        key = (sampler, steps)
        if key not in self._known:
            self._known[key] = Cell({group: self._kept(key, group) for group in GROUPS if self._counts.get(group)})
        return self._known[key]

    def _kept(self, key: tuple[str, int], group: str) -> list[Trace]:
        """The traces of a group, from the folder if they are there."""
        name = f"{key[0]} {key[1]} {group} {self._counts[group]}" + (f" first {self._only}" if self._only else "")
        path = self._folder / f"{name.replace(' ', '-').replace('++', 'pp')}.json"
        if path.is_file():
            return [Trace.from_dict(data) for data in json.loads(path.read_text())]
        traces = self.sample(key, group)
        write_whole(path, json.dumps([trace.to_dict() for trace in traces]))
        return traces

    def sample(
        self, key: tuple[str, int], group: str, guidance: float = 7.5, profile: StabilityProfile | None = None
    ) -> list[Trace]:
        """The traces of a group, sampled now, and judged by ``profile``."""
        self._pipe.scheduler = SAMPLERS[key[0]](self._config)
        texts = texts_of(self._lab, group, self._split, self._counts[group])
        first_seed = FIRST_SEED[self._split] + 100_000 * GROUPS.index(group)
        return sampled(self._pipe, texts, first_seed, key[1], guidance, profile=profile, only=self._only)


def figures(p_values: dict[str, np.ndarray]) -> dict[str, Any]:
    """AUC and TPR at 1 % FPR of the p-value, and the share that triggers with the usual thresholds, of each group ``[N]``."""
    rate = Thresholds().false_positive_rate
    scores = {group: -np.log(np.maximum(values, 1e-300)) for group, values in p_values.items()}
    result: dict[str, Any] = {"false_triggers": float((p_values["ordinary"] < rate).mean())}
    for group in ("exact", "template"):
        result[group] = detection(scores[group], scores["ordinary"])
        result[group]["triggered"] = float((p_values[group] < rate).mean())
    return result


def rejudged(cell: Cell, reference: Reference, evaluations: int | None = None) -> dict[str, Any]:
    """:func:`figures` of a cell by the reference runs of any."""
    return figures({group: cell.p_values(reference, group, evaluations) for group in GROUPS[1:]})


def matrix(cells: Cells, samplers: Sequence[str], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Every cell by the reference runs of every other."""
    keys = list(itertools.product(samplers, steps))
    for key in tqdm(keys, desc="cells"):
        cells(*key)
    return [
        {"calibrated": list(made), "used": list(used)} | rejudged(cells(*used), reference)
        for made, reference in ((key, cells(*key).reference()) for key in keys)
        for used in keys
    ]


def guidance(cells: Cells) -> list[dict[str, Any]]:
    """Runs at other guidance scales, by a profile of 7.5: it combines the predictions at its own scale."""
    profile = cells(*USUAL).profile()
    rows = []
    for scale in tqdm(GUIDANCE, desc="guidance"):
        traces = {group: cells.sample(USUAL, group, scale, profile) for group in GROUPS[1:]}
        found = {group: np.array([trace.p_value for trace in members]) for group, members in traces.items()}
        rows.append({"guidance": scale} | figures(found))
    return rows


def references(cells: Cells, draws: int = 30) -> list[dict[str, Any]]:
    """Profiles of fewer and more reference runs, drawn from all that there are."""
    cell, rng, rows = cells(*USUAL), np.random.default_rng(0), []
    available = len(cell.traces["reference"])
    for count in [n for n in REFERENCES if n <= available]:
        drawn = [rejudged(cell, cell.reference(rng.choice(available, count, replace=False))) for _ in range(draws)]
        row: dict[str, Any] = {"references": count, "draws": draws}
        for name, values in {
            "exact auc": [found["exact"]["auc"] for found in drawn],
            "template auc": [found["template"]["auc"] for found in drawn],
            "exact triggered": [found["exact"]["triggered"] for found in drawn],
            "template triggered": [found["template"]["triggered"] for found in drawn],
            "false triggers": [found["false_triggers"] for found in drawn],
        }.items():
            low, high = np.quantile(values, [0.05, 0.95])
            row[name] = {"mean": float(np.mean(values)), "5 %": float(low), "95 %": float(high)}
        rows.append(row)
    return rows


def early(cells: Cells, sampler: str, steps: int) -> list[dict[str, Any]]:
    """What is known after the first evaluations."""
    cell = cells(sampler, steps)
    reference = cell.reference()
    seen = sorted({1, 2, *(max(1, round(share * steps)) for share in (0.1, 0.2, 0.3, 0.5, 1.0))})
    return [{"sampler": sampler, "steps": steps, "seen": n} | rejudged(cell, reference, n) for n in seen]


def tail(lab: Lab, split: str, runs: int, count: int, folder: Path, *, only: int = 8) -> list[dict[str, float]]:
    """Nominal against observed share of ``count`` ordinary images that trigger, with 20 profiles of 50 of ``runs`` references.

    The runs end after ``only`` steps, in which nearly all verdicts are reached: whole runs of so many would take hours.
    """
    cell = Cells(lab, split, {"reference": runs, "ordinary": count}, folder, only=only)(*USUAL)
    rng, available = np.random.default_rng(0), len(cell.traces["reference"])
    found = [
        cell.p_values(cell.reference(rng.choice(available, min(50, available), replace=False)), "ordinary") for _ in range(20)
    ]
    rows = []
    for nominal in NOMINAL:
        observed = [float((values < nominal).mean()) for values in found]
        rows.append(
            {"nominal": nominal, "observed": float(np.mean(observed)), "lowest": min(observed), "highest": max(observed)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps the traces")
    parser.add_argument("--split", default="evaluation", choices=list(FIRST_SEED))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--parts", nargs="+", default=["matrix"], choices=PARTS)
    parser.add_argument("--samplers", nargs="+", default=MATRIX, choices=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--images", nargs=4, type=int, default=(50, 200, 60, 48), metavar=GROUPS, help="of each group")
    parser.add_argument("--tail-images", type=int, default=10_000)
    arguments = parser.parse_args()

    lab = Lab(arguments.model, arguments.world)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    counts = dict(zip(GROUPS, arguments.images, strict=True))
    cells = Cells(lab, arguments.split, counts, arguments.runs)
    result: dict[str, Any] = {"images": counts, "split": arguments.split}
    if "matrix" in arguments.parts:
        result["matrix"] = matrix(cells, arguments.samplers, arguments.steps)
    if "guidance" in arguments.parts:
        result["guidance"] = guidance(cells)
    if "references" in arguments.parts:
        many = Cells(lab, arguments.split, counts | {"reference": max(REFERENCES)}, arguments.runs)
        result["references"] = references(many)
    if "early" in arguments.parts:
        result["early"] = [row for steps in (20, 50) for row in early(cells, "Euler", steps)]
    if "tail" in arguments.parts:
        result["tail"] = tail(lab, arguments.split, max(REFERENCES), arguments.tail_images, arguments.runs)
    text = json.dumps(result, indent=1)
    if arguments.json:
        write_whole(arguments.json, text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
