"""The place between the network and guidance, in each host: both predictions lie side by side there, and may be replaced.

The WebUI calls back with the predictions for all prompts and images in one tensor, which is changed in place. In Forge the
last pre-CFG function puts a CFG function in front of whatever guides; in reForge the first pre-CFG function is given the
predictions. All of it is in place for one run of a sampler and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from modules import script_callbacks, shared
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.core.asking import Ask, Prompts
from ..memorization_guard.core.noise_level import resized
from . import hosts
from .prompts import OtherPrompts, Rows, Texts, picked
from .timesteps import changed


class Predicted(Protocol):
    """Takes a latent, its noise level, the predictions with and without the prompt, and what asks the network for others.

    Gives the prediction with the prompt to go on with.
    """

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor | None, /, *, ask: Ask, prompts: Prompts | None
    ) -> Tensor: ...


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
    texts = Texts(denoiser)

    def before(params: Any) -> None:
        nonlocal given
        # The whole of it: extensions that are called later may exchange the latent in it.
        given = params if params.denoiser is denoiser else None
        if given is not None:
            with _told(monitor):
                params.text_cond = texts.given(params.text_cond, params.x.shape)

    def after(params: Any) -> None:
        nonlocal given
        if given is not None:
            with _told(monitor):
                _judge_rows(denoiser, monitor, predicted, given, params.x, texts)
        given = None

    # Registered last, so called last: what other extensions make of the predictions is what is judged.
    with _called_back(script_callbacks.on_cfg_denoiser, before), _called_back(script_callbacks.on_cfg_denoised, after):
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

    def ask(noise: Tensor | None) -> tuple[Tensor, float, Tensor, Tensor]:
        latent, level = (x, float(sigma[0])) if noise is None else in_noise(noise)
        with _tiling_kept():
            found = _rows(denoiser, given, owners, latent, level)
        return latent, level, _joined(found, weights), _parts(found, weights)[1]

    def asked(latent: Tensor, level: float, sample: int, text: Rows) -> Tensor:
        image = given.image_cond[owners.index(sample)]
        images = _sized(image.expand(len(latent), *image.shape), latent)
        with _tiling_kept():
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


def _rows(denoiser: Any, given: Any, owners: Sequence[int], latent: Tensor, level: float) -> Tensor:
    """What the network says of another latent, one of an image, in rows as the host has them.

    It is called as ``CFGDenoiser.forward`` calls it where memory is to be saved, a batch at a time, and for all rows, also
    those that the host leaves out at present. No callback hears of it, and no step is counted.

    Args:
        owners: the image of each prompt.
    """
    rows, images = [], _sized(given.image_cond, latent)
    texts = _padded(denoiser, given.text_cond, given.text_uncond)
    for text, of in zip(texts, (owners, range(len(latent))), strict=True):
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
    texts = Texts(denoiser)
    # Functions, since a patcher that is cloned copies its options deeply, but not those: all clones have the same one.
    forge, reforge = _last_before_guidance(monitor, predicted, texts), _first_after_network(monitor, predicted)

    def before(params: Any) -> None:
        if params.denoiser is denoiser:
            with _told(monitor):
                params.text_cond = texts.given(params.text_cond, params.x.shape)
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


def _last_before_guidance(monitor: StabilityMonitor, predicted: Predicted, texts: Texts) -> Callable[..., Any]:
    """Forge's pre-CFG functions are called before the network; the last one knows which function guidance is left to."""

    def before_network(model: Any, cond: Any, uncond: Any, x: Any, timestep: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        chosen = options.get("sampler_cfg_function")
        weight = _weight(cond)

        def guide(args: dict[str, Any]) -> Any:
            prompted, without = args["cond_denoised"], args["uncond_denoised"]

            def network(cond: Any, uncond: Any, x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
                from backend.sampling.sampling_function import calc_cond_uncond_batch

                return calc_cond_uncond_batch(model, cond, uncond, x, timestep, options)

            with _told(monitor):
                evaluate = functools.partial(network, cond, uncond)
                in_noise = functools.partial(_at_highest, model, monitor)
                prompts = _forge_prompts(texts, network, cond, uncond, x, timestep, in_noise) if weight == 1 else None
                alone = None if uncond is None else without
                _judge(monitor, predicted, args, prompted, alone, weight, evaluate, prompts)
            if chosen is not None:
                return chosen({**args, "cond": args["input"] - prompted})
            difference = (prompted - without) * args["cond_scale"]
            return _Guided(without + (difference if math.isclose(weight, 1.0) else difference * weight))

        return model, cond, uncond, x, timestep, {**options, "sampler_cfg_function": guide}

    return before_network


def _forge_prompts(
    texts: Texts,
    network: Callable[[Any, Any, Tensor, Tensor], Sequence[Tensor]],
    cond: Any,
    uncond: Any,
    x: Tensor,
    timestep: Tensor,
    in_noise: Callable[[Tensor], tuple[Tensor, float]],
) -> OtherPrompts | None:
    """Other prompts in the place of those that Forge's network is given; ``None`` where AND joins several.

    Args:
        network: gives the predictions with and without the prompt, from conditions, latent and noise level.
    """
    if len(cond) != 1:
        return None
    (present,) = cond

    def with_rows(rows: Rows, images: list[int]) -> list[dict[str, Any]]:
        """The condition for these images, with other rows."""
        from backend.sampling.condition import compile_conditions

        (other,) = compile_conditions(rows)
        kept = {
            name: type(part)(part.cond[images]) if isinstance(part.cond, Tensor) and len(part.cond) == len(x) else part
            for name, part in present["model_conds"].items()
            if name not in other["model_conds"]
        }
        return [{**present, **other, "model_conds": {**kept, **other["model_conds"]}}]

    def asked(latent: Tensor, level: float, sample: int, rows: Rows) -> Tensor:
        conditions, levels = with_rows(rows, [sample] * len(latent)), timestep.new_full((len(latent),), level)
        with _tiling_kept():
            return network(conditions, None, latent, levels)[0]

    def again(rows: Rows) -> Tensor:
        conditions = with_rows(picked(rows, texts.places), list(range(len(x))))
        with _tiling_kept():
            return network(conditions, uncond, x, timestep)[0]

    return OtherPrompts(texts, in_noise, asked, again)


def _at_highest(model: Any, monitor: StabilityMonitor, noise: Tensor) -> tuple[Tensor, float]:
    """The latent that is this noise at the highest noise level of a patcher's model, and that level."""
    level = hosts.highest_sigma(model)
    return noise * NoiseLevel.from_model(level, monitor.settings.prediction_type).scale, level


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
    prompts: Prompts | None = None,
) -> None:
    """Judges the prediction with the prompt, an average, at the weight that guidance gives it, and replaces it in place.

    Args:
        evaluate: gives the predictions with and without the prompt for a latent and its noise level.
        prompts: has the network evaluate others.
    """
    sigma = args["sigma"]

    def at_weight(prompted: Tensor, without: Tensor | None) -> Tensor:
        return prompted if without is None or weight in (0.0, 1.0) else torch.lerp(without, prompted, weight)

    def ask(noise: Tensor | None) -> tuple[Tensor, float, Tensor, Tensor | None]:
        if noise is None:
            latent, level = args["input"], float(sigma[0])
        else:
            latent, level = _at_highest(args["model"], monitor, noise)
        with _tiling_kept():
            found, other = evaluate(latent, torch.full_like(sigma, level))
        alone = None if without is None else other
        return latent, level, at_weight(found, alone), alone

    joined = at_weight(prompted, without)
    corrected = predicted(args["input"], sigma, joined, without, ask=ask, prompts=prompts)
    if corrected is joined:
        return
    if without is not None and joined is not prompted:
        corrected = torch.where(changed(joined, corrected), without + (corrected - without) / weight, prompted)
    prompted.copy_(corrected)
