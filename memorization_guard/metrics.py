"""How well a score tells memorized images from others: AUC and TPR at 1 % FPR, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve


def detection(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """AUC, and TPR at 1 % FPR with the last threshold below it (never the nearest, which may lie above)."""
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scores = np.r_[positive, negative]
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {"auc": float(roc_auc_score(labels, scores)), "tpr_at_1_fpr": float(tpr[fpr <= 0.01].max())}


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
    return [np.flatnonzero(np.array(prompts) == text) for text in dict.fromkeys(prompts)]
