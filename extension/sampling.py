"""The WebUI's sampling, put in the core's terms: a run of its sampler in, a monitor with traces out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..memorization_guard import NoiseLevel, RunSettings
from ..memorization_guard.adapters.kdiffusion import SamplerRun, sampler_name, watched
from ..memorization_guard.fingerprint import content_hash, fingerprint
from . import calls, hosts, predictions
from .session import Session
from .timesteps import TimestepRun, timestep_levels

log = logging.getLogger(__name__)

# Arguments that say which part of a schedule is sampled, and not how.
_SCHEDULE = ("n", "sigma_min", "sigma_max", "is_img2img", "disable")

_MARK = "memorization_guard"


def watch_next_run(p: Any, session: Session) -> None:
    """Has the next run of ``p.sampler`` watched. Nothing is left on the sampler when that run ends, in whatever way.

    Args:
        p: the host's processing object, with its sampler.
        session: is told of the run, and of what keeps it from being watched.
    """
    sampler = p.sampler
    function = sampler.func
    if hasattr(function, _MARK):
        return  # Forge announces a second pass twice

    # Without its signature the host would hand it no schedule.
    @functools.wraps(function)
    def run(denoiser: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sampler.func = function
        with contextlib.ExitStack() as hooks:

            def new_run(x: Tensor, *args: Any, **arguments: Any) -> SamplerRun | None:
                try:
                    return _new_run(p, session, function, denoiser, x, arguments, hooks)
                except Exception as error:
                    log.warning("Memorization Guard does not watch this run; the image is not affected.", exc_info=True)
                    session.say(p, f"not watched: {type(error).__name__}: {error}")
                    return None

            return watched(function, new_run)(denoiser, x, *args, **kwargs)

    setattr(run, _MARK, True)
    sampler.func = run


def _new_run(
    p: Any,
    session: Session,
    function: Callable[..., Tensor],
    denoiser: Any,
    x: Tensor,
    arguments: dict[str, Any],
    hooks: contextlib.ExitStack,
) -> SamplerRun:
    kind = hosts.prediction_type(p.sd_model)
    level: Callable[[float], NoiseLevel] = functools.partial(NoiseLevel.from_model, prediction_type=kind)
    timestep = None
    if "timesteps" in arguments:
        timestep = timestep_levels(denoiser.inner_model.inner_model.alphas_cumprod)
        levels = [timestep(t) for t in arguments["timesteps"].flip(0).tolist()]
    elif "sigmas" in arguments:
        levels = [level(sigma) for sigma in arguments["sigmas"].tolist()]
    else:  # the sampler chooses its own, between these
        levels = [level(float(arguments[end])) for end in ("sigma_max", "sigma_min")]
    # The denoiser of Forge and reForge has sigmas and clean latents for all samplers.
    noisy = timestep is not None and not hosts.HAS_UNET_PATCHER
    settings = _settings(p, kind, function, arguments, x, levels)
    monitor = session.new_monitor(p, settings, timestep if timestep is not None and noisy else level)
    hooks.callback(session.end_run, p)
    if timestep is None:
        run: SamplerRun = SamplerRun(monitor, levels, level)
        predicted: calls.Predicted = run.predicted
    else:
        run = following = TimestepRun(monitor, levels, timestep, x)
        hooks.enter_context(following.evaluations_of(denoiser))
        predicted = following.predicted_noise if noisy else run.predicted
    hooks.enter_context(predictions.judged(denoiser, monitor, predicted))
    return run


def _settings(
    p: Any, kind: str, function: Callable[..., Tensor], arguments: dict[str, Any], x: Tensor, levels: list[NoiseLevel]
) -> RunSettings:
    planned = "timesteps" in arguments or "sigmas" in arguments
    sigmas = [level.model_sigma(kind) for level in levels] if planned else []
    cfg = getattr(p, "hr_cfg", p.cfg_scale) if getattr(p, "is_hr_pass", False) else p.cfg_scale  # Forge has one of its own
    return RunSettings(
        model=str(p.sd_model_name),
        model_hash=model_hash(p),
        prediction_type=kind,
        sampler=sampler_name(_name(function), _options(function, arguments)),
        steps=len(sigmas) - 1 if sigmas else arguments.get("n"),
        guidance_scale=float(cfg),
        latent_shape=tuple(x.shape[1:]),
        sigmas=tuple(sigmas[:-1]) if sigmas else None,
        end_sigma=sigmas[-1] if sigmas else None,
    )


def _name(function: Callable[..., Any] | str) -> str:
    name = function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
    return name.removeprefix("sample_").removesuffix("_sampler")


def _options(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What was set for the sampler and is not as the sampler has it by itself."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, (bool, int, float, str)) and name not in _SCHEDULE and value != defaults.get(name)
    }


_fingerprints: weakref.WeakKeyDictionary[Any, tuple[str, str | None]] = weakref.WeakKeyDictionary()


def checkpoint_hash(sd_model: Any) -> str | None:
    """Fingerprint of a loaded checkpoint's denoiser; ``None`` where its weights are packed in a form that has none."""
    # The host loads another checkpoint's weights into the same model.
    title = str(sd_model.sd_checkpoint_info.title)
    known = _fingerprints.get(sd_model)
    if known is None or known[0] != title:
        try:
            found = fingerprint(hosts.weights(sd_model))
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            log.info("Memorization Guard: the weights have no fingerprint (%s); profiles are not held against them.", error)
            found = None
        known = _fingerprints[sd_model] = title, found
    return known[1]


def model_hash(p: Any) -> str | None:
    """Identity of what ``p`` samples with: the checkpoint, the networks in its prompts at their weights, and the refiner."""
    checkpoint = checkpoint_hash(p.sd_model)
    hires = getattr(p, "is_hr_pass", False)
    networks = (getattr(p, "hr_extra_network_data", None) if hires else p.extra_network_data) or {}
    changes: list[Any] = [
        [kind, [[*network.positional, *sorted(network.named.items())] for network in chosen]]
        for kind, chosen in sorted(networks.items())
        if chosen
    ]
    refiner = getattr(p, "refiner_checkpoint_info", None)
    if refiner is not None and p.refiner_switch_at is not None and p.refiner_switch_at < 1:
        changes.append(["refiner", refiner.title, p.refiner_switch_at])
    if checkpoint is None or not changes:
        return checkpoint
    return content_hash([checkpoint, changes])[:16]
