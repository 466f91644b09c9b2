"""The nodes for profiles, the report and the gate, in the real ComfyUI."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from memorization_guard import StabilityProfile, Trace, evidence
from memorization_guard.lab import prompts

REFERENCES = prompts("reference")[:12]
EXACT, ORDINARY = prompts("exact", "tuning")[:2], prompts("ordinary", "tuning")[:2]


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
    run = server.queue((g := calibration([*prompts("reference")[:30], memorized], steps=30, batch_size=8)).prompt())
    run.wait()
    (said,) = run.outputs(g.said)["text"]
    assert said.startswith("Profile from 30 of 31 reference prompts.")
    assert memorized in said
    assert "outlier" in said


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
    assert "64 reference prompts" in run.outputs(g.said)["text"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": REFERENCES[:5]}, "5 reference prompts: give at least 8"),
        ({"sampler_name": "dpm_fast"}, "dpm_fast keeps to no fixed schedule"),
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


# Report and gate


@pytest.fixture
def batch(graph: Any) -> Any:
    """One batch of a memorized and an ordinary prompt, decoded."""

    def make(mode: str = "trace", profile: bool = True, texts: tuple[str, ...] = (EXACT[1], ORDINARY[0])) -> Any:
        g = graph()
        g.lab = lab = g.node("MemorizationGuardLoadLabModel")
        g.guard = g.node("MemorizationGuard", model=lab[0], mode=mode, **({"profile": lab[3]} if profile else {}))
        latents = []
        for text in texts:
            positive, negative = (g.node("CLIPTextEncode", clip=lab[1], text=t)[0] for t in (text, ""))
            empty = g.node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
            g.settings = {
                "model": g.guard[0],
                "positive": positive,
                "negative": negative,
                "latent_image": empty,
                "seed": 5,
                "steps": 30,
                "cfg": 7.5,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            }
            latents.append(g.node("KSampler", **g.settings)[0])
        g.latents = latents
        g.images = [g.node("VAEDecode", samples=latent, vae=lab[2])[0] for latent in latents]
        return g

    return make


def test_the_report_judges_its_own_samplers_images_and_draws_them(batch: Any, server: Any) -> None:
    g = batch()
    rows = []
    for latent in g.latents:
        report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=latent)
        texts = [g.node("PreviewAny", source=report[i]) for i in (2, 3, 4)]
        rows.append((report, *texts, g.node("PreviewImage", images=report[5])))
    run = server.queue(g.prompt())
    run.wait()
    for (report, stable, score, trace, picture), expected in zip(rows, ("likely copy", "stable"), strict=True):
        assert run.outputs(stable)["text"] == [str(expected == "stable")]
        entries = json.loads(run.outputs(trace)["text"][0])
        assert entries == run.outputs(report)["memorization_guard"]
        (one,) = entries[0]["traces"]
        assert Trace.from_dict(one).verdict == expected
        assert float(run.outputs(score)["text"][0]) == pytest.approx(one["score"], rel=1e-4)
        (drawn,) = run.images(picture)
        assert drawn.size == (640, 300)


def test_the_map_is_laid_over_the_image_and_shows_a_copy_more_than_an_ordinary_image(batch: Any, server: Any) -> None:
    g = batch()
    rows = []
    for image in g.images:
        report = g.node("MemorizationGuardReport", trace=g.guard[1], image=image)
        rows.append((g.node("PreviewImage", images=report[1]), g.node("PreviewImage", images=report[6])))
    run = server.queue(g.prompt())
    run.wait()
    reds = []
    for plain, mapped in rows:
        before, after = (np.asarray(run.images(node)[0].convert("RGB"), dtype=int) for node in (plain, mapped))
        assert before.shape == after.shape == (64, 64, 3)
        reds.append(float((after[..., 0] - after[..., 2]).mean()))
    assert reds[0] > reds[1] + 10
    assert reds[1] < 20


def test_an_image_without_a_map_goes_through_unchanged(batch: Any, server: Any) -> None:
    g = batch(profile=False, texts=(EXACT[1],))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=g.images[0])
    shown = [g.node("PreviewImage", images=report[output]) for output in (1, 6)]
    run = server.queue(g.prompt())
    run.wait()
    plain, mapped = (np.asarray(run.images(node)[0]) for node in shown)
    assert np.array_equal(plain, mapped)


def test_two_runs_of_one_image_are_two_rows_of_its_graph(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    again = g.node("KSampler", **(g.settings | {"latent_image": g.latents[0], "denoise": 0.5}))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=again[0])
    picture = g.node("PreviewImage", images=report[5])
    run = server.queue(g.prompt())
    run.wait()
    assert [len(entry["traces"]) for entry in run.outputs(report)["memorization_guard"]] == [1, 1]
    assert run.images(picture)[0].size == (640, 600)


def saved(run: Any, node: Any, folder: Path) -> list[Path]:
    """The files that Save Image or Preview Image wrote, under ComfyUI's folder."""
    return [folder / place["type"] / place["subfolder"] / place["filename"] for place in run.outputs(node)["images"]]


