"""Watching diffusers pipelines: everything a pipeline samples passes through ``pipe.scheduler.step``.

with guard(pipe, profile=profile, mitigate=True) as run:
    images = pipe("a prompt").images
run.traces[0].verdict
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.calibration import MIN_RUNS, CalibrationError, ReferenceRuns
from ..core.detection import Thresholds
from ..core.monitor import STOPPED, StabilityMonitor, StepEvent
from ..core.noise_level import NoiseLevel, where_changed, widened
from ..core.profile import RunSettings, StabilityProfile
from ..core.trace import Trace
from ..fingerprint import fingerprint
from ..prompts import read_prompts

log = logging.getLogger(__name__)

# torch counts its hooks up without a lock: two that are registered at once could get one number, and one of them be lost.
_hooks = threading.Lock()


@dataclass(frozen=True)
class _Call:
    """One call of ``scheduler.step``: the noise levels it takes a latent between, and whether that ends a solver step.

    A call that does not is an inner evaluation; the scheduler starts the next call from this one's sample again.
    """

    start: NoiseLevel
    end: NoiseLevel
    ends_step: bool = True


# What the calls of a run will be, from the first one's place in the schedule on: one function a family of schedulers. All
# of it is known before the second call, as plain floats, so no step has to wait for the device to learn its noise level.


def _plan_discrete(scheduler: Any, first: int) -> list[_Call]:
    """DDIM, DDPM: VP scale, indexed by training timestep."""
    level = _alpha_bars(scheduler)
    timesteps = scheduler.timesteps.tolist()[first:]
    if hasattr(scheduler, "previous_timestep"):
        # DDPM steps to the next entry of its list; diffusers looks it up on the device, for every step.
        ends = [*timesteps[1:], -1]
    else:
        ends = [t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps for t in timesteps]
    return [_Call(level(start), level(end)) for start, end in zip(timesteps, ends, strict=True)]


def _plan_pndm(scheduler: Any, first: int) -> list[_Call]:
    """PNDM's linear multistep mode. Its second call repeats the first step, from the same sample, with a mean prediction."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timesteps = scheduler.timesteps.tolist()[first:]
    level = _alpha_bars(scheduler)
    calls = []
    for number, t in enumerate(timesteps):
        start = t + stride if number == 1 else t
        calls.append(_Call(level(start), level(start - stride), ends_step=number > 0 or len(timesteps) == 1))
    return calls


def _alpha_bars(scheduler: Any) -> Callable[[int], NoiseLevel]:
    """Noise levels by training timestep; below 0 lies the end of the schedule. Waits for the device once, if at all."""
    alpha_bars, last = scheduler.alphas_cumprod.tolist(), float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return lambda t: NoiseLevel.from_alpha_bar(alpha_bars[t] if t >= 0 else last)


def _plan_sigmas(level: Callable[[float], NoiseLevel], scheduler: Any, first: int) -> list[_Call]:
    """Schedulers with one sigma a step and one more at the end."""
    levels = [level(sigma) for sigma in scheduler.sigmas.tolist()]
    return [_Call(levels[i], levels[i + 1]) for i in range(first, len(scheduler.timesteps))]


def _plan_heun(scheduler: Any, first: int) -> list[_Call]:
    """Heun: an Euler step, then the same step again from its start with a mean derivative; the last step is Euler alone."""
    sigmas, last = scheduler.sigmas.tolist(), len(scheduler.timesteps) - 1
    calls = []
    for number, i in enumerate(range(first, last + 1)):
        start, end = (sigmas[i], sigmas[i + 1]) if number % 2 == 0 else (sigmas[i - 1], sigmas[i])
        calls.append(_Call(NoiseLevel.from_sigma(start), NoiseLevel.from_sigma(end), ends_step=number % 2 == 1 or i == last))
    return calls


def _vp_sigma(sigma: float) -> NoiseLevel:
    """A VE sigma as the VP level of the same signal-to-noise ratio (DPM-Solver's and UniPC's latents)."""
    return NoiseLevel.from_alpha_bar(1.0 / (1.0 + sigma * sigma))


_Plan = Callable[[Any, int], list[_Call]]


