"""Runs, counts and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.trace import Trace, rarity


def summary(trace: Trace, title: str = "Image 1") -> str:
    """A run in words after ``title``: what ``summarize`` in ``js/graph.js`` says."""
    parts = [f"{title}: {trace.verdict}"]
    if trace.trigger_step is not None:
        parts.append(f"triggered at step {trace.trigger_step}")
    if trace.score is not None:
        parts.append(f"S_mem {trace.score:.1f}" if trace.score < 1000 else "S_mem over 1000")
    if trace.rarity is not None:
        parts.append(unusual(trace.rarity))
    if trace.words is not None:
        parts.append(called_up(trace.words.words) + (", left out" if trace.left_out else ""))
    if corrected := int(trace.mitigated.sum()):
        parts.append(f"{count(corrected, 'step')} corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"not a number from step {trace.nonfinite_step}")
    note = trace.note or ("no profile: not scored" if trace.verdict == "unscored" and not trace.bands else "")
    return ", ".join(parts) + "." + (f"\n{note.removesuffix('.')}." if note else "")


def unusual(rarity: str) -> str:
    """A trace's rarity in a sentence."""
    return f"{'' if rarity.startswith('rarer') else 'as far as '}{rarity} ordinary images"


def explanation(trace: Trace) -> list[str]:
    """What is told of a prompt that was judged without an image, a line each: the verdict, and the words that it hangs on."""
    lines = [prompt_verdict(trace)]
    if trace.words is not None:
        lines.append("These words call an image up (in brackets how rare the prompt is with that word alone of them):")
        lines += [f"  {word} ({rare})" for word, rare in zip(trace.words.words, word_rarities(trace), strict=True)]
        lines.append(f"Without them, an ordinary prompt: {trace.words.text}")
    elif trace.trigger_step is not None:
        lines.append(NO_WORDS)
    return lines


#: What is said of a memorized prompt in which no words were found.
NO_WORDS = "No few words of it call the image up by themselves."


def prompt_verdict(trace: Trace) -> str:
    """What a prompt was judged to be, without an image."""
    return f"{'ordinary' if trace.trigger_step is None else 'likely memorized'}: {unusual(trace.rarity or '')}"


def word_rarities(trace: Trace) -> list[str]:
    """How rare the prompt is with each of its words alone of those that call a copy up; none where there are no such words."""
    return [] if trace.words is None else [rarity(share, trace.p_value_floor) for share in trace.words.p_values]


def noticed(trace: Trace, copied: bool | None) -> str:
    """One line under an image that was sampled without mitigation.

    Args:
        copied: whether it is a copy of its training image; ``None`` where there is none.
    """
    what = {True: "a copy, ", False: "no copy, ", None: ""}[copied]
    if trace.trigger_step is None:
        return what + ("not noticed" if copied else "nothing noticed")
    steps = f"after {trace.trigger_step + 1} of {count(len(trace.mitigated), 'step')}"
    rare = "" if trace.rarity is None else f", {trace.rarity}"
    return f"{what}noticed {steps}{rare}"


def mitigated(trace: Trace, copied: bool | None) -> str:
    """One line under an image that was sampled with mitigation; ``copied`` as for :func:`noticed`."""
    if copied:
        return "still a copy"
    if not trace.mitigated.any():
        return "the same image: nothing to correct"
    if trace.words is not None and trace.left_out:
        return f"another image, without {quoted(trace.words.words)}"
    return f"another image: {count(int(trace.mitigated.sum()), 'step')} corrected"


def called_up(words: Sequence[str] | None) -> str:
    """Which words call an image up; empty where none were told."""
    return f"called up by {quoted(words)}" if words else ""


def quoted(words: Sequence[str]) -> str:
    """Words of a prompt, each in quotation marks."""
    return ", ".join(f'"{word}"' for word in words)


def count(number: int, noun: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: float | None) -> str:
    """A number with as many digits as its size needs."""
    if value is None:
        return "-"
    return f"{value:.2g}" if abs(value) < 0.1 or abs(value) >= 10_000 else f"{value:.2f}"
