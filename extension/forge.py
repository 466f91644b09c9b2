"""The place between the network and guidance in Forge and reForge, whose models are patched.

In Forge the last pre-CFG function puts a CFG function in front of whatever guides; in reForge the first pre-CFG function is
given the predictions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from modules import script_callbacks
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.core.asking import Answer, Prompts
from . import hosts
from .calls import Predicted, called_back, tiling_kept, told
from .prompts import OtherPrompts, Rows, Texts, picked
from .timesteps import changed


@contextlib.contextmanager
def judged_in_patcher(denoiser: Any, monitor: StabilityMonitor, predicted: Predicted) -> Iterator[None]:
    texts = Texts(denoiser)
    # Functions, since a patcher that is cloned copies its options deeply, but not those: all clones have the same one.
    forge, reforge = (place(monitor, predicted, texts) for place in (_last_before_guidance, _first_after_network))

    def before(params: Any) -> None:
        if params.denoiser is denoiser:
            with told(monitor):
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

    with contextlib.ExitStack() as put_back, called_back(script_callbacks.on_cfg_denoiser, before):
        yield


def _last_before_guidance(monitor: StabilityMonitor, predicted: Predicted, texts: Texts) -> Callable[..., Any]:
    """Forge's pre-CFG functions are called before the network; the last one knows which function guidance is left to."""

    def before_network(model: Any, cond: Any, uncond: Any, x: Any, timestep: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        chosen = options.get("sampler_cfg_function")
        weight = _weight(cond)

        def guide(args: dict[str, Any]) -> Any:
            prompted, without = args["cond_denoised"], args["uncond_denoised"]

            def conditions(rows: Rows) -> Any:
                from backend.sampling.condition import compile_conditions

                return compile_conditions(rows)

            def network(cond: Any, uncond: Any, x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
                from backend.sampling.sampling_function import calc_cond_uncond_batch

                return calc_cond_uncond_batch(model, cond, uncond, x, timestep, options)

            with told(monitor):

                def evaluate(x: Tensor, timestep: Tensor, *, alone: bool) -> Sequence[Tensor]:
                    return network(cond, None if alone else uncond, x, timestep)

                given = conditions, network, cond, uncond, x, timestep, functools.partial(_at_highest, model, monitor)
                prompts = _other_prompts(texts, *given) if weight == 1 else None
                alone = None if uncond is None else without
                _judge(monitor, predicted, args, prompted, alone, weight, evaluate, prompts)
            if chosen is not None:
                return chosen({**args, "cond": args["input"] - prompted})
            difference = (prompted - without) * args["cond_scale"]
            return _Guided(without + (difference if math.isclose(weight, 1.0) else difference * weight))

        return model, cond, uncond, x, timestep, {**options, "sampler_cfg_function": guide}

    return before_network


def _other_prompts(
    texts: Texts,
    conditions: Callable[[Rows], list[dict[str, Any]]],
    network: Callable[[Any, Any, Tensor, Tensor], Sequence[Tensor]],
    cond: Any,
    uncond: Any,
    x: Tensor,
    timestep: Tensor,
    in_noise: Callable[[Tensor], tuple[Tensor, float]],
) -> OtherPrompts | None:
    """Other prompts in the place of those that the network is given; ``None`` where AND joins several.

    Args:
        conditions: the host's form of a prompt's rows.
        network: gives the predictions with and without the prompt, from conditions, latent and noise level.
    """
    if len(cond) != 1:
        return None
    (present,) = cond

    def with_rows(rows: Rows, images: list[int]) -> list[dict[str, Any]]:
        """The condition for these images, with other rows."""
        (other,) = conditions(rows)
        kept = {
            name: type(part)(part.cond[images]) if isinstance(part.cond, Tensor) and len(part.cond) == len(x) else part
            for name, part in present["model_conds"].items()
            if name not in other["model_conds"]
        }
        return [{**present, **other, "model_conds": {**kept, **other["model_conds"]}}]

    def asked(latent: Tensor, level: float, sample: int, rows: Rows) -> Tensor:
        conditions, levels = with_rows(rows, [sample] * len(latent)), timestep.new_full((len(latent),), level)
        with tiling_kept():
            return network(conditions, None, latent, levels)[0]

    def again(rows: Rows) -> Tensor:
        conditions = with_rows(picked(rows, texts.places), list(range(len(x))))
        with tiling_kept():
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


def _first_after_network(monitor: StabilityMonitor, predicted: Predicted, texts: Texts) -> Callable[..., Any]:
    """reForge's pre-CFG functions, as ComfyUI's, are called with the predictions."""

    def after_network(args: dict[str, Any]) -> Any:
        prompted, without = args["conds_out"][:2]
        cond, uncond = args["conds"][:2]

        weight = _weight(cond)

        def conditions(rows: Rows) -> Any:
            from modules_forge.forge_sampler import cond_from_a1111_to_patched_ldm

            return cond_from_a1111_to_patched_ldm(rows)

        def network(cond: Any, uncond: Any, x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
            from ldm_patched.modules.samplers import calc_cond_uncond_batch

            return calc_cond_uncond_batch(args["model"], cond, uncond, x, timestep, args["model_options"])

        def evaluate(x: Tensor, timestep: Tensor, *, alone: bool) -> Sequence[Tensor]:
            return network(cond, None if alone else uncond, x, timestep)

        with told(monitor):
            given = args["input"], args["sigma"], lambda noise: _at_highest(args["model"], monitor, noise)
            prompts = _other_prompts(texts, conditions, network, cond, uncond, *given) if weight == 1 else None
            alone = None if uncond is None else without
            _judge(monitor, predicted, args, prompted, alone, weight, evaluate, prompts)
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
    evaluate: Callable[..., Sequence[Tensor]],
    prompts: Prompts | None = None,
) -> None:
    """Judges the prediction with the prompt, an average, at the weight that guidance gives it, and replaces it in place.

    Args:
        evaluate: gives the predictions with and without the prompt for a latent and its noise level; ``alone`` if the one
            with the prompt is enough.
        prompts: has the network evaluate others.
    """
    sigma = args["sigma"]

    def at_weight(prompted: Tensor, without: Tensor | None) -> Tensor:
        return prompted if without is None or weight in (0.0, 1.0) else torch.lerp(without, prompted, weight)

    def ask(noise: Tensor | None, *, alone: bool = False) -> Answer:
        if noise is None:
            latent, level = args["input"], float(sigma[0])
        else:
            latent, level = _at_highest(args["model"], monitor, noise)
        with tiling_kept():
            found, other = evaluate(latent, torch.full_like(sigma, level), alone=alone and weight == 1)
        rest = None if without is None or (alone and weight == 1) else other
        return latent, level, at_weight(found, rest), rest

    joined = at_weight(prompted, without)
    corrected = predicted(args["input"], sigma, joined, without, ask=ask, prompts=prompts)
    if corrected is joined:
        return
    if without is not None and joined is not prompted:
        corrected = torch.where(changed(joined, corrected), without + (corrected - without) / weight, prompted)
    prompted.copy_(corrected)
