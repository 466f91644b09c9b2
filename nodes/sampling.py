"""ComfyUI's sampling, put in the core's terms: its runs in, traces and live events out."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.hooks
import comfy.model_sampling
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..memorization_guard import RunSettings, StabilityMonitor, StabilityProfile, StepEvent, Thresholds, Trace
from ..memorization_guard.adapters.kdiffusion import SamplerWatch, sampler_name, watched
from ..memorization_guard.core.noise_level import NoiseLevel
from ..memorization_guard.fingerprint import content_hash, fingerprint

log = logging.getLogger(__name__)

EVENT = "memorization_guard"

MODES = ("off", "trace", "mitigate", "stop")

# What these samplers hand to the model is not what they go on with; every other sampler of ComfyUI is asked (kdiffusion.py).
_KEEP_ANOTHER_LATENT = ("lcm", "sa_solver", "sa_solver_pece")


@dataclass(frozen=True)
class Run:
    """One run of a sampler: the node that ran it, in which prompt, and out of what (see :func:`lineage`)."""

    name: str
    sampler_node: str
    prompt_id: str
    made_from: str | None
    monitor: StabilityMonitor

    @property
    def traces(self) -> list[Trace]:
        """One trace an image; a sampler that reports no steps leaves none."""
        return self.monitor.traces


@dataclass
class TraceLog:
    """The runs that a guard saw: what its TRACE output carries.

    It is filled while the sampler runs, after the guard's own node is done. ComfyUI keeps it as long as the guard's node is
    cached, so it holds runs of earlier prompts too, of which some are still what the samplers' cached results came from.
    """

    mode: str
    _runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)

    def begin(self, monitor: StabilityMonitor) -> Run:
        """Enters the run that is about to begin."""
        context = get_executing_context()
        prompt_id, node, index = (context.prompt_id, context.node_id, context.list_index or 0) if context else ("", "", 0)
        # Some nodes sample many times in one execution (tiles, detailers): those belong together, and take the place of
        # what the same node did in an earlier prompt.
        runs = [run for run in self._runs.pop((node, index), []) if run.prompt_id == prompt_id]
        prompt = _running_prompt(prompt_id)
        made_from = lineage(prompt.get, node)[1] if prompt is not None else None
        run = Run(f"{prompt_id}:{node}:{index}:{len(runs)}", node, prompt_id, made_from, monitor)
        self._runs[node, index] = [*runs, run]
        return run

    def runs(self) -> list[Run]:
        """The runs in order."""
        return [run for runs in self._runs.values() for run in runs]

    def runs_behind(self, get_node: Callable[[str], Mapping[str, Any] | None], nodes: Iterable[str]) -> list[Run]:
        """The runs that ``nodes`` and what stands before them rest on, in the prompt that ``get_node`` gives nodes of.

        A run of an earlier prompt counts if its sampler's node is made from the same as it was then: otherwise the number has
        gone to another node, or the node to another model.
        """
        context = get_executing_context()
        before = set().union(*(lineage(get_node, node)[0] for node in nodes))
        found = []
        for run in self.runs():
            if run.sampler_node in before:
                now = context is not None and run.prompt_id == context.prompt_id
                if now or (run.made_from is not None and run.made_from == lineage(get_node, run.sampler_node)[1]):
                    found.append(run)
        return found


def lineage(get_node: Callable[[str], Mapping[str, Any] | None], node: str) -> tuple[set[str], str]:
    """A node and all before it in a prompt, and a hash of their types, inputs and links."""
    found: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found or (content := get_node(current)) is None:
            continue
        found[current] = (content["class_type"], content["inputs"])
        waiting += [str(link[0]) for link in content["inputs"].values() if isinstance(link, list) and len(link) == 2]
    return set(found), content_hash(found)


def _running_prompt(prompt_id: str) -> Mapping[str, Any] | None:
    """The prompt as it was queued; nodes that other nodes expand into are not in it."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    items = queue.currently_running.values() if queue is not None else ()
    return next((item[2] for item in items if item[1] == prompt_id), None)


