"""Samples a list of memorized and a list of ordinary prompts as one audit, and reads off what an evaluation compares.

The audit does the planning, the sampling and the resuming (``memorization_guard.audit``); this says what is audited, and turns
the audit's rows and images into one :class:`~memorization_guard.evaluation.summary.Sample` an image.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..audit.dataset import PROFILE, read_manifest, scan
from ..audit.plan import Plan
from ..audit.run import Local, Workers, audit
from ..audit.worker import Recipe
from ..core.profile import StabilityProfile
from ..core.trace import Trace, numbers
from ..files import parse_json, path_inside, write_whole
from ..prompts import SEED_STRIDE
from .copies import CopyScorer
from .lists import Prompt
from .signals import SIGNALS
from .summary import Sample

#: What the folder of an evaluation holds: the prompts of both lists with their seeds, and the audit of them.
PROMPTS, AUDIT = "prompts.jsonl", "audit"

#: The columns of an audit's rows that are read.
_COLUMNS = ("row", "prompt", "kind", "seed", "file", "trace")


def evaluate(
    recipe: Recipe,
    memorized: Sequence[Prompt],
    ordinary: Sequence[Prompt],
    folder: Path,
    *,
    profile: Path | None = None,
    reference: Sequence[str] = (),
    reference_from: str = "",
    copies: CopyScorer | None = None,
    seeds_per_prompt: int = 1,
    batch_size: int = 4,
    seed: int = 0,
    workers: Callable[[Recipe], Workers] = Local,
    progress: bool = True,
) -> list[Sample]:
    """Samples every prompt of both lists without mitigation. Call it again with the same folder to go on where it stopped.

    Args:
        recipe: how images are made. Its ``keep`` is chosen here: all images if copy scores are asked for, or else none.
        memorized, ordinary: the lists.
        folder: keeps what has been made so far; created if need be. It can be deleted once the samples are there.
        profile: file of a stability profile for these settings. Without one, a profile is made with the ``reference`` prompts,
            which come from ``reference_from``.
        copies: takes copy scores of the images whose prompts have training images.
        seeds_per_prompt: images of each prompt.
        batch_size: images sampled at once; may differ when an evaluation goes on.
        seed: the first seed of the noise. The seeds of each list are counted from a number of their own, apart from those of
            the reference runs, so that a longer list changes no seed of the other.
        workers: makes those who sample, as for :func:`memorization_guard.audit.run.audit`.
        progress: whether to show a progress bar.

    Raises:
        AuditError: if the profile does not fit, or the folder belongs to another evaluation.
        OSError: if the disk is full; what was made so far is kept.
    """
    recipe = dataclasses.replace(recipe, mode="trace", keep="none" if copies is None else "all")
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {"prompt": prompt.text, "kind": prompt.kind, "seed": (seed + number * SEED_STRIDE + row * seeds_per_prompt) % 2**63}
        for number, prompts in enumerate((memorized, ordinary), start=1)
        for row, prompt in enumerate(prompts)
    ]
    write_whole(folder / PROMPTS, "".join(json.dumps(row) + "\n" for row in listed))
    try:
        audit(
            recipe,
            Plan.of(folder / PROMPTS, seeds_per_prompt=seeds_per_prompt, seed=seed),
            folder / AUDIT,
            lambda: workers(recipe),
            profile=profile,
            reference=reference,
            reference_from=reference_from,
            batch_size=batch_size,
            progress=progress,
        )
    except BaseException:
        if not (folder / AUDIT).exists():
            shutil.rmtree(folder)  # it could not begin, so nothing has been made
        raise
    return [
        _sample(row, folder / AUDIT, row["row"] < len(memorized), memorized, copies)
        for batch in scan(folder / AUDIT, _COLUMNS)
        for row in batch.to_pylist()
    ]


def _sample(
    row: Mapping[str, Any], folder: Path, is_memorized: bool, memorized: Sequence[Prompt], copies: CopyScorer | None
) -> Sample:
    """What an evaluation keeps of a row of the audit in ``folder``."""
    trace = Trace.from_dict(parse_json(row["trace"]))
    copy_score = None
    if copies is not None and is_memorized and (images := memorized[row["row"]].images):
        copy_score = copies(path_inside(folder, row["file"]), images)
    return Sample(
        memorized=is_memorized,
        prompt=row["prompt"],
        kind=row["kind"],
        seed=row["seed"],
        verdict=trace.verdict,
        trigger_step=trace.trigger_step,
        note=trace.note,
        signals=dict(zip(SIGNALS, numbers([signal(trace) for signal in SIGNALS.values()]), strict=True)),
        copy_score=numbers([copy_score])[0],
    )


def evaluated_profile(folder: Path) -> Path:
    """The stability profile that the evaluation in ``folder`` went by."""
    return folder / AUDIT / PROFILE


def conditions(folder: Path) -> dict[str, Any]:
    """What a report says of the model and the machines of the evaluation in ``folder``."""
    manifest, profile = read_manifest(folder / AUDIT), StabilityProfile.load(evaluated_profile(folder))
    settings = profile.settings.to_dict()
    names = ("model_hash", "prediction_type", "sampler", "scheduler", "latent_shape")
    return {name: settings[name] for name in names} | {
        "device": ", ".join(manifest["devices"]),
        "dtype": manifest["model"]["dtype"],
        "reference_runs": profile.count,
        "reference_prompts": profile.reference_prompts,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    }
