"""Screen Prompts in the running ComfyUI: which prompts of a list are told, and what is said where nothing can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memorization_guard.lab import prompts

MEMORIZED = prompts("exact")[:2]
ORDINARY = prompts("ordinary")[:9]


@pytest.fixture
def screen(graph: Any, server: Any) -> Callable[..., Any]:
    """``screen(text)`` runs the node, and gives the rows of its table without the header, and the suspicious prompts."""

    def run(text: str, *, guarded: bool = False, **inputs: Any) -> Any:
        g = graph()
        lab = g.node("MemorizationGuardLoadLabModel")
        model = g.node("MemorizationGuard", model=lab[0], mode="mitigate", profile=lab[3])[0] if guarded else lab[0]
        node = g.node("MemorizationGuardScreenPrompts", model=model, clip=lab[1], prompts=text, profile=lab[3], **inputs)
        shown = [g.node("PreviewAny", source=node[output]) for output in range(2)]
        ended = server.queue(g.prompt())
        ended.wait(300)
        table, suspicious = (ended.outputs(one)["text"][0] for one in shown)
        header, *rows = (line.split("\t") for line in table.split("\n"))
        assert header == ["verdict", "p_value", "prompt"]
        return rows, suspicious

    return run


def test_memorized_prompts_of_a_list_are_told_and_put_out(screen: Any) -> None:
    """More than are judged at once, so that memorized ones stand beside ordinary ones and alone."""
    listed = [*ORDINARY[:3], MEMORIZED[0], *ORDINARY[3:], MEMORIZED[1]]
    rows, suspicious = screen("\n\n  ".join(listed) + "\n")
    assert suspicious.split("\n") == list(MEMORIZED)
    assert {row[2] for row in rows[:2]} == set(MEMORIZED)
    assert [row[0] for row in rows] == ["likely memorized"] * 2 + ["ordinary"] * 9
    assert sorted(row[2] for row in rows) == sorted(listed)
    shares = [float(row[1]) for row in rows]
    assert shares == sorted(shares)
    assert shares[1] <= 0.005 < shares[2]
    assert screen("\n".join(listed), guarded=True) == (rows, suspicious)


def test_a_list_without_memorized_prompts_puts_out_nothing(screen: Any) -> None:
    rows, suspicious = screen("\n".join(ORDINARY[:2]))
    assert suspicious == ""
    assert [row[0] for row in rows] == ["ordinary"] * 2


def test_the_rate_is_the_users(screen: Any) -> None:
    rows, suspicious = screen("\n".join(ORDINARY), false_positive_rate=0.5)
    wanted = {text for _, share, text in rows if float(share) <= 0.5}
    assert 0 < len(wanted) < len(ORDINARY)
    assert set(suspicious.split("\n")) == wanted


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_no_prompts_are_no_ordinary_list(screen: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match="there are no prompts to screen: type one a line, or connect a text"):
        screen(text)


def test_what_is_asked_is_little_and_what_cannot_be_judged_is_said(in_comfyui: Any) -> None:
    result = in_comfyui(
        """
import dataclasses
lab, screen = (module(f"nodes.{name}") for name in ("lab", "screen"))
model, clip, profile = lab.load_model(), lab.load_clip(), lab.load_profile()
other = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, model_hash="0" * 16))

def said(model, text="a red cross\\na blue moon", clip=clip, **inputs):
    node = type("Node", (screen.ScreenPrompts,), {"hidden": type("Hidden", (), {"unique_id": "1"})})
    try:
        return list(node.execute(model, clip, text, **inputs).args)
    except ValueError as error:
        return str(error)

calls = []

def counted(apply, args):
    calls.append(len(args["cond_or_uncond"]))
    return apply(args["input"], args["timestep"], **args["c"])

watched = model.clone()
watched.set_model_unet_function_wrapper(counted)
result["told"] = said(watched, profile=profile)
result["calls"] = len(calls)

def broken_for_one(apply, args):
    answer = apply(args["input"], args["timestep"], **args["c"])
    answer[1::2] = float("nan")  # the second of two prompts, with the prompt and without
    return answer

half = model.clone()
half.set_model_unet_function_wrapper(broken_for_one)
result["one is not a number"] = said(half, profile=profile)
broken = model.clone()
broken.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * float("nan"))
result["not a number"] = said(broken, profile=profile)
result["another model's profile"], result["no CLIP"] = said(model, profile=other), said(model, clip=None, profile=profile)
"""
    )
    assert result["told"][1] == ""
    assert result["calls"] <= 3, "of two ordinary prompts, an evaluation, and two more if one of them is suspicious"
    table, suspicious = result["one is not a number"]
    assert table.split("\n")[1] == "not judged\t-\ta blue moon"
    assert table.split("\n")[2].startswith("ordinary\t")
    assert suspicious == "a blue moon", "what could not be judged is not called ordinary"
    assert "NaN" in result["not a number"]
    assert result["another model's profile"].startswith("the prompts could not be judged. The profile does not fit this run (")
    assert result["no CLIP"] == "this checkpoint has no CLIP: load the one that belongs to the model"
