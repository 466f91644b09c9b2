"""Watching diffusers pipelines: whatever a pipeline samples passes through its UNet or transformer.

with guard(pipe, profile=profile, mode="mitigate") as run:
    images = pipe("a prompt").images
run.traces[0].verdict
"""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import published
from ..core.monitor import STOPPED, StabilityMonitor
from ..core.noise_level import NoiseLevel
from ..core.profile import StabilityProfile
from ..core.run import StepEvent
from ..core.settings import Mode, RunSettings, Thresholds
from ..core.trace import Trace
from ..fingerprint import fingerprint
from .network import Network, Pair, denoisers

# torch counts its hooks up without a lock: two that are registered at once could get one number, and one of them be lost.
_hooks = threading.Lock()


class GuardedRun:
    """What a :func:`guard` block has seen so far."""

    def __init__(self, pipe: Any, new_monitor: Callable[..., StabilityMonitor]) -> None:
        self._pipe = pipe
        self._new_monitor = new_monitor
        self._monitors: list[StabilityMonitor] = []
        #: Host time in seconds that watching took so far. On a GPU, work that was queued and not waited for is not in it; a
        #: run that is mitigated or may be stopped waits in every evaluation, for the network as well.
        self.overhead_seconds = 0.0
        self._thread = threading.get_ident()
        self._begin()

    @property
    def traces(self) -> list[Trace]:
        """One trace an image, in the order of the images, over all pipeline calls in the block."""
        self._end()
        return [trace for monitor in self._monitors for trace in monitor.traces]

    def _begin(self) -> None:
        """The pipeline has set its timesteps: the next evaluation is the first of a new run."""
        self._thread = threading.get_ident()
        self._monitor: StabilityMonitor | None = None
        self._network: Network | None = None
        self._pending: Pair | None = None  # an evaluation whose second half, if there is one, comes with the next call
        self._evaluated: Pair | None = None  # the evaluation that the next step is made from
        self._result: Tensor | None = None  # the latent after the last step

    def _end(self) -> None:
        """The last latent of the run, which no evaluation follows."""
        if self._monitor is not None and self._network is not None and self._result is not None:
            self._monitor.latent(self._result, self._network.end, evaluated=False)
        self._result = None

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What watching does, which never raises: the image goes on without us."""
        begun = time.perf_counter()
        try:
            return function(*arguments)
        except Exception as error:
            if self._monitor is None:
                self._monitor = self._new_monitor(RunSettings())
                self._monitors.append(self._monitor)
            self._monitor.fail(error)
            return None
        finally:
            self.overhead_seconds += time.perf_counter() - begun

    def _after_network(self, _module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        # Pipelines that sample at the same time in other threads may share the denoiser.
        if threading.get_ident() == self._thread and (self._monitor is None or self._monitor.error is None):
            self._timed(self._evaluate, arguments, keywords, output)

    def _evaluate(self, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if self._evaluated is not None:
            return  # guidance methods call the network again within an evaluation
        if self._network is None:
            self._network = Network(self._pipe, arguments, keywords)
            self._monitor = self._new_monitor(self._settings(self._network), level=self._network.level)
            self._monitors.append(self._monitor)
        pair = self._network.pair(arguments, keywords, output, self._pending)
        if pair.waits:
            self._pending = pair
        else:
            self._judge(pair)

    def _judge(self, pair: Pair) -> None:
        assert self._monitor is not None
        given = self._monitor.predicted(pair.x, pair.sigma, pair.denoised_cond, pair.denoised_uncond)
        if given is not pair.denoised_cond:
            pair.replace(given)
        self._pending, self._evaluated = None, pair

    def _before_step(self) -> None:
        if self._pending is not None:
            self._judge(self._pending)  # there was one prediction only

    def _after_step(self, guided: Tensor, sample: Tensor, result: Any) -> Any:
        monitor, network, pair = self._monitor, self._network, self._evaluated
        self._evaluated = None
        if monitor is None or network is None or pair is None or monitor.error is not None:
            return result
        proposed = result[0] if isinstance(result, tuple) else result.prev_sample
        denoised = functools.partial(pair.denoised, guided)
        if monitor.thresholds.method == "published":
            start, end = network.step_ends(pair)
            changed = monitor.step(sample, proposed, denoised(), start=start, end=end)
        else:
            monitor.latent(pair.x, network.level(pair.timestep), evaluated=True)
            self._result = changed = proposed
        if monitor.should_stop:
            if not hasattr(type(self._pipe), "interrupt"):
                raise ValueError(f"{type(self._pipe).__name__} has no way to be interrupted: watch it without stop")
            monitor.end(STOPPED)
            self._pipe._interrupt = True
            changed = denoised().to(proposed.dtype)
        if changed is proposed:
            return result
        if isinstance(result, tuple):
            return (changed, *result[1:])
        result.prev_sample = changed
        return result

    def _settings(self, network: Network) -> RunSettings:
        pipe, config = self._pipe, self._pipe.scheduler.config
        spacing = [str(config.get("timestep_spacing", ""))]
        flags = ("karras", "exponential", "beta", "lu_lambdas")
        spacing += [flag for flag in flags if config.get(f"use_{flag}_sigmas") or config.get(f"use_{flag}")]
        sampler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
        if algorithm := config.get("algorithm_type"):
            sampler += f" {algorithm} order {config.get('solver_order')}"
        *sigmas, end = (level.model_sigma(network.prediction_type) for level in network.levels)
        return RunSettings(
            model=Path(str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)).name,
            model_hash=fingerprint(denoisers(pipe)[0]),
            prediction_type=network.prediction_type,
            sampler=sampler,
            scheduler=" ".join(filter(None, spacing)) or None,
            steps=len(sigmas),
            guidance_scale=network.guidance_scale,
            latent_shape=network.latent_shape,
            sigmas=tuple(sigmas),
            end_sigma=end,
        )


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
    mode: Mode = "trace",
    thresholds: Thresholds | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
) -> Iterator[GuardedRun]:
    """Watches everything ``pipe`` samples inside the block, and corrects it if asked to.

    Hooks the pipeline's UNet or transformer, whose output holds both predictions, and reads its scheduler's steps; all is as
    before when the block is left, however it is left. Blocks can be nested. In mode ``trace`` the images are bit-identical to
    unwatched ones. The block may be entered in one thread and the pipeline called in another; seen are the calls of the
    denoiser in the thread that set the scheduler's timesteps last, so that pipelines which share it can each be watched while
    they sample side by side (see :func:`copy_sharing_weights`).

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer``, and any scheduler.
        profile, mode, thresholds, on_step: as for :class:`memorization_guard.StabilityMonitor`. ``stop`` ends a pipeline call
            by the pipeline's own ``interrupt``; its images are then those predicted so far.

    Yields:
        The run; read its ``traces`` once sampling is done.

    Raises:
        TypeError: if ``pipe`` is no diffusion pipeline.
        ValueError: if the published method is asked for and its scheduler hands out no steps that could be edited.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(f"{type(pipe).__name__} has no scheduler with step and set_timesteps: not a diffusion pipeline")
    networks = denoisers(pipe)
    if thresholds is not None and thresholds.method == "published" and not _hands_out_steps(scheduler):
        raise ValueError(f"{type(scheduler).__name__}: {published.REFUSED}, or a scheduler such as PNDM or DDIM")

    def new_monitor(settings: RunSettings, level: Callable[[float], NoiseLevel] | None = None) -> StabilityMonitor:
        return StabilityMonitor(profile, thresholds, mode, on_step, settings=settings, level=level)

    run = GuardedRun(pipe, new_monitor)
    if mode == "off":
        yield run
        return
    original_step, original_set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(original_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        run._timed(run._before_step)
        result = original_step(model_output, timestep, sample, *args, **kwargs)
        changed = run._timed(run._after_step, model_output, sample, result)
        return result if changed is None else changed

    @functools.wraps(original_set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        run._timed(run._end)
        run._begin()
        return original_set_timesteps(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, "step", step))
        stack.enter_context(_replaced(scheduler, "set_timesteps", set_timesteps))
        for network in networks:
            with _hooks:
                handle = network.register_forward_hook(run._after_network, with_kwargs=True)
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


def _hands_out_steps(scheduler: Any) -> bool:
    """Whether what ``step`` returns is on the VP scale, and is what the next step starts from."""
    return float(scheduler.init_noise_sigma) == 1.0 and not hasattr(scheduler, "last_sample")
