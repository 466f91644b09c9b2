"""Watching diffusers pipelines: whatever a pipeline samples passes through its UNet or transformer.

with guard(pipe, profile=profile, mode="mitigate") as run:
    images = pipe("a prompt").images
run.traces[0].verdict
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from ..automatic import STEPS, profiles_in, user_folder
from ..core.calibration import CalibrationError
from ..core.monitor import StabilityMonitor
from ..core.noise_level import NoiseLevel
from ..core.profile import StabilityProfile
from ..core.run import StepEvent
from ..core.settings import Mode, RunSettings, Serves, Thresholds
from ..core.trace import Trace
from ..fingerprint import fingerprint
from .hooks import calls_of, is_replaced, replaced
from .network import denoisers
from .sampling import NewMonitor, Sampling
from .schedule import check_hands_out_steps


class GuardedRun:
    """What a :func:`guard` block has seen so far.

    Attributes:
        overhead_seconds: host time that watching took. On a GPU, work that was queued and not waited for is not in it; a run
            that is mitigated or may be stopped waits in every evaluation, for the network as well.
    """

    def __init__(self, pipe: Any, new_monitor: NewMonitor) -> None:
        self.overhead_seconds = 0.0
        self._pipe, self._new_monitor = pipe, new_monitor
        self._runs: list[Sampling] = []
        self._hooks = ExitStack()
        self._scheduler: Any = None
        self._encoded: tuple[Any, ...] | None = None  # the latest call of encode_prompt, and what came of it
        self._thread = threading.get_ident()

    @property
    def traces(self) -> list[Trace]:
        """One trace an image, in the order of the images, over all pipeline calls in the block. Read it when they are done:
        a run that is not at its end by then is said to have ended early."""
        if self._runs:
            self._timed(self._runs[-1].end)
        return [trace for run in self._runs if run.monitor is not None for trace in run.monitor.traces]

    @property
    def settled(self) -> list[bool]:
        """Of every image of ``traces``, which is to be read before: whether the network need not be asked about it."""
        return [known for run in self._runs if run.monitor is not None for known in run.monitor.settled.tolist()]

    @property
    def error(self) -> Exception | None:
        """What ended the watching of a pipeline call early, if anything did."""
        return next((run.failure for run in self._runs if run.failure is not None), None)

    def _watch(self) -> None:
        """Hooks the pipeline's network and scheduler, until ``_hooks`` is closed."""
        for network in denoisers(self._pipe):
            self._hooks.enter_context(calls_of(network, self._before_network, self._after_network))
        self._watch_scheduler()
        if callable(encode := getattr(self._pipe, "encode_prompt", None)):

            @functools.wraps(encode)
            def watched_encode(*args: Any, **kwargs: Any) -> Any:
                result = encode(*args, **kwargs)
                self._encoded = encode, args, kwargs, result
                return result

            self._hooks.enter_context(replaced(self._pipe, "encode_prompt", watched_encode))

    def _watch_scheduler(self) -> None:
        self._scheduler = scheduler = self._pipe.scheduler
        step, set_timesteps = scheduler.step, scheduler.set_timesteps
        names = list(inspect.signature(step).parameters)
        guided_at, sample_at = names.index("model_output"), names.index("sample")

        @functools.wraps(step)
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            run = self._stepping()
            guided = kwargs["model_output"] if "model_output" in kwargs else args[guided_at]
            sample = kwargs["sample"] if "sample" in kwargs else args[sample_at]
            self._timed(run.before_step, guided, sample)
            result = step(*args, **kwargs)
            proposed = result[0] if isinstance(result, tuple) else result.prev_sample
            changed = self._timed(run.after_step, guided, sample, proposed)
            if changed is None or changed is proposed:
                return result
            if isinstance(result, tuple):
                return (changed, *result[1:])
            result.prev_sample = changed
            return result

        @functools.wraps(set_timesteps)
        def watched_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return set_timesteps(*args, **kwargs)

        self._hooks.enter_context(replaced(scheduler, "step", watched_step))
        self._hooks.enter_context(replaced(scheduler, "set_timesteps", watched_set_timesteps))

    def _stepping(self) -> Sampling:
        """The run that the scheduler is about to step in."""
        if not self._runs:
            self._begin()
            self._runs[-1].fail(ValueError("sampling had begun before the guard was entered: enter it first"))
        elif threading.get_ident() != self._thread and self._runs[-1].failure is None:
            message = "the pipeline is called in two threads at once: give each its own, of copy_sharing_weights"
            self._runs[-1].fail(ValueError(message))
        return self._runs[-1]

    def _begin(self) -> None:
        """The pipeline sets its timesteps: a new run begins, in this thread."""
        if self._runs:
            self._timed(self._runs[-1].end)
        self._thread = threading.get_ident()
        encoded, self._encoded = self._encoded, None
        self._runs.append(Sampling(self._pipe, self._new_monitor, encoded))

    def _before_network(self, keywords: dict[str, Any]) -> Mapping[str, Any]:
        if threading.get_ident() != self._thread or not self._runs:
            return keywords
        return self._timed(self._runs[-1].calling, keywords) or keywords

    def _after_network(
        self, module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        # Pipelines that sample at the same time in other threads may share the denoiser.
        if threading.get_ident() != self._thread:
            return
        if self._pipe.scheduler is not self._scheduler:
            # Another scheduler was put in its place within the block, and has set its timesteps already.
            self._watch_scheduler()
            self._begin()
        if self._runs:
            self._timed(self._runs[-1].called, module, arguments, keywords, output)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What watching does. It never raises: the image goes on without it."""
        begun = time.perf_counter()
        try:
            with torch.no_grad():
                return function(*arguments)
        except Exception as error:
            self._runs[-1].fail(error)
            return None
        finally:
            self.overhead_seconds += time.perf_counter() - begun


@contextmanager
def guard(
    pipe: Any,
    profile: StabilityProfile | Literal["auto"] | None = None,
    mode: Mode = "trace",
    thresholds: Thresholds | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    *,
    serves: Serves | None = None,
) -> Iterator[GuardedRun]:
    """Watches everything ``pipe`` samples inside the block, and corrects it if asked to.

    Hooks the pipeline's UNet or transformer, whose output holds both predictions, and reads its scheduler's steps; all is as
    before when the block is left, however it is left. Blocks can be nested, and left in any order. In mode ``trace`` the
    images are bit-identical to unwatched ones. What could not be watched says so in the ``note`` of its trace.

    The block may be entered in one thread and the pipeline called in another; seen are the calls of the denoiser in the
    thread that set the scheduler's timesteps last, so that pipelines which share it can each be watched while they sample
    side by side (see :func:`copy_sharing_weights`). A call that is under way when the block is entered is not judged, and its
    trace says so; the next one is. When the block is left in the middle of a call, that call goes on unwatched. If two threads
    call the pipeline at once, neither call is judged.

    A deep copy that is made inside the block is not watched, and warns when it is called. A pipeline that shares the scheduler
    of the guarded one (``from_pipe``, ``copy.copy``) is watched with it. If it does not use guidance as the guarded one did
    last, its image may come without a verdict, and the note says so.

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer``.
        profile: as for :class:`memorization_guard.StabilityMonitor`; or ``"auto"``: that of the pipeline's weights, which is
            made when the block is entered if there is none, in the time of some ten images, and kept in
            :func:`memorization_guard.automatic.user_folder`. Where none can be made, the traces' notes say why: a pipeline
            that wants more than a prompt finds the one that was made with a text-to-image pipeline of the same weights.
        mode, thresholds, on_step: as for :class:`memorization_guard.StabilityMonitor`. ``stop`` ends a pipeline call
            by the pipeline's own ``interrupt`` once all its images have triggered; of those that have, nothing is handed on.
        serves: as there; where a pipeline has no ``interrupt``, it goes on to its end.

    Yields:
        The run; read its ``traces`` once sampling is done.

    Raises:
        TypeError: if ``pipe`` is no diffusion pipeline.
        ValueError: if the published method is asked for and its scheduler hands out no steps that could be edited; or mode
            ``stop``, and the pipeline has no ``interrupt``.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(f"{type(pipe).__name__} has no scheduler with step and set_timesteps: not a diffusion pipeline")
    denoisers(pipe)
    if thresholds is not None and thresholds.method == "published":
        check_hands_out_steps(scheduler)
    if mode == "stop" and not hasattr(type(pipe), "interrupt"):
        raise ValueError(f"{type(pipe).__name__} cannot be interrupted: choose another mode than stop")

    missing: str | None = None
    if profile == "auto":
        profile, missing = (None, None) if mode == "off" else _automatic_profile(pipe)

    def new_monitor(settings: RunSettings, level: Callable[[float], NoiseLevel] | None) -> StabilityMonitor:
        return StabilityMonitor(
            profile, thresholds, mode, on_step, settings=settings, level=level, serves=serves, missing=missing
        )

    run = GuardedRun(pipe, new_monitor)
    with run._hooks:
        if mode != "off":
            run._watch()
        yield run


def _automatic_profile(pipe: Any) -> tuple[StabilityProfile | None, str | None]:
    """The profile of the pipeline's weights, or why there is none."""

    def sample(prompts: list[str], seed: int, serves: Serves) -> list[Trace]:
        try:
            return sample_references(pipe, prompts, seed, serves, num_inference_steps=STEPS)
        except (TypeError, ValueError) as error:
            raise _NeedsMore(str(error)) from error

    weights = fingerprint(denoisers(pipe)[0])
    try:
        return profiles_in(user_folder()).make(weights, sample, cancelled=(_NeedsMore, KeyboardInterrupt))
    except _NeedsMore as error:
        return None, (
            f"{type(pipe).__name__} could not be called with prompts alone ({error}): enter guard(..., profile='auto') once "
            "with a text-to-image pipeline of the same weights."
        )


class _NeedsMore(Exception):  # noqa: N818 (the pipeline is as it should be)
    """A pipeline that makes no image of a prompt alone."""


def sample_references(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    serves: Serves,
    *,
    profile: StabilityProfile | Literal["auto"] | None = None,
    **pipe_kwargs: Any,
) -> list[Trace]:
    """The traces of reference prompts, sampled in one batch as long as they are needed; no image is decoded.

    Args:
        seed: prompt i starts from the noise of seed ``seed + i``, drawn on the CPU.
        profile: judges them, if there is one.
        pipe_kwargs: of the pipeline's call; one text as ``negative_prompt`` serves all prompts.

    Raises:
        CalibrationError: if the pipeline could not be watched.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    # Pipelines want as many of them as there are prompts.
    texts = {k: [v] * len(prompts) for k, v in pipe_kwargs.items() if "negative" in k and isinstance(v, str)}
    bar_config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        with guard(pipe, profile, serves=serves) as run:
            pipe(list(prompts), generator=generators, output_type="latent", **(pipe_kwargs | texts))
    finally:
        if bar_config is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar_config
    if run.error is not None:
        raise CalibrationError(f"this pipeline could not be watched: {run.error}")
    return run.traces


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
    if is_replaced(components["scheduler"], "step"):
        raise ValueError(f"the scheduler of this {type(pipe).__name__} is hooked by a guard: copy it outside of the block")
    twin = copy.copy(pipe)
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module):
            setattr(twin, name, copy.deepcopy(part))
    return twin
