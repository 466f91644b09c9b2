"""How well a score tells memorized images from others: AUC, TPR at 1 % FPR, the ROC curve; rates and their differences.

Needs SciPy and scikit-learn. Images of one prompt are not independent, so every interval is one over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import auc, roc_curve

#: The standard normal quantile of a 95 % interval.
_Z = float(stats.norm.ppf(0.975))


def detection(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """AUC, and TPR at 1 % FPR with the last threshold below it (never the nearest, which may lie above).

    Args:
        positive, negative: scores, ``[P]`` and ``[N]``, finite, not empty; higher is to mean memorized.
    """
    fpr, tpr = _roc(positive, negative)
    return {"auc": float(auc(fpr, tpr)), "tpr_at_1_fpr": float(tpr[fpr <= 0.01].max())}


def roc_points(positive: np.ndarray, negative: np.ndarray) -> dict[str, list[float]]:
    """The corners of the ROC curve, ``"fpr"`` and ``"tpr"``, from (0, 0) to (1, 1); arguments as for :func:`detection`."""
    fpr, tpr = _roc(positive, negative, corners=True)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def _roc(positive: np.ndarray, negative: np.ndarray, *, corners: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every threshold, or only where the curve turns."""
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    fpr, tpr, _ = roc_curve(labels, np.concatenate([positive, negative]), drop_intermediate=corners)
    return fpr, tpr


def detection_with_intervals(
    positive: np.ndarray,
    negative: np.ndarray,
    positive_prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    draws: int = 400,
) -> dict[str, Any]:
    """:func:`detection` with 95 % intervals (``"auc_95"``, ``"tpr_at_1_fpr_95"``) from a bootstrap over prompts.

    A figure that is 0 or 1 has an exact interval instead, since the samples of a bootstrap then hardly differ. The TPR counts
    each memorized prompt as one trial. The AUC counts pairs of a memorized and an ordinary prompt, as many as can be formed
    without using a prompt twice: these are independent trials whose chance of success is the AUC.

    Args:
        positive, negative: as for :func:`detection`.
        positive_prompts: the prompt of each positive score.
        negative_prompts: the prompt of each negative score; without them each negative counts as a prompt of its own.
        draws: bootstrap samples.
    """
    rows = [
        _rows_by_prompt(positive_prompts),
        _rows_by_prompt(negative_prompts if negative_prompts is not None else list(map(str, range(len(negative))))),
    ]
    rng = np.random.default_rng(0)
    drawn = [
        detection(*(values[_resample(rng, of)] for values, of in zip((positive, negative), rows, strict=True)))
        for _ in range(draws)
    ]
    found: dict[str, Any] = detection(positive, negative)
    trials = {"auc": min(map(len, rows)), "tpr_at_1_fpr": len(rows[0])}
    intervals = {
        f"{name}_95": _interval([row[name] for row in drawn], found[name], trials=count) for name, count in trials.items()
    }
    return found | intervals


def rate_with_interval(events: np.ndarray, prompts: Sequence[str], *, draws: int = 400) -> dict[str, Any]:
    """Share of images that are events (``"mean"``), with a 95 % interval over prompts (``"mean_95"``).

    The interval comes from a bootstrap over prompts; a rate of 0 or 1 has an exact one, which counts each prompt as one trial.

    Args:
        events: ``[images]``, of 0 and 1 or bool.
        prompts: the prompt of each image.
        draws: bootstrap samples.
    """
    means, rows = _resampled_means(np.asarray(events, dtype=np.float64), prompts, draws)
    rate = float(np.mean(events))
    return {"mean": rate, "mean_95": _interval(means, rate, trials=len(rows))}


def mean_with_interval(values: np.ndarray, prompts: Sequence[str], *, draws: int = 400) -> dict[str, Any]:
    """Mean of any ``values`` with a 95 % interval from a bootstrap over prompts; keys as of :func:`rate_with_interval`."""
    means, _ = _resampled_means(values, prompts, draws)
    return {"mean": float(np.mean(values)), "mean_95": np.quantile(means, [0.025, 0.975]).tolist()}


def exact_interval(events: int, trials: int) -> list[float]:
    """The 95 % interval of Clopper & Pearson (1934) for a rate over independent trials."""
    found = stats.binomtest(events, trials).proportion_ci(method="exact")
    return [float(found.low), float(found.high)]


def exact_rate(events: int, trials: int) -> dict[str, Any]:
    """``count``, ``of``, ``rate`` and its :func:`exact_interval`; the last two are ``None`` where there was no trial."""
    rate, interval = (events / trials, exact_interval(events, trials)) if trials else (None, None)
    return {"count": events, "of": trials, "rate": rate, "interval": interval}


def _interval(drawn: Sequence[float], figure: float, *, trials: int) -> list[float]:
    """The interval of a bootstrap; of a figure that is 0 or 1, the exact one for that many independent trials."""
    if figure in (0.0, 1.0):
        return exact_interval(int(figure) * trials, trials)
    return np.quantile(drawn, [0.025, 0.975]).tolist()


def _resampled_means(values: np.ndarray, prompts: Sequence[str], draws: int) -> tuple[list[float], list[np.ndarray]]:
    """The mean of each bootstrap sample over prompts, and the rows of each prompt."""
    rng, rows = np.random.default_rng(0), _rows_by_prompt(prompts)
    return [float(values[_resample(rng, rows)].mean()) for _ in range(draws)], rows


def _resample(rng: np.random.Generator, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of as many prompts as there are, drawn with replacement."""
    return np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])


def _rows_by_prompt(prompts: Sequence[str]) -> list[np.ndarray]:
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(prompts):
        rows.setdefault(text, []).append(row)
    return [np.array(numbers) for numbers in rows.values()]


def clustered_rate(events: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """A rate over images with a 95 % interval that does not take seeds of one prompt for independent evidence.

    Wilson's score interval (1927) for as many independent images as these are worth (Rao & Scott 1992; with the t quantile for
    few prompts, Korn & Graubard 1998): ``p (1 - p) / v``, where ``v`` is the variance of the rate between prompts, and never
    more than there are. Where no image or every image is an event, nothing shows how alike seeds are: each prompt counts once.

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
        effective = rate * (1 - rate) / max(variance, 1e-300) * (_Z / stats.t.ppf(0.975, prompts - 1)) ** 2
    effective = float(np.clip(effective, 1.0, of))
    center = (rate + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = _Z * math.sqrt(rate * (1 - rate) / effective + (_Z / (2 * effective)) ** 2) / (1 + _Z**2 / effective)
    interval = [max(0.0, float(center - half)) if count else 0.0, min(1.0, float(center + half)) if count < of else 1.0]
    return {"count": int(count), "of": int(of), "rate": rate, "interval": interval, "effective": effective}


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
    """The exact two-sided p-value of McNemar's test (1947): how uneven is the split of the pairs that changed?

    Args:
        became, ceased: how many pairs changed one way, and how many the other.
    """
    return float(stats.binomtest(became, became + ceased).pvalue) if became + ceased else 1.0
