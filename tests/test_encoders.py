"""Image encoders: thumbnails, TorchScript, and folders of transformers."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

pytest.importorskip("transformers")

from memorization_guard.evaluation import EvaluationError
from memorization_guard.evaluation.encoders import Thumbnails, open_encoder
from memorization_guard.lab import prompts as lab_prompts
from memorization_guard.lab import training_image


@pytest.fixture(scope="module")
def pictures():
    return [training_image(prompt) for prompt in lab_prompts("exact")[:6]]


def test_thumbnails_know_a_picture_whatever_its_size_brightness_and_format(pictures):
    encoder = Thumbnails()
    rows = encoder(pictures)
    assert rows.shape == (6, 32 * 32 * 3)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (rows @ rows.T - np.eye(6) < 0.8).all()
    for change in (
        lambda image: image.resize((300, 300)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.6),
        lambda image: ImageEnhance.Contrast(image).enhance(0.5),
        lambda image: image.convert("RGBA"),
        # Wider: the middle square is what counts.
        lambda image: _between(image, "red"),
    ):
        assert (np.diag(rows @ encoder([change(image) for image in pictures]).T) > 0.97).all()


def _between(image, color):
    wide = Image.new("RGB", (image.width + 60, image.height), color)
    wide.paste(image, (30, 0))
    return wide


def test_a_picture_of_one_colour_is_like_nothing(pictures):
    rows = Thumbnails()([Image.new("RGB", (50, 50), "gray"), *pictures])
    assert not rows[0].any()
    assert np.isfinite(rows).all()


@pytest.fixture(params=["dinov2", "clip", "clip vision"])
def folder(request, tmp_path):
    """A small vision model with random weights, as its library saves it."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "intermediate_size": 64}
    if request.param == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**small, patch_size=14))
    else:
        vision = t.CLIPVisionConfig(**small, patch_size=14, projection_dim=24)
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
        config = t.CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=24)
        model = t.CLIPModel(config) if request.param == "clip" else t.CLIPVisionModel(vision)
    model.save_pretrained(tmp_path / "encoder")
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (t.BitImageProcessor if request.param == "dinov2" else t.CLIPImageProcessor)(**size).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_folder_of_transformers_makes_unit_vectors(folder, pictures):
    encoder = open_encoder(folder, device="cpu")
    rows = encoder(pictures)
    assert rows.shape[0] == 6
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.diag(rows @ encoder([image.resize((256, 256)) for image in pictures]).T), 1, atol=0.02)
    assert not np.allclose(rows[0], rows[1], atol=1e-3)
    assert "encoder" in encoder.name
    assert encoder.key == open_encoder(folder, device="cpu").key


def test_an_encoder_that_lacks_tensors_or_holds_nan_is_refused(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layernorm" in name.lower() and "vision" in name + "vision")
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="lacks 1 tensors of its model"):
        open_encoder(folder)
    save_file({key: value * float("nan") for key, value in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="holds no numbers"):
        open_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.py").write_text("raise SystemExit"), "holds the Python file model.py"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "can run code when opened"),
        (lambda folder: (folder / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}'), "wants code of its own"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded as an image encoder"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be loaded as an image encoder"),
    ],
)
def test_what_a_folder_may_not_hold(folder, change, message):
    change(folder)
    with pytest.raises(EvaluationError, match=re.escape(message)):
        open_encoder(folder)


def test_torchscript_and_what_is_none(tmp_path, pictures):
    class Descriptor(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images, 6).flatten(1) * 3

    torch.jit.script(Descriptor()).save(str(tmp_path / "sscd.pt"))
    rows = open_encoder(tmp_path / "sscd.pt")(pictures)
    assert rows.shape == (6, 108)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="cannot be used as SSCD"):
        open_encoder(tmp_path / "other.pt")
    with pytest.raises(EvaluationError, match="there is no encoder at"):
        open_encoder(tmp_path / "gone")
