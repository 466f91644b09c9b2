"""How well a score tells memorized images from others: AUC, TPR at 1 % FPR, the ROC curve; rates and their differences."""

from __future__ import annotations

import math
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


#: The standard normal quantile of a 95 % interval.
_Z = 1.959963984540054


def clustered_rate(events: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """A rate over images with a 95 % interval that does not take seeds of one prompt for independent evidence.

    Wilson's score interval (1927) for as many independent images as these are worth (Rao & Scott 1992; with the t quantile for
    few prompts, Korn & Graubard 1998): ``p (1 - p) / v``, where ``v`` is the variance of the rate between prompts, and never
    more than there are. Where no image or every one is an event nothing shows how alike seeds are: each prompt counts once.

    Args:
        events, sizes: ``[prompts]``, how many images of each prompt are events, and how many it has.

    Returns:
        ``"count"`` (events), ``"of"`` (images), ``"rate"`` and ``"interval"`` (both ``None`` without images), ``"effective"``
        (independent images that these are worth).
    """
    events, sizes = (np.asarray(values, dtype=np.float64)[np.asarray(sizes) > 0] for values in (events, sizes))
    count, of, prompts = events.sum(), sizes.sum(), len(sizes)
    if not prompts:
        return {"count": 0, "of": 0, "rate": None, "interval": None, "effective": 0.0}
    rate, effective = float(count / of), float(prompts)
    if 0 < count < of and 1 < prompts < of:
        variance = prompts / (prompts - 1) * np.square(events - rate * sizes).sum() / of**2
        effective = rate * (1 - rate) / max(variance, 1e-300) * (_Z / _t_quantile(prompts - 1)) ** 2
    effective = float(np.clip(effective, 1.0, of))
    center = (rate + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = _Z * math.sqrt(rate * (1 - rate) / effective + (_Z / (2 * effective)) ** 2) / (1 + _Z**2 / effective)
    interval = [max(0.0, float(center - half)) if count else 0.0, min(1.0, float(center + half)) if count < of else 1.0]
    return {"count": int(count), "of": int(of), "rate": float(rate), "interval": interval, "effective": effective}


def clustered_difference(before: np.ndarray, after: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """By how much a rate over the same images changed, with a 95 % interval over prompts.

    The intervals of both rates are put together (Newcombe 1998, method 10; Zou & Donner 2008), with the correlation that the
    two rates have between prompts; the interval is not empty where nothing changed.

    Args:
        before, after, sizes: ``[prompts]``, events of each prompt before and after, and images.

    Returns:
        ``"rate"`` (after less before) and ``"interval"``, both ``None`` without images.
    """
    before, after, sizes = (np.asarray(values, dtype=np.float64)[np.asarray(sizes) > 0] for values in (before, after, sizes))
    first, second = clustered_rate(before, sizes), clustered_rate(after, sizes)
    if first["rate"] is None:
        return {"rate": None, "interval": None}
    p, q = first["rate"], second["rate"]
    off, other = before - p * sizes, after - q * sizes
    spread = math.sqrt(np.square(off).sum() * np.square(other).sum())
    correlation = float((off * other).sum() / spread) if spread > 0 else 0.0
    (p_low, p_high), (q_low, q_high) = first["interval"], second["interval"]

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a**2 - 2 * correlation * a * b + b**2, 0.0))

    difference = q - p
    interval = [difference - distance(q - q_low, p_high - p), difference + distance(q_high - q, p - p_low)]
    return {"rate": difference, "interval": [max(interval[0], -1.0), min(interval[1], 1.0)]}


def mcnemar(became: int, ceased: int) -> float:
    """Exact two-sided p of McNemar's test (1947): how often as uneven a split of the changes comes from two fair ways.

    Args:
        became, ceased: how many pairs changed one way, and how many the other.
    """
    changes, fewer = became + ceased, min(became, ceased)
    if not changes:
        return 1.0
    steps = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((changes - steps + 1) / steps))]) - changes * math.log(2)
    return min(1.0, 2 * float(np.exp(logs).sum()))


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from 3 degrees of freedom on (Abramowitz & Stegun 1964, 26.7.5)."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z, n = _Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))
