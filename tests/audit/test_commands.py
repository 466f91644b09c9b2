"""The commands audit, report and compare: what they write, and what they say when something is wrong."""

import copy
import errno
import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
import torch
from safetensors.torch import save_file

from memorization_guard.audit.dataset import read_manifest
from memorization_guard.audit.worker import Worker


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.txt"
    path.write_text("".join(f"a red cat {letter}\n" for letter in "abcdefghi"))
    return path


QUICK = ("--steps", 2, "--height", 16, "--width", 16, "--device", "cpu")


def test_audit_report_and_compare(call, model, prompts, reference, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    result = call("audit", model, prompts, "-o", first, "--reference", reference, "--seeds-per-prompt", 2, *QUICK)
    assert result.exit_code == 0, result.output
    assert "images, cat" in result.output
    assert "report.html shows the worst prompts" in result.output
    again = call("audit", model, prompts, "-o", first, "--reference", reference, "--seeds-per-prompt", 2, *QUICK)
    assert again.exit_code == 0, again.output
    assert "is finished: nothing was left to do" in again.output

    options = ("--profile", first / "profile.safetensors", "--seeds-per-prompt", 2, "--false-positive-rate", 0.5)
    assert call("audit", model, prompts, "-o", second, *options, *QUICK).exit_code == 0
    result = call("compare", first, second, "-o", tmp_path / "compare.html")
    assert result.exit_code == 0, result.output
    assert "18 images of 9 prompts that are in both" in result.output
    assert "became memorized: a red cat" in result.output
    assert "false positive rate" in result.stderr
    assert "a red cat" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert call("compare", first, second, "-o", tmp_path / "compare.json").exit_code == 0
    assert json.loads((tmp_path / "compare.json").read_text())["pairs"]["images"] == 18

    (first / "report.html").unlink()
    result = call("report", first)
    assert result.exit_code == 0, result.output
    assert (first / "report.html").exists()


def test_loras_are_merged_and_are_part_of_what_was_audited(call, model, prompts, reference, tiny_pipe, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = copy.deepcopy(tiny_pipe.unet)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="style.safetensors")
    lora = tmp_path / "style.safetensors"

    def hashes(folder, *loras):
        result = call("audit", model, prompts, "-o", tmp_path / folder, "--reference", reference, *QUICK, *loras)
        assert result.exit_code == 0, result.output
        found = read_manifest(tmp_path / folder)["model"]
        return found["components"]["unet"], [(one["file"], one["weight"]) for one in found["loras"]]

    plain, merged = hashes("plain"), hashes("merged", "--lora", lora)
    both = hashes("both", "--lora", lora, "--lora", f"{lora}:-1")
    assert merged[1] == [("style.safetensors", 1.0)]
    assert both[1] == [("style.safetensors", 1.0), ("style.safetensors", -1.0)]
    assert plain[0] != merged[0], "the LoRA was not merged"
    assert plain[0] == both[0], "the LoRA and its opposite do not cancel"
    result = call("audit", model, prompts, "-o", tmp_path / "plain", "--reference", reference, *QUICK, "--lora", lora)
    assert result.exit_code == 2
    assert "other model: loras" in result.stderr

    save_file({"nonsense.weight": state[next(iter(state))]}, tmp_path / "other.safetensors")
    result = call("audit", model, prompts, "-o", tmp_path / "x", *QUICK, "--lora", tmp_path / "other.safetensors")
    assert result.exit_code == 2
    assert "other.safetensors does not go with this model" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "p.safetensors", "--reference", "r.txt"), "either --profile or --reference"),
        (("--workers", "2"), "--workers is for --ray"),
        (("--lora", "gone.safetensors"), "there is no LoRA at gone.safetensors"),
        (("--lora", "prompts.jsonl"), "no .safetensors file"),
        (("--profile", "gone.safetensors"), "gone.safetensors"),
        (("--column", "words"), "no text under the key 'words'"),
        (("--ray", "127.0.0.1:1"), "there is no Ray cluster at 127.0.0.1:1"),
        (("--width", "12"), "sampling failed"),
    ],
)
def test_what_is_wrong_is_one_line(call, model, prompts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call("audit", model, prompts, "-o", "audit", *QUICK, *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("memorization-guard: ")
    assert not (tmp_path / "audit" / "manifest.json").exists()
    if "--width" not in arguments:
        assert not (tmp_path / "audit").exists(), "a folder was made for nothing"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "a smaller --batch-size needs less"),
        (
            OSError(errno.ENOSPC, "No space left on device", "part-000000.jsonl"),
            2,
            "part-000000.jsonl: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_where_it_stops_it_says_that_nothing_is_lost(
    call, model, prompts, reference, tmp_path, monkeypatch, error, code, message
):
    command = ("audit", model, prompts, "-o", tmp_path / "audit", "--reference", reference, "--batch-size", 4, *QUICK)
    sample = Worker.sample

    def once(worker, jobs, profile):
        if jobs[0].image:
            raise error
        return sample(worker, jobs, profile)

    monkeypatch.setattr(Worker, "sample", once)
    result = call(*command)
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message in last
    assert f"what was made is kept in {tmp_path / 'audit'}: call again to go on" in last

    seen = []
    monkeypatch.setattr(Worker, "sample", lambda worker, jobs, profile: seen.append(jobs) or sample(worker, jobs, profile))
    assert call(*command).exit_code == 0
    assert [job.image for jobs in seen for job in jobs] == [4, 5, 6, 7, 8]


def test_no_audit_is_said(call, tmp_path):
    for command in (("report", tmp_path), ("compare", tmp_path, tmp_path)):
        result = call(*command)
        assert result.exit_code == 2
        assert "is no audit: it holds no manifest.json" in result.stderr


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['pyarrow'] = None; from memorization_guard.cli import main; "
        "sys.argv = ['memorization-guard', 'report', '.']; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'pyarrow is missing: pip install "memorization-guard[audit]"' in result.stderr
