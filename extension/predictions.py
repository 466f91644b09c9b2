"""The place between the network and guidance: both predictions lie side by side there, and may be replaced.

The WebUI calls back with the predictions for all prompts and images in one tensor, which is changed in place; ``forge.py`` has
the place of its forks. All of it is in place for one run of a sampler and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from modules import script_callbacks, shared
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.core.asking import Answer
from ..memorization_guard.core.noise_level import resized
from . import hosts
from .calls import Predicted, called_back, tiling_kept, told
from .forge import judged_in_patcher
from .prompts import OtherPrompts, Rows, Texts, picked
from .timesteps import changed


def judged(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> contextlib.AbstractContextManager[None]:
    """While it is entered, the predictions of a denoiser go through ``predicted``, and what that corrects is replaced.

    Args:
        denoiser: the host's ``CFGDenoiser``.
        monitor: is told what goes wrong here; the image never suffers from it.
        predicted: the monitor's, or what stands before it where the denoiser's predictions are no clean latents.
    """
    judged_in = judged_in_patcher if hosts.HAS_UNET_PATCHER else _judged_in_callback
    return judged_in(denoiser, monitor, predicted)


@contextlib.contextmanager
def _judged_in_callback(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> Iterator[None]:
    given: Any = None
    texts = Texts(denoiser)

    def before(params: Any) -> None:
        nonlocal given
        # The whole of it: extensions that are called later may exchange the latent in it.
        given = params if params.denoiser is denoiser else None
        if given is not None:
            with told(monitor):
                params.text_cond = texts.given(params.text_cond, params.x.shape)

    def after(params: Any) -> None:
        nonlocal given
        if given is not None:
            with told(monitor):
                _judge_rows(denoiser, monitor, predicted, given, params.x, texts)
        given = None

    # Registered last, so called last: what other extensions make of the predictions is what is judged.
    with called_back(script_callbacks.on_cfg_denoiser, before), called_back(script_callbacks.on_cfg_denoised, after):
        yield


def _judge_rows(
    denoiser: Any, monitor: StabilityMonitor, predicted: Predicted, given: Any, rows: Tensor, texts: Texts
) -> None:
    """Judges, and replaces in place, the rows of a batch: first those of each image's prompts, then those without a prompt.

    Behind them, a model that edits images has those without the image.
    """
    arguments = denoiser.sampler.sampler_extra_args
    weights = [[prompt.weight for prompt in prompts] for prompts in arguments["cond"].batch]
    x, sigma = given.x[-len(weights) :], given.sigma[-len(weights) :]
    prompted, without = _parts(rows, weights)
    cond = _joined(rows, weights)
    # Where the host leaves the evaluation without the prompt out, it puts those of the first prompts in its place.
    may_miss = shared.opts.skip_early_cond or arguments["s_min_uncond"]
    missing = bool(may_miss) and torch.equal(without, torch.stack([each[0] for each in prompted]))

    owners = [image for image, each in enumerate(weights) for _ in each]

    def in_noise(noise: Tensor) -> tuple[Tensor, float]:
        return _in_noise(denoiser.inner_model, monitor, noise)

    def ask(noise: Tensor | None, *, alone: bool = False) -> Answer:
        latent, level = (x, float(sigma[0])) if noise is None else in_noise(noise)
        alone = alone and _unweighted(weights)
        with tiling_kept():
            found = _rows(denoiser, given, owners, latent, level, alone=alone)
        return latent, level, _joined(found, weights), None if alone else _parts(found, weights)[1]

    def asked(latent: Tensor, level: float, sample: int, text: Rows) -> Tensor:
        image = given.image_cond[owners.index(sample)]
        images = _sized(image.expand(len(latent), *image.shape), latent)
        with tiling_kept():
            return _evaluated(denoiser, given, _padded(denoiser, text, given.text_uncond)[0], latent, level, images)

    def again(text: Rows) -> Tensor:
        given.text_cond = text
        return ask(None)[2]

    prompts = OtherPrompts(texts, in_noise, asked, again)
    corrected = predicted(x, sigma, cond, None if missing else without, ask=ask, prompts=prompts)
    if corrected is cond:
        return
    replace = changed(cond, corrected)
    for i, (image, each) in enumerate(zip(prompted, weights, strict=True)):
        if missing:
            without[i] = torch.where(replace[i], corrected[i], without[i])
        # So that the host, which adds up the differences at their weights, comes to the corrected one.
        strongest = max(range(len(each)), key=lambda number: abs(each[number]))
        replaced = without[i].expand_as(image).clone()
        if each[strongest] != 0:
            replaced[strongest] += (corrected[i] - without[i]) / each[strongest]
        image.copy_(torch.where(replace[i], replaced, image))


def _in_noise(network: Any, monitor: StabilityMonitor, noise: Tensor) -> tuple[Tensor, float]:
    """The latent that is this noise at the network's highest noise level, and that level."""
    if (sigmas := getattr(network, "sigmas", None)) is None:
        return noise, float(len(network.inner_model.alphas_cumprod) - 1)  # timestep samplers', on the VP scale
    level = float(sigmas[-1])
    return noise * NoiseLevel.from_model(level, monitor.settings.prediction_type).scale, level


