"""What the guard does under every sampler and guidance method of a ComfyUI, on the lab model: the tables of docs/comfyui.md.

    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/comfyui_samplers.py FOLDER

One profile, the lab's own (euler, normal, 30 steps, cfg 7.5), judges all of them. Exact, template and ordinary prompts of the
evaluation split are sampled mitigated and, from the same noise, without the guard: ordinary ones only where a correction
reached their batch, and in the first. That tracing changes nothing is seen on the memorized ones. The figures of each sampler
and method go to a JSON file in FOLDER; a second call does what is missing. Where all are there, the tables are written into
the document. On one core a sampler takes about a minute, those that evaluate the network twice a step two.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfyui_lab import CFG, CFG_PP, REPOSITORY, Lab, Method, load, methods

DOCUMENT = REPOSITORY / "docs" / "comfyui.md"
GROUPS = {"exact": 30, "template": 16, "ordinary": 100}
FIRST_SEED = {"exact": 100, "template": 1100, "ordinary": 2100}
STEPS, BATCH = 12, 10
#: Columns of both tables.
COLUMNS = (
    "bit-identical",
    "triggered: exact",
    "template",
    "ordinary",
    "copies without: exact",
    "template",
    "with mitigation: exact",
    "template",
    "ordinary touched",
)


def batches(lab: Lab, group: str, count: int, size: int) -> Iterator[tuple[list[str], int]]:
    """The first ``count`` evaluation prompts of a group, ``size`` at a time, with the seed of the first of them."""
    prompts = lab.lab.prompts(group, "evaluation")[:count]
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size], FIRST_SEED[group] + start


def measured(lab: Lab, counts: dict[str, int], sampler: str, method: Method, guard_first: bool) -> dict[str, Any]:
    """The figures of one row, as JSON holds them."""
    import torch

    how = {"sampler": sampler, "steps": STEPS, "method": method, "guard_first": guard_first}
    figures: dict[str, Any] = {"identical": True, "unscored": 0}
    for group, count in counts.items():
        total = dict.fromkeys(("images", "triggered", "corrected", "touched", "copies", "left"), 0)
        for prompts, seed in batches(lab, group, count, 1 if method.single else BATCH):
            mitigated = lab.sample(prompts, seed, **how, mode="mitigate", profile=lab.profile)
            figures["unscored"] += sum(trace.verdict == "unscored" for trace in mitigated.traces)
            total["images"] += len(prompts)
            total["triggered"] += sum(trace.trigger_step is not None for trace in mitigated.traces)
            corrected = [bool(trace.mitigated.any()) for trace in mitigated.traces]
            total["corrected"] += sum(corrected)
            # Ordinary images are made a second time only where a correction reached the batch, and in the first one.
            if group == "ordinary" and seed > FIRST_SEED[group] and not any(corrected):
                continue
            plain = lab.sample(prompts, seed, **how)
            changed = (plain.latents != mitigated.latents).flatten(1).any(1)
            total["touched"] += int(changed.sum())
            if group != "ordinary":
                # That tracing changes nothing is seen where all is judged and much triggers.
                traced = lab.sample(prompts, seed, **how, mode="trace", profile=lab.profile)
                figures["identical"] &= torch.equal(plain.latents, traced.latents)
                total["copies"] += sum(lab.copies(plain.latents, prompts))
                total["left"] += sum(lab.copies(mitigated.latents, prompts))
        figures[group] = total
    return figures


def row(name: str, figures: dict[str, Any]) -> str:
    """A row of a table."""
    exact, template, ordinary = (figures[group] for group in GROUPS)

    def of(total: dict[str, int], what: str) -> str:
        return f"{total[what]} of {total['images']}"

    cells = ["yes" if figures["identical"] else "**no**"]
    cells += [of(total, "triggered") for total in (exact, template, ordinary)]
    cells += [of(total, what) for what in ("copies", "left") for total in (exact, template)]
    cells.append(of(ordinary, "touched"))
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    """Measures what is missing, printing rows as they come, and puts full tables into the document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the figures, a file a row")
    parser.add_argument("--samplers", nargs="*", help="samplers; all, unless named")
    parser.add_argument("--methods", nargs="*", help="guidance methods; all, unless named")
    for group, count in GROUPS.items():
        parser.add_argument(f"--{group}", type=int, default=count, help=f"{group} prompts")
    arguments = parser.parse_args()
    counts = {group: getattr(arguments, group) for group in GROUPS}
    lab = Lab(load())
    import comfy.samplers
    from comfyui_version import __version__

    ways = methods()
    tables = {
        "sampler": [(name, name, Method(), False) for name in comfy.samplers.KSampler.SAMPLERS],
        "method": [
            (f"{name}, {'after' if first else 'before'} the guard", "euler", method, first)
            for name, method in ways.items()
            for first in ((False,) if name == "CFG" or method.guider else (False, True))
        ],
    }
    chosen = {
        "sampler": lambda name: arguments.samplers is None or name in arguments.samplers,
        "method": lambda name: arguments.methods is None or any(name.startswith(f"{m}, ") for m in arguments.methods),
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in tables.items():
        lines = [f"| {kind} | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
        for name, sampler, method, first in rows:
            file = arguments.folder / f"{kind}-{re.sub('[^a-z0-9_]+', '-', name.lower())}.json"
            figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if figures.get("counts") != counts:
                if not chosen[kind](name):
                    continue
                figures = {"counts": counts} | measured(lab, counts, sampler, method, first)
                file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
            lines.append(row(name, figures))
            print(lines[-1], flush=True)
        if len(lines) == len(rows) + 2:
            said = (
                f"ComfyUI {__version__}, lab model, {STEPS} steps, scheduler normal, cfg {CFG} (CFG++ {CFG_PP}), batches of "
                f"{BATCH}, one profile (euler, 30 steps, cfg 7.5), evaluation split."
            )
            write_table(kind, "\n\n".join([said, "\n".join(lines)]))


def write_table(kind: str, text: str) -> None:
    """Puts a table between its two marks in the document."""
    begin, end = f"<!-- {kind}s: begin -->", f"<!-- {kind}s: end -->"
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