def _plan_of(scheduler: Any) -> _Plan:
    """How to plan the calls of ``scheduler``; subclasses are taken for what they derive from.

    Raises:
        ValueError: for a scheduler, or a mode of one, that cannot be watched.
    """
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    config: Any = getattr(scheduler, "config", {})
    if "PNDMScheduler" in names and not config.skip_prk_steps:
        raise ValueError(
            "PNDMScheduler with skip_prk_steps=False cannot be watched: set skip_prk_steps=True, as Stable Diffusion does"
        )
    for option in ("thresholding", "invert_sigmas"):
        if config.get(option):
            raise ValueError(f"{names[0]} with {option}=True cannot be watched: switch it off")
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    plans: dict[str, _Plan] = {
        "PNDMScheduler": _plan_pndm,
        "DDIMScheduler": _plan_discrete,
        "DDPMScheduler": _plan_discrete,
        "HeunDiscreteScheduler": _plan_heun,
        "EulerDiscreteScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_sigma),
        "EulerAncestralDiscreteScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_sigma),
        "LMSDiscreteScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_sigma),
        "DPMSolverMultistepScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_flow if flow else _vp_sigma),
        "UniPCMultistepScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_flow if flow else _vp_sigma),
        "FlowMatchEulerDiscreteScheduler": functools.partial(_plan_sigmas, NoiseLevel.from_flow),
    }
    for name in names:
        if name in plans:
            return plans[name]
    raise ValueError(f"{names[0]} cannot be watched; schedulers that can: {', '.join(plans)}")


@dataclass
class _Evaluation:
    """What went into one call of ``scheduler.step``."""

    sample: Tensor
    prediction: Tensor
    uncond: Tensor | None
    cond: Tensor | None
    level: NoiseLevel


