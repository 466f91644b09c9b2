"""A run in words."""

from __future__ import annotations

from ..core.trace import Trace, rarity


def summary(trace: Trace, title: str = "Image 1") -> str:
    """A run in words after ``title``: what ``summarize`` in ``js/graph.js`` says."""
    parts = [f"{title}: {trace.verdict}"]
    if trace.trigger_step is not None:
        parts.append(f"left the region at step {trace.trigger_step}")
    if trace.score is not None:
        parts.append(f"S_mem {trace.score:.1f}" if trace.score < 1000 else "S_mem over 1000")
    if trace.p_value is not None:
        parts.append(f"as far as {rarity(trace.p_value)} ordinary images")
    if corrected := int(trace.mitigated.sum()):
        parts.append(f"{corrected} {'step' if corrected == 1 else 'steps'} corrected")
    if trace.nonfinite_step is not None:
        parts.append(f"not a number from step {trace.nonfinite_step}")
    note = trace.note or ("no profile: not scored" if trace.verdict == "unscored" and not trace.bands else "")
    return ", ".join(parts) + "." + (f"\n{note.removesuffix('.')}." if note else "")
