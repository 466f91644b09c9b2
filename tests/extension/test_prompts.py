"""Other prompts among what the host gives its network, without a host: what is exchanged, and what is not known."""

import contextlib
import sys
import types

import pytest
import torch

LONG = 4


def made(text):
    """What the host's text encoders make of a prompt: as many tokens as words."""
    generator = torch.Generator().manual_seed(len(text) * 1000 + sum(map(ord, text)))
    words = text.split()
    return {"crossattn": torch.randn(len(words), 3, generator=generator), "vector": torch.randn(2, generator=generator)}


def plain(text):
    return made(text)["crossattn"]


def conditioning(prompts, encode):
    """As the host's: for every image a list of prompts, as ``text`` or ``(text, weight, number of changes)``."""

    def one(prompt):
        text, weight, count = (prompt, 1.0, 1) if isinstance(prompt, str) else prompt
        return types.SimpleNamespace(weight=weight, schedules=[types.SimpleNamespace(cond=encode(text))] * count)

    return types.SimpleNamespace(batch=[[one(prompt) for prompt in each] for each in prompts])


def rows_of(cond):
    """As the host makes rows of it: shorter ones with their last token again."""
    parts = [prompt.schedules[0].cond for each in cond.batch for prompt in each]

    def padded(part):
        return torch.cat([part, part[-1:].expand(LONG - len(part), -1)])

    if isinstance(parts[0], dict):
        tokens, vectors = [padded(part["crossattn"]) for part in parts], [part["vector"] for part in parts]
        return {"crossattn": torch.stack(tokens), "vector": torch.stack(vectors)}
    return torch.stack(list(map(padded, parts)))


@pytest.fixture
def host(monkeypatch):
    """As much of the host's ``modules`` as prompts are encoded with; ``encoded`` lists those that were."""
    modules = {name: types.ModuleType(f"modules.{name}") for name in ("devices", "prompt_parser", "shared", "sd_hijack")}
    package = types.ModuleType("modules")
    for name, module in modules.items():
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "modules", package)
    notes = package.sd_hijack.model_hijack = types.SimpleNamespace(comments=[], extra_generation_params={"TI hashes": "a: 1"})
    package.devices.autocast = contextlib.nullcontext
    package.shared.sd_model, package.encoded, package.encode = object(), [], plain

    class SdConditioning(list):
        def __init__(self, prompts, copy_from):
            super().__init__(prompts)
            self.settings = copy_from

    def encode(model, prompts, steps):
        package.encoded.append((list(prompts), prompts.settings.width))
        notes.comments.append("used")
        notes.extra_generation_params["TI hashes"] += ", b: 2"
        return conditioning([[prompt] for prompt in prompts], package.encode)

    package.prompt_parser.SdConditioning = SdConditioning
    package.prompt_parser.get_multicond_learned_conditioning = encode
    return package


@pytest.fixture
def texts(host, load_extension):
    """Gives the prompts of a run, and the rows of its first evaluation."""
    prompts = load_extension("prompts")

    def new(written, conditions, **p):
        settings = {"is_hr_pass": False, "prompts": written, "width": 64, "height": 64, "steps": 4, **p}
        sampler = types.SimpleNamespace(sampler_extra_args={"cond": conditioning(conditions, host.encode)})
        found = prompts.Texts(types.SimpleNamespace(p=types.SimpleNamespace(**settings), sampler=sampler))
        rows = rows_of(sampler.sampler_extra_args["cond"])
        assert found.given(rows, (len(written), 4, 8, 8)) is rows
        return found, rows, sampler

    return new


@pytest.mark.parametrize("encode", [plain, made], ids=["tensor", "by name"])
def test_the_row_of_one_image_is_exchanged_and_the_others_keep_every_bit(host, texts, encode):
    host.encode = encode
    found, rows, sampler = texts(["a b c d", "e AND f", "a red cat"], [["a b c d"], ["e", "f"], ["a red cat"]])
    assert found.of_images() == ["a b c d", "", "a red cat"]
    found.choose({2: "a cat"})
    given = found.given(rows, (3, 4, 8, 8))
    expected = rows_of(conditioning([["a b c d"], ["e", "f"], ["a cat"]], encode))
    for name in ("crossattn", "vector") if encode is made else (slice(None),):
        assert torch.equal(given[name], expected[name])
    count = len(host.encoded)
    found.given(rows, (3, 4, 8, 8))
    assert len(host.encoded) == count
    # The refiner has taken over, with text encoders of its own.
    host.encode = lambda text: encode(text[::-1])
    sampler.sampler_extra_args["cond"] = conditioning([["a b c d"], ["e", "f"], ["a red cat"]], host.encode)
    given = found.given(rows_of(sampler.sampler_extra_args["cond"]), (3, 4, 8, 8))
    expected = rows_of(conditioning([["a b c d"], ["e", "f"], ["a cat"]], host.encode))
    for name in ("crossattn", "vector") if encode is made else (slice(None),):
        assert torch.equal(given[name], expected[name])
    # What the text encoders note goes into the infotext of the next images.
    notes = host.sd_hijack.model_hijack
    assert (notes.comments, notes.extra_generation_params) == ([], {"TI hashes": "a: 1"})


@pytest.mark.parametrize(
    ("written", "condition"),
    [
        ("a AND b", ["a", "b"]),
        ("a cat :0.5", [("a cat", 0.5, 1)]),
        ("[a:b:0.5] cat", [("a cat", 1.0, 2)]),
        ("a cat", ["a dog"]),
        ("a cat", ["a very long cat"]),
    ],
    ids=["and", "weight", "editing", "exchanged", "longer"],
)
def test_what_is_not_one_prompt_of_the_hosts_own_is_not_known(texts, written, condition):
    found, *_ = texts([written, "a fox"], [condition, ["a fox"]])
    assert found.of_images() == ["", "a fox"]


def test_a_second_pass_has_its_own_prompt_and_size(host, texts):
    more = {"is_hr_pass": True, "hr_prompts": ["a fox"], "hr_upscale_to_x": 128, "hr_upscale_to_y": 128}
    found, *_ = texts(["a cat"], [["a fox"]], **more)
    assert found.of_images() == ["a fox"]
    assert host.encoded == [(["a fox"], 128)]


def test_a_prompt_that_does_not_fit_in_its_place_leaves_the_run_as_it_was(texts, load_extension):
    found, rows, _ = texts(["a fox"], [["a fox"]])
    others = load_extension("prompts").OtherPrompts(found, None, None, lambda rows: rows)
    with pytest.raises(ValueError, match="in the place of"):
        others.go_on({0: "one two three four five"})
    assert found.given(rows, (1, 4, 8, 8)) is rows
