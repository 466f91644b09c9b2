"""Reference prompts sampled with ComfyUI, and the profiles that make themselves from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ..memorization_guard import StabilityProfile, Thresholds, Trace
from ..memorization_guard.automatic import AUTO, STEPS, AutomaticProfiles, guidance_of, profiles_in, prompts
from ..memorization_guard.core.profile import EXTENSION
from ..memorization_guard.core.settings import Serves
from .models import model_hash
from .prompts import Encoder, encoded
from .sampling import guard, unguarded

FOLDER = "stability_profiles"

# As one of ComfyUI's own model folders, so that extra_model_paths.yaml can name others.
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(EXTENSION)


def profile_folder() -> Path:
    """Where profiles are written to."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def sample_references(
    model: ModelPatcher,
    positives: Sequence[Any],
    negative: Any,
    seed: int,
    serves: Serves,
    *,
    steps: int,
    cfg: float,
    latent: torch.Tensor,
    sampler_name: str = "euler",
    scheduler: str = "normal",
    profile: StabilityProfile | None = None,
    thresholds: Thresholds | None = None,
    encoder: Encoder | None = None,
) -> list[Trace]:
    """The traces of reference prompts, sampled in as few batches as their conditionings allow, as long as they are needed.

    Args:
        seed: prompt i starts from the noise of ``seed + i``. latent: an empty one, ``[1, ...]``.
        profile, thresholds: judge them, if there is a profile. encoder: tells the words of those that trigger.
    """
    traces: list[Trace] = []
    start = 0
    while start < len(positives):
        comfy.model_management.throw_exception_if_processing_interrupted()
        part = _alike(positives[start:])
        first = seed + start
        guarded, seen = guard(model, mode="trace", serves=serves, profile=profile, thresholds=thresholds, encoder=encoder)
        comfy.sample.sample(
            guarded,
            torch.cat([comfy.sample.prepare_noise(latent, first + i) for i in range(len(part))]),
            steps,
            cfg,
            sampler_name,
            scheduler,
            _together(part),
            negative,
            latent.repeat(len(part), *(1,) * (latent.ndim - 1)),
            disable_pbar=True,
            seed=first,
        )
        traces += [trace for run in seen.runs() for trace in run.traces]
        start += len(part)
    # Cancel may have come while the network was asked beside the last run, which was stopped before it could tell.
    comfy.model_management.throw_exception_if_processing_interrupted()
    return traces


class Automatic:
    """Gives a run the profile of whatever model it samples, and makes it before the first such run.

    Args:
        clip: encodes the reference prompts; ``None`` where none is connected.
    """

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    @property
    def _profiles(self) -> AutomaticProfiles:
        return profiles_in(profile_folder() / AUTO)

    def make(self, guider: Any, noise: torch.Tensor, tell: Callable[[str], None]) -> None:
        """Makes the profile if there is none; ``tell`` shows how far it is."""
        if self._clip is None:
            return
        model = functools.cache(lambda: unguarded(guider.model_patcher))
        bar = functools.cache(comfy.utils.ProgressBar)

        @functools.cache
        def conditionings() -> dict[str, Any]:
            # All at once: the text encoder and the model may not fit on the device together.
            texts = ["", *prompts()]
            return dict(zip(texts, encoded(self._clip, texts), strict=True))

        def sample(texts: list[str], seed: int, serves: Serves) -> list[Trace]:
            return sample_references(
                model(),
                [conditionings()[text] for text in texts],
                conditionings()[""],
                seed,
                serves,
                steps=STEPS,
                cfg=guidance_of(guider.cfg),
                latent=_one_frame(noise),
            )

        def progress(done: int, of: int) -> None:
            bar(of).update_absolute(done, of)
            tell(f"Making the profile of this model, once: {done} of {of} prompts.")

        self._profiles.make(
            self._weights(guider), sample, progress, cancelled=comfy.model_management.InterruptProcessingException
        )

    def profile(self, guider: Any) -> tuple[StabilityProfile | None, str | None]:
        """The profile of the model that a run samples, or why there is none."""
        profile, missing = self._profiles.find(self._weights(guider))
        if profile is None and self._clip is None:
            missing = "Connect the model's CLIP, and one is made before the first image; or connect a profile."
        return profile, missing

    def _weights(self, guider: Any) -> str | None:
        return model_hash(guider.model_patcher)


def _one_frame(noise: torch.Tensor) -> torch.Tensor:
    """An empty latent of a run's size; of a video, one frame."""
    latent = torch.zeros_like(noise[:1], device="cpu")
    return latent[:, :, :1] if latent.ndim == 5 else latent


def _alike(encoded: Sequence[Any]) -> Sequence[Any]:
    """The first conditionings that fit into one batch; a long prompt takes several windows of the text encoder."""
    same = 1
    while same < len(encoded) and _shape(encoded[same]) == _shape(encoded[0]) is not None:
        same += 1
    return encoded[:same]


def _shape(conditioning: Any) -> Any:
    """What conditionings must share to be one batch, or ``None`` where they can never be."""
    if len(conditioning) != 1:
        return None
    tensor, options = conditioning[0]
    return tensor.shape, {k: v.shape if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def _together(encoded: Sequence[Any]) -> Any:
    if len(encoded) == 1:
        return encoded[0]
    options = encoded[0][0][1]
    joined = {
        key: torch.cat([conditioning[0][1][key] for conditioning in encoded]) if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }
    return [[torch.cat([conditioning[0][0] for conditioning in encoded]), joined]]