class GuardedRun:
    """What a :func:`guard` block has seen so far."""

    def __init__(self, pipe: Any, new_monitor: Callable[[RunSettings], StabilityMonitor]) -> None:
        self._pipe = pipe
        self._new_monitor = new_monitor
        self._monitors: list[StabilityMonitor] = []
        #: Host time in seconds that watching took inside ``scheduler.step`` so far. On a GPU, work that was queued and not
        #: waited for is not in it; a run that is mitigated or may be stopped waits in every step, for the network as well.
        self.overhead_seconds = 0.0
        self._begin()

    @property
    def traces(self) -> list[Trace]:
        """One trace an image, in the order of the images, over all pipeline calls in the block."""
        return [trace for monitor in self._monitors for trace in monitor.traces]

    def _begin(self) -> None:
        """The pipeline has set its timesteps: the next step is the first of a new run."""
        self._monitor: StabilityMonitor | None = None
        self._plan: list[_Call] | None = None
        self._first_timestep: Any = None
        self._calls = 0
        self._network_outputs: list[Tensor] = []  # since the last call of the scheduler
        self._thread = threading.get_ident()
        self._start: _Evaluation | None = None  # where the current solver step began, after an inner evaluation

    def _keep_network_output(self, _module: Any, _arguments: Any, output: Any) -> None:
        # Pipelines that sample at the same time in other threads may share the denoiser.
        if threading.get_ident() != self._thread:
            return
        tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if isinstance(tensor, Tensor):
            self._network_outputs.append(tensor)

    def _before_step(self, scheduler: Any, prediction: Tensor, sample: Tensor) -> Tensor:
        """The prediction that the step is to be made with, exact for whatever the scheduler keeps of it. Never raises."""
        monitor, plan = self._monitor, self._plan
        if monitor is None or plan is None or not monitor.corrects or self._calls >= len(plan):
            return prediction
        try:
            level, kind = plan[self._calls].start, _prediction_type(scheduler)
            if level.noise == 0:
                return prediction
            latent = widened(sample)
            denoised = level.denoised(latent, widened(prediction), kind)
            sides = [
                None if output is None else level.denoised(latent, widened(output), kind)
                for output in _predictions(self._network_outputs, len(prediction))
            ]
            given = monitor.corrected_prediction(denoised, sides[1], sides[0], begins=self._start is None)
            if given is denoised:
                return prediction
            return where_changed(prediction, denoised, given, level.prediction(latent, given, kind))
        except Exception as error:
            monitor.fail(error)
            return prediction

    def _after_step(self, scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, result: Any) -> Any:
        """Hands the call to the monitor, and its correction to the result. Never raises: the image goes on without us."""
        outputs, self._network_outputs = self._network_outputs, []
        if self._monitor is not None and self._monitor.error is not None:
            return result
        try:
            return self._watch(scheduler, prediction, timestep, sample, result, outputs)
        except Exception as error:
            if self._monitor is None:
                self._monitor = self._new_monitor(RunSettings())
            self._monitor.fail(error)
            return result

    def _watch(
        self, scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, result: Any, outputs: list[Tensor]
    ) -> Any:
        if self._plan is None:
            self._plan = self._planned(scheduler, _first_index(scheduler, timestep))
            self._first_timestep = timestep
        elif self._calls == 1 and not hasattr(scheduler, "step_index") and int(timestep) == int(self._first_timestep):
            # PNDM lists its second timestep twice; only now it shows that the run began at the first of the two.
            self._plan = self._planned(scheduler, _first_index(scheduler, timestep) - 1)
        call = self._plan[self._calls]
        self._calls += 1
        uncond, cond = _predictions(outputs, len(prediction))
        here = _Evaluation(sample, prediction, uncond, cond, call.start)
        if not call.ends_step:
            self._start = here
            return result
        begin, self._start = self._start or here, None
        return self._finish_step(scheduler, call, begin, result)

    def _finish_step(self, scheduler: Any, call: _Call, begin: _Evaluation, result: Any) -> Any:
        if self._monitor is None:
            self._monitor = self._new_monitor(self._settings(scheduler, begin.sample))
            self._monitors.append(self._monitor)
        kind = _prediction_type(scheduler)
        # UniPC corrects the sample it was given before it steps on from it; what it kept is the true start of the step.
        corrects = hasattr(scheduler, "multistep_uni_c_bh_update")
        start_sample = scheduler.last_sample if corrects else begin.sample
        level = begin.level
        epsilon = functools.partial(level.epsilon, begin.sample, prediction_type=kind)
        proposed = result[0] if isinstance(result, tuple) else result.prev_sample
        z_next = call.end.to_vp(proposed)
        denoised = level.denoised(widened(begin.sample), widened(begin.prediction), kind)
        if scheduler.config.get("clip_sample"):
            denoised = denoised.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
        monitor = self._monitor
        z = monitor.step(
            level.to_vp(start_sample),
            z_next,
            denoised,
            sigma=level.model_sigma(kind),
            x0_coefficient=call.end.alpha,
            eps_cond=None if begin.cond is None else epsilon(begin.cond),
            eps_uncond=None if begin.uncond is None else epsilon(begin.uncond),
        )
        if monitor.should_stop:
            return self._stop(result, denoised)
        if z is z_next:
            return result
        corrected = where_changed(proposed, z_next, z, call.end.from_vp(z))
        if corrects:
            # The next call computes this latent anew from last_sample (Zhao et al. 2023, UniC), times the ratio of their
            # noise, or of their signal where it predicts noise: what is not moved there as well is forgotten.
            name = "noise" if scheduler.predict_x0 else "signal"
            if (end := getattr(call.end, name)) > 0:
                scheduler.last_sample = scheduler.last_sample + (corrected - proposed) * (getattr(level, name) / end)
        if isinstance(result, tuple):
            return (corrected, *result[1:])
        result.prev_sample = corrected
        return result

    def _stop(self, result: Any, denoised: Tensor) -> Any:
        """Ends the pipeline's loop by its own switch, with the image as predicted so far."""
        if not hasattr(type(self._pipe), "interrupt"):
            raise ValueError(f"{type(self._pipe).__name__} has no way to be interrupted: watch it without stop")
        assert self._monitor is not None
        self._monitor.end(STOPPED)
        self._pipe._interrupt = True
        if isinstance(result, tuple):
            return (denoised.to(result[0].dtype), *result[1:])
        result.prev_sample = denoised.to(result.prev_sample.dtype)
        return result

    def _planned(self, scheduler: Any, first: int) -> list[_Call]:
        # A pipeline that stops early (denoising_end) says so before its first step.
        count = getattr(self._pipe, "num_timesteps", None)
        return _plan_of(scheduler)(scheduler, first)[: count if isinstance(count, int) else None]

    def _settings(self, scheduler: Any, sample: Tensor) -> RunSettings:
        pipe, config = self._pipe, scheduler.config
        assert self._plan is not None
        kind = _prediction_type(scheduler)
        starts = _step_starts(self._plan)
        spacing = [str(config.get("timestep_spacing", ""))]
        spacing += [flag for flag in ("karras", "exponential", "beta", "lu_lambdas") if _uses(config, flag)]
        sampler = type(scheduler).__name__.removesuffix("Scheduler")
        if algorithm := config.get("algorithm_type"):
            sampler += f" {algorithm} order {config.get('solver_order')}"
        guided = bool(getattr(pipe, "do_classifier_free_guidance", True))
        scale = getattr(pipe, "guidance_scale", None)
        return RunSettings(
            model=Path(str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)).name,
            model_hash=fingerprint(_denoiser(pipe)),
            prediction_type=kind,
            sampler=sampler,
            scheduler=" ".join(filter(None, spacing)) or None,
            steps=len(starts),
            guidance_scale=None if scale is None else float(scale) if guided else 1.0,
            latent_shape=tuple(sample.shape[1:]),
            sigmas=tuple(start.model_sigma(kind) for start in starts),
            end_sigma=self._plan[-1].end.model_sigma(kind),
        )


