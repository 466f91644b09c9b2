"""What ordinary prompts do, and how rare it is to get as far from that as a given one does (ours).

A prompt is judged by the *detail* (see :mod:`~memorization_guard.core.signals`) of what it says in noise alone, at a run's
first evaluation: no solver, step count or guidance scale has a part in it. Where that is suspicious, and where a run begins in
the middle of the way, the network is asked twice more, in one noise and in its negative, the same for all prompts: what the
mean of the two answers has in detail comes from the prompt and not from the noise. Either is held against that of reference
prompts, by its rank among them. Among the tenth of them that have most, a rank says little; there the p-value comes from an
exponential tail, in the logarithm of the detail, with what so few references leave unknown of its length.
``docs/evaluation.md`` has what this was measured to be worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .signals import Signals

#: Noise level (VE sigma) above which an image is still open: there the latent is noise to the network, whatever is in it.
OPEN_SIGMA = 4.0

#: Share of the references, those with most detail, that the tail is fitted to, and how many it takes at least.
TAIL_SHARE, TAIL_COUNT = 0.1, 8

#: No p-value is below the inverse of this many times the number of references.
BEYOND = 20


def p_value_floor(prompts: int) -> float:
    """The smallest p-value that so many reference prompts can carry: 400 of them know nothing rarer than 1 in 8,000."""
    return 1.0 / (BEYOND * prompts)


#: At most this share of the references is taken for memorized, where a gap sets them apart: so many mean excesses wide, and as
#: rare as this.
MEMORIZED_SHARE, GAP, GAP_RARITY = 0.06, 2.0, 1e-4


class Tail:
    """P-values from the detail of reference prompts.

    Args:
        logs: logarithms of the detail of the references, ``[R]``, all finite.
    """

    def __init__(self, logs: np.ndarray) -> None:
        self._sorted = np.sort(np.asarray(logs, dtype=np.float64))
        count = len(self._sorted)
        self._exceeding = max(1, min(max(TAIL_COUNT, round(TAIL_SHARE * count)), count // 2))
        self._from = float(self._sorted[-self._exceeding - 1])
        self._sum = max(float((self._sorted[-self._exceeding :] - self._from).sum()), 1e-9)

    @cached_property
    def fingerprint(self) -> int:
        """Tells references apart, within a process."""
        return hash(self._sorted.tobytes())

    @property
    def lowest(self) -> float:
        """The smallest p-value that the references can carry."""
        return p_value_floor(len(self._sorted))

    def p_value(self, detail: np.ndarray) -> np.ndarray:
        """Share of ordinary images with as much detail, ``[...]``; NaN for NaN.

        The rank of a new image among R references is a p-value whatever their distribution (conformal: Vovk et al. 2005).
        Beyond the threshold, with n exceedances of sum S, it is the predictive distribution of an exponential tail,
        ``(1 + x / S) ** -n``: a Pareto tail, the heavier the fewer they are.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.asarray(detail, dtype=np.float64))
        count = len(self._sorted)
        rank = (1 + count - np.searchsorted(self._sorted, logs, side="left")) / (count + 1)
        beyond = (1 + np.maximum(logs - self._from, 0.0) / self._sum) ** -self._exceeding
        found = np.where(logs > self._from, self._exceeding / (count + 1) * beyond, rank)
        return np.where(np.isnan(logs), np.nan, np.maximum(found, self.lowest))


def memorized(details: Sequence[float]) -> list[int]:
    """The references that are apart from all others, as if memorized themselves: their numbers, those with most detail first.

    The spacings of the largest values of an exponential tail, the i-th times i, are independent and exponential (Renyi 1953).
    A gap that is too large for that sets apart all that lie beyond it, so that several memories do not hide each other.
    """
    logs = np.log(np.maximum(np.asarray(details, dtype=np.float64), 1e-300))
    order = np.argsort(-logs)
    top, most = logs[order], max(1, math.ceil(MEMORIZED_SHARE * len(logs)))
    tail = max(TAIL_COUNT, round(TAIL_SHARE * len(logs)))
    if len(logs) < most + tail + 2:
        return []
    gaps = np.zeros(most)
    for apart in range(1, most + 1):
        below, gap = top[apart : apart + tail + 1], float(top[apart - 1] - top[apart])
        excess = max(float((below[:-1] - below[-1]).mean()), 1e-9)
        rarity = (1 + apart * gap / (tail * excess)) ** -tail
        if gap > GAP * excess and rarity < GAP_RARITY / most:
            gaps[apart - 1] = gap
    found: list[int] = order[: int(gaps.argmax()) + 1].tolist() if gaps.any() else []
    return found


