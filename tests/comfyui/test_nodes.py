"""The nodes for profiles, and all nodes as the server tells of them, in the real ComfyUI."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import numpy as np
import pytest

from memorization_guard import StabilityProfile
from memorization_guard.lab import prompts

REFERENCES = prompts("reference")[:12]
EXACT = prompts("exact", "tuning")[:2]


@pytest.fixture
def calibration(graph: Any, server: Any) -> Any:
    while any(server.get("/queue").values()):  # what a refused prompt's valid part still does
        time.sleep(0.05)

    def make(texts: list[str] = REFERENCES, **changes: Any) -> Any:
        g = graph()
        g.lab = g.node("MemorizationGuardLoadLabModel")
        inputs = {
            "model": g.lab[0],
            "clip": g.lab[1],
            "prompts": "text below",
            "text": "\n".join(texts),
            "negative": "",
            "seed": 0,
            "steps": 8,
            "cfg": 7.5,
            "sampler_name": "euler",
            "scheduler": "normal",
            "width": 128,
            "height": 128,
            "batch_size": 5,
        }
        g.calibrate = g.node("MemorizationGuardCalibrate", **(inputs | changes))
        g.said = g.node("PreviewAny", source=g.calibrate[1])
        return g

    return make


def folder(server: Any) -> Any:
    return server.folder / "models" / "stability_profiles"


def test_a_profile_is_calibrated_saved_listed_and_loaded(calibration: Any, server: Any) -> None:
    g = calibration()
    g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name="lab 8 steps", overwrite=False)
    run = server.queue(g.prompt())
    run.wait()
    assert run.outputs(g.said)["text"] == ["Profile from 12 of 12 reference prompts."]
    profile = StabilityProfile.load(folder(server) / "lab 8 steps.safetensors")
    assert (profile.count, profile.steps, profile.settings.sampler, profile.settings.guidance_scale) == (12, 8, "euler", 7.5)
    assert profile.settings.latent_shape == (4, 16, 16)
    assert profile.settings.end_sigma == 0.0
    assert not list(folder(server).glob(".calibration*")), "the state is left behind"
    progress = [event.data for event in run.events if event.type == "progress" and event.data["node"] == g.calibrate.id]
    assert any(one["max"] == 12 for one in progress)

    info = server.object_info("MemorizationGuardLoadProfile")
    names = info["input"]["required"]["profile_name"]
    assert "lab 8 steps.safetensors" in json.dumps(names)

    # The same again does nothing.
    began = time.monotonic()
    again = server.queue(g.prompt())
    again.wait()
    assert time.monotonic() - began < 1.0
    assert not [event for event in again.events if event.type == "progress"]


def test_a_saved_profile_is_not_replaced_unless_that_is_wanted(calibration: Any, server: Any) -> None:
    g = calibration(steps=4)
    g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name="kept", overwrite=False)
    server.queue(g.prompt()).wait()
    content = (folder(server) / "kept.safetensors").read_bytes()
    for overwrite in (False, True):
        g = calibration(steps=5)
        g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name="kept", overwrite=overwrite)
        run = server.queue(g.prompt())
        if overwrite:
            run.wait()
        else:
            with pytest.raises(RuntimeError, match="choose another name, or switch 'overwrite' on"):
                run.wait()
            assert (folder(server) / "kept.safetensors").read_bytes() == content
    assert StabilityProfile.load(folder(server) / "kept.safetensors").steps == 5


@pytest.mark.parametrize("name", ["../escaped", "a/b", "a\\b", "", "  ", ".hidden", "CON", "x" * 200, "a\nb", "C:x"])
def test_a_name_is_never_a_path(calibration: Any, server: Any, name: str) -> None:
    g = calibration()
    g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name=name, overwrite=True)
    with pytest.raises(RuntimeError, match="cannot name a profile"):
        server.queue(g.prompt())


def test_a_calibration_goes_on_from_where_it_was_interrupted(calibration: Any, server: Any) -> None:
    texts = prompts("reference")[:40]
    g = calibration(texts, steps=20, batch_size=4, seed=77)
    run = server.queue(g.prompt())
    state = None
    while state is None or len(json.loads(state.read_text())["traces"]) < 8:
        time.sleep(0.02)
        state = next(folder(server).glob(".calibration-*.json"), None) if folder(server).is_dir() else None
    server.interrupt()
    with pytest.raises(RuntimeError, match="interrupted"):
        run.wait()
    kept = len(json.loads(state.read_text())["traces"])
    assert 8 <= kept < 40
    g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name="resumed", overwrite=True)
    run = server.queue(g.prompt())
    run.wait()
    begun = [event.data["value"] for event in run.events if event.type == "progress" and event.data["max"] == 40]
    assert min(begun) >= kept
    assert not state.exists()

    server.free(unload_models=False, free_memory=True)
    g.node("MemorizationGuardSaveProfile", profile=g.calibrate[0], name="whole", overwrite=True)
    server.queue(g.prompt()).wait()
    resumed, whole = (StabilityProfile.load(folder(server) / f"{name}.safetensors") for name in ("resumed", "whole"))
    assert np.allclose(resumed.mean, whole.mean, rtol=1e-5)
    assert np.allclose(resumed.std, whole.std, rtol=1e-3)


def test_a_memorized_reference_prompt_is_left_out_and_named(calibration: Any, server: Any) -> None:
    memorized = prompts("exact", "tuning")[0]
    run = server.queue((g := calibration([*prompts("reference")[:99], memorized], steps=10, batch_size=10)).prompt())
    run.wait(300)
    (said,) = run.outputs(g.said)["text"]
    assert said.startswith("Profile from 99 of 100 reference prompts.")
    assert f"Left out: {memorized!r}: the model seems to have memorized it." in said


def test_prompts_come_from_a_file_or_the_built_in_list(calibration: Any, server: Any) -> None:
    (server.folder / "input" / "mine.txt").write_text("\n".join(REFERENCES[:9]), encoding="utf-8")
    options = json.dumps(server.object_info("MemorizationGuardCalibrate")["input"]["required"]["prompts"])
    assert "mine.txt" in options
    assert "built-in list" in options
    run = server.queue((g := calibration(prompts="mine.txt", steps=4)).prompt())
    run.wait()
    assert "9 of 9" in run.outputs(g.said)["text"][0]
    run = server.queue((g := calibration(prompts="built-in list", steps=2, batch_size=16)).prompt())
    run.wait()
    assert "400 of 400 reference prompts" in run.outputs(g.said)["text"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": REFERENCES[:5]}, "5 reference prompts: give at least 8"),
        ({"sampler_name": "dpm_adaptive"}, r"5 usable reference runs, .*left out \(other noise levels\)"),
    ],
)
def test_what_gives_no_profile_is_said(calibration: Any, server: Any, changes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        server.queue(calibration(**changes).prompt()).wait()


def test_a_guarded_model_is_not_calibrated(calibration: Any, server: Any) -> None:
    g = calibration()
    guard = g.node("MemorizationGuard", model=g.lab[0], mode="mitigate", profile=g.lab[3])
    prompt = g.prompt()
    prompt[g.calibrate.id]["inputs"]["model"] = guard[0]
    with pytest.raises(RuntimeError, match="connect the model as it is before Memorization Guard"):
        server.queue(prompt).wait()


def test_a_damaged_profile_is_named(graph: Any, server: Any) -> None:
    folder(server).mkdir(parents=True, exist_ok=True)
    (folder(server) / "damaged.safetensors").write_bytes(b"not a profile")
    g = graph()
    g.lab = g.node("MemorizationGuardLoadLabModel")
    profile = g.node("MemorizationGuardLoadProfile", profile_name="damaged.safetensors")
    guard = g.node("MemorizationGuard", model=g.lab[0], mode="trace", profile=profile[0])
    g.node("PreviewAny", source=guard[1])
    with pytest.raises(RuntimeError, match=r"damaged\.safetensors cannot be read as a stability profile"):
        server.queue(g.prompt()).wait()


def test_profiles_of_other_folders_are_found(in_comfyui: Any, tmp_path: Any) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "theirs.safetensors").write_bytes(b"")
    (other / "notes.txt").write_text("no profile", encoding="utf-8")
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(f"ours:\n  stability_profiles: {other}\n", encoding="utf-8")
    source = """
