"""The node that tells of a list of prompts which the model remembers an image under, without an image."""

from __future__ import annotations

import math
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..memorization_guard import StabilityProfile, Thresholds, Trace
from ..memorization_guard.automatic import STEPS
from ..memorization_guard.core.settings import USUAL_GUIDANCE
from .explain import FALSE_POSITIVE_RATE, automatic_profile, empty_latent
from .guard import CATEGORY, StabilityProfileType, threshold_input
from .prompts import encoded
from .references import sample_references
from .sampling import unguarded

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
            inputs=[
                io.Model.Input("model", tooltip="The model that is asked, with its LoRAs. A guard on it makes no difference."),
                io.Clip.Input("clip", tooltip="The model's CLIP: encodes the prompts."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    placeholder="One prompt a line",
                    tooltip="The prompts, one a line. Or connect a text. Empty lines are left out.",
                ),
                StabilityProfileType.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "Stability profile of this model. Without one, the profile of the model and its LoRAs makes itself "
                        "first, as with Memorization Guard, from 100 built-in prompts in the time of some ten images. It is "
                        "kept, and the guard uses it too."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The Empty Latent Image that you sample with: a profile that makes itself gets its size. Without it "
                        "512 x 512 for Stable Diffusion 1 and 2, and 1024 x 1024 for other models. Where there is a profile "
                        "it makes no difference."
                    ),
                ),
                threshold_input(FALSE_POSITIVE_RATE),
            ],
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
        if clip is None:
            raise ValueError("this checkpoint has no CLIP: load the one that belongs to the model")
        model = unguarded(model)
        size = empty_latent(model, latent)
        if profile is None:
            profile = automatic_profile(model, clip, size, cls.hidden.unique_id)
        traces = _judged(model, clip, texts, profile, size, Thresholds(**thresholds))
        _check(traces)
        order = sorted(range(len(texts)), key=lambda number: _p_value(traces[number]))
        lines = [f"{_verdict(traces[number])}\t{_shown(traces[number])}\t{texts[number]}" for number in order]
        suspicious = [text for text, trace in zip(texts, traces, strict=True) if _verdict(trace) != ORDINARY]
        return io.NodeOutput("\n".join(["verdict\tp_value\tprompt", *lines]), "\n".join(suspicious))


def _judged(
    model: ModelPatcher,
    clip: Any,
    texts: list[str],
    profile: StabilityProfile,
    latent: torch.Tensor,
    thresholds: Thresholds,
) -> list[Trace]:
    """What the model says of each prompt in noise, as the first evaluation of a run.

    Raises:
        ValueError: if there is not one trace of every prompt.
    """
    shape, scale = profile.settings.latent_shape, profile.settings.guidance_scale
    (nothing,) = encoded(clip, [""])
    bar, traces = comfy.utils.ProgressBar(len(texts)), list[Trace]()
    for start in range(0, len(texts), AT_ONCE):
        some = encoded(clip, texts[start : start + AT_ONCE])
        if any(len(prompt) != 1 for prompt in some):
            raise ValueError("this CLIP makes several conditionings of a text (scheduled hooks): connect it without its hooks")
        traces += sample_references(
            model,
            some,
            nothing,
            start,
            "verdict",
            steps=STEPS,
            cfg=USUAL_GUIDANCE if scale is None else scale,
            latent=latent if shape is None else torch.zeros(1, *shape),
            profile=profile,
            thresholds=thresholds,
        )
        if len(traces) != min(start + AT_ONCE, len(texts)):
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
