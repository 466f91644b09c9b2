"""Fingerprints: the same for the same weights at any precision, another for other weights."""

import pytest
import torch
from torch import nn

from memorization_guard.fingerprint import fingerprint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 64, 3), nn.Linear(64, 300), nn.Linear(300, 5, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_does_not_matter(model, dtype):
    before = fingerprint(model)
    assert len(before) == 16
    assert fingerprint(model.to(dtype)) == before


def test_memory_layout_and_order_do_not_matter(model):
    before = fingerprint(model)
    assert fingerprint(dict(reversed(model.state_dict().items()))) == before
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before


def test_compiling_does_not_matter_and_offloaded_weights_have_none(model):
    before = fingerprint(model)
    assert fingerprint({f"_orig_mod.{name}": value for name, value in model.state_dict().items()}) == before
    assert fingerprint({name: value.to("meta") for name, value in model.state_dict().items()}) is None


def test_a_small_change_of_all_weights_is_seen(model):
    before = fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    assert fingerprint(model) != before


def test_names_and_shapes_are_seen(model):
    state = model.state_dict()
    renamed = {name.replace("0.", "lora."): value for name, value in state.items()}
    reshaped = {name: value[None] for name, value in state.items()}
    assert len({fingerprint(state), fingerprint(renamed), fingerprint(reshaped)}) == 3


def test_a_module_is_hashed_again_once_its_weights_were_written_to():
    module = torch.nn.Linear(8, 8)
    first = fingerprint(module)
    assert fingerprint(module) == first == fingerprint(module.state_dict())
    with torch.no_grad():
        module.weight.neg_()
    written = fingerprint(module)
    assert written != first
    assert written == fingerprint(module.state_dict())
    module.weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    assert fingerprint(module) == fingerprint(module.state_dict()) != written


def test_weights_exchanged_at_the_same_place_are_seen(monkeypatch):
    """Where nothing but the content tells: the same address, and no write that torch counts."""
    module = torch.nn.Linear(8, 8)
    first = fingerprint(module)
    module.weight.data.numpy()[:] = -module.weight.data.numpy()
    assert fingerprint(module) != first