def test_the_evidence_belongs_to_every_image_of_a_batch_and_to_no_other(batch: Any, server: Any, tmp_path: Path) -> None:
    g = batch(texts=(EXACT[1],))
    g.settings |= {"steps": 8, "seed": 77}
    several = g.node("RepeatLatentBatch", samples=g.settings["latent_image"], amount=3)
    samplers = [g.node("KSampler", **(g.settings | changes)) for changes in ({"latent_image": several[0]}, {"seed": 78})]
    decoded = [g.node("VAEDecode", samples=sampler[0], vae=g.lab[2]) for sampler in samplers]
    reports = [g.node("MemorizationGuardReport", trace=g.guard[1], image=image[0]) for image in decoded]
    saves = [g.node("SaveImage", images=report[1], filename_prefix="evidence") for report in reports]
    # Passed on so that this Save Image writes the records of both reports.
    late = g.node("SaveImage", images=g.node("ImageBatch", image1=reports[1][1], image2=reports[0][1])[0], filename_prefix="e")
    run = server.queue(g.prompt(), {"extra_pnginfo": {}})
    run.wait()
    files = saved(run, saves[0], server.folder)
    assert len(files) == 3
    for number, file in enumerate(files):
        found = evidence.verify(file)
        assert (found.pixels, found.settings, found.unaltered, found.belongs) == ("match", "match", True, "match")
        assert (found.image, found.batch, found.runs) == (number, 3, (f"sampler {samplers[0].id}",))
    assert evidence.verify(saved(run, saves[1], server.folder)[0]).runs == (f"sampler {samplers[1].id}",)
    places = [(found.image, found.batch) for found in map(evidence.verify, saved(run, late, server.folder))]
    assert places == [(0, 1), (0, 3), (1, 3), (2, 3)]

    call = [sys.executable, "-m", "memorization_guard", "verify"]
    told = subprocess.run([*call, files[1]], capture_output=True, text=True, check=True)
    assert "image 2 of a batch of 3\nImage 2, sampler" in told.stdout
    with Image.open(files[1]) as image:
        text = PngInfo()
        for name, value in image.text.items():
            text.add_text(name, value)
        red, green, blue = image.getpixel((3, 3))
        image.putpixel((3, 3), (red ^ 1, green, blue))
        image.save(tmp_path / "changed.png", pnginfo=text)
    told = subprocess.run([*call, tmp_path / "changed.png"], capture_output=True, text=True)
    assert told.returncode == 1, told.stdout + told.stderr
    assert "does NOT belong" in told.stdout


def test_without_an_image_the_evidence_says_that_pixels_are_not_known(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    sampler = g.node("KSampler", **(g.settings | {"steps": 8, "seed": 79}))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=sampler[0])
    image = g.node("VAEDecode", samples=report[0], vae=g.lab[2])
    save = g.node("SaveImage", images=image[0], filename_prefix="evidence")
    run = server.queue(g.prompt(), {"extra_pnginfo": {}})
    run.wait()
    found = evidence.verify(saved(run, save, server.folder)[0])
    assert (found.pixels, found.settings, found.belongs, len(found.traces)) == ("unknown", "match", "unknown", 1)


