"""Where ComfyUI's sampling meets the core: predictions are judged and corrected, steps are traced.

A guard leaves two wrappers on its model, around the run and around the sampler. All else goes into the options of the run,
which ComfyUI makes anew each time, once every node has patched the model. So it makes no difference whether a node stands
before or after a guard.

- ``sampler_calc_cond_batch_function`` sees all predictions of an evaluation together and before any pre-CFG function, with
  context windows joined, and with the two calls of nodes that evaluate the negative prompt in another way (SLG).
- Guiders with a formula of their own (PerpNeg, DualCFG) ask for their predictions directly: ``CALC_COND_BATCH`` sees those.
  PAG, SAG, SLG and others do so too, later in the same evaluation; ``PREDICT_NOISE`` tells where an evaluation begins.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from server import PromptServer
from torch import Tensor

from ..memorization_guard import (
    Mode,
    NoiseLevel,
    RunSettings,
    StabilityMonitor,
    StabilityProfile,
    StepEvent,
    Thresholds,
)
from ..memorization_guard.adapters.kdiffusion import SamplerRun, watched
from ..memorization_guard.core.asking import Answer
from ..memorization_guard.core.monitor import STOPPED
from ..memorization_guard.core.settings import Serves
from .models import noise_levels, run_settings
from .prompts import Encoder, OtherPrompts, RunConditioning
from .runs import TraceLog

log = logging.getLogger(__name__)

#: Name of the live events, and of everything that is put into a model's or a run's options.
KEY = "memorization_guard"

#: The conditionings of a guider that stand for no prompt; the first that it has counts. PerpNeg has both.
_WITHOUT_PROMPT = ("empty_negative_prompt", "negative")


class Automatic(Protocol):
    """Gives a profile to runs for which none was chosen."""

    def make(self, guider: Any, noise: Tensor, tell: Callable[[str], None]) -> None:
        """Before a run: makes the profile of its model, if there is none; ``tell`` shows how far it is."""
        ...

    def profile(self, guider: Any) -> tuple[StabilityProfile | None, str | None]:
        """The profile of the model that a run samples, or why there is none."""
        ...


def guard(
    model: ModelPatcher,
    *,
    mode: Mode,
    profile: StabilityProfile | None = None,
    thresholds: Thresholds | None = None,
    node: str | None = None,
    serves: Serves | None = None,
    automatic: Automatic | None = None,
    encoder: Encoder | None = None,
    ends_prompt: bool = False,
) -> tuple[ModelPatcher, TraceLog]:
    """A clone of ``model`` whose runs are watched, and where they are logged; ``model`` itself stays as it is.

    Args:
        node: id of the node that live events are for; without one, none are sent.
        serves: as for :class:`StabilityMonitor`.
        automatic: gives runs a profile, where ``profile`` does not.
        encoder: finds the prompts of runs, to tell the words that call a copy up and to go on without them.
        ends_prompt: whether a run that mode ``stop`` ends takes the whole prompt with it, as *Cancel* does.
    """
    traces = TraceLog(mode)
    if mode == "off":
        # Or the node would go on showing the graph of an earlier run.
        send(node, traces.next_name(), "begin", lambda: {"note": "The mode is off: nothing is watched."})
        send(node, traces.next_name(), "end", lambda: {"traces": []})
        return model, traces

    # Functions, since copying a model deeply copies bound methods together with their objects, and functions never.
    def tell(text: str) -> None:
        send(node, traces.next_name(), "begin", lambda: {"note": text})

    def around_run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if profile is None and automatic is not None:
            automatic.make(executor.class_obj, noise, tell)
        return executor(noise, *args, **kwargs)

    def around_sampler(
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: Any,
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        sampler = executor.class_obj
        prepared = noise, latent_image, denoise_mask
        sample = functools.partial(executor, guider, sigmas, extra_args, callback, *prepared, *args, **kwargs)
        if not hasattr(sampler, "sampler_function"):
            log.warning("Memorization Guard cannot watch %s: it is no KSAMPLER.", type(sampler).__name__)
            return sample()
        try:
            levels = noise_levels(guider.model_patcher.get_model_object("model_sampling"), sigmas)
            schedule = [levels(sigma) for sigma in sigmas.tolist()]
            settings = run_settings(guider, sampler, noise.shape, schedule)
            held, missing = (profile, None) if automatic is None or profile is not None else automatic.profile(guider)
            watch = _Watch(traces, held, thresholds, node, settings, levels, serves, missing)
            sampler_run = SamplerRun(watch.monitor, schedule, levels)
            own = None if encoder is None else RunConditioning(encoder, guider, *prepared, extra_args.get("seed"))
            predictions = Predictions(sampler_run, guider, own)
            predictions.attach(extra_args["model_options"])
        except Exception:
            log.warning("Memorization Guard does not watch this run; the image is not affected.", exc_info=True)
            return sample()
        function = sampler.sampler_function
        sampler.sampler_function = watched(function, lambda *_, **__: sampler_run)
        try:
            result = sample()
            if ends_prompt and watch.monitor.should_stop:
                watch.monitor.end(f"{STOPPED}, and the prompt with it")
                raise comfy.model_management.InterruptProcessingException
            return result
        finally:
            sampler.sampler_function = function
            predictions.detach()
            watch.end()

    guarded = model.clone()
    guarded.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_run)
    guarded.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, around_sampler)
    return guarded, traces


def is_guarded(model: ModelPatcher) -> bool:
    """Whether ``model`` came out of :func:`guard`."""
    return bool(model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY))


def unguarded(model: ModelPatcher) -> ModelPatcher:
    """A clone that no guard watches."""
    clone = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


def send(node: str | None, run: str, kind: str, data: Callable[[], Mapping[str, Any]]) -> None:
    """Sends a live event to the page that queued the prompt, if any did, for a node."""
    if node is None or (server := PromptServer.instance).client_id is None:
        return
    server.send_sync(KEY, {"kind": kind, "node": node, "run": run, **data()}, server.client_id)


class _Watch:
    """One run: its monitor, its entry in the log and its live events. The log keeps it, so it holds on to no tensor."""

    def __init__(
        self,
        traces: TraceLog,
        profile: StabilityProfile | None,
        thresholds: Thresholds | None,
        node: str | None,
        settings: RunSettings,
        level: Callable[[float], NoiseLevel],
        serves: Serves | None,
        missing: str | None,
    ) -> None:
        on_step = None if node is None else self._on_step
        self.monitor = StabilityMonitor(
            profile, thresholds, traces.mode, on_step, settings=settings, level=level, serves=serves, missing=missing
        )
        self._run = traces.begin(self.monitor)
        self._node = node
        if self.monitor.check is not None and self.monitor.check.invalid:
            log.warning("Memorization Guard: %s", self.monitor.check)
        self._send("begin", self.monitor.outline)

    def end(self) -> None:
        """The sampler has returned, or was left."""
        try:
            traces = self._run.traces  # in any case: from here on the log keeps numbers, and no latent
            self._send("end", lambda: {"traces": [trace.to_dict() for trace in traces]})
        except Exception:
            log.warning("Memorization Guard could not send the graph of this run.", exc_info=True)

    def _on_step(self, event: StepEvent) -> None:
        self._send("step", event.to_dict)

    def _send(self, kind: str, data: Callable[[], dict[str, Any]]) -> None:
        send(self._node, self._run.name, kind, data)


class Predictions:
    """The place between network and guidance: hands the predictions of a run over, and puts the corrected one in their place.

    Args:
        run: takes them in.
        guider: asks for them; its conditionings tell which prediction is which.
        conditioning: the one with the prompt, where it is to be told what of it calls a copy up.
    """

    #: Whether some guard is asking the network: what it answers is no evaluation of a run, for none of several guards.
    asking = False

    def __init__(self, run: SamplerRun, guider: Any, conditioning: RunConditioning | None) -> None:
        self._run = run
        self._guider = guider
        self._conditioning = conditioning
        self._expected = False  # whether an evaluation has begun whose predictions were not seen yet
        self._evaluation_wrappers: list[Any] = []

    def __deepcopy__(self, memo: Any) -> Predictions:
        """Itself: whoever copies a run's options goes on with the same run."""
        return self

    def attach(self, options: dict[str, Any]) -> None:
        """Stands between network and guidance of whatever is sampled with ``options``, those of this run alone."""
        inner = options.get("sampler_calc_cond_batch_function", _calc_cond_batch)
        options["sampler_calc_cond_batch_function"] = functools.partial(self.together, inner)
        _wrappers(options, WrappersMP.CALC_COND_BATCH).append(self.around_batch)
        self._evaluation_wrappers = _wrappers(self._guider.model_options, WrappersMP.PREDICT_NOISE)
        self._evaluation_wrappers.append(self.around_evaluation)

    def detach(self) -> None:
        """Leaves the guider's options, which may outlive the run."""
        self._evaluation_wrappers.remove(self.around_evaluation)

    def around_evaluation(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A ``PREDICT_NOISE`` wrapper: an evaluation begins."""
        self._expected = True
        return executor(*args, **kwargs)

    def together(self, inner: Callable[..., Sequence[Tensor]], args: Mapping[str, Any]) -> Sequence[Tensor]:
        """A ``sampler_calc_cond_batch_function``, chained to the ``inner`` one."""
        if not Predictions.asking:
            self._expected = False

        def evaluate(conds: Sequence[Any], x: Tensor, sigma: Tensor) -> Sequence[Tensor]:
            return inner({**args, "conds": conds, "input": x, "sigma": sigma, "timestep": sigma})

        return self._judged(args["conds"], evaluate, args["input"], args["sigma"])

    def around_batch(
        self, executor: Any, model: Any, conds: Sequence[Any], x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any
    ) -> Sequence[Tensor]:
        """A ``CALC_COND_BATCH`` wrapper."""

        def evaluate(conds: Sequence[Any], x: Tensor, sigma: Tensor) -> Sequence[Tensor]:
            predictions: Sequence[Tensor] = executor(model, conds, x, sigma, *args, **kwargs)
            return predictions

        if self._expected and not Predictions.asking and self._place("positive", conds) is not None:
            self._expected = False
            return self._judged(conds, evaluate, x, sigma)
        return evaluate(conds, x, sigma)

    def _judged(
        self,
        conds: Sequence[Any],
        evaluate: Callable[[Sequence[Any], Tensor, Tensor], Sequence[Tensor]],
        x: Tensor,
        sigma: Tensor,
    ) -> Sequence[Tensor]:
        """The predictions for ``conds``, the one with the prompt replaced where it was corrected."""
        predictions = evaluate(conds, x, sigma)
        if Predictions.asking:
            return predictions
        try:
            place = self._place("positive", conds)
            if place is None or not _active(conds[place], sigma):
                return predictions
            without = next((p for name in _WITHOUT_PROMPT if (p := self._place(name, conds)) is not None), None)
            uncond = predictions[without] if without is not None and _active(conds[without], sigma) else None

            def asked(noise: Tensor | None, conds: Sequence[Any]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
                latent, level = (x, sigma) if noise is None else self._in_noise(noise, sigma)
                if not _active(conds[place], level):
                    raise ValueError("the prompt has no part in the image at the highest noise level")
                Predictions.asking = True
                try:
                    return latent, level, evaluate(conds, latent, level)
                except comfy.model_management.InterruptProcessingException:
                    # A question that fails ends no run: the sampler is to be told too.
                    comfy.model_management.interrupt_current_processing()
                    raise
                finally:
                    Predictions.asking = False

            def with_prompt(cond: Sequence[Any]) -> Sequence[Any]:
                return [cond if i == place else None for i in range(len(conds))]

            def ask(noise: Tensor | None, *, alone: bool = False) -> Answer:
                latent, level, found = asked(noise, with_prompt(conds[place]) if alone else conds)
                return latent, level, found[place], None if alone or without is None else found[without]

            def answer(noise: Tensor | None, other: Mapping[str, Any] | None) -> tuple[Tensor, Tensor, Tensor]:
                latent, level, found = asked(noise, conds if other is None else with_prompt([other]))
                return latent, level, found[place]

            prompts = None if self._conditioning is None else OtherPrompts(self._conditioning, len(x), answer)
            cond = self._run.predicted(x, sigma, predictions[place], uncond, ask=ask, prompts=prompts)
            if cond is predictions[place]:
                return predictions
            return [cond if i == place else prediction for i, prediction in enumerate(predictions)]
        except Exception as error:
            self._run.monitor.fail(error)
            return predictions

    def _in_noise(self, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The latent that is this noise at the model's highest noise level, and that level, in the form of ``sigma``."""
        sampling = self._guider.model_patcher.get_model_object("model_sampling")
        highest = torch.full_like(sigma, float(sampling.sigma_max))
        scale = highest.view(-1, *(1,) * (noise.ndim - 1))
        return sampling.noise_scaling(scale, noise, torch.zeros_like(noise), max_denoise=True), highest

    def _place(self, name: str, conds: Sequence[Any]) -> int | None:
        """Where in a batch the guider's own conditioning of this name stands."""
        own = self._guider.conds.get(name)
        return next((i for i, cond in enumerate(conds) if cond is own), None) if own is not None else None


def _wrappers(options: dict[str, Any], kind: str) -> list[Any]:
    """Our list among the wrappers of a kind."""
    wrappers: list[Any] = (
        options.setdefault("transformer_options", {}).setdefault("wrappers", {}).setdefault(kind, {}).setdefault(KEY, [])
    )
    return wrappers


def _calc_cond_batch(args: Mapping[str, Any]) -> Sequence[Tensor]:
    """What ComfyUI does without a ``sampler_calc_cond_batch_function``."""
    predictions: Sequence[Tensor] = comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
    return predictions


def _active(conditionings: Sequence[Mapping[str, Any]], sigma: Tensor) -> bool:
    """Whether any of them is in its time; otherwise what stands in place of the prediction are zeros."""
    if any("timestep_start" not in one and "timestep_end" not in one for one in conditionings):
        return True
    now = float(sigma[0])  # ComfyUI has just read it too
    return any(one.get("timestep_end", now) <= now <= one.get("timestep_start", now) for one in conditionings)
