"""The stability graph of one trace as a picture: how unusual its prompt is, what was corrected, and the norms of its steps.

One layout, two forms: :func:`svg` for files and notebooks, :func:`image` for hosts that show pictures. In pages
``js/graph.js`` draws the same graph, also while a run is sampled. ``docs/graph.md`` says how to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.trace import Trace, rarity
from .axis import Axis, norm_axis
from .drawing import DARK, LIGHT, STYLES, Shape, pixels, text_width, tick_width, vector
from .words import called_up, unusual

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DARK", "HEIGHT", "LIGHT", "NORMS", "STYLES", "WIDTH", "image", "overlay", "svg"]

WIDTH, HEIGHT = 640, 440

#: The norms of a trace in the order they are drawn, and what each is called.
NORMS = {"latent": "latent norm", "update": "update norm", "denoised": "predicted image norm"}

#: How each verdict is drawn, as a badge and as the mark of its image.
_LOOKS = {
    "stable": "plain",
    "corrected": "outlined",
    "likely copy": "solid",
    "mild": "outlined",
    "strong": "solid",
    "unscored": "muted",
}

#: The axis of evidence ends here where no references say how far they reach: one in so many.
_REACH = 10_000.0

#: Height of the place above the axis for what is rarer than the references can tell.
_BEYOND = 18.0

#: Share of ordinary prompts that is shaded darker: nine of ten.
_COMMON = 0.1


def svg(trace: Trace) -> str:
    """The graph as one ``<svg>`` element of 640 x 440 pixels, which follows the reader's light or dark theme."""
    title = "Stability graph: " + ", ".join(filter(None, (trace.verdict, _number(trace))))
    return vector(_layout(trace, WIDTH, HEIGHT), WIDTH, HEIGHT, title, _description(trace))


