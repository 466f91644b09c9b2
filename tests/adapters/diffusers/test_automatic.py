"""Profiles that make themselves: once for each set of weights, kept, gone on with, and never in the way of an image."""

from __future__ import annotations

import os

import pytest
import torch

from memorization_guard import automatic
from memorization_guard.adapters.diffusers import sample_references
from memorization_guard.automatic import AutomaticProfiles, user_folder
from memorization_guard.diffusers import guard

from .conftest import images_of


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A folder of its own, and a fifth of the prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(automatic, "PROMPTS", 20)
    monkeypatch.setattr(automatic, "STEPS", 3)


@pytest.fixture
def profiles(tmp_path):
    return AutomaticProfiles(tmp_path / "own")


def sampling(pipe, asked):
    """Samples with a pipeline, and writes down what for."""

    def sample(prompts, seed, serves):
        asked.append((len(prompts), seed, serves))
        return sample_references(pipe, prompts, seed, serves, num_inference_steps=3, height=16, width=16)

    return sample


def test_it_is_made_once_and_found_for_the_same_weights_alone(tiny_pipe, profiles):
    asked, seen = [], []
    profiles.make("weights", sampling(tiny_pipe, asked), lambda done, of: seen.append((done, of)))
    assert asked == [(4, 0, "whole"), (4, 4, "whole"), (2, 8, "whole"), (4, 10, "first"), (4, 14, "first"), (2, 18, "first")]
    assert seen == [(0, 20), (4, 20), (8, 20), (10, 20), (14, 20), (18, 20), (20, 20)]
    profile, missing = profiles.find("weights")
    assert missing is None
    assert (profile.count, profile.reference.count, len(profile.reference.asked)) == (10, 20, 20)
    profiles.make("weights", sampling(tiny_pipe, asked))
    assert len(asked) == 6
    assert AutomaticProfiles(profiles.folder).find("weights")[0] is not None
    assert profiles.find("others") == (None, "None has been made yet: see the log.")
    assert [path.suffix for path in profiles.folder.iterdir()] == [".safetensors"]


def test_one_that_was_cancelled_goes_on_and_draws_from_no_generator(tiny_pipe, profiles):
    asked = []
    sample = sampling(tiny_pipe, asked)

    def cancelled(prompts, seed, serves):
        if seed == 8:
            raise KeyboardInterrupt
        torch.manual_seed(1)
        return sample(prompts, seed, serves)

    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        profiles.make("weights", cancelled)
    assert profiles.find("weights") == (None, "None has been made yet: see the log.")
    profiles.make("weights", sample)
    assert [seed for _, seed, _ in asked] == [0, 4, 8, 10, 14, 18]
    drawn = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(3))


def test_one_that_failed_says_why_and_is_not_tried_again(profiles):
    tried = []

    def failing(prompts, seed, serves):
        tried.append(seed)
        raise ValueError("a tensor too many")

    for _ in range(2):
        profiles.make("weights", failing)
    assert tried == [0]
    assert profiles.find("weights") == (
        None,
        "None could be made of this model by itself (a tensor too many): calibrate one.",
    )
    assert "no fingerprint" in profiles.find(None)[1]


def test_without_memory_for_a_batch_it_is_halved(tiny_pipe, profiles):
    asked = []
    sample = sampling(tiny_pipe, asked)

    def small_device(prompts, seed, serves):
        if len(prompts) > 1:
            raise torch.cuda.OutOfMemoryError
        return sample(prompts, seed, serves)

    profiles.make("weights", small_device)
    assert {count for count, _, _ in asked} == {1}
    assert profiles.find("weights")[0].reference.count == 20

    def none(*_):
        raise torch.cuda.OutOfMemoryError

    profiles.make("others", none)
    assert "no memory" in profiles.find("others")[1]


def test_those_used_longest_ago_are_swept(tiny_pipe, profiles, monkeypatch):
    monkeypatch.setattr(automatic, "KEPT", 2)
    for number, weights in enumerate("abc"):
        profiles.make(weights, sampling(tiny_pipe, []))
        for path in profiles.folder.glob("*.safetensors"):
            os.utime(path, (number, number))
        profiles.find("a")  # is used all the time
    assert [profiles.find(weights)[0] is not None for weights in "abc"] == [True, False, True]


def test_one_of_another_format_is_made_anew(tiny_pipe, profiles):
    profiles.make("weights", sampling(tiny_pipe, []))
    (path,) = profiles.folder.iterdir()
    path.write_bytes(b"of another version")
    assert profiles.find("weights")[0] is None
    profiles.make("weights", sampling(tiny_pipe, []))
    assert profiles.find("weights")[0] is not None


def test_guard_takes_it_and_later_blocks_find_it(tiny_pipe):
    plain = images_of(tiny_pipe, seeds=(3,))
    with guard(tiny_pipe, "auto") as run:
        images = images_of(tiny_pipe, seeds=(3,))
    assert (images == plain).all()
    assert run.traces[0].p_value is not None
    assert run.traces[0].note is None
    (made,) = user_folder().iterdir()
    written = made.stat().st_ino
    with guard(tiny_pipe, "auto") as run:
        images_of(tiny_pipe)
    assert run.traces[0].p_value is not None
    assert made.stat().st_ino == written


def test_a_pipeline_that_wants_more_than_a_prompt_says_so_and_makes_its_image(tiny_pipe):
    import diffusers

    other = diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    start = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with guard(other, "auto", "mitigate") as run:
        assert len(images_of(other, image=start, strength=1.0, height=None, width=None)) == 1
    (trace,) = run.traces
    assert trace.verdict == "unscored"
    assert "nothing is judged, and mode mitigate does nothing" in trace.note
    assert "StableDiffusionImg2ImgPipeline could not be called with prompts alone" in trace.note
    # It finds the profile that a text-to-image pipeline of the same weights makes.
    with guard(tiny_pipe, "auto"):
        pass
    with guard(other, "auto") as run:
        images_of(other, image=start, strength=1.0, height=None, width=None)
    assert run.traces[0].p_value is not None
