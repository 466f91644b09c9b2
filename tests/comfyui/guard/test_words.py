"""The prompt of a run, told by the texts of the workflow: the words that call a copy up, and the image without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memorization_guard.lab import copy_score, prompts

EXACT, ORDINARY = prompts("exact", "tuning")[0], prompts("ordinary", "tuning")[0]


def name_in(caption: str) -> set[str]:
    """The words of a caption that are its picture's name."""
    return set(caption.split()[-2:])


def test_the_prompt_is_kept_without_the_words_that_call_the_copy_up(bench: Any, finish: Any) -> None:
    plain = finish(b := bench(None), b.ksampler())
    steered = finish(b := bench("mitigate"), b.ksampler())
    kept = finish(b := bench("mitigate", clip=True), b.ksampler())
    (trace,) = kept.runs[0]
    assert trace.verdict == "corrected"
    assert trace.words is not None
    assert set(trace.words.words) & name_in(EXACT)
    assert copy_score(plain.images[0], EXACT) > 0.75 > copy_score(kept.images[0], EXACT)
    assert steered.runs[0][0].words is None
    assert not np.array_equal(steered.images[0], kept.images[0])
    # Nothing of the guard is in the picture but the prompt.
    same = finish(b := bench(None, text=trace.words.text), b.ksampler())
    assert np.abs(same.images[0].astype(int) - kept.images[0]).max() <= 1