def image(trace: Trace, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """The graph as an RGB image of ``width`` x ``height`` pixels, in the light theme.

    Below 480 x 400 pixels the evidence is drawn alone, without the norms.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: for a size below 240 x 140.
    """
    return pixels(_layout(trace, width, height), width, height)


def _layout(trace: Trace, width: int, height: int) -> list[Shape]:
    """Everything the graph shows, in the order it is painted."""
    if width < 240 or height < 140:
        raise ValueError(f"a graph of {width} x {height} pixels is not readable: give at least 240 x 140")
    right, told = width - 14.0, called_up(trace.words.words if trace.words else None)
    below = (16.0 if told else 0.0) + 26.0
    whole = width >= 480 and height >= 400
    bottom = (0.55 * height if whole else height - 18.0) - below
    shapes = [Shape("area", "ground", [(0, 0), (width, 0), (width, height), (0, height)]), *_heading(trace, right)]
    shapes += _evidence(trace, right, 36.0, bottom)
    shapes += _legend(_evidence_keys(trace), bottom + 36, right)
    if told:
        shapes.append(_text("caption", 10, bottom + 54, _cut(told + (", left out" if trace.left_out else ""), right - 10)))
    if whole:
        each = (width - 4.0) / len(NORMS)
        for number, name in enumerate(NORMS):
            start = 10 + number * each
            shapes += _norm(trace, name, start, start + each - 20, 0.55 * height + 40, height - 42.0)
        shapes += _legend(_norm_keys(trace), height - 8.0, right)
    return shapes


def _text(role: str, x: float, y: float, words: str, anchor: Literal["start", "middle", "end"] = "start") -> Shape:
    return Shape("text", role, [(x, y)], words, anchor)


def _cut(words: str, width: float) -> str:
    """``words``, or as many letters of them as fit."""
    most = int(width / text_width("x"))
    return words if len(words) <= most else words[: most - 3] + "..."


def _heading(trace: Trace, right: float) -> list[Shape]:
    """The verdict with its number, and what the first part shows if there is room for it."""
    look = _LOOKS[trace.verdict]
    badge = f"badge-{look}" if look in ("outlined", "solid") else "badge"
    text = f"caption-{look}" if look in ("outlined", "solid") else "tick" if look == "muted" else "caption"
    end = 10 + text_width(trace.verdict) + 18
    shapes = [Shape("badge", badge, [(10, 7), (end, 25)]), _text(text, (10 + end) / 2, 20, trace.verdict, "middle")]
    if words := _number(trace):
        shapes.append(_text("caption", end + 8, 20, words))
    title = "how unusual the prompt is"
    if end + text_width(words) + text_width(title) + 24 < right:
        shapes.append(_text("tick", right, 20, title, "end"))
    return shapes


def _evidence(trace: Trace, right: float, top: float, bottom: float) -> list[Shape]:
    """How rare the prompt is among ordinary ones, from its verdict on through the steps; with the published method, how far
    every step is from the reference."""
    if trace.p_value is None and np.isfinite(_joint(trace)).any() and trace.thresholds.method == "published":
        return _scores(trace, right, top, bottom)
    if trace.p_value is None:
        words = _cut("not judged: how unusual the prompt is is not known", right - 28)
        return [_text("tick", (right + 14) / 2, (top + bottom) / 2, words, "middle")]
    floor = trace.p_value_floor or 0.0
    limit = 1 / max(trace.thresholds.false_positive_rate, floor)
    most = 1 / floor if floor else max(_REACH, 1.3 * limit, 1 / max(trace.p_value, 1e-12))
    axis = Axis(1.0, most, bottom, top + (_BEYOND if floor else 0.0), log=True)
    decades = [10.0**n for n in range(1, 13) if 10.0**n <= most]
    names = {tick: f"1 in {tick:,.0f}" for tick in decades}
    left = 14 + max(map(tick_width, names.values()), default=0)

    shapes = []
    for role, low, high in (("wide", 1.0, limit), ("band", 1.0, min(1 / _COMMON, limit))):
        y_low, y_high = float(axis(low)), float(axis(high))
        shapes.append(Shape("area", role, [(left, y_low), (right, y_low), (right, y_high), (left, y_high)]))
    for tick, name in names.items():
        at = float(axis(tick))
        shapes += [Shape("line", "grid", [(left, at), (right, at)]), _text("tick", left - 6, at + 4, name, "end")]
    if floor:
        at = float(axis(most))
        shapes += [Shape("line", "axis", [(left, at), (right, at)]), _text("tick", left - 6, top + 11, "rarer", "end")]
    x = _places(trace, left + 32, right)
    shapes += _step_axis(x, left, bottom, right)
    at = float(axis(limit))
    shapes.append(Shape("line", "threshold", [(left, at), (right, at)]))

    beyond = floor > 0 and rarity(trace.p_value, floor).startswith("rarer")
    y = top + _BEYOND / 2 if beyond else float(axis(1 / max(trace.p_value, 1 / most)))
    lower = abs(at - 5 - y) < 10  # the run's line would go through the words above
    words = f"triggers from {rarity(1 / limit)} on"
    told = at + (13 if lower else -5)
    shapes.append(_text("label-trigger", right - 4, told, words, "end"))
    for place in (float(axis(min(1 / _COMMON, limit))) + 13, bottom - 5):
        if place <= bottom - 3 and abs(place - 4 - y) >= 10 and abs(place - told) >= 12:
            shapes.append(_text("tick", right - 4, place, "9 of 10 ordinary prompts", "end"))
            break
    seen = len(x) if trace.nonfinite_step is None else trace.nonfinite_step + 1
    if len(x):
        shapes.append(Shape("line", "run", [(left + 16, y), (float(x[seen - 1]), y)]))
        if seen < len(x):
            shapes.append(Shape("line", "broken", [(x[seen - 1], y - 6), (x[seen - 1], y + 6)]))
    shapes += [Shape("dot", "corrected", [(float(x[i]), y)]) for i in np.flatnonzero(trace.mitigated[:seen])]
    shapes.append(Shape("diamond" if trace.judged_by == "asked" else "dot", f"mark-{_LOOKS[trace.verdict]}", [(left + 16, y)]))
    return shapes


def _scores(trace: Trace, right: float, top: float, bottom: float) -> list[Shape]:
    """The distance from the reference that update and x0 norm both reach, step by step, with the published thresholds."""
    score, left = _joint(trace), 44.0
    mild, strong = trace.thresholds.tau_mild, trace.thresholds.tau_strong
    high = max(1.4 * mild, min(1.15 * float(np.nanmax(score)), 3 * strong))
    axis = Axis(0.0, high, bottom, top)
    y_mild = float(axis(mild))
    shapes = [Shape("area", "band", [(left, bottom), (right, bottom), (right, y_mild), (left, y_mild)])]
    for tick in axis.ticks():
        at = float(axis(tick))
        shapes += [Shape("line", "grid", [(left, at), (right, at)]), _text("tick", left - 6, at + 4, f"{tick:g} sd", "end")]
    x = _places(trace, left + 4, right)
    shapes += _step_axis(x, left, bottom, right)
    for limit, words in ((mild, f"triggers above {mild:g} sd"), (strong, f"strong above {strong:g} sd")):
        if limit <= high:
            at = float(axis(limit))
            shapes.append(Shape("line", "threshold", [(left, at), (right, at)]))
            shapes.append(_text("label-trigger", right - 4, at - 5 if at > top + 16 else at + 13, words, "end"))
    y = axis(score)
    shapes += _lines("run", x, y)
    shapes += [Shape("dot", "corrected", [(x[i], y[i])]) for i in np.flatnonzero(trace.mitigated & np.isfinite(y))]
    if trace.trigger_step is not None:
        shapes.append(
            Shape("dot", f"mark-{_LOOKS[trace.verdict]}", [(float(x[trace.trigger_step]), float(y[trace.trigger_step]))])
        )
    return shapes


def _norm(trace: Trace, name: str, start: float, right: float, top: float, bottom: float) -> list[Shape]:
    """A norm over the steps, small, with the band of ordinary runs where it holds for this sampler."""
    values = getattr(trace.steps, f"{name}_norm")
    mean, low, high, inner = _band(trace, name)
    axis = norm_axis(values, mean, inner, top, bottom)
    title = NORMS[name] + (", log scale" if axis is not None and axis.log else "")
    if trace.reference_count is not None and name not in trace.bands:
        title += " (no band holds)"
    shapes = [_text("tick", start, top - 9, title)]
    if axis is None:
        return [*shapes, _text("tick", (start + right) / 2, (top + bottom) / 2, "no number", "middle")]
    ticks = axis.ticks()
    ticks = ticks if len(ticks) <= 4 else ticks[:: 2 if len(ticks) < 8 else 3]
    left = start + 8 + max(tick_width(f"{tick:g}") for tick in ticks)
    x = _places(trace, left, right)
    y, y_low, y_high = axis(values), axis(low), axis(high)
    for part in _stretches(np.isfinite(y_low)):
        upper, lower = (list(zip(x[part], edge[part], strict=True)) for edge in (y_high, y_low))
        shapes.append(Shape("area", "band", [*upper, *reversed(lower)]))
    for tick in ticks:
        at = float(axis(tick))
        shapes += [Shape("line", "grid", [(left, at), (right, at)]), _text("tick", left - 5, at + 4, f"{tick:g}", "end")]
    shapes += _step_axis(x, left, bottom, right)
    shapes += _lines("mean", x, axis(mean))
    if trace.nonfinite_step is not None:
        at = float(x[trace.nonfinite_step])
        shapes.append(Shape("line", "broken", [(at, top), (at, bottom)]))
    shapes += _lines("run", x, y)
    return shapes + [Shape("dot", "corrected", [(x[i], y[i])]) for i in np.flatnonzero(trace.mitigated & np.isfinite(y))]


def _band(trace: Trace, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper edge of a band, and what of it the axis makes room for, each ``[steps]`` but the last.

    Norms are positive and their logarithms are about normal, so the band is taken there: mean and standard deviation of the
    norm are those of a log-normal variable. Its lower edge never reaches 0.
    """
    nothing = np.full(len(trace.steps), np.nan)
    band = trace.bands.get(name, {"mean": nothing, "std": nothing})
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spread = np.sqrt(np.log1p((band["std"] / band["mean"]) ** 2))
        centre = np.log(band["mean"]) - spread**2 / 2
        reach = trace.thresholds.gamma * spread
        shown = np.minimum(reach, 0.8)
        edges = [np.where(np.isfinite(centre), np.exp(centre + offset), np.nan) for offset in (-reach, reach, -shown, shown)]
    return band["mean"], edges[0], edges[1], np.concatenate(edges[2:])


def _places(trace: Trace, left: float, right: float) -> np.ndarray:
    """Where the steps are, ``[steps]``."""
    steps = len(trace.steps)
    return left + (right - left) * np.arange(steps) / max(steps - 1, 1)


def _step_axis(x: np.ndarray, left: float, bottom: float, right: float) -> list[Shape]:
    shapes = [Shape("line", "axis", [(left, bottom), (right, bottom)])]
    room = (right - left) / 48
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if len(x) / n <= room)
    for i in range(0, len(x), every):
        shapes.append(Shape("line", "axis", [(x[i], bottom), (x[i], bottom + 3)]))
        if x[i] < right - 34 or i == 0:  # "step" stands at the right end
            shapes.append(_text("tick", float(x[i]), bottom + 15, str(i), "middle"))
    return [*shapes, _text("tick", right, bottom + 15, "step", "end")]


_Key = tuple[Literal["line", "dot", "diamond", "area"], str, str]


def _evidence_keys(trace: Trace) -> list[_Key]:
    """What the first part shows, in words: shape, role, words."""
    keys: list[_Key] = []
    if trace.p_value is not None:
        asked = trace.judged_by == "asked"
        words = "judged by what the network was asked" if asked else "judged at the first evaluation"
        keys.append(("diamond" if asked else "dot", "key", words))
    elif np.isfinite(_joint(trace)).any() and trace.thresholds.method == "published":
        keys.append(("line", "run", "distance from ordinary runs"))
    if keys and trace.mitigated.any():
        keys.append(("dot", "corrected", "corrected"))
    return keys


def _norm_keys(trace: Trace) -> list[_Key]:
    keys: list[_Key] = [("line", "run", "this run")]
    if trace.mitigated.any():
        keys.append(("dot", "corrected", "corrected"))
    if trace.bands:
        count = "" if trace.reference_count is None else f"{trace.reference_count} "
        keys.append(("area", "band", f"{count}ordinary runs, ± {trace.thresholds.gamma:g} sd"))
    return keys


def _legend(keys: Sequence[_Key], y: float, right: float) -> list[Shape]:
    """What is drawn, in one row; what does not fit is left out."""
    shapes, x = [], 10.0
    swatches = {
        "line": [(0, -4), (18, -4)],
        "dot": [(9, -4)],
        "diamond": [(9, -4)],
        "area": [(0, -8), (18, -8), (18, 0), (0, 0)],
    }
    for kind, role, words in keys:
        if x + 24 + tick_width(words) > right:
            continue
        shapes.append(Shape(kind, role, [(x + dx, y + dy) for dx, dy in swatches[kind]]))
        shapes.append(_text("tick", x + 24, y, words))
        x += 38 + tick_width(words)
    return shapes


def _lines(role: str, x: np.ndarray, y: np.ndarray) -> list[Shape]:
    """A line with gaps where ``y`` is NaN. A single value between two gaps is drawn as a point."""
    shapes = []
    for part in _stretches(np.isfinite(y)):
        points = list(zip(x[part], y[part], strict=True))
        shapes.append(Shape("line", role, points) if len(points) > 1 else Shape("dot", "point", points))
    return shapes


def _stretches(there: np.ndarray) -> list[slice]:
    """Where ``[steps]`` bool is true, as slices without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2)]


