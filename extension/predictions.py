"""The place between the network and guidance, in each host: both predictions lie side by side there, and may be replaced.

The WebUI calls back with the predictions for all prompts and images in one tensor, which is changed in place. In Forge the
last pre-CFG function puts a CFG function in front of whatever guides; in reForge the first pre-CFG function is given the
predictions. All of it is in place for one run of a sampler and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from modules import script_callbacks, shared
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.core.asking import Ask
from ..memorization_guard.core.noise_level import resized
from . import hosts
from .timesteps import changed


class Predicted(Protocol):
    """Takes a latent, its noise level, the predictions with and without the prompt, and what asks the network for others.

    Gives the prediction with the prompt to go on with.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor | None, /, *, ask: Ask) -> Tensor: ...


def judged(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> contextlib.AbstractContextManager[None]:
    """While it is entered, the predictions of a denoiser go through ``predicted``, and what that corrects is replaced.

    Args:
        denoiser: the host's ``CFGDenoiser``.
        monitor: is told what goes wrong here; the image never suffers from it.
        predicted: the monitor's, or what stands before it where the denoiser's predictions are no clean latents.
    """
    judged_in = _judged_in_patcher if hosts.HAS_UNET_PATCHER else _judged_in_callback
    return judged_in(denoiser, monitor, predicted)


@contextlib.contextmanager
def _called_back(register: Callable[..., None], callback: Callable[[Any], None]) -> Iterator[None]:
    register(callback)
    try:
        yield
    finally:
        script_callbacks.remove_callbacks_for_function(callback)


@contextlib.contextmanager
def _told(monitor: StabilityMonitor) -> Iterator[None]:
    """Errors go to the monitor, and nowhere else."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        monitor.fail(error)


@contextlib.contextmanager
def _tiling_kept() -> Iterator[None]:
    """What Hypertile draws at random while it is entered, it draws again afterwards: it has a generator of its own."""
    tiling = getattr(sys.modules.get("hypertile"), "RNG_INSTANCE", None)
    state = None if tiling is None else tiling.getstate()
    try:
        yield
    finally:
        if tiling is not None:
            tiling.setstate(state)


# ------------------------------------------------------------------------------------------------------------- the WebUI


@contextlib.contextmanager
def _judged_in_callback(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> Iterator[None]:
    given: Any = None

    def before(params: Any) -> None:
        nonlocal given
        # The whole of it: extensions that are called later may exchange the latent in it.
        given = params if params.denoiser is denoiser else None

    def after(params: Any) -> None:
        nonlocal given
        if given is not None:
            with _told(monitor):
                _judge_rows(denoiser, monitor, predicted, given, params.x)
        given = None

    # Registered last, so called last: what other extensions make of the predictions is what is judged.
    with _called_back(script_callbacks.on_cfg_denoiser, before), _called_back(script_callbacks.on_cfg_denoised, after):
        yield


def _judge_rows(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted, given: Any, rows: Tensor) -> None:
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

    def ask(noise: Tensor | None) -> tuple[Tensor, float, Tensor, Tensor]:
        owners = [image for image, each in enumerate(weights) for _ in each]
        latent, level = (x, float(sigma[0])) if noise is None else _in_noise(denoiser.inner_model, monitor, noise)
        with _tiling_kept():
            found = _rows(denoiser, given, owners, latent, level)
        return latent, level, _joined(found, weights), _parts(found, weights)[1]

    corrected = predicted(x, sigma, cond, None if missing else without, ask=ask)
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


def _rows(denoiser: Any, given: Any, owners: Sequence[int], latent: Tensor, level: float) -> Tensor:
    """What the network says of another latent, one of an image, in rows as the host has them.

    It is called as ``CFGDenoiser.forward`` calls it where memory is to be saved, a batch at a time, and for all rows, also
    those that the host leaves out at present. No callback hears of it, and no step is counted.

    Args:
        owners: the image of each prompt.
    """
    with_prompt, without = given.text_cond, given.text_uncond
    if with_prompt.shape[1] != without.shape[1]:
        if shared.opts.pad_cond_uncond_v0:
            with_prompt, without = denoiser.pad_cond_uncond_v0(with_prompt, without)
        elif shared.opts.pad_cond_uncond:
            with_prompt, without = denoiser.pad_cond_uncond(with_prompt, without)

    rows, images = [], given.image_cond
    if images.ndim == 4 and images.shape[-1] > 1:  # an inpainting model's; others are given a single pixel
        images = resized(images, latent.shape[2:])
    for text, of in ((with_prompt, owners), (without, range(len(latent)))):
        for start in range(0, len(of), len(latent)):
            x = latent[list(of[start : start + len(latent)])]
            condition = _condition(text, start, start + len(x), images[: len(x)])
            rows.append(denoiser.inner_model(x, given.sigma.new_full((len(x),), level), cond=condition))
            images = images[len(x) :]
    return torch.cat(rows)


def _condition(text: Any, start: int, end: int, image: Tensor) -> dict[str, Any]:
    """What the WebUI's models are given beside the latent: these rows of the prompts' tensors, and the image to go by."""
    if isinstance(text, dict):
        return {**{name: rows[start:end] for name, rows in text.items()}, "c_concat": [image]}
    by_embedding = shared.sd_model.model.conditioning_key == "crossattn-adm"
    return {"c_crossattn": [text[start:end]], **({"c_adm": image} if by_embedding else {"c_concat": [image]})}


def _parts(rows: Tensor, weights: list[list[float]]) -> tuple[Sequence[Tensor], Tensor]:
    """The rows with each image's prompts, and those without a prompt."""
    prompted = torch.split(rows[: sum(map(len, weights))], [len(each) for each in weights])
    return prompted, rows[sum(map(len, weights)) :][: len(weights)]


def _joined(rows: Tensor, weights: list[list[float]]) -> Tensor:
    """The prediction with the prompt, ``[B, ...]``; where prompts are joined by AND, at their weights."""
    if all(each == [1.0] for each in weights):
        return rows[: len(weights)]
    prompted, without = _parts(rows, weights)
    return torch.stack(
        [
            alone + sum(weight * (one - alone) for weight, one in zip(each, image, strict=True))
            for image, alone, each in zip(prompted, without, weights, strict=True)
        ]
    )


# ------------------------------------------------------------------------------------------------------ Forge and reForge


@contextlib.contextmanager
def _judged_in_patcher(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> Iterator[None]:
    # Functions, since a patcher that is cloned copies its options deeply, but not those: all clones have the same one.
    forge, reforge = _last_before_guidance(monitor, predicted), _first_after_network(monitor, predicted)

    def before(params: Any) -> None:
        objects = params.denoiser.inner_model.inner_model.forge_objects
        present = objects.unet.model_options.get("sampler_pre_cfg_function", [])
        if params.denoiser is not denoiser or forge in present or reforge in present:
            return
        # The first call, or the refiner has taken over.
        put_back.callback(setattr, objects, "unet", objects.unet)
        objects.unet = objects.unet.clone()
        functions = [*present, forge] if hosts.is_forge(objects.unet) else [reforge, *present]
        objects.unet.model_options["sampler_pre_cfg_function"] = functions

    with contextlib.ExitStack() as put_back, _called_back(script_callbacks.on_cfg_denoiser, before):
        yield


def _last_before_guidance(monitor: StabilityMonitor, predicted: Predicted) -> Callable[..., Any]:
    """Forge's pre-CFG functions are called before the network; the last one knows which function guidance is left to."""

    def before_network(model: Any, cond: Any, uncond: Any, x: Any, timestep: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        chosen = options.get("sampler_cfg_function")
        weight = _weight(cond)

        def guide(args: dict[str, Any]) -> Any:
            prompted, without = args["cond_denoised"], args["uncond_denoised"]

            def evaluate(x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
                from backend.sampling.sampling_function import calc_cond_uncond_batch

                return calc_cond_uncond_batch(model, cond, uncond, x, timestep, options)

            with _told(monitor):
                _judge(monitor, predicted, args, prompted, None if uncond is None else without, weight, evaluate)
            if chosen is not None:
                return chosen({**args, "cond": args["input"] - prompted})
            difference = (prompted - without) * args["cond_scale"]
            return _Guided(without + (difference if math.isclose(weight, 1.0) else difference * weight))

        return model, cond, uncond, x, timestep, {**options, "sampler_cfg_function": guide}

    return before_network


class _Guided:
    """What a CFG function of Forge gives for the host to take from the latent, where the outcome is to be this very tensor."""

    def __init__(self, denoised: Tensor) -> None:
        self._denoised = denoised

    def __rsub__(self, x: Tensor) -> Tensor:
        return self._denoised


def _first_after_network(monitor: StabilityMonitor, predicted: Predicted) -> Callable[..., Any]:
    """reForge's pre-CFG functions, as ComfyUI's, are called with the predictions."""

    def after_network(args: dict[str, Any]) -> Any:
        prompted, without = args["conds_out"][:2]
        cond, uncond = args["conds"][:2]

        def evaluate(x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
            from ldm_patched.modules.samplers import calc_cond_uncond_batch

            return calc_cond_uncond_batch(args["model"], cond, uncond, x, timestep, args["model_options"])

        with _told(monitor):
            _judge(monitor, predicted, args, prompted, None if uncond is None else without, _weight(cond), evaluate)
        return args["conds_out"]

    return after_network


def _weight(cond: Any) -> float:
    """That of all prompts together, which AND joins."""
    return float(sum(each.get("strength", 1) for each in cond))


def _judge(
    monitor: StabilityMonitor,
    predicted: Predicted,
    args: dict[str, Any],
    prompted: Tensor,
    without: Tensor | None,
    weight: float,
    evaluate: Callable[[Tensor, Tensor], Sequence[Tensor]],
) -> None:
    """Judges the prediction with the prompt, an average, at the weight that guidance gives it, and replaces it in place.

    Args:
        evaluate: gives the predictions with and without the prompt for a latent and its noise level.
    """
    sigma = args["sigma"]

    def at_weight(prompted: Tensor, without: Tensor | None) -> Tensor:
        return prompted if without is None or weight in (0.0, 1.0) else torch.lerp(without, prompted, weight)

    def ask(noise: Tensor | None) -> tuple[Tensor, float, Tensor, Tensor | None]:
        if noise is None:
            latent, level = args["input"], float(sigma[0])
        else:
            level = hosts.highest_sigma(args["model"])
            latent = noise * NoiseLevel.from_model(level, monitor.settings.prediction_type).scale
        with _tiling_kept():
            found, other = evaluate(latent, torch.full_like(sigma, level))
        alone = None if without is None else other
        return latent, level, at_weight(found, alone), alone

    joined = at_weight(prompted, without)
    corrected = predicted(args["input"], sigma, joined, without, ask=ask)
    if corrected is joined:
        return
    if without is not None and joined is not prompted:
        corrected = torch.where(changed(joined, corrected), without + (corrected - without) / weight, prompted)
    prompted.copy_(corrected)
