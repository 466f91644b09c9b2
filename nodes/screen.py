"""The node that tells of a list of prompts which the model remembers an image under, without an image."""

from __future__ import annotations

import math
from typing import Any

import comfy.utils
from comfy_api.v0_0_2 import io

from ..memorization_guard import Trace
from .guard import CATEGORY
from .judging import InNoise, inputs

#: Prompts that are judged at once: if one of them is suspicious, all are asked about.
AT_ONCE = 8

ORDINARY = "ordinary"


class ScreenPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardScreenPrompts",
            display_name="Screen Prompts",
            category=CATEGORY,
            description=(
                "Tells of every prompt of a list whether the model remembers an image under it, and puts out the suspicious "
                "ones. Makes no image: a prompt takes about as long as one or two steps of sampling."
            ),
            inputs=inputs(
                io.String.Input(
                    "prompts",
                    multiline=True,
                    placeholder="One prompt a line",
                    tooltip="The prompts, one a line. Or connect a text. Empty lines are left out.",
                ),
                clip="The model's CLIP: encodes the prompts.",
            ),
            outputs=[
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="A line for each prompt, the rarest first: verdict, p-value and prompt, with tabs between them.",
                ),
                io.String.Output(
                    "suspicious",
                    display_name="suspicious",
                    tooltip="The prompts that are likely memorized, or that could not be judged, one a line.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, prompts: str, profile: Any = None, latent: Any = None, **thresholds: Any
    ) -> io.NodeOutput:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not texts:
            raise ValueError("there are no prompts to screen: type one a line, or connect a text")
        traces = _judged(InNoise(model, clip, profile, latent, thresholds, node=cls.hidden.unique_id), texts)
        _check(traces)
        order = sorted(range(len(texts)), key=lambda number: _p_value(traces[number]))
        lines = [f"{_verdict(traces[number])}\t{_shown(traces[number])}\t{texts[number]}" for number in order]
        suspicious = [text for text, trace in zip(texts, traces, strict=True) if _verdict(trace) != ORDINARY]
        return io.NodeOutput("\n".join(["verdict\tp_value\tprompt", *lines]), "\n".join(suspicious))


def _judged(in_noise: InNoise, texts: list[str]) -> list[Trace]:
    """What the model says of each prompt, some at a time.

    Raises:
        ValueError: if there is not one trace of every prompt.
    """
    bar, traces = comfy.utils.ProgressBar(len(texts)), list[Trace]()
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        traces += in_noise.traces(some, start, "verdict")
        if len(traces) != start + len(some):
            raise ValueError("the prompts could not be judged. The log says why.")
        bar.update(len(some))
    return traces


def _check(traces: list[Trace]) -> None:
    """Says why nothing could be judged; single prompts that could not be stand in the table.

    Raises:
        ValueError: if none could be.
    """
    if all(trace.p_value is None for trace in traces):
        raise ValueError(f"the prompts could not be judged. {traces[0].note or 'The log says why.'}")


def _verdict(trace: Trace) -> str:
    if trace.p_value is None:
        return "not judged"
    return ORDINARY if trace.trigger_step is None else "likely memorized"


def _p_value(trace: Trace) -> float:
    return -math.inf if trace.p_value is None else trace.p_value


def _shown(trace: Trace) -> str:
    return "-" if trace.p_value is None else f"{trace.p_value:.4g}"
