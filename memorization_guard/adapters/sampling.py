"""One run of a diffusers pipeline: from the calls of its network and scheduler to a monitor, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.asking import Answer
from ..core.monitor import STOPPED, StabilityMonitor
from ..core.noise_level import NoiseLevel
from ..core.settings import RunSettings
from ..files import shown_name
from ..fingerprint import fingerprint
from .network import Call, Evaluation, Network, answer, called_with, denoisers, number_of
from .prompts import OtherPrompts
from .schedule import check_hands_out_steps

#: Makes the monitor of a run, from its settings and from what its noise levels are called.
NewMonitor = Callable[[RunSettings, Callable[[float], NoiseLevel] | None], StabilityMonitor]


class Sampling:
    """What is known of a run, which begins when the pipeline sets its timesteps.

    Between two calls of the scheduler's ``step`` lies one evaluation: a call of the network with both halves in one batch, or
    one call with the prompt and then one without. Further calls (perturbed attention, skipped layers) are guidance's own.

    Args:
        pipe: the pipeline. new_monitor: makes the monitor, once the settings are known.
        encoded: what the pipeline's ``encode_prompt`` was called with before the run, and gave: the arguments of
            :class:`~memorization_guard.adapters.prompts.Encoded`.

    Attributes:
        monitor: ``None`` before the first evaluation.
    """

    def __init__(self, pipe: Any, new_monitor: NewMonitor, encoded: tuple[Any, ...] | None) -> None:
        self._pipe, self._new_monitor, self._encoded = pipe, new_monitor, encoded
        self._prompts: OtherPrompts | None = None
        self.monitor: StabilityMonitor | None = None
        self._network: Network | None = None
        self._steps = 0  # calls of the scheduler's step
        self._pending: tuple[Evaluation, Call] | None = None  # waits for its second half
        self._evaluated: Evaluation | None = None  # the next step is made from it
        self._start: tuple[Tensor, Tensor] | None = None  # latent and guided x0 at the beginning of a solver step
        self._result: Tensor | None = None  # the latest latent that the scheduler made
        self._timestep: Any = None  # the latest one that the network was given
        self._failure: Exception | None = None
        self._stopped = False

    @property
    def failure(self) -> Exception | None:
        """What ended the watching of this run, if anything did."""
        return self._failure if self.monitor is None else self.monitor.error

    def fail(self, error: Exception) -> None:
        """Ends the watching of this run; the image goes on without it."""
        self._failure = error
        if self.monitor is not None:
            self.monitor.fail(error)

    def calling(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """The network is about to be called; gives the arguments that it is called with."""
        return keywords if self._prompts is None or self.failure is not None else self._prompts.chosen(keywords)

    def called(self, module: torch.nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
        """The network was called, and has answered."""
        if self.failure is not None or self._evaluated is not None:
            return
        if self._network is not None and self._steps >= len(self._network.schedule):
            return
        x, timestep = called_with(arguments, keywords)
        network, call = self._network, Call(module, arguments, keywords, answer(output))
        prompt = keywords.get("encoder_hidden_states")
        if network is None:
            network = self._network = Network(self._pipe, keywords, number_of(timestep))
        evaluation = network.read(self._steps, x, call.output)
        if self._pending is not None and evaluation.uncond is None:
            first, its_call = self._pending
            if prompt is None or prompt is not its_call.keywords.get("encoder_hidden_states"):
                evaluation = Evaluation(first.number, first.x, first.cond, evaluation.cond, first.coefficients)
                self._judge(evaluation, its_call, call)
            return
        # On another device, the first and the last one are looked at: nothing waits for those between.
        self._timestep = timestep
        on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if on_host and not network.schedule.is_at(self._steps, number_of(timestep)):
            raise ValueError(f"the network is given timestep {number_of(timestep):g} out of the scheduler's order")
        if evaluation.uncond is None and network.guided is not False:
            self._pending = evaluation, call
        else:
            self._judge(evaluation, call)

    def _judge(self, evaluation: Evaluation, *calls: Call) -> None:
        """Hands an evaluation over, which was one call of the network, or one with the prompt and one without."""
        network = self._network
        assert network is not None
        if self.monitor is None:
            schedule = network.schedule
            # The number of an evaluation is this host's name of its noise level; that of the highest is below 0.
            monitor = self._new_monitor(
                self._settings(network, evaluation),
                lambda number: schedule.levels[int(number)] if number >= 0 else schedule.in_noise()[1],
            )
            if monitor.thresholds.method == "published":
                check_hands_out_steps(self._pipe.scheduler)
            self.monitor = monitor
        cond = evaluation.denoised(evaluation.cond)
        uncond = None if evaluation.uncond is None else evaluation.denoised(evaluation.uncond)

        def ask(noise: Tensor | None, *, alone: bool = False) -> Answer:
            found = [network.asked(call, noise, alone=alone) for call in (calls[:1] if alone else calls)]
            without = found[0].uncond if len(found) == 1 else found[1].cond
            denoised = found[0].denoised
            return found[0].x, -1.0, denoised(found[0].cond), None if without is None else denoised(without)

        if not self.monitor.evaluations:
            self._prompts = None if self._encoded is None else OtherPrompts(self._encoded, network, calls[0])
        given = self.monitor.predicted(evaluation.x, float(evaluation.number), cond, uncond, ask=ask, prompts=self._prompts)
        if given is not cond:
            evaluation.replace(cond, given)
        if self.monitor.thresholds.method == "reference" and network.schedule.begins(evaluation.number):
            self.monitor.latent(evaluation.x, network.schedule.levels[evaluation.number], evaluated=True)
        self._pending, self._evaluated = None, evaluation

    def before_step(self, guided: Tensor, sample: Tensor) -> None:
        """The scheduler is about to step from ``sample``, with the prediction that guidance has made."""
        if self.failure is not None:
            return
        if self._pending is not None:
            self._judge(*self._pending)  # there was one prediction only
        evaluation = self._evaluated
        if evaluation is None or self._network is None:
            raise ValueError("the scheduler takes a step that no evaluation of the network was seen for")
        if sample.numel() != evaluation.x.numel():
            shapes = f"{tuple(evaluation.x.shape)} and {tuple(sample.shape)}"
            raise ValueError(f"the network is not given the latent that the scheduler steps from ({shapes})")
        # Waits for the device, once a run. Some pipelines turn the prediction round, so that x0 is not what it seems.
        if not self._steps and _along(guided, evaluation) * self._network.schedule.output_sign < 0:
            raise ValueError("this pipeline does not hand its network's prediction to the scheduler as it is")

    def after_step(self, guided: Tensor, sample: Tensor, proposed: Tensor) -> Tensor:
        """The scheduler has stepped from ``sample`` to ``proposed``; gives the latent to go on with."""
        monitor, network, evaluation = self.monitor, self._network, self._evaluated
        self._evaluated = None
        self._steps += 1
        if self._failure is not None and monitor is None:
            self.monitor = monitor = self._new_monitor(RunSettings(), None)
            monitor.latent(sample, NoiseLevel(1.0, 0.0), evaluated=False)  # for the number of images
            monitor.fail(self._failure)
        if monitor is None or network is None or evaluation is None or monitor.error is not None:
            return proposed
        schedule, number = network.schedule, evaluation.number
        changed = proposed
        if monitor.thresholds.method == "published":
            if schedule.begins(number):
                self._start = sample, evaluation.denoised(guided)
            if self._completes(number) and self._start is not None:
                latent, denoised = self._start
                start = schedule.levels[max(k for k in range(number + 1) if schedule.begins(k))]
                changed = monitor.step(latent, proposed, denoised, start=start, end=schedule.after(number))
        self._result = changed
        if monitor.should_stop and not self._stopped:
            self._stopped = True
            self._pipe._interrupt = True
            return monitor.withheld(evaluation.denoised(guided).to(proposed.dtype))
        return monitor.withheld(changed) if self._steps == len(schedule) else changed

    def _completes(self, number: int) -> bool:
        assert self._network is not None
        return number + 1 == len(self._network.schedule) or self._network.schedule.begins(number + 1)

    def end(self) -> None:
        """There is nothing more to come, as far as is known: the last latent, and whether the run is whole."""
        monitor, network, result = self.monitor, self._network, self._result
        if monitor is None or network is None or monitor.error is not None:
            return
        self._result = None
        planned = len(network.schedule)
        if result is not None and monitor.thresholds.method == "reference" and self._completes(self._steps - 1):
            monitor.latent(result, network.schedule.after(self._steps - 1), evaluated=False)
        early = f"{self._steps} of {planned} evaluations were made" if self._steps < planned else None
        monitor.end(STOPPED if self._stopped else early)
        if early is None and self._timestep is not None and not network.schedule.is_at(planned - 1, number_of(self._timestep)):
            self.fail(ValueError("the network was given timesteps out of the scheduler's order"))
        self._timestep = None

    def _settings(self, network: Network, evaluation: Evaluation) -> RunSettings:
        pipe, scheduler = self._pipe, self._pipe.scheduler
        config = scheduler.config
        flags = ("karras", "exponential", "beta", "lu_lambdas")
        spacing = [str(config.get("timestep_spacing", ""))]
        spacing += [flag for flag in flags if config.get(f"use_{flag}_sigmas") or config.get(f"use_{flag}")]
        sampler = type(scheduler).__name__.removesuffix("Scheduler")
        if algorithm := config.get("algorithm_type"):
            sampler += f" {algorithm} order {config.get('solver_order')}"
        scale = getattr(pipe, "guidance_scale", None)
        if network.embeds_guidance:
            sampler += f", guidance {scale} embedded"
        if network.guided is False or (network.guided is None and evaluation.uncond is None):
            scale = 1.0
        elif network.guided is None:
            scale = None  # of two calls that the pipeline mixes at a scale it keeps to itself
        *sigmas, end = network.schedule.sigmas
        return RunSettings(
            model=shown_name(str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)),
            model_hash=fingerprint(denoisers(pipe)[0]),
            prediction_type=network.schedule.prediction_type,
            sampler=sampler,
            scheduler=" ".join(filter(None, spacing)) or None,
            steps=len(sigmas),
            guidance_scale=None if scale is None else float(scale),
            latent_shape=tuple(evaluation.x.shape[1:]),
            sigmas=tuple(sigmas),
            end_sigma=end,
        )


def _along(guided: Tensor, evaluation: Evaluation) -> float:
    """How much of the network's own predictions a guided one holds, together: 1 whatever the guidance scale, negative where
    it was turned round. 1 where they cannot be compared."""
    parts = [part for part in (evaluation.cond, evaluation.uncond) if part is not None]
    if any(part.numel() != guided.numel() for part in parts):
        return 1.0
    basis = torch.stack([part.flatten().float() for part in parts], dim=1)
    gram = basis.T @ basis
    # Two predictions that are nearly the same share what there is.
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(parts), device=gram.device)
    return float(torch.linalg.solve(gram, basis.T @ guided.flatten().float()).sum())
