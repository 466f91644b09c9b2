"""What is never run or unpickled: Python in a model's folder, and weights that are no safetensors."""

import json
import os
import pickle
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from memorization_guard.lab import PROFILE, Lab
from memorization_guard.pipelines import Lora, ModelError, load_part, load_pipeline

ROOT = Path(__file__).parent.parent


class Runs:
    """A pickle that writes a file when it is opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """Is there afterwards if something was run."""
    path = tmp_path / "was run"
    yield path
    assert not path.exists()


@pytest.fixture
def code(mark):
    """Python that leaves the mark, with every class that a folder below asks for."""
    classes = ("Evil", "UNet2DConditionModel", "StableDiffusionPipeline")
    return "\n".join([f"import os\nos.mkdir({str(mark)!r})", *(f"class {name}: pass" for name in classes)])


def _index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _class_of_its_own(folder, code):
    _index(folder, _class_name=["evilpipe", "Evil"])
    (folder / "evilpipe.py").write_text(code)


def _class_without_a_file(folder, code):
    _index(folder, _class_name=["evilpipe", "Evil"])


def _component_of_its_own(folder, code):
    _index(folder, unet=["evil", "Evil"])
    (folder / "unet/evil.py").write_text(code)


def _component_in_the_place_of_a_library(folder, code):
    # diffusers 0.31 to 0.37 takes the file for the library.
    (folder / "unet/diffusers.py").write_text(code)


def _pipeline_without_a_name(folder, code):
    # diffusers 0.31 to 0.37 looks for the file of a custom pipeline called None.
    (folder / "None.py").write_text(code)


def _component_of_a_module_elsewhere(folder, code):
    _index(folder, unet=["antigravity", "Evil"])


def _tokenizer_with_code(folder, code):
    _index(folder, tokenizer=["transformers", "AutoTokenizer"])
    config = folder / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))


def _pickled_weights(folder, code):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def _list_of_pickles(folder, code):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet/part.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "part.bin"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(folder, code):
    (folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')


def _no_settings(folder, code):
    (folder / "model_index.json").write_text("[1]")


FOLDERS = {
    _class_of_its_own: "holds the Python file evilpipe.py",
    _class_without_a_file: "names a pipeline class of its own",
    _component_of_its_own: f"holds the Python file {Path('unet/evil.py')}",
    _component_in_the_place_of_a_library: f"holds the Python file {Path('unet/diffusers.py')}",
    _pipeline_without_a_name: "holds the Python file None.py",
    _component_of_a_module_elsewhere: "takes unet from 'antigravity'",
    _tokenizer_with_code: "wants code of its own to be run",
    _pickled_weights: "diffusion_pytorch_model.bin can run code when opened",
    _list_of_pickles: "names 'part.bin', which is no .safetensors file",
    _adapter: "is an adapter to another model",
    _no_settings: "holds no settings",
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.items(), ids=[change.__name__ for change in FOLDERS])
def test_a_folder_that_would_run_code_is_refused_wherever_it_is_given(change, message, call, model, code, tmp_path):
    change(model, code)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({}, checkpoint)
    for load in (
        lambda: load_pipeline(model),
        lambda: load_pipeline(checkpoint, config=model),
        lambda: load_part(model, "vae"),
        lambda: Lab(model).pipeline(),
    ):
        with pytest.raises(ModelError) as told:
            load()
        assert message in str(told.value)
    result = call("check", model, "a prompt", "--device", "cpu")
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
    assert message in result.stderr


def test_the_service_refuses_it_too(model, code, serving):
    _class_of_its_own(model, code)
    settings = serving.settings.Settings(model=str(model), profile=str(PROFILE))
    with pytest.raises(serving.settings.SettingsError, match="holds the Python file evilpipe"):
        serving.painter.Painter(settings, serving.metrics.Metrics())


NAMES = ("x.SAFETENSORS", "x.Safetensors", "x.pt", "x.PT", "x.bin", "x.ckpt", "x.safetensors", "x")


@pytest.fixture(params=NAMES)
def pickled(request, mark, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(pickle.dumps(Runs(mark)))
    return path


def test_a_pickle_is_no_lora_whatever_its_name(pickled, model):
    with pytest.raises(ModelError, match=r"rename it|convert it"):
        Lora.parse(str(pickled))
    with pytest.raises(ModelError, match=r"rename it|convert it"):
        load_pipeline(model, loras=[Lora(pickled)], device="cpu")


def test_a_pickle_is_no_checkpoint_whatever_its_name(pickled, model):
    with pytest.raises(ModelError, match=r"rename it|convert it"):
        load_pipeline(pickled, config=model)
