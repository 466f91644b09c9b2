"""Loading models: LoRAs as they are named, and files that are told apart."""

import copy
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memorization_guard.fingerprint import file_fingerprint
from memorization_guard.lab import MODEL, Lab
from memorization_guard.pipelines import Lora, ModelError, load_part, load_pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture
def style(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({}, "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize(("text", "weight"), [("", 1.0), (":0.5", 0.5), (":-1", -1.0), (":1e-1", 0.1), (":0", 0.0)])
def test_a_lora_is_a_file_and_perhaps_a_weight(style, text, weight):
    assert Lora.parse(f"style.safetensors{text}") == Lora(style, weight)
    assert Lora.parse(f"{style}{text}") == Lora(style, weight)


def test_a_colon_in_a_name_is_no_weight(style):
    Path("a:2").mkdir()
    save_file({}, "a:2/b.safetensors")
    assert Lora.parse("a:2/b.safetensors").weight == 1.0
    assert Lora.parse("a:2/b.safetensors:3").weight == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.safetensors", "there is no LoRA at gone.safetensors"),
        ("gone.safetensors:0.5", "there is no LoRA at gone.safetensors"),
        ("style.safetensors:much", "'much' is no number"),
        ("style.safetensors:nan", "'nan' is no number"),
        ("style.safetensors:inf", "'inf' is no number"),
        ("style.pt", "can run code"),
    ],
)
def test_what_is_wrong_with_a_lora_is_said(style, text, message):
    Path("style.pt").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=re.escape(message)):
        Lora.parse(text)


def test_a_missing_model_is_said(tmp_path):
    with pytest.raises(ModelError, match="there is no model at"):
        load_pipeline(tmp_path / "gone")
    (tmp_path / "model.ckpt").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=r"model\.ckpt is no \.safetensors file"):
        load_pipeline(tmp_path / "model.ckpt")


def test_an_unknown_number_type_or_device_is_said(model):
    with pytest.raises(ModelError, match="'float17' is no number type"):
        load_pipeline(model, dtype="float17")
    with pytest.raises(ModelError, match="nowhere"):
        load_pipeline(model, device="nowhere")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000, 300_000, 5_000_000])
def test_files_are_told_apart_by_their_size_and_by_training(tmp_path, size):
    path = tmp_path / "weights"
    content = os.urandom(size)
    path.write_bytes(content)
    found = file_fingerprint(path)
    assert re.fullmatch("[0-9a-f]{16}", found)
    (tmp_path / "copy").write_bytes(content)
    assert file_fingerprint(tmp_path / "copy") == found
    path.write_bytes(content + b"\0")
    assert file_fingerprint(path) != found
    # Training changes every weight.
    path.write_bytes(bytes(255 - byte for byte in content))
    assert (file_fingerprint(path) == found) == (size == 0)
    if size:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert file_fingerprint(path) != found, "the end of the file is not looked at"


def _rewritten(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "1 are missing"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "1 are unknown (other)"),
        (lambda tensors: tensors.update({f"x.{name}": tensors.pop(name) for name in list(tensors)}), "are missing"),
    ],
)
def test_a_model_that_does_not_get_all_of_its_tensors_is_an_error(model, part, change, message):
    """diffusers and transformers start what is missing at random, and do no more than warn."""
    (file,) = (model / part).glob("*.safetensors")
    _rewritten(file, change)
    for load in (lambda: load_pipeline(model, device="cpu"), Lab(model).pipeline, lambda: load_part(model, part)):
        with pytest.raises(ModelError, match=re.escape(message)):
            load()


def test_tensors_that_older_versions_wrote_and_no_model_needs_are_none_too_many(model):
    (file,) = (model / "text_encoder").glob("*.safetensors")
    prefix = "text_model." if any(name.startswith("text_model.") for name in load_file(file)) else ""
    _rewritten(file, lambda tensors: tensors.update({f"{prefix}embeddings.position_ids": torch.arange(32)[None]}))
    load_pipeline(model, device="cpu")


