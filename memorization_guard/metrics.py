"""How well a score tells memorized images from others: AUC, TPR at 1 % FPR, the ROC curve, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def detection(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """AUC, and TPR at 1 % FPR with the last threshold below it (never the nearest, which may lie above).

    Args:
        positive, negative: scores, ``[P]`` and ``[N]``, finite, not empty; higher is to mean memorized.
    """
    ascending = np.sort(negative)
    below = np.searchsorted(ascending, positive, "left")
    not_above = np.searchsorted(ascending, positive, "right")
    # The share of pairs in which the positive is the higher one, ties counting half (Mann & Whitney 1947).
    auc = (below + not_above).mean() / (2 * len(negative))
    # One in a hundred negatives may pass the threshold; it stands at the first that may not.
    limit = ascending[len(negative) - 1 - len(negative) // 100]
    return {"auc": float(auc), "tpr_at_1_fpr": float((positive > limit).mean())}


def roc_points(positive: np.ndarray, negative: np.ndarray) -> dict[str, list[float]]:
    """The corners of the ROC curve, ``"fpr"`` and ``"tpr"``, from (0, 0) to (1, 1); arguments as for :func:`detection`."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    counts = [
        np.concatenate([[0], len(values) - np.searchsorted(np.sort(values), thresholds, "left")])
        for values in (negative, positive)
    ]
    turns = np.any([np.diff(count, 2) != 0 for count in counts], axis=0)
    corners = np.concatenate([[True], turns, [True]])
    return {name: (count[corners] / count[-1]).tolist() for name, count in zip(("fpr", "tpr"), counts, strict=True)}


def detection_with_intervals(
    positive: np.ndarray,
    negative: np.ndarray,
    positive_prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    draws: int = 400,
) -> dict[str, Any]:
    """:func:`detection` with 95 % intervals (``"auc_95"``, ``"tpr_at_1_fpr_95"``) from a bootstrap over prompts.

    Over prompts, since seeds of one prompt are no independent evidence; negatives without prompts are drawn image by image.
    """
    rng = np.random.default_rng(0)
    sides = [
        (values, _rows_by_prompt(texts) if texts is not None else [np.array([i]) for i in range(len(values))])
        for values, texts in ((positive, positive_prompts), (negative, negative_prompts))
    ]
    drawn = [
        detection(
            *(values[np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])] for values, rows in sides)
        )
        for _ in range(draws)
    ]
    result: dict[str, Any] = detection(positive, negative)
    for name in list(result):
        result[f"{name}_95"] = np.quantile([row[name] for row in drawn], [0.025, 0.975]).tolist()
    return result


def rate_with_interval(values: np.ndarray, prompts: Sequence[str], *, draws: int = 400) -> dict[str, Any]:
    """Mean of ``values`` (of 0 and 1: a rate) with a 95 % interval from a bootstrap over prompts."""
    rng = np.random.default_rng(0)
    rows = _rows_by_prompt(prompts)
    means = [values[np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])].mean() for _ in range(draws)]
    return {"mean": float(np.mean(values)), "mean_95": np.quantile(means, [0.025, 0.975]).tolist()}


def _rows_by_prompt(prompts: Sequence[str]) -> list[np.ndarray]:
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(prompts):
        rows.setdefault(text, []).append(row)
    return [np.array(numbers) for numbers in rows.values()]
