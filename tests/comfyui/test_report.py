"""The report and the gate, in the real ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from memorization_guard import Trace, evidence
from memorization_guard.lab import prompts

EXACT, ORDINARY = prompts("exact", "tuning")[0], prompts("ordinary", "tuning")[0]


@pytest.fixture
def batch(graph: Any) -> Any:
    """One batch of a memorized and an ordinary prompt, decoded."""

    def make(mode: str = "trace", profile: bool = True, texts: tuple[str, ...] = (EXACT, ORDINARY), clip: bool = False) -> Any:
        g = graph()
        g.lab = lab = g.node("MemorizationGuardLoadLabModel")
        given = ({"profile": lab[3]} if profile else {}) | ({"clip": lab[1]} if clip else {})
        g.guard = g.node("MemorizationGuard", model=lab[0], mode=mode, **given)
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
        assert drawn.size == (640, 440)


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
        assert before.shape == after.shape == (128, 128, 3)
        reds.append(float((after[..., 0] - after[..., 2]).mean()))
    assert reds[0] > reds[1] + 10
    assert reds[1] < 20


def test_an_image_without_a_map_goes_through_unchanged(batch: Any, server: Any) -> None:
    g = batch(profile=False, texts=(EXACT,))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=g.images[0])
    shown = [g.node("PreviewImage", images=report[output]) for output in (1, 6)]
    run = server.queue(g.prompt())
    run.wait()
    plain, mapped = (np.asarray(run.images(node)[0]) for node in shown)
    assert np.array_equal(plain, mapped)


def test_two_runs_of_one_image_are_two_rows_of_its_graph(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT,))
    again = g.node("KSampler", **(g.settings | {"latent_image": g.latents[0], "denoise": 0.5}))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=again[0])
    picture = g.node("PreviewImage", images=report[5])
    run = server.queue(g.prompt())
    run.wait()
    assert [len(entry["traces"]) for entry in run.outputs(report)["memorization_guard"]] == [1, 1]
    assert run.images(picture)[0].size == (640, 880)


def saved(run: Any, node: Any, folder: Path) -> list[Path]:
    """The files that Save Image or Preview Image wrote, under ComfyUI's folder."""
    return [folder / place["type"] / place["subfolder"] / place["filename"] for place in run.outputs(node)["images"]]


def test_the_evidence_belongs_to_every_image_of_a_batch_and_to_no_other(batch: Any, server: Any, tmp_path: Path) -> None:
    g = batch(texts=(EXACT,))
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
    g = batch(texts=(EXACT,))
    sampler = g.node("KSampler", **(g.settings | {"steps": 8, "seed": 79}))
    report = g.node("MemorizationGuardReport", trace=g.guard[1], latent=sampler[0])
    image = g.node("VAEDecode", samples=report[0], vae=g.lab[2])
    save = g.node("SaveImage", images=image[0], filename_prefix="evidence")
    run = server.queue(g.prompt(), {"extra_pnginfo": {}})
    run.wait()
    found = evidence.verify(saved(run, save, server.folder)[0])
    assert (found.pixels, found.settings, found.belongs, len(found.traces)) == ("unknown", "match", "unknown", 1)


def gate(g: Any, image: Any, **changes: Any) -> tuple[Any, Any, Any]:
    inputs = {"when_empty": "block", "pass_unscored": False, "pass_corrected": "none"}
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
    g = batch(texts=(EXACT,))
    save, count, _ = gate(g, g.images[0], when_empty="placeholder")
    run = server.queue(g.prompt())
    run.wait()
    (image,) = run.images(save)
    assert len(np.unique(np.asarray(image))) == 1
    assert run.outputs(count)["text"] == ["1"]


def test_what_could_not_be_judged_passes_where_that_is_wanted(batch: Any, server: Any) -> None:
    g = batch(profile=False, texts=(EXACT,))
    shut, opened = gate(g, g.images[0]), gate(g, g.images[0], pass_unscored=True)
    run = server.queue(g.prompt())
    run.wait()
    assert run.outputs(shut[0]) == {}
    assert len(run.images(opened[0])) == 1


@pytest.mark.parametrize("clip", [True, False])
def test_a_corrected_image_passes_if_an_ordinary_prompt_was_left_of_its_own(batch: Any, server: Any, clip: bool) -> None:
    """Without the CLIP it is steered, and nothing tells whether it is a copy still."""
    g = batch("mitigate", texts=(EXACT,), clip=clip)
    gates = [gate(g, g.images[0], pass_corrected=which) for which in ("none", "without the words", "all")]
    run = server.queue(g.prompt())
    run.wait()
    saved = [run.outputs(save) != {} for save, _, _ in gates]
    assert saved == [False, clip, True]
    assert "and was corrected" in run.outputs(gates[0][2])["text"][0]


def test_a_report_that_no_run_led_to_says_so_and_loses_no_image(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT,))
    empty = g.node("EmptyImage", width=64, height=64, batch_size=2, color=0)
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=empty[0])
    save = g.node("SaveImage", images=report[1], filename_prefix="t")
    run = server.queue(g.prompt())
    run.wait()
    assert len(run.images(save)) == 2
    assert "No run of a guard led here" in run.outputs(report)["memorization_guard"][0]["traces"][0]["note"]


def test_a_report_without_anything_to_report_on_is_refused(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT,))
    g.node("MemorizationGuardReport", trace=g.guard[1])
    with pytest.raises(RuntimeError, match="connect the sampler's latent"):
        server.queue(g.prompt()).wait()


def test_runs_of_an_earlier_prompt_are_not_taken_for_those_of_this_one(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT,))
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
    assert "No run of a guard led here" in entry["traces"][0]["note"]


def test_a_report_added_later_finds_the_run_that_a_cached_sampler_made(batch: Any, server: Any) -> None:
    g = batch(texts=(EXACT,))
    g.node("PreviewImage", images=g.images[0])
    server.queue(g.prompt()).wait()
    report = g.node("MemorizationGuardReport", trace=g.guard[1], image=g.images[0])
    run = server.queue(g.prompt())
    run.wait()
    assert not [event for event in run.events if event.type == "memorization_guard"], "the sampler ran again"
    assert run.outputs(report)["memorization_guard"][0]["traces"][0]["verdict"] == "likely copy"


def test_a_bypassed_guard_fails_nothing_and_is_said(batch: Any, server: Any) -> None:
    """ComfyUI hands the model on, and leaves the trace unconnected."""
    g = batch(texts=(EXACT,))
    sampled = g.node("KSampler", **{**g.settings, "model": g.lab[0]})[0]
    image = g.node("VAEDecode", samples=sampled, vae=g.lab[2])[0]
    report = g.node("MemorizationGuardReport", latent=sampled, image=image)
    gate = g.node("MemorizationGuardGate", image=report[1], when_empty="block", pass_unscored=False, pass_corrected="none")
    stable, held, why = (g.node("PreviewAny", source=source) for source in (report[2], gate[1], gate[2]))
    run = server.queue(g.prompt())
    run.wait()
    assert "It may be bypassed" in run.outputs(report)["memorization_guard"][0]["traces"][0]["note"]
    assert (run.outputs(stable)["text"], run.outputs(held)["text"]) == (["False"], ["1"])
    assert "not judged" in run.outputs(why)["text"][0]
