"""Tiny pipelines with random weights, and one thread, so that tests running side by side do not fight for cores."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

CHROMIUM = "/usr/bin/chromium"

torch.set_num_threads(1)

# Property tests draw the same examples every time, so that chance never fails the gate.
# ``pytest --hypothesis-profile=random`` draws new ones, and more of them where a test does not set their number.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", derandomize=False, deadline=None, max_examples=500)
hypothesis.settings.load_profile("gate")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    pytest.importorskip("diffusers")
    from memorization_guard.lab.models import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a red cat on a mat", "a blue dog in the sun"])


@pytest.fixture(scope="session")
def tiny_parts(tokenizer):
    """Text encoder, autoencoder and UNet of a tiny Stable Diffusion, with fixed random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return text.eval(), autoencoder.eval(), unet.eval()


@pytest.fixture
def tiny_pipe(tokenizer, tiny_parts):
    """A StableDiffusionPipeline for 16 x 16 images; latents are [4, 8, 8]."""
    from diffusers import StableDiffusionPipeline

    from memorization_guard.lab.models import make_scheduler

    text, autoencoder, unet = tiny_parts
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def model(tiny_pipe, tmp_path):
    """The folder of the same."""
    tiny_pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def of_another_model():
    """Saves a profile as that of a model with other weights; gives its file."""

    def saved(profile, path):
        settings = dataclasses.replace(profile.settings, model_hash="0" * 16)
        return dataclasses.replace(profile, settings=settings).save(path)

    return saved


@pytest.fixture
def call():
    """Calls a command as typed, in this process."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from memorization_guard.cli.app import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def serving():
    """The example service, as if it were an installed package; its modules are its attributes."""
    pytest.importorskip("prometheus_client")
    pytest.importorskip("uvicorn")
    folder = Path(__file__).parents[1] / "examples" / "serving"
    spec = importlib.util.spec_from_file_location("serving", folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving"] = module
    spec.loader.exec_module(module)
    for file in folder.glob("*.py"):
        importlib.import_module(f"serving.{file.stem}")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "serving"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def browser():
    """Chromium, which asks for nothing by itself."""

    def absent(what):
        if os.environ.get("CI"):
            pytest.fail(f"{what}, and in CI it has to be")
        pytest.skip(what)

    if not Path(CHROMIUM).exists():
        absent(f"{CHROMIUM} is not there")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    switches = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()
