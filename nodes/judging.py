"""Judges prompts by what a model says of them in noise, without an image: what Explain and Screen Prompts have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..memorization_guard import StabilityProfile, Thresholds, Trace
from ..memorization_guard.automatic import STEPS
from ..memorization_guard.core.settings import USUAL_GUIDANCE, Serves
from .guard import StabilityProfileType, threshold_input
from .prompts import Encoder, encoded
from .references import Automatic, sample_references
from .runs import TraceLog
from .sampling import send, unguarded

#: The field of the constant that the nodes offer.
_FALSE_POSITIVE_RATE = next(field for field in dataclasses.fields(Thresholds) if field.name == "false_positive_rate")


def inputs(text: Any, *, clip: str) -> list[Any]:
    """The inputs of a node that judges prompts.

    Args:
        text: the input with the prompts. clip: tooltip of the CLIP.
    """
    return [
        io.Model.Input(
            "model",
            tooltip="The model that is asked, with its LoRAs. It makes no difference whether a guard is on it.",
        ),
        io.Clip.Input("clip", tooltip=clip),
        text,
        StabilityProfileType.Input(
            "profile",
            optional=True,
            tooltip=(
                "Stability profile of this model. Without one, the node first makes a profile of the model and its LoRAs, "
                "from 100 built-in prompts, in about the time of ten images, and keeps it. Memorization Guard uses the same "
                "profile."
            ),
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip=(
                "The Empty Latent Image that you sample with. If the node makes a profile, it uses this size, and otherwise "
                "512 x 512 for Stable Diffusion 1 and 2, and 1024 x 1024 for other models. If there is a profile, this input "
                "makes no difference."
            ),
        ),
        threshold_input(_FALSE_POSITIVE_RATE),
    ]


class InNoise:
    """A model that is asked about prompts, as the first evaluation of a run is.

    Args:
        model, clip, profile, latent, thresholds: what a node with :func:`inputs` was given; without a profile, one is made.
        node: id of the node, which shows how far that is.

    Raises:
        ValueError: if there is no CLIP, or no profile.
    """

    def __init__(
        self, model: ModelPatcher, clip: Any, profile: StabilityProfile | None, latent: Any, thresholds: Any, *, node: str
    ) -> None:
        if clip is None:
            raise ValueError("this checkpoint has no CLIP: load the one that belongs to the model")
        self._model, self._clip, self._thresholds = unguarded(model), clip, Thresholds(**thresholds)
        size = empty_latent(self._model, latent)
        self._profile = _automatic_profile(self._model, clip, size, node) if profile is None else profile
        shape = self._profile.settings.latent_shape
        self._latent = size if shape is None else torch.zeros(1, *shape)

    @functools.cached_property
    def _nothing(self) -> Any:
        return encoded(self._clip, [""])[0]

    def traces(self, texts: Sequence[str], seed: int, serves: Serves, encoder: Encoder | None = None) -> list[Trace]:
        """What the model says of each prompt; one trace each, where nothing went wrong that the log tells.

        Args:
            seed: prompt i is evaluated in the noise of ``seed + i``. encoder: tells the words of those that trigger.
        """
        prompts = encoded(self._clip, [*texts])
        if any(len(prompt) != 1 for prompt in prompts):
            raise ValueError("this CLIP makes several conditionings of a text (scheduled hooks): connect it without its hooks")
        scale = self._profile.settings.guidance_scale
        return sample_references(
            self._model,
            prompts,
            self._nothing,
            seed,
            serves,
            steps=STEPS,
            cfg=USUAL_GUIDANCE if scale is None else scale,
            latent=self._latent,
            profile=self._profile,
            thresholds=self._thresholds,
            encoder=encoder,
        )


def _automatic_profile(model: ModelPatcher, clip: Any, latent: torch.Tensor, node: str) -> StabilityProfile:
    """The profile of this model that makes itself, as before a guarded run of this size."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(USUAL_GUIDANCE)
    automatic, log = Automatic(clip), TraceLog("trace")
    automatic.make(guider, latent, lambda said: send(node, log.next_name(), "begin", lambda: {"note": said}))
    profile, missing = automatic.profile(guider)
    if profile is None:
        raise ValueError(f"the prompt cannot be judged, since there is no profile of this model. {missing}")
    return profile


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
