"""LoRAs that fit a model whole, in part or not at all, in the formats of the trainers."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from memorization_guard.pipelines import Lora, ModelError, load_pipeline

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")


@pytest.fixture
def layers(tiny_parts):
    """The LoRA layers of the tiny pipeline's UNet, as peft names them."""
    return _layers(tiny_parts[2], "unet", ["to_q", "to_k", "to_v", "to_out.0"])


def _layers(part, name, targets):
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    part = peft.inject_adapter_in_model(config, copy.deepcopy(part))
    return {f"{name}.{key}": value for key, value in peft.get_peft_model_state_dict(part).items()}


def _peft(layers):
    return layers


def _diffusers(layers):
    """As diffusers named them before it used peft."""
    between = {"text_encoder": "lora_linear_layer"}
    return {
        name.replace("lora_A", f"{between.get(name.partition('.')[0], 'lora')}.down").replace(
            "lora_B", f"{between.get(name.partition('.')[0], 'lora')}.up"
        ): value
        for name, value in layers.items()
    }


def _kohya(layers):
    """As sd-scripts writes them, with its scales."""
    written = {}
    for name, value in layers.items():
        part, _, rest = name.partition(".")
        module, _, half = rest.removesuffix(".weight").rpartition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}.get(part, part)
        if prefix == "lora_te_" and not module.startswith("text_model."):  # as transformers names it since its version 5
            module = f"text_model.{module}"
        place = prefix + module.replace(".", "_")
        written[f"{place}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[half] }.weight"] = value
        written[f"{place}.alpha"] = torch.tensor(2.0)
    return written


FORMATS = pytest.mark.parametrize("written", [_peft, _diffusers, _kohya])


@pytest.fixture
def lora(tmp_path):
    """Writes tensors as a LoRA."""

    def write(tensors):
        save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "style.safetensors")
        return Lora(tmp_path / "style.safetensors")

    return write


def _weights(pipe):
    return {f"{part}.{name}": w for part in ("unet", "text_encoder") for name, w in getattr(pipe, part).named_parameters()}


@FORMATS
def test_a_lora_of_unet_and_text_encoder_is_taken_whole(model, tiny_parts, layers, lora, written):
    both = layers | _layers(tiny_parts[0], "text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    try:
        changed = _weights(load_pipeline(model, device="cpu", loras=[lora(written(both))]))
    except ModelError as error:
        if "version of PEFT" in str(error):  # transformers wants a newer one for text encoders than diffusers does
            pytest.skip(str(error))
        raise
    base = _weights(load_pipeline(model, device="cpu"))
    assert sum(not torch.equal(base[name], changed[name]) for name in base) == len(both) // 2


def _more(layers, name):
    return layers | {f"{name}.lora_A.weight": torch.full((2, 16), 0.1), f"{name}.lora_B.weight": torch.full((16, 2), 0.1)}


@FORMATS
def test_a_whole_lora_changes_what_it_says(model, layers, lora, written):
    base, changed = (_weights(load_pipeline(model, device="cpu", loras=loras)) for loras in ([], [lora(written(layers))]))
    differing = {name for name in base if not torch.equal(base[name], changed[name])}
    assert len(differing) == len(layers) // 2
    for name in differing:
        pair = [layers[f"{name.removesuffix('.weight').removesuffix('.base_layer')}.lora_{half}.weight"] for half in "BA"]
        torch.testing.assert_close(changed[name] - base[name], pair[0] @ pair[1], atol=1e-5, rtol=1e-3)


@FORMATS
def test_a_lora_that_fits_in_part_is_refused_with_how_many_of_its_tensors_do(model, layers, lora, written):
    """Of a model with one block more, as that of another kind."""
    more = _more(layers, "unet.down_blocks.1.attentions.5.transformer_blocks.0.attn1.to_q")
    with pytest.raises(ModelError, match=rf"only {len(layers)} of its {len(layers) + 2} tensors belong"):
        load_pipeline(model, device="cpu", loras=[lora(written(more))])


@pytest.mark.parametrize("part", ["text_encoder_2", "transformer", "prior"])
def test_a_lora_with_a_part_that_the_model_lacks_is_refused(model, layers, lora, part):
    """Diffusers says nothing of tensors under a name that it does not look for."""
    with pytest.raises(ModelError, match=rf"only {len(layers)} of its .*{part}\."):
        load_pipeline(model, device="cpu", loras=[lora(_more(layers, f"{part}.layers.0.to_q"))])


def test_a_lora_that_fits_nothing_is_refused(model, layers, lora):
    elsewhere = {f"transformer.{name.partition('.')[2]}": value for name, value in layers.items()}
    with pytest.raises(ModelError, match=r"none of its \d+ tensors belong"):
        load_pipeline(model, device="cpu", loras=[lora(elsewhere)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_with_values_that_are_no_numbers_is_refused_where_it_is_named(layers, lora, value, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in layers.items()}
    first = sorted(tensors)[0]
    tensors[first].view(-1)[-1] = value
    file = lora(tensors).file
    with pytest.raises(ModelError, match=re.escape(f"NaN or infinite values in 1 of {len(layers)} tensors ({first})")):
        Lora.parse(str(file))


@FORMATS
def test_an_untrained_lora_is_refused(model, layers, lora, written):
    untrained = {name: value * ("lora_A" in name) for name, value in layers.items()}
    with pytest.raises(ModelError, match="it changes nothing"):
        load_pipeline(model, device="cpu", loras=[lora(written(untrained))])


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_change_is_refused(model, layers, lora, half):
    name = next(name for name in layers if half in name and name.startswith("unet."))
    with pytest.raises(ModelError, match="does not go with this model"):
        load_pipeline(model, device="cpu", loras=[lora({key: value for key, value in layers.items() if key != name})])


def test_a_lora_of_other_shapes_is_refused(model, layers, lora):
    wide = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in layers.items()}
    with pytest.raises(ModelError, match="does not go with this model"):
        load_pipeline(model, device="cpu", loras=[lora(wide)])


def test_a_weight_that_makes_the_model_infinite_is_refused(model, layers, lora):
    file = lora(layers).file
    with pytest.raises(ModelError, match="does not go with this model"):
        load_pipeline(model, device="cpu", loras=[Lora(file, 1e39)])


def test_number_types_do_not_matter(model, layers, lora):
    """A file of half precision in a model of single, and the other way round."""
    half = lora({name: value.half() for name, value in layers.items()})
    load_pipeline(model, device="cpu", loras=[half])
    load_pipeline(model, device="cpu", dtype="bfloat16", loras=[lora(layers)])
    assert len(load_file(half.file)) == len(layers)