def _rows(denoiser: Any, given: Any, owners: Sequence[int], latent: Tensor, level: float, *, alone: bool) -> Tensor:
    """What the network says of another latent, one of an image, in rows as the host has them.

    It is called as ``CFGDenoiser.forward`` calls it where memory is to be saved, a batch at a time, and for all rows, also
    those that the host leaves out at present. No callback hears of it, and no step is counted.

    Args:
        owners: the image of each prompt. alone: whether the rows without a prompt are left out.
    """
    rows, images = [], _sized(given.image_cond, latent)
    texts = _padded(denoiser, given.text_cond, given.text_uncond)
    for text, of in zip(texts, (owners, range(0 if alone else len(latent))), strict=True):
        for start in range(0, len(of), len(latent)):
            x = latent[list(of[start : start + len(latent)])]
            part = picked(text, slice(start, start + len(x)))
            rows.append(_evaluated(denoiser, given, part, x, level, images[: len(x)]))
            images = images[len(x) :]
    return torch.cat(rows)


def _padded(denoiser: Any, with_prompt: Rows, without: Rows) -> tuple[Rows, Rows]:
    """The prompts' rows at one length, where the host is set to that."""
    if with_prompt.shape[1] != without.shape[1]:
        if shared.opts.pad_cond_uncond_v0:
            return denoiser.pad_cond_uncond_v0(with_prompt, without)
        if shared.opts.pad_cond_uncond:
            return denoiser.pad_cond_uncond(with_prompt, without)
    return with_prompt, without


def _sized(images: Tensor, latent: Tensor) -> Tensor:
    """The images to go by, in the size of a latent: an inpainting model's; others are given a single pixel."""
    return resized(images, latent.shape[2:]) if images.ndim == 4 and images.shape[-1] > 1 else images


def _evaluated(denoiser: Any, given: Any, text: Rows, x: Tensor, level: float, images: Tensor) -> Tensor:
    """What the WebUI's models say of latents; beside them they are given the prompts' rows, and the images to go by."""
    if isinstance(text, dict):
        condition = {**text, "c_concat": [images]}
    else:
        by_embedding = shared.sd_model.model.conditioning_key == "crossattn-adm"
        condition = {"c_crossattn": [text], **({"c_adm": images} if by_embedding else {"c_concat": [images]})}
    found: Tensor = denoiser.inner_model(x, given.sigma.new_full((len(x),), level), cond=condition)
    return found


def _parts(rows: Tensor, weights: list[list[float]]) -> tuple[Sequence[Tensor], Tensor]:
    """The rows with each image's prompts, and those without a prompt."""
    prompted = torch.split(rows[: sum(map(len, weights))], [len(each) for each in weights])
    return prompted, rows[sum(map(len, weights)) :][: len(weights)]


def _unweighted(weights: list[list[float]]) -> bool:
    """Whether every image has one prompt, at its full weight."""
    return all(each == [1.0] for each in weights)


def _joined(rows: Tensor, weights: list[list[float]]) -> Tensor:
    """The prediction with the prompt, ``[B, ...]``; where prompts are joined by AND, at their weights."""
    if _unweighted(weights):
        return rows[: len(weights)]
    prompted, without = _parts(rows, weights)
    return torch.stack(
        [
            alone + sum(weight * (one - alone) for weight, one in zip(each, image, strict=True))
            for image, alone, each in zip(prompted, without, weights, strict=True)
        ]
    )
