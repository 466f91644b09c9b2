"""The node that tells, without an image, whether the model remembers one under a prompt, and which words call it up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from comfy_api.v0_0_2 import io

from ..memorization_guard import Trace
from ..memorization_guard.core.words import ORDINARY, Words, marked
from ..memorization_guard.reports.words import NO_WORDS, explanation, prompt_verdict, word_rarities
from .guard import CATEGORY, also_found_as
from .judging import InNoise, inputs
from .prompts import Encoder

#: Key of what the node shows.
SHOWN = "memorization_guard_prompt"


class ExplainPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardExplainPrompt",
            display_name="Explain Prompt",
            category=CATEGORY,
            description=(
                "Tells whether the model remembers an image under a prompt, and marks the words that call it up. It makes no "
                "image. It asks the model what it predicts for the prompt in noise, which takes about as long as a few steps "
                "of sampling."
            ),
            **also_found_as("duplicate", "plagiarism", "overfit", "copyright", "memorized", "trigger words"),
            inputs=inputs(
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="The prompt to explain",
                    tooltip="The prompt, as in CLIP Text Encode. Or connect a text.",
                ),
                clip="The model's CLIP. It encodes the prompt, and the prompt without some of its words.",
            ),
            outputs=[
                io.String.Output(
                    "text_without",
                    display_name="text without",
                    tooltip="The prompt without the words that call an image up. It is the whole prompt if that is "
                    "ordinary, or if no such words were found.",
                ),
                io.String.Output("report", display_name="report", tooltip="What the node shows, as text."),
                io.Boolean.Output("memorized", display_name="memorized", tooltip="Whether the prompt is likely memorized."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, text: str, profile: Any = None, latent: Any = None, **thresholds: Any
    ) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("there is no prompt to explain: type one, or connect a text")
        in_noise = InNoise(model, clip, profile, latent, thresholds, node=cls.hidden.unique_id)
        trace = _only(in_noise.traces([text], 0, "first", Encoder(clip, lambda: [text])))
        told = {
            "verdict": prompt_verdict(trace),
            "memorized": trace.trigger_step is not None,
            "pieces": [*_pieces(text, trace)],
            "without": None if trace.words is None else trace.words.text,
            "note": NO_WORDS if trace.trigger_step is not None and trace.words is None else None,
        }
        return io.NodeOutput(
            text if trace.words is None else trace.words.text,
            "\n".join([text, *explanation(trace)]),
            told["memorized"],
            ui={SHOWN: [told]},
        )


def _only(traces: list[Trace]) -> Trace:
    """The trace of the prompt.

    Raises:
        ValueError: if it could not be judged.
    """
    notes = [trace.note for trace in traces if trace.p_value is None] if traces else [None]
    if notes:
        raise ValueError(f"the prompt could not be judged. {notes[0] or 'The log says why.'}")
    return traces[0]


def _pieces(text: str, trace: Trace) -> Iterator[dict[str, Any]]:
    """The text in pieces, of which words that call an image up have a strength from 0 to 1, and how rare they are in words."""
    words, rare = trace.words, word_rarities(trace)
    pieces = [text] if words is None else marked(text, words.words, words.text)
    for place, piece in enumerate(pieces):
        number, is_word = divmod(place, 2)
        if words is None or not is_word:
            yield {"text": piece}
        else:
            yield {"text": piece, "strength": _strength(words, number, trace.p_value_floor), "rarity": rare[number]}


def _strength(words: Words, number: int, floor: float | None) -> float:
    """How far a word alone leads from an ordinary prompt, of as far as the references can tell: 0 to 1, by its log p-value."""
    lowest = floor or min(words.p_values)
    p_value = min(max(words.p_values[number], lowest), ORDINARY)
    return math.log(ORDINARY / p_value) / math.log(ORDINARY / lowest)
