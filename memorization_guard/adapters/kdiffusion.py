"""Watching samplers in k-diffusion's form: every sampler of ComfyUI, and of the WebUI, is one function of this shape.

``sampler_function(model, x, sigmas, extra_args=..., callback=..., disable=..., **options) -> x`` calls ``model(x, sigma,
**extra_args)``, which gives the guided clean latent, and ``callback({"x", "i", "sigma", "denoised", ...})`` once a solver
step. A proxy around both sees the sampler's own latent at every step, and can change it before the network does, whichever
sampler it is: what happened between two step starts (further evaluations, fresh noise, past predictions) is the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.monitor import STOPPED, StabilityMonitor
from ..core.noise_level import NoiseLevel, where_changed, widened

#: Relative distance up to which a noise level that the sampler names is the one its schedule has: some samplers move their
#: first one by less than this.
_TOLERANCE = 2e-3


@dataclass(eq=False)
class _Call:
    """One call of the model."""

    x: Tensor
    sigma: Tensor
    denoised: Tensor | None = None
    #: Clean latents predicted with and without the prompt, and the latent they were predicted from.
    guidance: tuple[Tensor, Tensor, Tensor] | None = None

    @functools.cached_property
    def named_sigma(self) -> float:
        """The noise level that the sampler names; waits for the device, once."""
        return float(self.sigma.flatten()[0])


@dataclass(eq=False)
class _Start:
    """The beginning of a solver step."""

    call: _Call
    z: Tensor  # the latent on the VP scale
    level: NoiseLevel


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Leaves a sampler function in the middle; ``denoised`` is the clean latent as predicted so far."""

    def __init__(self, denoised: Tensor) -> None:
        super().__init__(STOPPED)
        self.denoised = denoised


