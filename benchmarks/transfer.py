"""How far one calibration carries: over samplers and steps, guidance scales, few references, few steps, and into the tail.

    python benchmarks/transfer.py --model FOLDER --world FOLDER --runs FOLDER --json FILE [--split tuning] [--parts matrix ...]

Every cell (sampler, steps, guidance) is sampled once with the same prompts and seeds, kept in --runs and taken up from there
by the next call. What was traced is then held against the reference runs of any other cell; the thresholds are those that
ship. Reference prompts and seeds are shared with no other group.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from memorization_guard import Calibrator, StabilityProfile, Thresholds, Trace
from memorization_guard.core.detection import planned_angles
from memorization_guard.core.reference import STATISTICS, Reference, Region
from memorization_guard.diffusers import guard
from memorization_guard.evaluation.statistics import detection, detection_with_intervals
from memorization_guard.files import write_whole
from memorization_guard.lab import MODEL, Lab
from memorization_guard.lab.world import DATA, more_captions

SAMPLERS: dict[str, Any] = {
    "PNDM": lambda c: diffusers.PNDMScheduler.from_config(c, skip_prk_steps=True),
    "DDIM": lambda c: diffusers.DDIMScheduler.from_config(c, clip_sample=False),
    "Euler": diffusers.EulerDiscreteScheduler.from_config,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler.from_config,
    "UniPC": diffusers.UniPCMultistepScheduler.from_config,
    "Heun": diffusers.HeunDiscreteScheduler.from_config,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler.from_config,
    "DPM++ 2M SDE": lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, algorithm_type="sde-dpmsolver++"),
}
STEPS = (15, 20, 30, 50, 100)
GUIDANCE = (3.0, 5.0, 7.5, 10.0, 12.0)
REFERENCES = (8, 16, 32, 50, 100, 200)
PARTS = ("matrix", "signals", "guidance", "references", "early", "tail")
GROUPS = ("reference", "ordinary", "exact", "template")
FIRST_SEED = {"tuning": 5_000_000, "evaluation": 6_000_000}


class Cell:
    """The traces of all groups at one sampler, step count and guidance scale."""

    def __init__(self, traces: dict[str, list[Trace]]) -> None:
        self.traces = traces
        self._signals: dict[str, np.ndarray] = {}

    def signals(self, group: str) -> np.ndarray:
        """Logarithms of the signals: ``[steps, 4, N]``."""
        if group not in self._signals:
            names = ("velocity_norm", "denoised_norm", "guidance_norm", "local_norm")
            stacked = np.array([[getattr(trace, name) for name in names] for trace in self.traces[group]])
            self._signals[group] = np.log(stacked).transpose(2, 1, 0)
        return self._signals[group]

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

    def tails(self, region: Region, group: str, steps: int | None = None) -> np.ndarray:
        """Tail probability of every image of a group after ``steps``: ``[N]``."""
        signals = self.signals(group)[:steps]
        every = [region.statistics(angle, logs)[1] for angle, logs in zip(self.starts, signals, strict=False)]
        return region.tail(np.fmax.reduce(every))

    @property
    def planned(self) -> np.ndarray:
        angles = planned_angles(self.traces["ordinary"][0].settings)
        assert angles is not None
        return angles

    @property
    def starts(self) -> np.ndarray:
        return self.planned[:-1]


def texts_of(lab: Lab, group: str, split: str, count: int) -> list[str]:
    """``count`` prompts of a group; more than it has are new captions, or, of memorized ones, further seeds."""
    found = lab.prompts(group, split)
    if group in ("reference", "ordinary") and count > len(found):
        found = found + [c.text for c in more_captions(count, GROUPS.index(group) + 10 * (split == "evaluation"), lab.world)]
    return [found[i % len(found)] for i in range(count)]


def sampled(
    pipe: Any, texts: list[str], first_seed: int, steps: int, guidance: float, *, only: int | None = None, batch: int = 16
) -> list[Trace]:
    """The traces of one image a prompt; of the first ``only`` steps, where that is enough."""

    def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index + 1 == only or pipe._interrupt
        return tensors

    traces: list[Trace] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        with guard(pipe) as run:
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
        self._known: dict[tuple[str, int, float], Cell] = {}

    def __call__(self, sampler: str, steps: int, guidance: float = 7.5) -> Cell:
        key = (sampler, steps, guidance)
        if key not in self._known:
            self._pipe.scheduler = SAMPLERS[sampler](self._config)
            self._known[key] = Cell({group: self._traces(key, group) for group in GROUPS if self._counts.get(group)})
        return self._known[key]

    def _traces(self, key: tuple[str, int, float], group: str) -> list[Trace]:
        count = self._counts[group]
        name = f"{key[0]} {key[1]} {key[2]:g} {group} {count}" + (f" first {self._only}" if self._only else "")
        path = self._folder / f"{name.replace(' ', '-').replace('++', 'pp')}.json"
        if path.is_file():
            return [self._cut(Trace.from_dict(data)) for data in json.loads(path.read_text())]
        texts = texts_of(self._lab, group, self._split, count)
        first_seed = FIRST_SEED[self._split] + 100_000 * GROUPS.index(group)
        traces = sampled(self._pipe, texts, first_seed, *key[1:], only=self._only)
        write_whole(path, json.dumps([trace.to_dict() for trace in traces]))
        return [self._cut(trace) for trace in traces]

    def _cut(self, trace: Trace) -> Trace:
        """A run of the first steps alone is one over that part of the schedule."""
        sigmas = trace.settings.sigmas
        if self._only is not None and sigmas is not None and len(sigmas) > self._only:
            part = {"steps": self._only, "sigmas": sigmas[: self._only], "end_sigma": sigmas[self._only]}
            trace.settings = dataclasses.replace(trace.settings, **part)
        return trace


def figures(cell: Cell, region: Region, steps: int | None = None) -> dict[str, Any]:
    """AUC and TPR at 1 % FPR of the tail probability, and the share of ordinary images that trigger as it ships."""
    tails = {group: cell.tails(region, group, steps) for group in cell.traces if group != "reference"}
    scores = {group: -np.log(np.maximum(values, 1e-300)) for group, values in tails.items()}
    result: dict[str, Any] = {"false_triggers": float((tails["ordinary"] < Thresholds().false_alarms).mean())}
    for group in ("exact", "template"):
        result[group] = detection(scores[group], scores["ordinary"])
        result[group]["triggered"] = float((tails[group] < Thresholds().false_alarms).mean())
    return result


def matrix(cells: Cells, samplers: list[str], steps: list[int]) -> list[dict[str, Any]]:
    keys = list(itertools.product(samplers, steps))
    for key in tqdm(keys, desc="cells"):
        cells(*key)
    return [
        {"calibrated": list(made), "used": list(used)} | figures(cells(*used), reference.region(cells(*used).planned))
        for made, reference in ((key, cells(*key).reference()) for key in keys)
        for used in keys
    ]


def guidance(cells: Cells, sampler: str = "Euler", steps: int = 20) -> list[dict[str, Any]]:
    reference = cells(sampler, steps).reference()
    rows = []
    for scale in tqdm(GUIDANCE, desc="guidance"):
        used = cells(sampler, steps, scale)
        regions = {
            "as it is": reference.region(used.planned),
            "modelled": reference.region(used.planned, scale),
            "own": used.reference().region(),
        }
        rows += [{"guidance": scale, "profile": name} | figures(used, region) for name, region in regions.items()]
    return rows


def references(cells: Cells, draws: int = 30, sampler: str = "Euler", steps: int = 20) -> list[dict[str, Any]]:
    cell, rng, rows = cells(sampler, steps), np.random.default_rng(0), []
    available = len(cell.traces["reference"])
    for count in [n for n in REFERENCES if n <= available]:
        drawn = [figures(cell, cell.reference(rng.choice(available, count, replace=False)).region()) for _ in range(draws)]
        row: dict[str, Any] = {"references": count, "draws": draws}
        for name, of in (
            ("exact auc", lambda f: f["exact"]["auc"]),
            ("template auc", lambda f: f["template"]["auc"]),
            ("exact triggered", lambda f: f["exact"]["triggered"]),
            ("template triggered", lambda f: f["template"]["triggered"]),
            ("false triggers", lambda f: f["false_triggers"]),
        ):
            values = [of(found) for found in drawn]
            row[name] = {
                "mean": float(np.mean(values)),
                "5 %": float(np.quantile(values, 0.05)),
                "95 %": float(np.quantile(values, 0.95)),
            }
        rows.append(row)
    return rows


def early(cells: Cells, sampler: str, steps: int) -> list[dict[str, Any]]:
    cell = cells(sampler, steps)
    region = cell.reference().region()
    seen = sorted({1, 2, *(max(1, round(share * steps)) for share in (0.1, 0.2, 0.3, 0.5, 1.0))})
    return [{"sampler": sampler, "steps": steps, "seen": n} | figures(cell, region, n) for n in seen]


def signals(lab: Lab, split: str, cells: Cells, sampler: str, steps: int) -> dict[str, Any]:
    """Each signal by itself against the published score, with a profile of the very sampler and steps; with intervals."""
    cell = cells(sampler, steps)
    own, region = cell.profile(), cell.reference().region()

    def scores(group: str) -> dict[str, np.ndarray]:
        every = [region.statistics(angle, logs)[1] for angle, logs in zip(cell.starts, cell.signals(group), strict=True)]
        norms = np.array([[trace.latent_norm, trace.update_norm, trace.denoised_norm] for trace in cell.traces[group]])
        published = np.stack([own.scores(row, norms[:, :, row].T) for row in range(own.steps)])  # [steps, 3, N]
        return {
            "S_mem (published)": published[:, 1].max(axis=0),
            "published trigger": np.minimum(published[:, 1], published[:, 2]).max(axis=0),
            **dict(zip(STATISTICS, np.fmax.reduce(every), strict=True)),
            "tail probability": -np.log(np.maximum(cell.tails(region, group), 1e-300)),
            "without a profile": np.array([trace.uncalibrated_score for trace in cell.traces[group]]),
        }

    by_group = {group: scores(group) for group in ("ordinary", "exact", "template")}
    return {
        name: {
            group: detection_with_intervals(
                by_group[group][name],
                by_group["ordinary"][name],
                texts_of(lab, group, split, len(by_group[group][name])),
            )
            for group in ("exact", "template")
        }
        for name in by_group["ordinary"]
    }


def tail(
    lab: Lab, split: str, references: int, count: int, folder: Path, *, steps: int = 20, only: int = 8
) -> list[dict[str, float]]:
    """Nominal against observed share of ordinary images, out of ``count``, with 20 profiles of 50 references each.

    Of the first ``only`` steps, in which nearly all verdicts fall: that many images to their end would take hours.
    """
    cell = Cells(lab, split, {"reference": references, "ordinary": count}, folder, only=only)("Euler", steps)
    rng, available = np.random.default_rng(0), len(cell.traces["reference"])
    tails = [
        cell.tails(cell.reference(rng.choice(available, min(50, available), replace=False)).region(), "ordinary")
        for _ in range(20)
    ]
    rows = []
    for nominal in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001):
        observed = [float((values < nominal).mean()) for values in tails]
        rows.append(
            {"nominal": nominal, "observed": float(np.mean(observed)), "lowest": min(observed), "highest": max(observed)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--world", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps what was sampled")
    parser.add_argument("--split", default="evaluation", choices=list(FIRST_SEED))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--parts", nargs="+", default=["matrix"], choices=PARTS)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
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
    if "signals" in arguments.parts:
        result["signals"] = {
            f"{sampler} {steps}": signals(lab, arguments.split, cells, sampler, steps)
            for sampler, steps in (("PNDM", 50), ("Euler", 20))
        }
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
