"""The monitor: takes in what one sampling run shows, has it judged, and gives what is to go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import asking, steering
from .asking import Ask, Prompts
from .noise_level import NoiseLevel, row_norm, sample_norm, widened
from .profile import ProfileCheck, StabilityProfile
from .reference import OPEN_SIGMA
from .run import Run, Step, StepEvent
from .settings import USUAL_GUIDANCE, Mode, RunSettings, Serves, Thresholds
from .signals import Arrival, Measurement, Meter
from .trace import Trace

log = logging.getLogger(__name__)

#: Why a run ended that was stopped.
STOPPED = "stopped, since every image of the batch had triggered"


class StabilityMonitor:
    """Judges and, on request, corrects the predictions of one sampling run, and traces its solver steps; knows no host.

    A host hands every pair of raw predictions to :meth:`predicted` before guidance mixes them, and goes on with what it gives.
    It hands the latents between solver steps to :meth:`latent`, read only: they are drawn and stored, and decide nothing.

    While it only traces, the device is never waited for: some numbers a step stay where they are computed and move once, at
    the end, or without blocking for live events. In modes ``mitigate`` and ``stop`` an evaluation waits for its own numbers,
    since what follows is decided from them. Whatever goes wrong inside is logged once and ends the watching, never the
    sampling.

    Args:
        profile: stability profile of the model; without one, and with one that does not fit ``settings``, the run is traced
            with the signals that need none, and left unscored and uncorrected.
        thresholds: method and constants.
        mode: what is to be done; see :data:`~memorization_guard.core.settings.Mode`.
        on_step: called with a :class:`StepEvent` for every solver step, in order; on a GPU up to a few steps late.
        settings: what the run is made with, to be held against the profile and written into the traces.
        level: the noise level that the host's own number stands for; by default that of the settings' prediction type.
        serves: what the run is for, if for no image: see :data:`~memorization_guard.core.settings.Serves`.
        missing: why there is no profile, and what to do: sentences for the note of a run that should have one.
    """

    def __init__(
        self,
        profile: StabilityProfile | None = None,
        thresholds: Thresholds | None = None,
        mode: Mode = "trace",
        on_step: Callable[[StepEvent], None] | None = None,
        *,
        settings: RunSettings | None = None,
        level: Callable[[float], NoiseLevel] | None = None,
        serves: Serves | None = None,
        missing: str | None = None,
    ) -> None:
        settings = settings or RunSettings()
        level = level or (lambda sigma: NoiseLevel.from_model(sigma, settings.prediction_type))
        self._run = Run(profile, thresholds or Thresholds(), mode, settings, level, missing)
        self._at_once = mode in ("mitigate", "stop") and self._run.judges
        self._on_step = on_step
        self._serves = serves
        self._emitted = 0
        self._meter = Meter()
        self._evaluated: tuple[Tensor, Tensor] | None = None  # the last latent that was evaluated, and its norm
        self._without: Tensor | None = None  # what the network answers without the prompt
        self._kept = np.zeros(0, dtype=bool)  # samples [B] that go on with another prompt
        self._waiting: list[Measurement] = []  # not yet judged, oldest first
        self._arrivals: list[Arrival] = []  # of the same, where they are sent one by one
        self._latent: tuple[Tensor, NoiseLevel, int] | None = None  # the last one, and the evaluation that starts from it

    @property
    def settings(self) -> RunSettings:
        return self._run.settings

    @property
    def thresholds(self) -> Thresholds:
        return self._run.thresholds

    @property
    def mode(self) -> Mode:
        return self._run.mode

    @property
    def check(self) -> ProfileCheck | None:
        """How the profile fits the settings, or ``None`` without a profile."""
        return self._run.check

    @property
    def error(self) -> Exception | None:
        """What ended the watching early, if anything did."""
        return self._run.error

    @property
    def judges(self) -> bool:
        """Whether this run is judged at all."""
        return self._run.judges

    @property
    def settled(self) -> np.ndarray:
        """Samples ``[B]`` that the network need not be asked about, as far as ``traces`` has judged them."""
        return self._run.judge.settled

    @property
    def steps(self) -> int:
        """Number of solver steps so far."""
        return len(self._run.steps)

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far."""
        return self._run.taken

    @property
    def should_stop(self) -> bool:
        """Whether the mode is ``stop`` and every image of the batch has triggered: the rest of the run changes nothing."""
        if self._serves not in (None, "whole"):
            return self.evaluations > 0
        triggers = self._run.triggers
        return self.mode == "stop" and self.error is None and len(triggers) > 0 and bool((triggers >= 0).all())

    @torch.no_grad()
    def withheld(self, latent: Tensor) -> Tensor:
        """What a run hands on: in mode ``stop``, zeros for samples that have triggered, which decode to a plain picture.

        Args:
            latent: clean latents ``[B, ...]`` at the end of the run, or as predicted where it was stopped.

        Returns:
            ``latent`` itself in other modes, and where nothing has triggered; other samples are bit-identical.
        """
        triggered = self._run.triggers >= 0
        if self.mode != "stop" or not triggered.any():
            return latent
        if len(triggered) != len(latent):
            return torch.zeros_like(latent)  # which of them triggered is not known
        keeps = torch.from_numpy(~triggered).to(latent.device).view(-1, *(1,) * (latent.ndim - 1))
        return torch.where(keeps, latent, torch.zeros_like(latent))

    @torch.no_grad()
    def predicted(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Tensor,
        uncond: Tensor | None = None,
        *,
        ask: Ask | None = None,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Takes in one evaluation of the network, and gives the conditional prediction to go on with.

        Args:
            x: the latent that was evaluated, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or ``[B, ...]``, as the host holds it.
            sigma: the host's own noise level, ``[B]`` or one number.
            cond, uncond: clean latents predicted with and without the prompt, before guidance, of any dtype; ``uncond`` is
                ``None`` where the host computed none.
            ask: has the network evaluate another latent with the same prompts, of the references' size: twice at a run's
                beginning, where the first evaluation is suspicious, not in noise (image to image, a second pass), of another
                size, or one prediction only; and then ``x`` once more. Without it the last three are not judged.
            prompts: has it evaluate other prompts, to tell the words that call a copy up, and to go on without them.

        Returns:
            ``cond`` itself where nothing is corrected; otherwise a new tensor, in which samples that are not corrected are
            bit-identical.
        """
        if self.error is not None:
            return cond
        try:
            run = self._run
            self._check_batch(len(x))
            if not run.taken:
                self._kept = np.zeros(len(x), dtype=bool)
            detail = not run.taken or self._serves is not None
            measurement = self._meter.measure(x, sigma, cond, uncond, run.scale, detail=detail)
            self._evaluated = x, measurement.latent
            self._waiting.append(measurement)
            run.taken += 1
            if run.taken == 1 and ask is not None and self._serves != "glance" and (run.reference is not None or self._serves):
                self._judge_all()  # waits for the device, once a run
                if self._serves in ("whole", "first") or run.judge.wants_to_ask:
                    self._ask(x, ask)
                if prompts is not None and self._serves != "verdict" and run.judge.tells_words:
                    cond = self._look_at_words(x, cond, ask, prompts)
            if not self._at_once or run.reference is None:
                if self._on_step is not None and x.is_cuda:
                    self._arrivals.append(Arrival(measurement.block()))
                return cond
            self._judge_all()
            steers = run.judge.to_correct() & ~self._kept
            if self.mode == "mitigate" and (corrected := steers | self._kept).any():
                run.judge.corrects(corrected)
                return self._steered(cond, uncond, steers) if steers.any() else cond
            return cond
        except Exception as error:
            self.fail(error)
            return cond

    def _steered(self, cond: Tensor, uncond: Tensor | None, chosen: np.ndarray) -> Tensor:
        """``cond`` with the chosen samples led away from it."""
        run, scale = self._run, self.settings.guidance_scale
        if uncond is None and run.judge.evaluations[-1].level.sigma > OPEN_SIGMA:
            # The host leaves it out early; in noise it is nearly the same for every latent.
            uncond, scale = self._without, 1.0
        if uncond is None:
            return steering.rescaled(cond, chosen, run.usual_norm())
        # At a scale of almost 0 the prompt has no part in the image.
        usable = USUAL_GUIDANCE if scale is None else scale if abs(scale) > 0.1 else 1.0
        return steering.steered(cond, uncond, chosen, guidance_scale=usable, target=self.thresholds.steering_guidance)

    def _ask(self, like: Tensor, ask: Ask) -> None:
        """Judges the run by what its prompts say in noise.

        The noise has the size of the references, whatever the run's is. The prediction without the prompt has no part in it,
        so that a negative prompt has none, and a host may leave it out.
        """
        try:
            noise = asking.noise(self._run.reference_shape or like.shape[1:], like)
            with asking.undisturbed(like.device):
                # Without an image to make, one prediction is enough, at half the cost. A compiler may want the run's batches.
                every, alone = noise.expand(len(like), *noise.shape), self._serves is not None
                x, sigma, cond, uncond = asking.answered(ask, every, alone=alone)
                if not alone:
                    # What notes what the network saw last, as self-attention guidance does, is to note the run's own latent.
                    ask(None)
            self._without = uncond if noise.shape == like.shape[1:] else None
            meter, judge, scale = Meter(), self._run.judge, self._run.scale
            judge.take_in_asked(meter.measure(x, sigma, cond, None, scale))
            if judge.shows_asked:
                judge.show(meter.measure(x, sigma, cond, uncond, scale))
        except Exception as error:
            log.warning("Memorization Guard cannot judge this run; the image is not affected: %s", error, exc_info=error)
            self._run.unasked = f"{type(error).__name__}: {error}"

    def _look_at_words(self, x: Tensor, cond: Tensor, ask: Ask, prompts: Prompts) -> Tensor:
        """Tells the words that call up what has triggered, and if that is wanted has the run go on without them; gives the
        conditional predictions to go on with."""
        run, judge = self._run, self._run.judge
        noise = asking.noise(run.reference_shape or x.shape[1:], x)
        triggered = np.flatnonzero(judge.trigger >= 0).tolist()
        without = None
        with asking.undisturbed(x.device):
            try:
                run.words = asking.words_of(triggered, prompts, noise, run.scale, judge, run.settings.model_hash)
                if run.words and self.mode == "mitigate" and self.thresholds.correction == "keep":
                    without = prompts.go_on({sample: words.text for sample, words in run.words.items()})
            except Exception as error:
                log.warning("Memorization Guard cannot tell the words of this prompt: %s", error, exc_info=error)
            if without is None:
                ask(None)  # as after any question: what the network saw last is the run's own latent
                return cond
        run.words = {sample: replace(words, left_out=True) for sample, words in run.words.items()}
        self._kept[list(run.words)] = True
        kept = torch.from_numpy(self._kept).to(cond.device).view(-1, *(1,) * (cond.ndim - 1))
        return torch.where(kept, without.to(cond.dtype), cond)

    @torch.no_grad()
    def latent(self, x: Tensor, level: NoiseLevel, *, evaluated: bool) -> None:
        """Takes in the next latent of the sampler; every one but the first ends a solver step. It is kept until the next one.

        Args:
            x: the latent, as the host holds it.
            level: its noise level.
            evaluated: whether the prediction made from it was taken in already.
        """
        if self.error is not None:
            return
        try:
            self._check_batch(len(x))
            evaluation = max(self._run.taken - 1, 0) if evaluated else self._run.taken
            before, self._latent = self._latent, (x, level, evaluation)
            if before is None:
                return
            previous, start, first = before
            now, known = widened(x), self._evaluated
            norm = known[1] if known is not None and known[0] is x else row_norm(now.flatten(1))
            # z' - z = (x' - x scale' / scale) / scale'
            difference = torch.sub(now, widened(previous), alpha=level.scale / start.scale)
            update = row_norm(difference.flatten(1))
            step = Step(start, level, first, max(first, evaluation - 1), norm, update, level.scale)
            self._run.steps.append(step)
            self._emit_arrived()
        except Exception as error:
            self.fail(error)

    @torch.no_grad()
    def step(self, z_prev: Tensor, z_next: Tensor, x0: Tensor, *, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """Takes in one solver step for the published method, in place of :meth:`latent`, and gives the latent to go on with.

        Args:
            z_prev, z_next: latent before and after the step on the VP scale, ``[B, ...]``, any dtype.
            x0: clean latent predicted at its start, after guidance.
            start, end: their noise levels.

        Returns:
            ``z_next`` itself where nothing is corrected; otherwise a new tensor, in which samples that are not corrected are
            bit-identical.
        """
        if self.error is not None:
            return z_next
        try:
            run = self._run
            self._check_batch(len(z_prev))
            update = sample_norm(widened(z_next) - widened(z_prev))
            first, last = run.steps[-1].last + 1 if run.steps else 0, max(run.taken - 1, 0)
            step = Step(start, end, min(first, last), last, sample_norm(z_next), update, 1.0, sample_norm(x0))
            run.steps.append(step)
            if self._at_once:
                run.judge_steps()
                if self.mode == "mitigate" and run.detector is not None and step.judgement is not None:
                    z_next = run.detector.corrected(step.judgement, z_prev, z_next, x0, end.alpha)
            self._emit_arrived()
            return z_next
        except Exception as error:
            self.fail(error)
            return z_next

    def fail(self, error: Exception) -> None:
        """Ends the watching of this run because of ``error``, and says so once; sampling goes on."""
        self._run.error = error
        log.warning("Memorization Guard stopped watching this run; the image is not affected: %s", error, exc_info=error)

    def end(self, reason: str | None) -> None:
        """Says why the run came to no regular end (interrupted, an error of the host); without a trigger it is unscored.
        ``None`` if it did after all. A run of which one evaluation is needed ends regularly where it is stopped."""
        self._run.ended = None if self._serves is not None and reason == STOPPED else reason

    def outline(self) -> dict[str, Any]:
        """What is known before the first step, JSON-ready, for a live graph: planned ``steps`` and ``bands`` (as in a trace,
        for the planned steps), ``thresholds``, ``reference_count``, ``p_value_floor``, ``mode`` and ``note``."""
        return self._run.outline()

    @property
    def traces(self) -> list[Trace]:
        """One trace a sample, in batch order, of the run so far; empty before its first evaluation or step.

        Waits for the device and sends the live events that are still due, so read it once the run is over.
        """
        self._latent = self._evaluated = self._without = None  # a log of runs keeps their numbers, not their latents
        self._meter = Meter()
        try:
            self._judge_all()
            self._run.judge_steps()
            self._emit(len(self._run.steps))
        except Exception as error:
            self.fail(error)
        return self._run.traces()

    def _check_batch(self, batch: int) -> None:
        if self._run.batch not in (0, batch):
            raise ValueError(f"the batch went from {self._run.batch} to {batch} samples within a run: use one monitor a run")
        self._run.batch = batch

    def _judge_all(self) -> None:
        """Judges every evaluation so far, waiting for the device."""
        waiting, self._waiting = self._waiting, []
        arrivals, self._arrivals = self._arrivals, []
        if not waiting:
            return
        blocks = [arrival.numpy() for arrival in arrivals]
        if len(arrivals) < len(waiting):
            rows = [measurement.block() for measurement in waiting]  # the first is longer, by its patches
            ends = np.cumsum([len(block) for block in rows])[:-1]
            blocks = np.split(torch.cat(rows).cpu().numpy(), ends)
        for measurement, block in zip(waiting, blocks, strict=True):
            self._run.judge.take_in(measurement, block)

    def _emit_arrived(self) -> None:
        """Judges what has reached host memory, and sends the events that are known by then, without waiting for anything."""
        if self._on_step is None:
            return
        arrived = 0
        while arrived < len(self._arrivals) and self._arrivals[arrived].arrived:
            arrived += 1
        later = self._waiting[arrived:], self._arrivals[arrived:]
        if self._arrivals:
            self._waiting, self._arrivals = self._waiting[:arrived], self._arrivals[:arrived]
        self._judge_all()
        if later[1]:
            self._waiting, self._arrivals = later
        judged = len(self._run.judge.evaluations)
        self._emit(sum(step.last < judged for step in self._run.steps))

    def _emit(self, count: int) -> None:
        """Sends the events of the first ``count`` steps that were not sent yet."""
        while self._on_step is not None and self._emitted < count:
            try:
                self._on_step(self._run.event(self._emitted))
            except Exception:
                log.warning("Memorization Guard: the live view failed and is switched off for this run.", exc_info=True)
                self._on_step = None
            self._emitted += 1
