"""The console command: what it writes, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import jsonschema
import pytest
import torch
from PIL import Image

from memorization_guard import StabilityProfile, Trace, trace_schema
from memorization_guard.core.trace import STATEMENT
from memorization_guard.evidence import NO_SIGNATURE, SETTINGS_KEY, pixel_hash, png, record

pytest.importorskip("typer")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"caption": f"a red cat {i}"}) for i in range(9)), encoding="utf-8")
    return path


QUICK = ("--steps", 3, "--height", 16, "--width", 16, "--device", "cpu")


def test_calibrate_then_trace(call, model, prompts, tmp_path):
    profile = tmp_path / "tiny.safetensors"
    result = call("calibrate", model, "--prompts", prompts, "-o", profile, *QUICK)
    assert result.exit_code == 0, result.output
    assert "3 steps from 9 reference runs" in result.output
    assert StabilityProfile.load(profile).settings.model == "model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "prompts.jsonl", "tiny.safetensors"]

    files = {"--json": tmp_path / "t.json", "--plot": tmp_path / "t.svg", "--image": tmp_path / "t.png"}
    options = [part for pair in files.items() for part in pair]
    result = call("trace", model, "a <b>cat</b>", "--profile", profile, "--mode", "mitigate", *QUICK, *options)
    assert result.exit_code == 0, result.output
    data = json.loads(files["--json"].read_text())
    jsonschema.Draft202012Validator(trace_schema()).validate(data)
    assert f"verdict: {data['verdict']}" in result.output
    assert data["verdict"] in ("stable", "likely copy")
    ET.parse(files["--plot"])
    assert Image.open(files["--image"]).size == (16, 16)
    assert STATEMENT in result.output

    result = call("verify", files["--image"], "--json", tmp_path / "v.json", "--plot", tmp_path / "v.svg")
    assert result.exit_code == 0, result.output
    assert (
        "t.png: the trace belongs to this image\npixels: as recorded\nsettings: as recorded\ntrace: unaltered" in result.output
    )
    assert f"\nImage 1: {data['verdict']}" in result.output
    assert STATEMENT in result.output
    assert NO_SIGNATURE in result.output
    (shown,) = json.loads((tmp_path / "v.json").read_text())
    assert shown["steps"] == data["steps"]
    ET.parse(tmp_path / "v.svg")
    settings = json.loads(Image.open(files["--image"]).text[SETTINGS_KEY])
    assert (settings["prompt"], settings["seed"], settings["mode"]) == ("a <b>cat</b>", 0, "mitigate")


def test_without_a_profile_it_says_that_nothing_is_scored(call, model, tmp_path):
    result = call("trace", model, "a cat", "--plot", tmp_path / "t.png", *QUICK)
    assert result.exit_code == 0, result.output
    assert "verdict: unscored" in result.output
    assert "--profile auto" in result.output
    assert Image.open(tmp_path / "t.png").size == (640, 440)


def test_a_profile_that_does_not_fit_is_said(call, model, prompts, of_another_model, tmp_path):
    profile = tmp_path / "tiny.safetensors"
    call("calibrate", model, "--prompts", prompts, "-o", profile, *QUICK)
    for option, value in (("--guidance", 1), ("--width", 32)):
        result = call("trace", model, "a cat", "--profile", profile, *QUICK, option, value)
        assert result.exit_code == 0
        assert "verdict: unscored" not in result.output
    of_another_model(StabilityProfile.load(profile), profile)
    result = call("trace", model, "a cat", "--profile", profile, *QUICK)
    assert result.exit_code == 2
    assert "verdict: unscored" in result.output
    assert f"model hash: profile {'0' * 16}" in result.stderr


def one_line_error(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_what_a_user_can_get_wrong_ends_in_one_line_and_exit_code_2(call, model, prompts, tmp_path):
    missing, out = tmp_path / "missing", tmp_path / "out.safetensors"
    one_line_error(call("trace", missing, "a cat"), "no model at", "missing")
    (tmp_path / "empty").mkdir()
    one_line_error(call("trace", tmp_path / "empty", "a cat"), "no model_index.json")
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"x")
    one_line_error(call("trace", checkpoint, "a cat"), "no .safetensors file", "convert")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    one_line_error(call("trace", broken, "a cat"), "cannot be read as safetensors")
    one_line_error(call("trace", model, "a cat", "--profile", broken), "calibrate again")
    one_line_error(call("trace", model, "a cat", "--profile", missing), "no stability profile at")
    one_line_error(call("trace", model, "a cat", "--plot", tmp_path / "t.gif"), ".svg or .png")
    one_line_error(call("trace", model, "a cat", "--json", tmp_path / "no" / "t.json"), "does not exist")
    one_line_error(call("trace", model, "a cat", "--json", tmp_path), "is a folder")
    one_line_error(call("trace", model, "a cat", "--json", "/dev/null"), "no ordinary file")
    one_line_error(call("trace", model, "a cat", "--mode", "mitigate"), "needs a --profile")
    one_line_error(call("trace", model, "a cat", "--config", tmp_path / "empty"), "no model_index.json")
    one_line_error(call("calibrate", model, "--prompts", missing.with_suffix(".txt"), "-o", out), "no prompt list")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    one_line_error(call("calibrate", model, "--prompts", tmp_path / "bad.txt", "-o", out), "not UTF-8")
    (tmp_path / "few.txt").write_text("a\nb\n")
    one_line_error(call("calibrate", model, "--prompts", tmp_path / "few.txt", "-o", out), "at least 8")
    assert not out.exists()


@pytest.mark.parametrize("damage", ["no folder", "no vocabulary", "left out"])
def test_a_model_that_reads_no_prompt_is_refused(call, model, damage):
    if damage == "left out":
        index = json.loads((model / "model_index.json").read_text()) | {"tokenizer": [None, None]}
        (model / "model_index.json").write_text(json.dumps(index))
    else:
        for file in (model / "tokenizer").iterdir():
            if damage == "no folder" or "config" not in file.name:
                file.unlink()
        if damage == "no folder":
            (model / "tokenizer").rmdir()
    one_line_error(call("trace", model, "a cat", *QUICK), "reads no prompt: get the model again")


def test_more_steps_than_a_scheduler_has_are_one_line(call, model):
    for file in (model / "model_index.json", model / "scheduler" / "scheduler_config.json"):
        file.write_text(re.sub('"EulerDiscreteScheduler"|"DDIMScheduler"', '"PNDMScheduler"', file.read_text()))
    result = call("trace", model, "a cat", *QUICK, "--steps", 1000)
    one_line_error(result, "sampling failed", "the scheduler may not have so many --steps")


def test_a_model_whose_settings_are_nested_too_deep_is_refused(call, model):
    (model / "model_index.json").write_text("[" * 100_000 + "]" * 100_000)
    one_line_error(call("trace", model, "a cat", *QUICK), "nested too deep")


def test_a_list_whose_name_is_not_utf8_is_calibrated_with(call, model, prompts, tmp_path):
    named = prompts.rename(tmp_path / os.fsdecode(b"l\xe4nge.jsonl"))
    result = call("calibrate", model, "--prompts", named, "-o", tmp_path / "tiny.safetensors", *QUICK)
    assert result.exit_code == 0, result.output
    named.write_text("")
    one_line_error(
        call("calibrate", model, "--prompts", named, "-o", tmp_path / "b.safetensors", *QUICK), "nge.jsonl holds no"
    )


def test_a_profile_that_makes_itself(call, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("memorization_guard.automatic.PROMPTS", 20)
    for _ in range(2):
        result = call("trace", model, "a cat", "--profile", "auto", "--steps", 4, "--json", tmp_path / "trace.json")
        assert result.exit_code == 0
        assert Trace.from_dict(json.loads((tmp_path / "trace.json").read_text())).p_value is not None
        assert "not scored" not in result.output
    assert len(list((tmp_path / "memorization-guard" / "profiles").iterdir())) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(call, model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    one_line_error(call("trace", model, "a cat", "--json", tmp_path / "t.json", *QUICK), "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_interrupted_calibration_keeps_its_runs_and_says_where(call, model, prompts, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    original, calls = StableDiffusionPipeline.__call__, []

    def interrupt(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupt)
    result = call("calibrate", model, "--prompts", prompts, "-o", tmp_path / "p.safetensors", *QUICK)
    assert result.exit_code == 130
    assert "p.safetensors.partial.json" in result.stderr
    result = call("calibrate", model, "--prompts", prompts, "-o", tmp_path / "p.safetensors", *QUICK)
    assert result.exit_code == 0
    assert len(calls) == 2 + 2


@pytest.fixture
def carried(tmp_path):
    """A function that writes an image with the record of two runs of it."""

    def write(name="image.png", change=lambda image, record: None, **options):
        image = Image.new("RGB", (8, 8), "red")
        traces = [Trace(note="a \x1b[31mred\x1b[0m note"), Trace()]
        pixels = options.pop("pixels", [pixel_hash(image)])
        made = record(traces, pixels=pixels, settings=None, settings_in=None, runs=["", "hires"])
        change(image, made)
        path = tmp_path / name
        if path.suffix == ".png":
            path.write_bytes(png(image, made))
        else:
            image.save(path)
            path.with_suffix(".stability.json").write_text(json.dumps(made))
        return path

    return write


def test_verify_tells_what_was_changed(call, carried):
    result = call("verify", carried())
    assert result.exit_code == 0
    assert "settings: none were recorded" in result.output
    assert "Image 1: unscored.\na \ufffd[31mred\ufffd[0m note.\nImage 1, hires: unscored" in result.output

    result = call("verify", carried(change=lambda image, record: image.putpixel((0, 0), (254, 0, 0))))
    assert result.exit_code == 1
    assert "does NOT belong to this image as it is now\npixels: not those that the trace was recorded for" in result.output
    assert "trace: unaltered" in result.output

    result = call("verify", carried(change=lambda image, record: record["traces"][0].update(verdict="stable")))
    assert result.exit_code == 1
    assert "pixels: as recorded" in result.output
    assert "trace: altered since it was recorded" in result.output

    result = call("verify", carried("image.jpg"))
    assert result.exit_code == 3
    assert "cannot be told\npixels: this format may have changed them: not compared" in result.output
    assert "trace: unaltered, in image.stability.json" in result.output
    assert "pixels: none were recorded" in call("verify", carried(pixels=None)).output


def test_verify_says_in_one_line_what_a_user_can_get_wrong(call, carried, tmp_path):
    one_line_error(call("verify", tmp_path / "missing.png"), "there is no image at")
    one_line_error(call("verify", tmp_path), "there is no image at")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    one_line_error(call("verify", tmp_path / "plain.png"), "carries no trace")
    (tmp_path / "text.png").write_text("nonsense")
    one_line_error(call("verify", tmp_path / "text.png"), "cannot be read as an image")
    one_line_error(call("verify", carried(), "--plot", tmp_path / "t.gif"), ".svg or .png")
    newer = carried(change=lambda image, record: record.update(version="\x1b[31m2\n" * 100))
    one_line_error(call("verify", newer), "update it")


def test_help_answers_without_loading_torch():
    code = "import sys; sys.argv=['x','--help']\nimport memorization_guard.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
    code += "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert result.returncode == 0, result.stderr
    for command in ("demo", "calibrate", "trace", "evaluate", "verify"):
        assert command in result.stdout


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "memorization_guard", "trace", "/nowhere", "x"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("memorization-guard: there is no model at /nowhere")


def test_a_full_disk_at_the_end_of_a_calibration_keeps_its_runs(call, model, prompts, tmp_path, monkeypatch):
    output = tmp_path / "p.safetensors"

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(StabilityProfile, "save", full)
        one_line = call("calibrate", model, "--prompts", prompts, "-o", output, *QUICK)
    assert one_line.exit_code == 2
    assert "No space left" in one_line.stderr
    assert (tmp_path / "p.safetensors.partial.json").exists()
    assert call("calibrate", model, "--prompts", prompts, "-o", output, *QUICK).exit_code == 0
    assert not (tmp_path / "p.safetensors.partial.json").exists()


def test_a_checkpoint_is_loaded_offline_with_the_class_and_files_of_its_config(call, model, tmp_path, monkeypatch):
    """What diffusers makes of a checkpoint is its own business; here it is handed the right things."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({"weight": torch.zeros(2)}, checkpoint)
    seen = {}

    def load(cls, path, **keywords):
        seen.update(keywords, path=path)
        return StableDiffusionPipeline.from_pretrained(model)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", classmethod(load))
    result = call("trace", checkpoint, "a cat", "--config", model, *QUICK)
    assert result.exit_code == 0, result.output
    assert (seen["path"], seen["config"]) == (str(checkpoint), str(model))
    assert seen["local_files_only"] is True
    monkeypatch.undo()
    one_line_error(call("trace", checkpoint, "a cat"), "cannot be loaded", "--config FOLDER")