def _predictions(outputs: Sequence[Tensor], batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Network outputs without and with the prompt, out of all since the last step; ``None`` where guidance has none."""
    for output in outputs:
        if len(output) == 2 * batch:  # both prompts in one batch, the unconditional one first
            uncond, cond = output.chunk(2)
            return uncond, cond
    if len(outputs) == 2 and all(len(output) == batch for output in outputs):  # one after the other (Flux, true_cfg_scale)
        return outputs[1], outputs[0]
    return None, None


def _step_starts(plan: Sequence[_Call]) -> list[NoiseLevel]:
    """Noise level before each solver step: that of the first call of it."""
    starts, fresh = [], True
    for call in plan:
        if fresh:
            starts.append(call.start)
        fresh = call.ends_step
    return starts


def _uses(config: Any, flag: str) -> bool:
    return bool(config.get(f"use_{flag}_sigmas") or config.get(f"use_{flag}"))


def _prediction_type(scheduler: Any) -> str:
    return "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else str(scheduler.config.prediction_type)


def _first_index(scheduler: Any, timestep: Any) -> int:
    """Where in ``scheduler.timesteps`` the run began, after its first call; image to image starts in the middle."""
    if hasattr(scheduler, "step_index"):
        return int(scheduler.step_index) - 1
    # Waits for the device, once a run. The last of equal ones: see where PNDM's second call is watched.
    timesteps = scheduler.timesteps.tolist()
    return len(timesteps) - 1 - timesteps[::-1].index(int(timestep))


def _denoiser(pipe: Any) -> torch.nn.Module:
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
            return module
    raise TypeError(f"{type(pipe).__name__} has no unet and no transformer: only diffusion pipelines can be watched")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of one object for the time of a block, and leaves no trace of it behind."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)


@contextmanager
def guard(
    pipe: Any,
    profile: StabilityProfile | None = None,
    mitigate: bool = False,
    thresholds: Thresholds | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    *,
    stop: bool = False,
) -> Iterator[GuardedRun]:
    """Watches everything ``pipe`` samples inside the block, and corrects it if asked to.

    Hooks the pipeline's scheduler, and its denoiser to see the conditional and unconditional predictions that guidance
    computes anyway; both are as before when the block is left, however it is left. Blocks can be nested. Without mitigation
    the images are bit-identical to unwatched ones. The block may be entered in one thread and the pipeline called in another;
    seen are the calls of the denoiser in the thread that set the scheduler's timesteps last, so that pipelines which share
    it can each be watched while they sample side by side (see :func:`copy_sharing_weights`).

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer`` and a supported scheduler.
        profile, mitigate, thresholds, on_step: as for :class:`memorization_guard.StabilityMonitor`.
        stop: whether to end a pipeline call by the pipeline's own ``interrupt`` as soon as every image of its batch has
            triggered; its images are then those predicted so far, and no more network calls are made.

    Yields:
        The run; read its ``traces`` once sampling is done.

    Raises:
        TypeError: if ``pipe`` is no diffusion pipeline.
        ValueError: if its scheduler cannot be watched.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(f"{type(pipe).__name__} has no scheduler with step and set_timesteps: not a diffusion pipeline")
    _plan_of(scheduler)
    denoiser = _denoiser(pipe)

    def new_monitor(settings: RunSettings) -> StabilityMonitor:
        return StabilityMonitor(profile, thresholds, mitigate, on_step, settings=settings, stop=stop)

    run = GuardedRun(pipe, new_monitor)
    original_step, original_set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(original_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        given = run._before_step(scheduler, model_output, sample)
        called = time.perf_counter()
        result = original_step(given, timestep, sample, *args, **kwargs)
        returned = time.perf_counter()
        result = run._after_step(scheduler, model_output, timestep, sample, result)
        run.overhead_seconds += called - begun + time.perf_counter() - returned
        return result

    @functools.wraps(original_set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        run._begin()
        return original_set_timesteps(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, "step", step))
        stack.enter_context(_replaced(scheduler, "set_timesteps", set_timesteps))
        with _hooks:
            handle = denoiser.register_forward_hook(run._keep_network_output)
        stack.callback(handle.remove)
        yield run


def copy_sharing_weights(pipe: Any) -> Any:
    """A pipeline of the same class and weights that may sample at the same time as ``pipe``, in another thread.

    Its own are what a call writes to: the scheduler, the tokenizers (whose padding every call sets anew), and the
    attributes in which a pipeline keeps the guidance scale and the like; networks are shared. Takes some milliseconds, and
    memory for the tokenizers only. ``DiffusionPipeline.from_pipe`` would share the scheduler, and casts the shared weights to
    float32. Images are those that ``pipe`` makes, bit for bit, whatever the others do, each guarded by its own
    :func:`guard`; but for what is done to the networks while one of them samples: loading, fusing or scaling a LoRA,
    offloading to the CPU, and half-precision autoencoders with ``force_upcast``, which SDXL casts up and down to decode.

    Raises:
        TypeError: if ``pipe`` is no diffusers pipeline.
        ValueError: if it is guarded; copy it outside of the block.
    """
    if not isinstance(components := getattr(pipe, "components", None), dict) or "scheduler" not in components:
        raise TypeError(f"{type(pipe).__name__} has no components with a scheduler: not a diffusion pipeline")
    if "step" in vars(components["scheduler"]):
        raise ValueError(f"the scheduler of this {type(pipe).__name__} is hooked by a guard: copy it outside of the block")
    twin = copy.copy(pipe)
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module):
            setattr(twin, name, copy.deepcopy(part))
    return twin


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | str | os.PathLike[str],
    *,
    batch_size: int = 4,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> StabilityProfile:
    """Makes a stability profile from reference prompts, one unmitigated run each; outliers among them are left out.

    Args:
        pipe: as for :func:`guard`.
        prompts: prompts that are not memorized, 50 or so; a list, or a file that :func:`read_prompts` reads.
        batch_size: prompts sampled at once.
        seed: prompt i starts from the noise of seed ``seed + i``, drawn on the CPU.
        state: file that keeps the runs so far after every batch, so that an interrupted calibration goes on from there;
            delete it once the profile is saved.
        progress: whether to show a progress bar.
        pipe_kwargs: what the profile is to hold for (``num_inference_steps``, ``guidance_scale``, ``height``, ...); one
            text as ``negative_prompt`` serves all prompts.

    Raises:
        CalibrationError: if there are fewer than 8 prompts, or fewer than 8 runs are usable; and if ``state`` belongs to
            another calibration.
    """
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else read_prompts(prompts)  # type: ignore[arg-type]
    if len(texts) < MIN_RUNS or not all(isinstance(text, str) for text in texts):
        raise CalibrationError(f"{len(texts)} reference prompts: give a list of at least {MIN_RUNS}, better 50")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    arguments = {key: repr(value) for key, value in sorted(pipe_kwargs.items())}
    identity = [
        texts,
        seed,
        arguments,
        fingerprint(_denoiser(pipe)),
        type(pipe.scheduler).__name__,
        dict(pipe.scheduler.config),
    ]
    runs = ReferenceRuns(state, identity)

    bar_config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(texts), initial=len(runs.traces), desc="calibrating", unit="image", disable=not progress) as bar:
            for start in range(len(runs.traces), len(texts), batch_size):
                part = texts[start : start + batch_size]
                generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
                # Pipelines want as many of them as there are prompts.
                texts_a_prompt = {k: [v] * len(part) for k, v in pipe_kwargs.items() if "negative" in k and isinstance(v, str)}
                with guard(pipe) as run:
                    pipe(part, generator=generators, output_type="latent", **(pipe_kwargs | texts_a_prompt))
                runs.add(run.traces, len(part))
                bar.update(len(part))
    finally:
        if bar_config is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar_config

    return runs.profile()[0]
