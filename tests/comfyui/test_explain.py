"""Explain Prompt in the running ComfyUI: what is told of prompts of the lab model, and what is said where nothing can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memorization_guard.lab import prompts

TINY = Path(__file__).with_name("tiny_models.py").read_text(encoding="utf-8")
MEMORIZED = prompts("exact")[0]
ORDINARY = prompts("ordinary")[0]


@pytest.fixture
def explain(graph: Any, server: Any) -> Callable[..., Any]:
    """``explain(text)`` runs the node, and gives what it puts out and what it shows."""

    def run(text: Any, *, profile: bool = True, guarded: bool = False, **inputs: Any) -> Any:
        g = graph()
        lab = g.node("MemorizationGuardLoadLabModel")
        model = g.node("MemorizationGuard", model=lab[0], mode="mitigate", profile=lab[3])[0] if guarded else lab[0]
        if profile:
            inputs["profile"] = lab[3]
        text = text(g) if callable(text) else text
        if "latent" in inputs:
            inputs["latent"] = g.node("EmptyLatentImage", width=128, height=128, batch_size=2)[0]
        node = g.node("MemorizationGuardExplainPrompt", model=model, clip=lab[1], text=text, **inputs)
        shown = [g.node("PreviewAny", source=node[output]) for output in range(3)]
        ended = server.queue(g.prompt())
        ended.wait(300)
        without, report, memorized = (ended.outputs(one)["text"][0] for one in shown)
        (told,) = ended.outputs(node)["memorization_guard_prompt"]
        return without, report, memorized == "True", told

    return run


def test_a_memorized_prompt_is_told_with_its_words_and_is_ordinary_without_them(explain: Any) -> None:
    without, report, memorized, told = explain(MEMORIZED)
    assert memorized
    assert told["verdict"] == "likely memorized: rarer than 1 in 8,000 ordinary images"
    assert "".join(piece["text"] for piece in told["pieces"]) == MEMORIZED
    words = [piece for piece in told["pieces"] if "strength" in piece]
    assert {word["text"] for word in words} & set(MEMORIZED.split()[-2:])
    assert all(0 < word["strength"] <= 1 for word in words)
    assert max(word["strength"] for word in words) > 0.5
    assert told["without"] == without
    assert not {word["text"] for word in words} & set(without.split())
    assert told["note"] is None
    lines = report.split("\n")
    assert lines[:2] == [MEMORIZED, told["verdict"]]
    assert [f"  {word['text']} ({word['rarity']})" for word in words] == lines[3:-1]
    assert lines[-1] == f"Without them, an ordinary prompt: {without}"

    again, report, memorized, told = explain(without)
    assert not memorized
    assert again == without
    assert told["verdict"].startswith("ordinary: ")
    assert told["without"] is None


def test_an_ordinary_prompt_stays_as_it_is(explain: Any) -> None:
    without, report, memorized, told = explain(ORDINARY)
    assert not memorized
    assert without == ORDINARY
    assert told["pieces"] == [{"text": ORDINARY}]
    assert told["without"] is told["note"] is None
    assert report == f"{ORDINARY}\n{told['verdict']}"
    assert told["verdict"].startswith("ordinary: as far as ")


def test_a_linked_text_a_guarded_model_and_another_size_make_no_difference(explain: Any) -> None:
    usual = explain(MEMORIZED)

    def linked(g: Any) -> Any:
        return g.node("StringConcatenate", string_a=MEMORIZED[:20], string_b=MEMORIZED[20:], delimiter="")[0]

    assert explain(linked) == usual
    assert explain(MEMORIZED, guarded=True) == usual
    assert explain(MEMORIZED, latent=True) == usual


def test_more_ordinary_prompts_may_trigger_where_the_rate_says_so(explain: Any) -> None:
    """Of a prompt that triggers and is ordinary, or hangs on all of its words, no words are told."""
    without, _, memorized, told = explain(ORDINARY, false_positive_rate=0.5)
    assert memorized == (told["without"] is not None or told["note"] is not None)
    assert (without == ORDINARY) == (told["without"] is None)


def test_without_a_profile_it_is_made_first_and_kept(explain: Any, automatic_profiles: Path) -> None:
    without, _, memorized, told = explain(MEMORIZED, profile=False, latent=True)
    assert memorized
    assert set(MEMORIZED.split()[-2:]) & {piece["text"] for piece in told["pieces"]}
    (made,) = automatic_profiles.glob("*.safetensors")
    before = made.read_bytes()
    assert explain(without, profile=False)[2] is False  # at the profile's size, though no latent is connected
    assert made.read_bytes() == before


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_prompt_is_no_ordinary_prompt(explain: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match="there is no prompt to explain: type one, or connect a text"):
        explain(text)


def test_what_cannot_be_judged_is_not_called_ordinary(in_comfyui: Any) -> None:
    result = in_comfyui(
        """
import dataclasses
import torch
lab, explain, references = (module(f"nodes.{name}") for name in ("lab", "explain", "references"))
model, clip, profile = lab.load_model(), lab.load_clip(), lab.load_profile()
other = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, model_hash="0" * 16))

