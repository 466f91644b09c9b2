"""The place between the network and guidance, in each host: both predictions lie side by side there, and may be replaced.

The WebUI calls back with the predictions for all prompts and images in one tensor, which is changed in place. In Forge the
last pre-CFG function puts a CFG function in front of whatever guides; in reForge the first pre-CFG function is given the
predictions. All of it is in place for one run of a sampler and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from modules import script_callbacks, shared
from torch import Tensor

from ..memorization_guard import StabilityMonitor
from . import hosts
from .timesteps import changed

#: Takes a latent, its noise level, and the predictions with and without the prompt; gives the first of the two to go on with.
Predicted = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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
                _judge_rows(denoiser, predicted, given, params.x)
        given = None

    # Registered last, so called last: what other extensions make of the predictions is what is judged.
    with _called_back(script_callbacks.on_cfg_denoiser, before), _called_back(script_callbacks.on_cfg_denoised, after):
        yield


def _judge_rows(denoiser: Any, predicted: Predicted, given: Any, rows: Tensor) -> None:
    """Judges, and replaces in place, the rows of a batch: first those of each image's prompts, then those without a prompt.

    Behind them, a model that edits images has those without the image.
    """
    arguments = denoiser.sampler.sampler_extra_args
    weights = [[prompt.weight for prompt in prompts] for prompts in arguments["cond"].batch]
    x, sigma = given.x[-len(weights) :], given.sigma[-len(weights) :]
    prompted = torch.split(rows[: sum(map(len, weights))], [len(each) for each in weights])
    without = rows[sum(map(len, weights)) :][: len(weights)]
    cond = _joined(rows, prompted, without, weights)
    # Where the host leaves the evaluation without the prompt out, it puts those of the first prompts in its place.
    may_miss = shared.opts.skip_early_cond or arguments["s_min_uncond"]
    missing = bool(may_miss) and torch.equal(without, torch.stack([each[0] for each in prompted]))
    corrected = predicted(x, sigma, cond, None if missing else without)
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


def _joined(rows: Tensor, prompted: Sequence[Tensor], without: Tensor, weights: list[list[float]]) -> Tensor:
    """The prediction with the prompt, ``[B, ...]``; where prompts are joined by AND, at their weights."""
    if all(each == [1.0] for each in weights):
        return rows[: len(weights)]
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
            with _told(monitor):
                _judge(predicted, args, prompted, None if uncond is None else without, weight)
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
        with _told(monitor):
            _judge(predicted, args, prompted, None if uncond is None else without, _weight(cond))
        return args["conds_out"]

    return after_network


def _weight(cond: Any) -> float:
    """That of all prompts together, which AND joins."""
    return float(sum(each.get("strength", 1) for each in cond))


def _judge(predicted: Predicted, args: dict[str, Any], prompted: Tensor, without: Tensor | None, weight: float) -> None:
    """Judges the prediction with the prompt, an average, at the weight that guidance gives it, and replaces it in place."""
    joined = prompted if without is None or weight in (0.0, 1.0) else torch.lerp(without, prompted, weight)
    corrected = predicted(args["input"], args["sigma"], joined, without)
    if corrected is joined:
        return
    if without is not None and joined is not prompted:
        corrected = torch.where(changed(joined, corrected), without + (corrected - without) / weight, prompted)
    prompted.copy_(corrected)