@pytest.fixture
def style_of_unet(tiny_parts, tmp_path):
    """A LoRA of the tiny pipeline."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    unet = copy.deepcopy(tiny_parts[2])
    unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    state = peft.get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="unet.safetensors")
    return tmp_path / "unet.safetensors"


@pytest.mark.parametrize("name", ["unet.nowhere.to_q", "elsewhere.to_q"])
def test_a_lora_of_another_model_is_an_error(model, tmp_path, name):
    pytest.importorskip("peft")
    lora = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(lora, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not go with this model"):
        load_pipeline(model, loras=[Lora(tmp_path / "other.safetensors")], device="cpu")


# --- single files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """The lab model as a single file, as Stable Diffusion 1 names its tensors."""
    spec = importlib.util.spec_from_file_location("written_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    file = importlib.import_module("written_pack.extension.lab").write(tmp_path)
    host, ours = "cond_stage_model.model.", "cond_stage_model.transformer."
    save_file({name.replace(host, ours): value for name, value in load_file(file).items()}, file)
    return file


def test_a_checkpoint_has_the_tensors_of_the_folder_it_was_made_from(checkpoint):
    found, expected = load_pipeline(checkpoint, config=MODEL, device="cpu"), load_pipeline(MODEL, device="cpu")
    assert type(found) is type(expected)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (pipe.components[part].state_dict() for pipe in (found, expected))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.decoder.conv_in.weight",
    ],
)
def test_a_checkpoint_that_lacks_tensors_is_an_error(checkpoint, name):
    _rewritten(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match="missing"):
        load_pipeline(checkpoint, config=MODEL, device="cpu")


def test_a_checkpoint_with_more_blocks_than_its_config_is_an_error(checkpoint):
    def more(tensors):
        for name in [name for name in tensors if ".input_blocks.5." in name]:
            tensors[name.replace(".5.", ".6.", 1)] = tensors[name].clone()

    _rewritten(checkpoint, more)
    with pytest.raises(ModelError, match="not used"):
        load_pipeline(checkpoint, config=MODEL, device="cpu")


def test_positions_in_a_checkpoint_are_none_too_many(checkpoint):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    _rewritten(checkpoint, lambda tensors: tensors.update({name: torch.arange(32)[None]}))
    load_pipeline(checkpoint, config=MODEL, device="cpu")


# --- nothing is fetched -----------------------------------------------------------------------------------------------

#: diffusers and the hub's library are there before us, as in a program that uses this package, and read their environment when
#: they are imported.
OFFLINE = """
import socket, sys
from pathlib import Path
import diffusers, huggingface_hub, transformers
asked = []
def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError("the test has no network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from memorization_guard.pipelines import Lora, ModelError, load_pipeline
from memorization_guard.lab import MODEL, Lab
assert not huggingface_hub.constants.HF_HUB_OFFLINE
checkpoint, lora, model = sys.argv[1:]
try:
    load_pipeline(checkpoint, device="cpu")
except ModelError as error:
    print(error)
else:
    sys.exit("a checkpoint was loaded without settings")
load_pipeline(checkpoint, config=MODEL, device="cpu")
load_pipeline("lab", device="cpu")
load_pipeline(model, device="cpu", loras=[Lora(Path(lora))])
Lab().pipeline()
sys.exit(f"asked for {asked}" if asked else 0)
"""


def test_nothing_is_fetched_whatever_was_imported_before(checkpoint, model, style_of_unet):
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, checkpoint, style_of_unet, model],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "with --config FOLDER give a diffusers folder" in result.stdout


def test_settings_in_the_hubs_cache_serve_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    """The folder of a model that the hub's library has fetched before, for whatever purpose."""
    repository, commit = tmp_path / "hub/models--stable-diffusion-v1-5--stable-diffusion-v1-5", "0" * 40
    shutil.copytree(MODEL, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_pipeline(checkpoint, device="cpu").unet.config.cross_attention_dim == 128