def guard(
    model: ModelPatcher,
    *,
    mode: str,
    profile: StabilityProfile | None = None,
    thresholds: Thresholds | None = None,
    node: str | None = None,
) -> tuple[ModelPatcher, TraceLog]:
    """A clone of ``model`` whose runs are watched, and where they are logged; ``model`` itself is left as it is.

    Args:
        mode: one of :data:`MODES`.
        node: id of the node that live events are for; without one, none are sent.
    """
    traces = TraceLog(mode)
    if mode == "off":
        return model, traces
    guarded = model.clone()
    watcher = _Guard(traces, profile, thresholds or Thresholds(), node)
    guarded.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, EVENT, watcher.around_sampler)
    guarded.set_model_sampler_post_cfg_function(watcher.after_guidance)
    return guarded, traces


def is_guarded(model: ModelPatcher) -> bool:
    """Whether ``model`` came out of :func:`guard`."""
    return bool(model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, EVENT))


class _Guard:
    """What a guarded model carries: the wrapper around a sampler, and the look at its guidance."""

    def __init__(self, traces: TraceLog, profile: StabilityProfile | None, thresholds: Thresholds, node: str | None) -> None:
        self._traces = traces
        self._profile = profile
        self._thresholds = thresholds
        self._node = node
        self._watch: SamplerWatch | None = None  # of the run under way
        self._run: Run | None = None

    def around_sampler(self, executor: Any, guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sampler = executor.class_obj
        function = getattr(sampler, "sampler_function", None)
        if function is None:
            log.warning("Memorization Guard cannot watch %s: it is no KSAMPLER.", type(sampler).__name__)
            return executor(guider, sigmas, *args, **kwargs)
        outer = self._watch, self._run
        self._watch = self._run = None
        sampler.sampler_function = watched(function, functools.partial(self._begin, guider, sampler))
        try:
            return executor(guider, sigmas, *args, **kwargs)
        finally:
            sampler.sampler_function = function
            self._end()
            self._watch, self._run = outer

    def after_guidance(self, args: Mapping[str, Any]) -> torch.Tensor:
        # At cfg 1 there is no unconditional prediction; what stands in its place are zeros.
        if self._watch is not None and args.get("uncond") is not None and args.get("uncond_denoised") is not None:
            self._watch.saw_guidance(args["cond_denoised"], args["uncond_denoised"], args["input"])
        return args["denoised"]

    def _begin(self, guider: Any, sampler: Any, x: torch.Tensor, sigmas: torch.Tensor, **_: Any) -> SamplerWatch | None:
        try:
            level = _levels(guider.model_patcher.get_model_object("model_sampling"), sigmas)
            settings = _settings(guider, sampler, x, [level(sigma) for sigma in sigmas.tolist()])
            monitor = StabilityMonitor(
                self._profile,
                self._thresholds,
                self._traces.mode == "mitigate",
                self._on_step(),
                settings=settings,
                stop=self._traces.mode == "stop",
            )
            editable = _sampler_name(sampler).split("(")[0] not in _KEEP_ANOTHER_LATENT
            watch = SamplerWatch(monitor, sigmas, level, editable=editable)
            self._run = self._traces.begin(monitor)
            if monitor.check is not None and monitor.check.invalid:
                log.warning("Memorization Guard: %s", monitor.check)
            self._watch = watch
            self._send("begin", **monitor.outline())
        except Exception:
            log.warning("Memorization Guard does not watch this run; the image is not affected.", exc_info=True)
        return self._watch

    def _end(self) -> None:
        if self._run is None or self._node is None:
            return
        try:
            self._send("end", traces=[trace.to_dict() for trace in self._run.traces])
        except Exception:
            log.warning("Memorization Guard could not send the graph of this run.", exc_info=True)

    def _on_step(self) -> Callable[[StepEvent], None] | None:
        return None if self._node is None else lambda event: self._send("step", **event.to_dict())

    def _send(self, kind: str, **data: Any) -> None:
        if self._node is None or self._run is None or (server := PromptServer.instance).client_id is None:
            return
        server.send_sync(EVENT, {"kind": kind, "node": self._node, "run": self._run.name, **data}, server.client_id)


def _levels(model_sampling: Any, sigmas: torch.Tensor) -> Callable[[float], NoiseLevel]:
    """Coefficients of a latent at the model's own noise level, for whatever kind of model; those of ``sigmas`` beforehand."""

    def levels(at: torch.Tensor) -> list[NoiseLevel]:
        zeros, ones = torch.zeros_like(at), torch.ones_like(at)
        # Some scale the noise in place.
        signal = model_sampling.noise_scaling(at, zeros.clone(), ones.clone())
        noise = model_sampling.noise_scaling(at, ones, zeros)
        return [NoiseLevel(*pair) for pair in zip(signal.tolist(), noise.tolist(), strict=True)]

    known = dict(zip(sigmas.tolist(), levels(sigmas.double().cpu()), strict=True))

    def level(sigma: float) -> NoiseLevel:
        if sigma not in known:
            known[sigma] = levels(torch.tensor([sigma], dtype=torch.float64))[0]
        return known[sigma]

    return level


def _settings(guider: Any, sampler: Any, x: torch.Tensor, levels: list[NoiseLevel]) -> RunSettings:
    patcher = guider.model_patcher
    kind = _prediction_type(patcher.get_model_object("model_sampling"))
    *sigmas, end = (level.model_sigma(kind) for level in levels)
    # A guider that mixes predictions in its own way may leave `cfg` at its default.
    own_way = type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise
    cfg = None if own_way and guider.cfg == 1.0 else guider.cfg
    # Hooks change the weights in the middle of a run, for some of its conditionings: no fingerprint stands for that.
    hooked = any(_changes_weights(cond) for conds in guider.conds.values() for cond in conds)
    return RunSettings(
        model=type(patcher.model.model_config).__name__ + (" with hooks" if hooked else ""),
        model_hash=None if hooked else model_hash(patcher),
        prediction_type=kind,
        sampler=_sampler_name(sampler),
        steps=len(sigmas),
        guidance_scale=None if cfg is None else float(cfg),
        latent_shape=tuple(x.shape[1:]),
        sigmas=tuple(sigmas),
        end_sigma=end,
    )


def _changes_weights(conditioning: Mapping[str, Any]) -> bool:
    group = conditioning.get("hooks")
    return group is not None and any(hook.hook_type == comfy.hooks.EnumHookType.Weight for hook in group.hooks)


def _prediction_type(model_sampling: Any) -> str:
    kinds = {
        comfy.model_sampling.CONST: "flow_prediction",
        comfy.model_sampling.X0: "sample",
        comfy.model_sampling.V_PREDICTION: "v_prediction",
        comfy.model_sampling.EPS: "epsilon",
    }
    return next((name for kind, name in kinds.items() if isinstance(model_sampling, kind)), type(model_sampling).__name__)


def _sampler_name(sampler: Any) -> str:
    """As the KSampler's list has it, with the options that a sampler node sets: ``euler_ancestral(eta=0.5)``."""
    name = getattr(sampler.sampler_function, "__name__", type(sampler).__name__)
    return sampler_name(name.removesuffix("_function"), sampler.extra_options)


_hashes: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def model_hash(patcher: ModelPatcher) -> str | None:
    """Fingerprint of the denoiser's own weights and of what is patched onto them, wherever either is loaded right now."""
    known = _hashes.setdefault(patcher.model, {})
    if patcher.patches_uuid not in known:
        weights = {}
        for name, weight in patcher.model.diffusion_model.state_dict().items():
            key = f"diffusion_model.{name}"
            weights[key] = patcher.backup[key].weight if key in patcher.backup else weight
        for key, patches in patcher.patches.items():
            # A patch is (strength, value, strength of the model's own weight, offset, function).
            for number, (strength, value, model_strength, *_) in enumerate(patches):
                # A fingerprint looks at signs: the bits of the strengths as such.
                bits = np.unpackbits(np.array([strength, model_strength], dtype=np.float64).view(np.uint8))
                weights[f"{key}.{number}.strengths"] = torch.from_numpy(bits.astype(np.float32) - 0.5)
                for part, tensor in enumerate(_tensors(value)):
                    weights[f"{key}.{number}.{part}"] = tensor
        try:
            known[patcher.patches_uuid] = fingerprint(weights)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            # Weights in a packed form that only their own loader can read.
            log.info("Memorization Guard: the weights have no fingerprint (%s); profiles are not held against them.", error)
            known[patcher.patches_uuid] = None
    return known[patcher.patches_uuid]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
