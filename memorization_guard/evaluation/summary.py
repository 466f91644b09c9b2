"""The figures of an evaluation: how well each signal tells memorized from ordinary prompts, and what a reader is warned of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.trace import STATEMENT, numbers
from ..statistics import detection_with_intervals, rate_with_interval, roc_points
from . import EvaluationError
from .signals import RANKING

FORMAT = "memorization-guard.evaluation"
FORMAT_VERSION = 2

#: With fewer ordinary prompts than this, 1 % of them is less than one.
MIN_NEGATIVES = 100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is kept of one image.

    Attributes:
        memorized: which list its prompt is from. prompt, kind, seed: what it was made of.
        verdict, trigger_step, note: of its trace.
        signals: one number for each of ``signals.SIGNALS``, ``None`` where there is none.
        copy_score: highest similarity with a training image of the prompt, or ``None`` where none was given.
    """

    memorized: bool
    prompt: str
    kind: str | None
    seed: int
    verdict: str
    trigger_step: int | None
    note: str | None
    signals: Mapping[str, float | None]
    copy_score: float | None = None


def summarize(
    samples: Sequence[Sample],
    *,
    settings: Mapping[str, Any],
    copy_threshold: float | None = None,
    reference: Sequence[str] = (),
    draws: int = 400,
) -> dict[str, Any]:
    """The result of an evaluation, JSON-ready: what the report shows, and every number behind it.

    Args:
        samples: of both lists.
        settings: what to write into the report about how they were made.
        copy_threshold: similarity above which an image counts as a copy, where copy scores were taken.
        reference: prompts that the profile was made with, to warn of those that are evaluated too.
        draws: samples of the bootstrap over prompts from which the 95 % intervals come.

    Returns:
        ``"settings"``, ``"warnings"``, ``"ordinary"`` and ``"groups"`` (all memorized prompts first, then each kind) with
        counts, rates and, by signal, AUC, TPR at 1 % FPR and ROC curve against the ordinary images; ``"ranked_by"``, the
        signal that the least typical prompts are chosen by; and ``"samples"``, which a group's ``"samples"`` number.

    Raises:
        EvaluationError: if one of the lists gave no image.
    """
    ordinary = [sample for sample in samples if not sample.memorized]
    memorized = [sample for sample in samples if sample.memorized]
    if not ordinary or not memorized:
        raise EvaluationError("an evaluation needs images of memorized and of ordinary prompts")
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "statement": STATEMENT,
        "settings": dict(settings) | {"copy_threshold": copy_threshold},
        "warnings": _warnings(memorized, ordinary, reference),
        "ordinary": {"name": "ordinary"} | _counts(ordinary, copy_threshold, draws) | {"signals": {}},
        "groups": [],
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }
    for name in ordinary[0].signals:
        if values := _values(ordinary, name)[0].tolist():
            result["ordinary"]["signals"][name] = _spread(values)
    for group, rows in _groups(samples, copy_threshold):
        members = [samples[row] for row in rows]
        signals: dict[str, Any] = {}
        for name in result["ordinary"]["signals"]:
            positive, positive_prompts = _values(members, name)
            negative, negative_prompts = _values(ordinary, name)
            if len(positive):
                signals[name] = (
                    _spread(positive.tolist())
                    | detection_with_intervals(positive, negative, positive_prompts, negative_prompts, draws=draws)
                    | {"roc": {axis: numbers(points) for axis, points in roc_points(positive, negative).items()}}
                )
        result["groups"].append(group | _counts(members, copy_threshold, draws) | {"signals": signals, "samples": rows})
    compared = result["groups"][0]["signals"]
    return result | {"ranked_by": next((name for name in RANKING if name in compared), None)}


def _groups(samples: Sequence[Sample], copy_threshold: float | None) -> list[tuple[dict[str, str], list[int]]]:
    """The groups of memorized samples: the name of each, what makes it a group (``"of"``), and its numbers in ``samples``.

    All memorized samples are one; each kind is one where there are several; and those that are copies, where only some are.
    """
    memorized = [row for row, sample in enumerate(samples) if sample.memorized]
    groups = [({"name": "memorized", "of": "all"}, memorized)]
    kinds = list(dict.fromkeys(samples[row].kind for row in memorized))
    if len(kinds) > 1:
        for kind in kinds:
            rows = [row for row in memorized if samples[row].kind == kind]
            groups.append(({"name": kind or "no kind", "of": "kind"}, rows))
    if copy_threshold is not None:
        copied = [row for row in memorized if (samples[row].copy_score or -1.0) > copy_threshold]
        if 0 < len(copied) < len(memorized):
            groups.append(({"name": f"copies (similarity over {copy_threshold:g})", "of": "copies"}, copied))
    return groups


def _counts(samples: Sequence[Sample], copy_threshold: float | None, draws: int) -> dict[str, Any]:
    prompts = [sample.prompt for sample in samples]
    triggered = np.array([sample.trigger_step is not None for sample in samples])
    counts: dict[str, Any] = {
        "images": len(samples),
        "prompts": len(set(prompts)),
        "triggered": rate_with_interval(triggered, prompts, draws=draws),
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "copies": None,
    }
    compared = [sample for sample in samples if sample.copy_score is not None]
    if compared and copy_threshold is not None:
        similarity = np.array([sample.copy_score for sample in compared])
        rate = rate_with_interval(similarity > copy_threshold, [sample.prompt for sample in compared], draws=draws)
        counts["copies"] = {"images": len(compared), "rate": rate, "median": float(np.median(similarity))}
    return counts


def _values(samples: Sequence[Sample], name: str) -> tuple[np.ndarray, list[str]]:
    """The values of a signal, where there are any, and the prompt of each."""
    found = [(value, sample.prompt) for sample in samples if (value := sample.signals[name]) is not None]
    return np.array([value for value, _ in found], dtype=np.float64), [prompt for _, prompt in found]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"images": len(values), "median": median, "quartiles": [low, high]}


def _warnings(memorized: Sequence[Sample], ordinary: Sequence[Sample], reference: Sequence[str]) -> list[str]:
    """What a reader of the figures should know before reading them."""
    said = []
    prompts = {sample.prompt for sample in ordinary}
    if len(prompts) < MIN_NEGATIVES:
        said.append(
            f"1 % FPR rests on {len(prompts)} ordinary prompts ({len(ordinary)} images): with fewer than {MIN_NEGATIVES} it "
            "allows hardly any false positive at all. Give more ordinary prompts."
        )
    if shared := len(prompts & {sample.prompt for sample in memorized}):
        said.append(f"Prompts that are in the memorized and in the ordinary list: {shared}.")
    if known := len(prompts & set(reference)):
        said.append(
            f"Ordinary prompts that are reference prompts too: {known}. The profile was made with them, so give others."
        )
    for name in ordinary[0].signals:
        for title, group in (("memorized", memorized), ("ordinary", ordinary)):
            missing = sum(sample.signals[name] is None for sample in group)
            if missing == len(group):
                said.append(f"{name}: no {title} image has a value, so it is not in the table.")
            elif missing:
                said.append(f"{name}: {missing} of {len(group)} {title} images have no value and do not count.")
    notes = Counter(sample.note for sample in (*memorized, *ordinary) if sample.note)
    said += [f"{count} images: {note}" for note, count in notes.most_common(5)]
    return said
