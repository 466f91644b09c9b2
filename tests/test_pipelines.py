"""Loading models: LoRAs as they are named, and files that are told apart."""

import os
import re
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from memorization_guard.fingerprint import file_fingerprint
from memorization_guard.pipelines import Lora, ModelError, load_pipeline


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