import folder_paths
result["names"] = folder_paths.get_filename_list("stability_profiles")
result["folders"] = folder_paths.get_folder_paths("stability_profiles")
"""
    found = in_comfyui(source, flags=("--extra-model-paths-config", str(paths)))
    assert found["names"] == ["theirs.safetensors"]
    assert str(other) in found["folders"]
    assert len(found["folders"]) == 2


def test_the_pack_loads_fast_and_adds_no_warning(server: Any) -> None:
    start = server.log().partition("To see the GUI go to")[0]
    seconds = re.search(r"([\d.]+) seconds: .*memorization-guard", start)
    assert seconds is not None
    assert float(seconds[1]) < 1.0
    said = [line for line in start.splitlines() if "emorization" in line and "seconds:" not in line]
    assert said == []


def test_every_input_and_node_explains_itself(server: Any) -> None:
    names = [name for name in server.object_info() if name.startswith("MemorizationGuard")]
    assert len(names) == 9
    for name in names:
        info = server.object_info(name)
        assert info["category"] == "memorization guard"
        assert info["description"]
        for inputs in (info["input"].get("required", {}), info["input"].get("optional", {})):
            for key, (_, *options) in inputs.items():
                assert options, (name, key)
                assert options[0].get("tooltip"), (name, key)
        assert all(info["output_tooltips"]), name
