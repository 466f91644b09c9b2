"""The place between the network and guidance in Forge and reForge, whose models are patched.

In Forge the last pre-CFG function puts a CFG function in front of whatever guides; in reForge the first pre-CFG function is
given the predictions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modules import script_callbacks
from torch import Tensor

from ..memorization_guard import NoiseLevel, StabilityMonitor
from ..memorization_guard.core.asking import Answer
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


@dataclass(frozen=True)
class _Network:
    """How a fork evaluates its network in a run.

    Attributes:
        compiled: the host's form of a prompt's rows.
        calculated: gives the predictions with and without the prompt, from conditions, latent and noise level.
        cond, uncond: the run's conditions; ``uncond`` is ``None`` where guidance is off.
    """

    compiled: Callable[[Rows], list[dict[str, Any]]]
    calculated: Callable[[Any, Any, Tensor, Tensor], Sequence[Tensor]]
    cond: Any
    uncond: Any

    @property
    def weight(self) -> float:
        """That of all prompts together, which AND joins."""
        return float(sum(each.get("strength", 1) for each in self.cond))


def _last_before_guidance(monitor: StabilityMonitor, predicted: Predicted, texts: Texts) -> Callable[..., Any]:
    """Forge's pre-CFG functions are called before the network; the last one knows which function guidance is left to."""

    def before_network(model: Any, cond: Any, uncond: Any, x: Any, timestep: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        chosen = options.get("sampler_cfg_function")

        def compiled(rows: Rows) -> Any:
            from backend.sampling.condition import compile_conditions

            return compile_conditions(rows)

        def calculated(cond: Any, uncond: Any, x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
            from backend.sampling.sampling_function import calc_cond_uncond_batch

            return calc_cond_uncond_batch(model, cond, uncond, x, timestep, options)

        network = _Network(compiled, calculated, cond, uncond)
        weight = network.weight

        def guide(args: dict[str, Any]) -> Any:
            prompted, without = args["cond_denoised"], args["uncond_denoised"]
            with told(monitor):
                _judge(monitor, predicted, texts, network, args, prompted, without)
            if chosen is not None:
                return chosen({**args, "cond": args["input"] - prompted})
            difference = (prompted - without) * args["cond_scale"]
            return _Guided(without + (difference if math.isclose(weight, 1.0) else difference * weight))

        return model, cond, uncond, x, timestep, {**options, "sampler_cfg_function": guide}

    return before_network


def _other_prompts(
    texts: Texts, network: _Network, x: Tensor, timestep: Tensor, in_noise: Callable[[Tensor], tuple[Tensor, float]]
) -> OtherPrompts | None:
    """Other prompts in the place of those that the network is given; ``None`` where AND joins several."""
    if len(network.cond) != 1:
        return None
    (present,) = network.cond

    def with_rows(rows: Rows, images: list[int]) -> list[dict[str, Any]]:
        """The condition for these images, with other rows."""
        (other,) = network.compiled(rows)
        kept = {
            name: type(part)(part.cond[images]) if isinstance(part.cond, Tensor) and len(part.cond) == len(x) else part
            for name, part in present["model_conds"].items()
            if name not in other["model_conds"]
        }
        return [{**present, **other, "model_conds": {**kept, **other["model_conds"]}}]

    def asked(latent: Tensor, level: float, sample: int, rows: Rows) -> Tensor:
        conditions, levels = with_rows(rows, [sample] * len(latent)), timestep.new_full((len(latent),), level)
        with tiling_kept():
            return network.calculated(conditions, None, latent, levels)[0]

    def again(rows: Rows) -> Tensor:
        conditions = with_rows(picked(rows, texts.places), list(range(len(x))))
        with tiling_kept():
            return network.calculated(conditions, network.uncond, x, timestep)[0]

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

        def compiled(rows: Rows) -> Any:
            from modules_forge.forge_sampler import cond_from_a1111_to_patched_ldm

            return cond_from_a1111_to_patched_ldm(rows)

        def calculated(cond: Any, uncond: Any, x: Tensor, timestep: Tensor) -> Sequence[Tensor]:
            from ldm_patched.modules.samplers import calc_cond_uncond_batch

            return calc_cond_uncond_batch(args["model"], cond, uncond, x, timestep, args["model_options"])

        with told(monitor):
            _judge(monitor, predicted, texts, _Network(compiled, calculated, *args["conds"][:2]), args, prompted, without)
        return args["conds_out"]

    return after_network


def _judge(
    monitor: StabilityMonitor,
    predicted: Predicted,
    texts: Texts,
    network: _Network,
    args: dict[str, Any],
    prompted: Tensor,
    without: Tensor | None,
) -> None:
    """Judges the prediction with the prompt, an average, at the weight that guidance gives it, and replaces it in place.

    Args:
        args: of the host's own function, with latent and noise level.
        prompted, without: the predictions, whatever the second one is where there is no condition for it.
    """
    x, sigma, weight = args["input"], args["sigma"], network.weight
    if network.uncond is None:
        without = None

    def in_noise(noise: Tensor) -> tuple[Tensor, float]:
        return _at_highest(args["model"], monitor, noise)

    def at_weight(prompted: Tensor, without: Tensor | None) -> Tensor:
        return prompted if without is None or weight in (0.0, 1.0) else torch.lerp(without, prompted, weight)

    def ask(noise: Tensor | None, *, alone: bool = False) -> Answer:
        latent, level = (x, float(sigma[0])) if noise is None else in_noise(noise)
        uncond = None if alone and weight == 1 else network.uncond
        with tiling_kept():
            found, other = network.calculated(network.cond, uncond, latent, torch.full_like(sigma, level))
        rest = None if uncond is None else other
        return latent, level, at_weight(found, rest), rest

    prompts = _other_prompts(texts, network, x, sigma, in_noise) if weight == 1 else None
    joined = at_weight(prompted, without)
    corrected = predicted(x, sigma, joined, without, ask=ask, prompts=prompts)
    if corrected is joined:
        return
    if without is not None and joined is not prompted:
        corrected = torch.where(changed(joined, corrected), without + (corrected - without) / weight, prompted)
    prompted.copy_(corrected)
