"""Profiles that make themselves, in ComfyUI: the first image with a model is judged, and the later ones cost nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memorization_guard.lab import copy_score, prompts

EXACT, ORDINARY = prompts("exact", "tuning")[0], prompts("ordinary", "tuning")[0]


def automatic(bench: Any, mode: str, text: str) -> Any:
    return bench(mode, text=text, profile=False, clip=True)


def test_the_first_image_is_judged_and_mitigated(bench: Any, finish: Any, automatic_profiles: Path) -> None:
    plain = finish(b := bench(None), b.ksampler())
    first = finish(b := automatic(bench, "mitigate", EXACT), b.ksampler())
    assert [trace.verdict for trace in first.runs[0]] == ["corrected"]
    assert copy_score(plain.images[0], EXACT) > 0.75 > copy_score(first.images[0], EXACT)
    (made,) = automatic_profiles.iterdir()
    before = made.read_bytes()
    (trace,) = finish(b := automatic(bench, "mitigate", ORDINARY), b.ksampler()).runs[0]
    assert (trace.verdict, trace.note) == ("stable", None)
    assert [path.read_bytes() for path in automatic_profiles.iterdir()] == [before]


def test_making_it_changes_no_image(bench: Any, finish: Any, automatic_profiles: Path) -> None:
    """Ancestral samplers draw noise while they sample."""
    plain = finish(b := bench(None), b.ksampler(sampler_name="euler_ancestral"))
    traced = finish(b := automatic(bench, "trace", EXACT), b.ksampler(sampler_name="euler_ancestral"))
    assert list(automatic_profiles.glob("*.safetensors"))
    assert np.array_equal(plain.images[0], traced.images[0])
    assert traced.runs[0][0].verdict == "likely copy"


def test_a_lora_has_a_profile_of_its_own_wherever_it_stands(bench: Any, finish: Any, automatic_profiles: Path) -> None:
    for number in (1, 2):
        b = automatic(bench, "trace", EXACT)
        result = finish(b, b.ksampler(model=b.lora()) if number == 2 else b.ksampler())
        assert result.runs[0][0].verdict == "likely copy"
        assert len(list(automatic_profiles.glob("*.safetensors"))) == number


def test_without_a_clip_it_says_what_to_connect(bench: Any, finish: Any) -> None:
    (trace,) = finish(b := bench("mitigate", profile=False), b.ksampler()).runs[0]
    assert trace.verdict == "unscored"
    assert trace.note.startswith(
        "There is no profile: nothing is judged, and mode mitigate does nothing. Connect the model's CLIP, and one is made "
        "before the first image; or connect a profile."
    )