def gate(g: Any, image: Any, **changes: Any) -> tuple[Any, Any, Any]:
    inputs = {"when_empty": "block", "pass_unscored": False, "pass_corrected": False}
    node = g.node("MemorizationGuardGate", image=image, trace=g.guard[1], **(inputs | changes))
    save = g.node("SaveImage", images=node[0], filename_prefix="gated")
    return save, g.node("PreviewAny", source=node[1]), g.node("PreviewAny", source=node[2])


def test_the_gate_passes_what_is_stable_and_blocks_the_rest(batch: Any, server: Any) -> None:
    g = batch()
    held, passed = (gate(g, image) for image in g.images)
    run = server.queue(g.prompt())
    run.wait()
    assert run.images(passed[0])
    assert run.outputs(passed[1])["text"] == ["0"]
    assert run.outputs(held[0]) == {}
    assert run.outputs(held[1])["text"] == ["1"]
    assert "likely copy, triggered at step 0" in run.outputs(held[2])["text"][0]


def test_a_placeholder_stands_for_what_is_held_back(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    save, count, _ = gate(g, g.images[0], when_empty="placeholder")
    run = server.queue(g.prompt())
    run.wait()
    (image,) = run.images(save)
    assert len(np.unique(np.asarray(image))) == 1
    assert run.outputs(count)["text"] == ["1"]


@pytest.mark.parametrize(("mode", "switch"), [("trace", "pass_unscored"), ("mitigate", "pass_corrected")])
def test_what_the_gate_lets_through_is_a_switch(batch: Any, server: Any, mode: str, switch: str) -> None:
    g = batch(mode, profile=mode == "mitigate", texts=(EXACT[1],))
    shut, opened = gate(g, g.images[0]), gate(g, g.images[0], **{switch: True})
    run = server.queue(g.prompt())
    run.wait()
    assert run.outputs(shut[0]) == {}
    assert len(run.images(opened[0])) == 1


def test_a_report_that_no_run_led_to_says_so_and_loses_no_image(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    empty = g.node("EmptyImage", width=64, height=64, batch_size=2, color=0)
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=empty[0])
    save = g.node("SaveImage", images=report[1], filename_prefix="t")
    run = server.queue(g.prompt())
    run.wait()
    assert len(run.images(save)) == 2
    assert "No run of this guard led here" in run.outputs(report)["memorization_guard"][0]["traces"][0]["note"]


def test_a_report_without_anything_to_report_on_is_refused(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    g.node("MemorizationGuardReport", trace=g.guard[1])
    with pytest.raises(RuntimeError, match="connect the sampler's latent"):
        server.queue(g.prompt()).wait()


def test_runs_of_an_earlier_prompt_are_not_taken_for_those_of_this_one(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=g.latents[0])
    prompt = g.prompt()
    run = server.queue(prompt)
    run.wait()
    assert run.outputs(report)["memorization_guard"][0]["sampler_node"] == g.latents[0][0]

    # The sampler is given the unguarded model: its node is the same, the run is not.
    prompt[g.latents[0][0]]["inputs"]["model"] = g.lab[0]
    run = server.queue(prompt)
    run.wait()
    (entry,) = run.outputs(report)["memorization_guard"]
    assert entry["sampler_node"] is None
    assert "No run of this guard led here" in entry["traces"][0]["note"]


def test_a_report_added_later_finds_the_run_that_a_cached_sampler_made(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT[1],))
    g.node("PreviewImage", images=g.images[0])
    server.queue(g.prompt()).wait()
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=g.images[0])
    run = server.queue(g.prompt())
    run.wait()
    assert not [event for event in run.events if event.type == "memorization_guard"], "the sampler ran again"
    assert run.outputs(report)["memorization_guard"][0]["traces"][0]["verdict"] == "likely copy"


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
    assert len(names) == 7
    for name in names:
        info = server.object_info(name)
        assert info["category"] == "memorization guard"
        assert info["description"]
        for inputs in (info["input"].get("required", {}), info["input"].get("optional", {})):
            for key, (_, *options) in inputs.items():
                assert options, (name, key)
                assert options[0].get("tooltip"), (name, key)
        assert all(info["output_tooltips"]), name
