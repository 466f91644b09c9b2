"""The prompt of a run, told by the texts of the workflow: the words that call a copy up, and the image without them."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_an_ordinary_picture_and_one_that_is_only_watched_are_the_same_to_the_bit(
    bench: Any, finish: Any, sampler: str
) -> None:
    for mode, text in (("mitigate", ORDINARY), ("trace", EXACT)):
        plain = finish(b := bench(None, text=text), b.ksampler(sampler_name=sampler))
        result = finish(b := bench(mode, text=text, clip=True), b.ksampler(sampler_name=sampler))
        (trace,) = result.runs[0]
        assert np.array_equal(plain.images[0], result.images[0])
        assert trace.verdict == ("stable" if text == ORDINARY else "likely copy")
        if text == ORDINARY:
            assert trace.words is None
        else:
            assert set(trace.words.words) & name_in(EXACT)


def test_a_second_pass_keeps_the_prompt_too(bench: Any, finish: Any) -> None:
    def passes(b: Any) -> Any:
        first = b.ksampler()
        larger = b.g.node("LatentUpscale", samples=first, upscale_method="bilinear", width=192, height=192, crop="disabled")
        return b.ksampler(latent_image=larger[0], denoise=0.5, steps=10)

    result = finish(b := bench("mitigate", clip=True), passes(b))
    assert [trace.verdict for (trace,) in result.runs] == ["corrected", "corrected"]
    (first,), (second,) = result.runs
    assert set(first.words.words) & name_in(EXACT)
    assert second.words == first.words
    without = finish(b := bench(None, text=first.words.text), passes(b))
    assert np.abs(without.images[0].astype(int) - result.images[0]).max() <= 1


def test_the_texts_are_those_of_the_workflow_that_runs_not_of_the_one_that_the_guard_ran_in(bench: Any, finish: Any) -> None:
    """The node of a guard is cached when nothing but the prompt has changed."""
    result = finish(b := bench("mitigate", text=ORDINARY, clip=True), b.ksampler())
    assert result.runs[0][0].verdict == "stable"
    result = finish(b := bench("mitigate", clip=True, batch=2), b.ksampler(), fresh=False)
    assert [trace.verdict for trace in result.runs[0]] == ["corrected", "corrected"]
    assert all(set(trace.words.words) & name_in(EXACT) for trace in result.runs[0])
    assert all(copy_score(image, EXACT) < 0.75 for image in result.images)


def joined(b: Any) -> Any:
    """The prompt, put together of two texts of the workflow."""
    half = len(EXACT) // 2
    text = b.g.node("StringConcatenate", string_a=EXACT[:half], string_b=EXACT[half:], delimiter="")
    return b.g.node("CLIPTextEncode", clip=b.lab[1], text=text[0])[0]


def averaged(b: Any) -> Any:
    inputs = {"conditioning_to": b.positive, "conditioning_from": b.text("a picture"), "conditioning_to_strength": 0.98}
    return b.g.node("ConditioningAverage", **inputs)[0]


def combined(b: Any) -> Any:
    return b.g.node("ConditioningCombine", conditioning_1=b.positive, conditioning_2=b.positive)[0]


@pytest.mark.parametrize("how", [joined, averaged, combined], ids=lambda how: how.__name__)
def test_where_the_prompt_is_no_text_of_the_workflow_the_run_is_steered(bench: Any, finish: Any, how: Any) -> None:
    def sampled(**guard: Any) -> Any:
        b = bench("mitigate", text="" if how is joined else EXACT, **guard)
        return finish(b, b.ksampler(positive=how(b)))

    steered, found = sampled(), sampled(clip=True)
    assert [trace.verdict for trace in found.runs[0]] == ["corrected"]
    assert found.runs[0][0].words is None
    assert np.array_equal(steered.images[0], found.images[0])


def test_the_words_are_told_on_the_node_and_in_the_report(bench: Any, finish: Any) -> None:
    result = finish(b := bench("mitigate", clip=True), b.ksampler())
    (trace,) = result.runs[0]
    (told,) = [event.data for event in result.run.events if event.type == "memorization_guard"][-1]["traces"]
    assert told["words"]["words"] == [*trace.words.words]
    (record,) = json.loads(result.metadata["memorization_guard"]).values()
    assert record["traces"][0]["words"] == trace.words.to_dict()