class Several:
    tokenize = clip.tokenize

    def encode_from_tokens_scheduled(self, tokens):
        return clip.encode_from_tokens_scheduled(tokens) * 2

def said(model, clip=clip, **inputs):
    hidden = type("Hidden", (), {"unique_id": "1"})
    node = type("Node", (explain.ExplainPrompt,), {"hidden": hidden})
    try:
        return str(node.execute(model, clip, "a red cross", **inputs).args)
    except ValueError as error:
        return str(error)

result["another model's profile"] = said(model, profile=other)
references.model_hash = lambda patcher: None
result["no fingerprint"] = said(model)
broken = model.clone()
broken.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * float("nan"))
result["not a number"] = said(broken, profile=profile)
result["no CLIP"], result["hooks"] = said(model, None, profile=profile), said(model, Several(), profile=profile)
"""
    )
    assert result["another model's profile"].startswith("the prompt could not be judged. The profile does not fit this run (")
    assert result["no fingerprint"] == (
        "the prompt cannot be judged, since there is no profile of this model. The model's weights have no fingerprint: "
        "calibrate a profile, and choose it."
    )
    assert "NaN" in result["not a number"]
    assert result["no CLIP"] == "this checkpoint has no CLIP: load the one that belongs to the model"
    assert "several conditionings of a text (scheduled hooks)" in result["hooks"]


def test_models_of_all_kinds_are_asked(in_comfyui: Any) -> None:
    """With random weights no prompt is memorized; at this rate most of those that are less ordinary than others trigger."""
    result = in_comfyui(
        TINY
        + """
explain, judging, references = (module(f"nodes.{name}") for name in ("explain", "judging", "references"))
runs_of = sys.modules[pack.__name__ + ".memorization_guard.core.calibration"].ReferenceRuns
node = type("Node", (explain.ExplainPrompt,), {"hidden": type("Hidden", (), {"unique_id": "1"})})
for name in ("SD 1", "SD 2 v", "SDXL", "SD3", "Flux", "Wan"):
    model, clip = tiny(name), Clip(name)
    empty = judging.empty_latent(model, {"samples": torch.zeros(2, *MODELS[name][-1])})[:, :, :1 if name == "Wan" else None]
    nothing, *prompts = (clip.encode_from_tokens_scheduled(text) for text in ("", *map(str, range(8))))
    known = runs_of(None, name)
    sampled = references.sample_references(model, prompts, nothing, 0, "whole", steps=4, cfg=4.0, latent=empty)
    known.add(sampled, 8)
    text = "a red cat on a mat"
    without, report, memorized = node.execute(model, clip, text, known.profile()[0], false_positive_rate=0.5).args
    usual = list(judging.empty_latent(model, None).shape)
    result[name] = {"told": report.split("\\n")[1], "memorized": memorized, "changed": without != text, "size": usual}
"""
    )
    assert [found["size"][-1] for found in result.values()] == [64, 64, 128, 128, 128, 128]
    assert [found["size"][1] for found in result.values()] == [4, 4, 4, 16, 16, 16]
    for name, found in result.items():
        assert found["told"].startswith("likely memorized: " if found["memorized"] else "ordinary: "), name
        assert found["changed"] <= found["memorized"], name
    assert any(found["memorized"] for found in result.values())


def test_cancel_while_the_words_are_looked_for_tells_nothing(in_comfyui: Any) -> None:
    result = in_comfyui(
        """
import comfy.model_management as management
lab, explain = module("nodes.lab"), module("nodes.explain")
words = sys.modules[pack.__name__ + ".memorization_guard.core.words"]
node = type("Node", (explain.ExplainPrompt,), {"hidden": type("Hidden", (), {"unique_id": "1"})})
inputs = lab.load_model(), lab.load_clip(), args[0], lab.load_profile()
find = words.find

def cancelled(text, detail, tail):
    management.interrupt_current_processing()
    return find(text, detail, tail)

words.find = cancelled
try:
    result["told"] = str(node.execute(*inputs).args)
except management.InterruptProcessingException:
    result["told"] = None
words.find = find
result["again"] = node.execute(*inputs).args[2]
""",
        MEMORIZED,
    )
    assert result == {"told": None, "again": True}


def test_what_it_shows_is_json_with_every_word_marked_once(in_comfyui: Any) -> None:
    """Of a word that stands in a prompt twice, the one is marked that was left out."""
    result = in_comfyui(
        """
explain = module("nodes.explain")
core = pack.__name__ + ".memorization_guard.core."
words, trace = (sys.modules[core + name] for name in ("words", "trace"))
text = "a <b>cat</b> and a cat, red"
found = words.Words(("cat", "red"), (1e-4, 0.3), "a <b>cat</b> and a", 0.9)
result["pieces"] = [*explain._pieces(text, trace.Trace(words=found, p_value=1e-4, p_value_floor=1e-4))]
"""
    )
    pieces = json.loads(json.dumps(result["pieces"]))
    assert [piece["text"] for piece in pieces] == ["a <b>cat</b> and a ", "cat", ", ", "red", ""]
    assert pieces[1]["strength"] == 1
    assert 0 < pieces[3]["strength"] < 0.1
    assert pieces[1]["rarity"] == "rarer than 1 in 10,000"
