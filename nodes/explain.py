"""The node that tells, without an image, whether the model remembers one under a prompt, and which words call it up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..memorization_guard import StabilityProfile, Thresholds, Trace
from ..memorization_guard.automatic import STEPS
from ..memorization_guard.core.settings import USUAL_GUIDANCE
from ..memorization_guard.core.words import ORDINARY, Words, marked
from ..memorization_guard.reports.words import NO_WORDS, explanation, prompt_verdict, word_rarities
from .guard import CATEGORY, StabilityProfileType, also_found_as, threshold_input
from .prompts import Encoder, encoded
from .references import Automatic, sample_references
from .runs import TraceLog
from .sampling import send, unguarded

#: Key of what the node shows.
SHOWN = "memorization_guard_prompt"

#: The field of the constant that both nodes offer.
FALSE_POSITIVE_RATE = next(field for field in dataclasses.fields(Thresholds) if field.name == "false_positive_rate")


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
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that is asked, with its LoRAs. It makes no difference whether a guard is on it.",
                ),
                io.Clip.Input(
                    "clip", tooltip="The model's CLIP. It encodes the prompt, and the prompt without some of its words."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="The prompt to explain",
                    tooltip="The prompt, as in CLIP Text Encode. Or connect a text.",
                ),
                StabilityProfileType.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "Stability profile of this model. Without one, the node first makes a profile of the model and its "
                        "LoRAs, from 100 built-in prompts, in about the time of ten images, and keeps it. Memorization Guard "
                        "uses the same profile."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The Empty Latent Image that you sample with. If the node makes a profile, it uses this size, and "
                        "otherwise 512 x 512 for Stable Diffusion 1 and 2, and 1024 x 1024 for other models. If there is a "
                        "profile, this input makes no difference."
                    ),
                ),
                threshold_input(FALSE_POSITIVE_RATE),
            ],
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
        if clip is None:
            raise ValueError("this checkpoint has no CLIP: load the one that belongs to the model")
        model = unguarded(model)
        size = empty_latent(model, latent)
        if profile is None:
            profile = automatic_profile(model, clip, size, cls.hidden.unique_id)
        trace = _asked(model, clip, text, profile, size, Thresholds(**thresholds))
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


def automatic_profile(model: ModelPatcher, clip: Any, latent: torch.Tensor, node: str) -> StabilityProfile:
    """The profile of this model that makes itself, as before a guarded run of this size."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(USUAL_GUIDANCE)
    automatic, log = Automatic(clip), TraceLog("trace")
    automatic.make(guider, latent, lambda said: send(node, log.next_name(), "begin", lambda: {"note": said}))
    profile, missing = automatic.profile(guider)
    if profile is None:
        raise ValueError(f"the prompt cannot be judged, since there is no profile of this model. {missing}")
    return profile


def _asked(
    model: ModelPatcher, clip: Any, text: str, profile: StabilityProfile, latent: torch.Tensor, thresholds: Thresholds
) -> Trace:
    """What the model says of a prompt in noise, as the first evaluation of a run.

    Raises:
        ValueError: if it could not be judged.
    """
    shape, scale = profile.settings.latent_shape, profile.settings.guidance_scale
    nothing, prompt = encoded(clip, ["", text])
    if len(prompt) != 1:
        raise ValueError("this CLIP makes several conditionings of a text (scheduled hooks): connect it without its hooks")
    traces = sample_references(
        model,
        [prompt],
        nothing,
        0,
        "first",
        steps=STEPS,
        cfg=USUAL_GUIDANCE if scale is None else scale,
        latent=latent if shape is None else torch.zeros(1, *shape),
        profile=profile,
        thresholds=thresholds,
        encoder=Encoder(clip, lambda: [text]),
    )
    notes = [trace.note for trace in traces if trace.p_value is None] if traces else [None]
    if notes:
        raise ValueError(f"the prompt could not be judged. {notes[0] or 'The log says why.'}")
    return traces[0]


def empty_latent(model: ModelPatcher, latent: Any) -> torch.Tensor:
    """An empty latent of the size of another; without one, of that which models of this kind are usually sampled at: ComfyUI
    knows no size of a model."""
    if latent is not None:
        samples = torch.zeros_like(latent["samples"][:1], device="cpu")
    else:
        small = (comfy.supported_models.SD15, comfy.supported_models.SD20)
        side = (512 if isinstance(model.model.model_config, small) else 1024) // 8
        samples = torch.zeros(1, 4, side, side)
    return comfy.sample.fix_empty_latent_channels(model, samples)


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
