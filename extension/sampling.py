"""The WebUI's sampling, put in the core's terms: a run of its sampler in, a monitor with traces out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from modules import shared

from ..memorization_guard import NoiseLevel, RunSettings, StabilityMonitor
from ..memorization_guard.adapters.kdiffusion import SamplerWatch, sampler_name, watched
from ..memorization_guard.adapters.timesteps import TimestepScale, TimestepWatch
from ..memorization_guard.fingerprint import content_hash, fingerprint
from . import hosts

log = logging.getLogger(__name__)

# What these samplers hand to the model is not what they go on with; every other sampler of the host goes on with that tensor.
_KEEP_ANOTHER_LATENT = ("lcm", "unipc")

# DDIM CFG++ maps the page's scale, up to 12.5, to one of up to 1.
_CFG_PP, _CFG_PP_SCALE = "ddim_cfgpp", 12.5

# Arguments that say which part of a schedule is sampled, and not how.
_SCHEDULE = ("n", "sigma_min", "sigma_max", "is_img2img", "disable")

_MARK = "memorization_guard"


def watch_next_run(p: Any, new_monitor: Callable[[RunSettings], StabilityMonitor], ended: Callable[[], None]) -> None:
    """Has the next run of ``p.sampler`` watched. Nothing is left on the sampler when that run ends, in whatever way.

    Args:
        p: the host's processing object, with its sampler.
        new_monitor: gives the monitor of a run with these settings; what it raises is logged, and the run not watched.
        ended: called when a watched run has ended.
    """
    sampler = p.sampler
    function = sampler.func
    if hasattr(function, _MARK):
        return  # Forge announces a second pass twice

    # Without its signature the host would hand it no schedule.
    @functools.wraps(function)
    def run(denoiser: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sampler.func = function
        with contextlib.ExitStack() as hooks:

            def new_watch(x: torch.Tensor, *args: Any, **kwargs: Any) -> SamplerWatch | None:
                try:
                    watch = _new_watch(p, function, denoiser, x, kwargs, new_monitor)
                    hooks.enter_context(hosts.guidance_seen(denoiser, p.sd_model, watch))
                except Exception:
                    log.warning("Memorization Guard does not watch this run; the image is not affected.", exc_info=True)
                    return None
                hooks.callback(ended)
                return watch

            return watched(function, new_watch)(denoiser, x, *args, **kwargs)

    setattr(run, _MARK, True)
    sampler.func = run


def _new_watch(
    p: Any,
    function: Callable[..., torch.Tensor],
    denoiser: Any,
    x: torch.Tensor,
    arguments: dict[str, Any],
    new_monitor: Callable[[RunSettings], StabilityMonitor],
) -> SamplerWatch:
    kind = hosts.prediction_type(p.sd_model)
    name = _name(function)
    options = _options(function, arguments)
    editable = name not in _KEEP_ANOTHER_LATENT
    if "timesteps" in arguments:
        alphas_cumprod = denoiser.inner_model.inner_model.alphas_cumprod
        scale = TimestepScale(alphas_cumprod)
        if name == "unipc":
            schedule = _unipc_schedule(alphas_cumprod, arguments)
            options |= _unipc_options()
        else:
            schedule = arguments["timesteps"].flip(0).float().cpu()
        levels = [scale.level(t) for t in schedule.tolist()]
        monitor = new_monitor(_settings(p, kind, name, options, x, [level.model_sigma(kind) for level in levels]))
        return TimestepWatch(monitor, schedule, scale, editable=editable, every_call=name == "unipc")
    level = functools.partial(NoiseLevel.from_model, prediction_type=kind)
    sigmas = arguments.get("sigmas")
    if sigmas is None:  # DPM fast and DPM adaptive
        ends = [float(arguments[end]) for end in ("sigma_max", "sigma_min")]
        settings = _settings(p, kind, name, options, x, None, steps=arguments.get("n"))
        return SamplerWatch(new_monitor(settings), torch.tensor(ends), level, editable=editable, fixed=False)
    sigmas = sigmas.float().cpu()
    monitor = new_monitor(_settings(p, kind, name, options, x, sigmas.tolist()))
    watch = _GivesCopies if name == "lcm" else SamplerWatch
    return watch(monitor, sigmas, level, editable=editable)


class _GivesCopies(SamplerWatch):
    """Of a sampler that adds its noise to the very tensor that was predicted, which is looked at later."""

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, evaluate: Callable[..., torch.Tensor]) -> torch.Tensor:
        return super().predict(x, sigma, evaluate).clone()


def guidance_scale(name: str | None, cfg: float) -> float:
    """The scale that the predictions are mixed at by the sampler of this name, where the page says ``cfg``."""
    return float(cfg) / _CFG_PP_SCALE if name == _CFG_PP else float(cfg)


def _settings(
    p: Any,
    kind: str,
    name: str,
    options: dict[str, Any],
    x: torch.Tensor,
    levels: list[float] | None,
    *,
    steps: int | None = None,
) -> RunSettings:
    *sigmas, end = levels or [None]
    cfg = getattr(p, "hr_cfg", p.cfg_scale) if getattr(p, "is_hr_pass", False) else p.cfg_scale  # Forge has one of its own
    return RunSettings(
        model=str(p.sd_model_name),
        model_hash=model_hash(p),
        prediction_type=kind,
        sampler=sampler_name(name, options),
        steps=len(sigmas) if levels else steps,
        guidance_scale=guidance_scale(name, cfg),
        latent_shape=tuple(x.shape[1:]),
        sigmas=tuple(sigmas) if levels else None,
        end_sigma=end,
    )


def sampler_function_name(label: str) -> str | None:
    """The core's name for the sampler that the host's list calls ``label``; ``None`` where it cannot be told."""
    from modules import sd_samplers

    config = sd_samplers.find_sampler_config(label)
    parameter = inspect.signature(config.constructor).parameters.get("funcname") if config is not None else None
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return _name(parameter.default)


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


def _unipc_schedule(alphas_cumprod: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The timesteps as the host's UniPC spaces them, and hands them to the model."""
    from modules.models.diffusion.uni_pc import uni_pc

    timesteps = arguments["timesteps"]
    noise_schedule = uni_pc.NoiseScheduleVP("discrete", alphas_cumprod=alphas_cumprod)
    start = float(timesteps[-1]) / 1000 + 1 / 1000 if arguments.get("is_img2img") else noise_schedule.T
    times = uni_pc.UniPC(None, noise_schedule, predict_x0=True).get_time_steps(
        skip_type=shared.opts.uni_pc_skip_type,
        t_T=start,
        t_0=1.0 / noise_schedule.total_N,
        N=len(timesteps),
        device=timesteps.device,
    )
    return ((times - 1.0 / noise_schedule.total_N) * 1000.0).float().cpu()


def _unipc_options() -> dict[str, Any]:
    names = ("variant", "order", "lower_order_final")
    options = {name: getattr(shared.opts, f"uni_pc_{name}") for name in names}
    return {name: value for name, value in options.items() if value != shared.opts.get_default(f"uni_pc_{name}")}


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