@dataclass(frozen=True, eq=False)
class Reference:
    """The references of a profile: runs that were seen to their end, and further prompts that were evaluated once.

    Attributes:
        signals: of every evaluation of every run, each ``[runs, evaluations]``; NaN for what a run without guidance does not
            have, and for the detail of evaluations in which it was not taken.
        angles: ``[evaluations]``, ``atan(noise / signal)``, strictly falling.
        patches: ``[evaluations, 2]``, mean and standard deviation of the logarithm of a patch's root mean square of detail,
            over runs and places; NaN where latents have none.
        probed: ``[prompts]``, detail of each further prompt at the first of ``angles``.
        asked: ``[runs + prompts]``, detail of the mean answer of each; empty where the network could not be asked.

    Raises:
        ValueError: if the arrays do not fit, or what must be finite is not.
    """

    signals: Signals
    angles: np.ndarray
    patches: np.ndarray
    probed: np.ndarray
    asked: np.ndarray

    def __post_init__(self) -> None:
        signals = Signals(*(np.asarray(values, dtype=np.float64) for values in self.signals))
        angles, patches, probed, asked = (
            np.asarray(values, dtype=np.float64) for values in (self.angles, self.patches, self.probed, self.asked)
        )
        shape = signals.velocity.shape
        if len(shape) != 2 or shape[0] < 3 or not shape[1] or any(values.shape != shape for values in signals):
            raise ValueError(f"signals must be [3 or more runs, evaluations] each; they are {[s.shape for s in signals]}")
        if angles.shape != shape[1:] or patches.shape != (shape[1], 2) or probed.ndim != 1:
            raise ValueError(f"the arrays do not fit runs of {shape[1]} evaluations: {angles.shape}, {patches.shape}")
        norms = np.stack([signals.velocity, signals.denoised])
        detailed = np.isfinite(signals.detail).any(axis=0)
        if not (np.isfinite(angles).all() and np.isfinite(norms).all() and (norms > 0).all()):
            raise ValueError("angles and signals must be finite, and signals positive")
        if not (detailed[0] and (signals.detail[:, detailed] > 0).all()):
            raise ValueError("the detail of the first evaluation must be finite, and all detail positive")
        if asked.shape not in ((0,), (shape[0] + len(probed),)):
            raise ValueError(f"asked does not fit {shape[0]} runs and {len(probed)} prompts: {asked.shape}")
        details = np.concatenate([probed, asked])
        if not (np.isfinite(details).all() and (details > 0).all()):
            raise ValueError("the detail of references must be finite and positive")
        if (np.diff(angles) >= 0).any():
            raise ValueError("the noise levels of reference runs must fall")
        arrays = {"angles": angles, "patches": patches, "probed": probed, "asked": asked}
        for values in (*signals, *arrays.values()):
            values.setflags(write=False)
        for name, value in {"signals": signals, **arrays}.items():
            object.__setattr__(self, name, value)

    @property
    def count(self) -> int:
        """Number of prompts that a run is held against."""
        return len(self.signals.detail) + len(self.probed)

    def tail(self, angle: float) -> Tail:
        """Where ordinary prompts are at ``angle``. What was evaluated once goes from its own angle there as the runs do."""
        runs = self._logs("detail", angle)
        shift = float((runs - self._logs("detail", self.angles[0])).mean())
        return Tail(np.concatenate([runs, np.log(self.probed) + shift]))

    @cached_property
    def answers(self) -> Tail | None:
        """Where ordinary prompts are in what the network is asked; ``None`` where it could not be."""
        return Tail(np.log(self.asked)) if len(self.asked) else None

    def band(self, angle: float, signal: str) -> tuple[float, float]:
        """Mean and standard deviation of a signal over the runs at ``angle``, held constant outside; to be drawn."""
        logs = self._logs(signal, angle)
        mean = math.exp(float(logs.mean()))
        return mean, mean * max(float(logs.std(ddof=1)), 1e-6)

    def patch(self, angle: float) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of a patch's root mean square of detail."""
        known = np.isfinite(self.patches).all(axis=1)
        if not known.any():
            return math.nan, math.nan
        mean, std = (np.interp(angle, self.angles[known][::-1], values[known][::-1]) for values in self.patches.T)
        return float(mean), float(std)

    @cached_property
    def _rising(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Angles at which a signal is known, rising, and its logarithms there, ``[runs, angles]``."""
        found = {}
        for name, values in self.signals._asdict().items():
            known = np.isfinite(values).all(axis=0) if np.isfinite(values).any() else np.ones(len(self.angles), dtype=bool)
            with np.errstate(divide="ignore", invalid="ignore"):
                found[name] = self.angles[known][::-1], np.log(values[:, known][:, ::-1])
        return found

    def _logs(self, signal: str, angle: float) -> np.ndarray:
        """Logarithms of a signal of every run at ``angle``, ``[runs]``."""
        angles, logs = self._rising[signal]
        if len(angles) == 1:
            return logs[:, 0]
        after = int(np.clip(np.searchsorted(angles, angle), 1, len(angles) - 1))
        low, high = angles[after - 1 : after + 1]
        share = float(np.clip((angle - low) / (high - low), 0.0, 1.0))
        found: np.ndarray = (1 - share) * logs[:, after - 1] + share * logs[:, after]
        return found
