"""Profiles that make themselves, in the real hosts: the first image with a model is judged, and nothing else of it changes."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from memorization_guard import lab
from memorization_guard.automatic import AUTO

EXACT, ORDINARY = lab.prompts("exact", "tuning")[0], lab.prompts("ordinary", "tuning")[0]


@pytest.fixture
def folder(host):
    folder = host.data / "models/stability_profiles" / AUTO
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def made(folder):
    return list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("path", ["txt2img", "img2img"])
def test_the_first_image_is_judged_and_is_what_it_would_have_been(host, folder, path):
    # Samplers that draw nothing by themselves leave other random numbers than the profile's do.
    settings = {"path": path, "sampler_name": "Euler a" if path == "txt2img" else "DPM++ 2M", "steps": 8}
    if path == "img2img":
        settings["init_images"] = host.ask("/sdapi/v1/txt2img", {**host.usual, "seed": 5})["images"]
        host.make(**settings)  # to encode an image the host draws from a generator that the run before it has seeded
    before = host.make(**settings)
    first = host.make("trace", AUTO, **settings)
    assert first.pixels == before.pixels
    assert first.trace.p_value is not None
    assert first.trace.note is None
    assert first.info["extra_generation_params"]["Memorization Guard profile"] == AUTO
    (profile,) = made(folder)
    written = profile.read_bytes()
    again = host.make("trace", AUTO, **settings)
    assert again.trace.p_value == first.trace.p_value
    assert made(folder) == [profile]
    assert profile.read_bytes() == written


def test_a_copy_is_found_out_and_mitigated_without_calibrating(webui, folder):
    plain = webui.make(prompt=EXACT, steps=20)
    mitigated = webui.make("mitigate", AUTO, prompt=EXACT, steps=20)
    assert mitigated.trace.verdict == "corrected"
    score = [lab.copy_score(answer.images[0], EXACT) for answer in (plain, mitigated)]
    assert score[0] > lab.COPY_THRESHOLD > score[1]
    ordinary = webui.make("mitigate", AUTO, prompt=ORDINARY, steps=20)
    assert ordinary.trace.verdict == "stable"
    assert ordinary.pixels == webui.make(prompt=ORDINARY, steps=20).pixels


def test_skipping_it_makes_the_image_and_says_that_it_was_not_judged(host, folder):
    before, ended = host.make(), {}
    thread = threading.Thread(target=lambda: ended.update(answer=host.make("mitigate", AUTO)))
    thread.start()
    deadline = time.monotonic() + 120
    while not any(folder.glob(".calibration-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    host.ask("/sdapi/v1/skip", {})
    thread.join()
    assert made(folder) == []
    assert ended["answer"].pixels == before.pixels
    assert "nothing is judged, and mode mitigate does nothing" in ended["answer"].trace.note
    # The next one goes on from there.
    assert host.make("mitigate", AUTO).trace.p_value is not None
    assert len(made(folder)) == 1


def test_the_dropdown_takes_it_too(host, folder):
    assert host.script("mitigate", AUTO).trace.p_value is not None
    assert len(made(folder)) == 1