class SamplerWatch:
    """Follows one run of a sampler function, and hands its solver steps to a monitor.

    A step starts at the last model call before its callback; which call that was shows only at the callback. To correct a
    latent it must be known before: a call at the schedule's next noise level is taken for a start, from that place among the
    calls on at which the step before started; it is taken back if it was none, as can happen in the first step.

    Whatever goes wrong in here ends the watching, never the run. Nothing is drawn from any random generator. Noise levels are
    read once, from ``sigmas``; a device is not waited for at each step unless the monitor corrects.

    Args:
        monitor: takes in the steps; its settings should have been made from the same ``sigmas``.
        sigmas: the schedule, ``[steps + 1]``.
        level: coefficients of the latent at a noise level that the sampler names; for k-diffusion's own samplers
            :meth:`NoiseLevel.from_sigma`.
        editable: whether the sampler goes on with the tensor that it hands to the model. Where it is known not to
            (it keeps another state, or only the predictions), predictions are corrected instead.
        fixed: whether the sampler keeps to ``sigmas``; of one that chooses its own they are the first and the last.
    """

    def __init__(
        self,
        monitor: StabilityMonitor,
        sigmas: Tensor,
        level: Callable[[float], NoiseLevel],
        *,
        editable: bool = True,
        fixed: bool = True,
    ) -> None:
        self.monitor = monitor
        self._schedule: list[float] = sigmas.tolist()
        self._level = level
        self._editable = editable
        self._on_schedule = fixed
        if not fixed:
            monitor.leave_schedule()
        self._started = 0  # solver steps begun
        self._start: _Start | None = None  # of the step under way
        self._first: _Call | None = None  # first and last call since the callback
        self._last: _Call | None = None
        self._calls = 0  # since the callback
        self._expected = 1  # which of them started the last step
        self._presumed: _Start | None = None  # a start that no callback has confirmed yet
        self._changed: _Start | None = None  # the presumed start whose latent was changed
        self._spoiled = False  # whether a latent was changed inside the step under way
        self._named: list[Tensor] = []  # noise levels of the starts, as the sampler named them

    def model(self, model: Any) -> ModelProxy:
        """What the sampler is to be given in place of ``model``."""
        return ModelProxy(model, self)

    def callback(self, callback: Callable[[dict[str, Any]], Any] | None) -> Callable[[dict[str, Any]], Any]:
        """What the sampler is to be given in place of ``callback``."""

        def stepped(info: dict[str, Any]) -> Any:
            self.stepped(info)
            return callback(info) if callback is not None else None

        return stepped

    def predict(self, x: Tensor, sigma: Tensor, evaluate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Stands for the model: the prediction that the sampler is to go on with, out of ``evaluate(x, sigma)``."""
        call = _Call(x, sigma)
        self._guarded(self._before_call, call)
        denoised = evaluate(x, sigma)
        call.denoised = denoised
        corrected = self._guarded(self._after_call, call)
        return denoised if corrected is None else corrected

    def saw_guidance(self, cond: Tensor, uncond: Tensor, x: Tensor | None = None) -> None:
        """Takes in, from inside ``evaluate``, the clean latents predicted with and without the prompt.

        They were predicted from ``x``, or, as where nothing stands in between, from what the sampler handed to the model.
        """
        if self._last is not None:
            self._last.guidance = (cond, uncond, self._last.x if x is None else x)

    def stepped(self, info: Mapping[str, Any]) -> None:
        """Stands before the sampler's own callback.

        Raises:
            Stopped: where the monitor says that the run is to stop, for :func:`watched` to end it.
        """
        self._guarded(self._after_callback, info)
        if self.monitor.should_stop and self._start is not None and self._start.call.denoised is not None:
            self.monitor.end(STOPPED)
            raise Stopped(self._start.call.denoised)

    def finished(self, result: Tensor) -> Tensor:
        """Takes in what the sampler function returned, and gives what it is to return."""
        corrected = self._guarded(self._finish, result)
        return result if corrected is None else corrected

    def aborted(self, error: BaseException) -> None:
        """The sampler function was left by ``error`` (an interrupt, or the host's own failure)."""
        name = type(error).__name__
        why = "interrupted" if "interrupt" in name.lower() else name
        self.monitor.end(f"{why} after {self.monitor.steps} of {self.monitor.settings.steps} steps")

    def _guarded(self, function: Callable[[Any], Any], argument: Any) -> Any:
        if self.monitor.error is not None:
            return None
        try:
            with torch.no_grad():
                return function(argument)
        except Exception as error:
            self.monitor.fail(error)
            return None

    def _before_call(self, call: _Call) -> None:
        self._calls += 1
        self._first, self._last = self._first or call, call
        if self._start is None or not self.monitor.corrects or not self._may_start_step(call):
            return
        if self._presumed is not None:
            self._take_back()
        start = self._new_start(call)
        if not self.monitor.corrects:  # the schedule was left
            return
        z = self._end_step(start.z, start.level, editable=self._editable and not self._spoiled)
        if z is not start.z:
            call.x.copy_(where_changed(call.x, start.z, z, start.level.from_vp(z)))
            start.z, self._changed = z, start
        self._presumed = start

    def _may_start_step(self, call: _Call) -> bool:
        following = self._schedule[self._started] if self._started < len(self._schedule) else math.nan
        return self._calls >= self._expected and _same(call.named_sigma, following)

    def _after_call(self, call: _Call) -> Tensor | None:
        if not self.monitor.corrects or call.denoised is None:
            return None
        cond, uncond, _ = call.guidance or (None, None, None)
        begins = self._presumed is not None and self._presumed.call is call
        return self.monitor.corrected_prediction(call.denoised, cond, uncond, begins=begins, editable=self._editable)

    def _take_back(self) -> None:
        """The presumed start was none."""
        assert self._presumed is not None
        # What was changed in an inner evaluation is part of the step already: it is not corrected a second time.
        self._spoiled |= self._changed is self._presumed
        self._presumed = None
        self.monitor.retract()

    def _after_callback(self, info: Mapping[str, Any]) -> None:
        first, last, calls = self._first, self._last, self._calls
        self._first = self._last = None
        self._calls = 0
        if first is None or last is None:
            return  # nothing was evaluated since the last callback
        # Most samplers report the tensor they called the model with. Where none is reported, and calls are several, the
        # callback stands at the end of its step (DPM adaptive), which began with the first of them.
        reported = info.get("x")
        call, position = (last, calls) if last.x is reported or calls == 1 else (first, 1)
        if self._started == 0:
            # A sampler that does not even report its first latent keeps it where no edit reaches it (UniPC).
            self._editable &= call.x is reported
        if self._started:
            self._expected = position
        start = self._presumed
        if start is None or start.call is not call:
            if start is not None:
                self._take_back()
            start = self._new_start(call)
            if self._start is not None:
                self._end_step(start.z, start.level, editable=False)
        self._presumed = None
        self._spoiled = False
        self._start = start
        self._started += 1
        if self._on_schedule:
            self._named.append(call.sigma)

    def _new_start(self, call: _Call) -> _Start:
        level = self._level(self._sigma(call))
        return _Start(call, level.to_vp(call.x), level)

    def _sigma(self, call: _Call) -> float:
        """The noise level of the step that starts at ``call``."""
        planned = self._schedule[self._started] if self._started < len(self._schedule) - 1 else None
        if self._on_schedule and planned is not None:
            # Reading it makes the host wait for a device: two looks tell a sampler with steps of its own, and the end of
            # the run tells the rest. What corrects waits anyway.
            if self._started > 1 and not self.monitor.corrects:
                return planned
            if _same(call.named_sigma, planned):
                return planned
        if self._on_schedule:
            self._on_schedule = False
            self.monitor.leave_schedule()
        return call.named_sigma

    def _end_step(self, z_next: Tensor, level: NoiseLevel, *, editable: bool) -> Tensor:
        start = self._start
        assert start is not None
        assert start.call.denoised is not None
        eps_cond = eps_uncond = None
        if start.call.guidance is not None and start.level.noise > 0:
            cond, uncond, x = start.call.guidance
            eps_cond, eps_uncond = (start.level.epsilon(widened(x), widened(d), "sample") for d in (cond, uncond))
        return self.monitor.step(
            start.z,
            z_next,
            start.call.denoised,
            sigma=start.level.model_sigma(self.monitor.settings.prediction_type),
            x0_coefficient=level.alpha,
            eps_cond=eps_cond,
            eps_uncond=eps_uncond,
            editable=editable,
        )

    def _finish(self, result: Tensor) -> Tensor | None:
        if self._presumed is not None:
            self._take_back()
        if self._start is None:
            return None
        level = self._level(self._schedule[-1])
        z_next = level.to_vp(result)
        z = self._end_step(z_next, level, editable=not self._spoiled)
        if self._on_schedule and not self._keeps_schedule():
            self.monitor.leave_schedule()
        return None if z is z_next else where_changed(result, z_next, z, level.from_vp(z))

    def _keeps_schedule(self) -> bool:
        """Whether every step was one of the schedule; waits for the device, once, at the end."""
        if len(self._named) != len(self._schedule) - 1:
            return False
        named = torch.stack([sigma.flatten()[0] for sigma in self._named]).tolist()
        return all(map(_same, named, self._schedule))


def watched(sampler_function: Callable[..., Tensor], new_watch: Callable[..., SamplerWatch | None]) -> Callable[..., Tensor]:
    """``sampler_function`` with its model and callback watched; what it returns is bit-identical unless it is corrected.

    A run that the monitor stops returns the clean latent as it was predicted when every image had triggered.

    Args:
        sampler_function: ``(model, x, sigmas, *, extra_args, callback, ...) -> x``; what follows ``x`` may have other names.
        new_watch: gives, from ``x`` and all that follows it, who watches the run, or ``None`` for nobody.
    """

    @functools.wraps(sampler_function)
    def run(
        model: Any, x: Tensor, *args: Any, callback: Callable[[dict[str, Any]], Any] | None = None, **kwargs: Any
    ) -> Tensor:
        watch = new_watch(x, *args, **kwargs)
        if watch is None:
            return sampler_function(model, x, *args, callback=callback, **kwargs)
        try:
            result = sampler_function(watch.model(model), x, *args, callback=watch.callback(callback), **kwargs)
        except Stopped as stopped:
            return stopped.denoised.to(x.dtype)
        except BaseException as error:
            watch.aborted(error)
            raise
        return watch.finished(result)

    return run


def sampler_name(function: str, options: Mapping[str, Any]) -> str:
    """A sampler as run settings name it: ``euler_ancestral(eta=0.5)``, with those ``options`` that are plain values."""
    plain = [f"{name}={value}" for name, value in sorted(options.items()) if isinstance(value, (bool, int, float, str))]
    return function.removeprefix("sample_") + (f"({', '.join(plain)})" if plain else "")


class ModelProxy:
    """The model as a sampler sees it: called through a watch, and itself in everything else."""

    def __init__(self, model: Any, watch: SamplerWatch) -> None:
        self.__dict__.update(_model=model, _watch=watch)

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._watch.predict(x, sigma, lambda x, sigma: self._model(x, sigma, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6)
