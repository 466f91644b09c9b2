"""The node that watches, and on request corrects, whatever its model samples."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

from comfy_api.v0_0_2 import io

from ..memorization_guard import Mode, Thresholds
from ..memorization_guard.core.settings import HOST_CONSTANTS, MODES
from .prompts import Encoder
from .references import Automatic
from .sampling import guard

CATEGORY = "memorization guard"

StabilityProfileType = io.Custom("STABILITY_PROFILE")
TraceType = io.Custom("STABILITY_TRACE")

#: Mode ``stop`` in a place where ComfyUI has more to end than a run.
END_PROMPT = "stop and end prompt"


def also_found_as(*words: str) -> dict[str, list[str]]:
    """Other words that the node is found by in the search of nodes, where this ComfyUI's schema has a place for them."""
    return {"search_aliases": [*words]} if "search_aliases" in inspect.signature(io.Schema).parameters else {}


def threshold_input(field: dataclasses.Field[Any]) -> Any:
    """A widget for a field of :class:`Thresholds`, folded away as advanced; callers of the API may leave it out."""
    about, name = field.metadata["about"], field.name
    if choices := field.metadata.get("choices"):
        widget = io.Combo.Input(name, options=[*choices], default=field.default, tooltip=about, optional=True)
    else:
        low, high, step = field.metadata["bounds"]
        widget = io.Float.Input(name, default=field.default, min=low, max=high, step=step, tooltip=about, optional=True)
    widget.extra_dict = {"advanced": True}
    return widget


class MemorizationGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuard",
            display_name="Memorization Guard",
            category=CATEGORY,
            description=(
                "Watches this model while it samples, and shows live whether it reproduces a training image. With mode "
                "'mitigate' it also prevents that: with the CLIP connected, by leaving out the words of the prompt that call "
                "the image up."
            ),
            **also_found_as("duplicate", "plagiarism", "overfit", "copyright", "training image", "memorized"),
            inputs=[
                io.Model.Input("model", tooltip="The model to watch. Nodes that patch it may stand before or after this one."),
                io.Combo.Input(
                    "mode",
                    options=[*MODES, END_PROMPT],
                    default="trace",
                    tooltip=(
                        "off: the model passes through unchanged. trace: watch and judge; the image is bit-identical to one "
                        "without this node. mitigate: also correct images that count as memorized; needs a profile that "
                        "fits. stop: end a run as soon as every image of its batch counts as memorized; instead of those "
                        "images plain pictures come out; needs a profile too. stop and end prompt: then also end the whole "
                        "prompt, as Cancel does; nothing comes out."
                    ),
                ),
                StabilityProfileType.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "Stability profile of this model, from Load or Calibrate Stability Profile. It is valid for every "
                        "sampler, step count, cfg and size. Without a profile, connect the CLIP. With neither, the run is "
                        "traced but not judged."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "The model's CLIP: connect the one that the prompt is encoded with. If no profile is connected, the "
                        "guard makes one of the model and its LoRAs before the first image, from 100 built-in prompts, in "
                        "about the time of ten images, and keeps it. With the CLIP, the guard also names the words that call "
                        "a copy up, and 'mitigate' keeps the rest of the prompt."
                    ),
                ),
                *map(threshold_input, HOST_CONSTANTS),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The watched model: connect it to the sampler."),
                TraceType.Output(
                    display_name="TRACE",
                    tooltip="What was recorded while this model sampled, for Stability Report and Memorization Gate.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            # Two guards with equal inputs are still two: each shows its own sampler's run.
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, mode: str, profile: Any = None, clip: Any = None, **thresholds: Any) -> io.NodeOutput:
        return io.NodeOutput(
            *guard(
                model,
                mode="stop" if mode == END_PROMPT else cast(Mode, mode),
                profile=profile,
                thresholds=Thresholds(**thresholds),
                node=cls.hidden.unique_id,
                automatic=Automatic(clip),
                encoder=None if clip is None else Encoder(clip),
                ends_prompt=mode == END_PROMPT,
            )
        )