def _joint(trace: Trace) -> np.ndarray:
    """The score that update and x0 both reach, ``[steps]``."""
    return np.minimum(trace.steps.update_score, trace.steps.denoised_score)


def _number(trace: Trace) -> str:
    """The number beside the verdict: how rare the run is among ordinary images, else S_mem."""
    if trace.rarity is not None:
        return trace.rarity
    if trace.score is None:
        return ""
    return f"S_mem {trace.score:.1f}" if trace.score < 1000 else f"S_mem {trace.score:.2g}"


def _description(trace: Trace) -> str:
    """What readers who do not see the graph should know."""
    parts = []
    if trace.rarity is not None:
        limit = rarity(max(trace.thresholds.false_positive_rate, trace.p_value_floor or 0.0))
        parts.append(f"The prompt is {unusual(trace.rarity)}; {limit} triggers")
        how = "what the network was asked" if trace.judged_by == "asked" else "the first evaluation"
        parts.append(f"It was judged by {how}")
    if told := called_up(trace.words.words if trace.words else None):
        parts.append(told[0].upper() + told[1:] + (", left out" if trace.left_out else ""))
    if trace.trigger_step is not None:
        parts.append(f"The run triggered at step {trace.trigger_step}")
    if trace.mitigated.any():
        parts.append(f"{int(trace.mitigated.sum())} of {len(trace.steps)} steps were corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"From step {trace.nonfinite_step} on the latent is not a number")
    norms = f"Below, the norms of latent, update and predicted image over {len(trace.steps)} sampling steps"
    if trace.bands:
        norms += f", with the band of ordinary runs for {' and '.join(name for name in NORMS if name in trace.bands)}"
    parts.append(norms)
    if trace.note:
        parts.append(trace.note.rstrip("."))
    return ". ".join(parts) + "."


def overlay(image: Image.Image, trace: Trace) -> Image.Image:
    """``image`` in grey, with the trace's local map laid over it in red: the redder, the more detail.

    Red begins at 2 standard deviations above ordinary prompts and is strongest at 6. It marks what the prompt settles in noise
    alone; of a template, the fixed part.

    Raises:
        ValueError: if the trace has no map (it needs a profile with reference runs, and a latent with places).
    """
    from PIL import Image

    if not trace.local_map.size:
        raise ValueError("the trace has no local map: it was made without a profile that fits, or of a latent without places")
    strength = np.clip((np.nan_to_num(trace.local_map) - 2) / 4, 0, 1)
    mask = Image.fromarray((strength * 200).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, (214, 40, 40)), grey, mask)
