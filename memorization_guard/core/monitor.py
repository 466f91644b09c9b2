"""The monitor: watches one sampling run step by step, and corrects it if it is asked to."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .detection import Detector, Judgement, Measures, Thresholds, Verdict, planned_angles
from .mitigation import correct, rescale, response, steer
from .noise_level import NoiseLevel, sample_norm, widened
from .profile import NORMS, ProfileCheck, RunSettings, StabilityProfile
from .reference import LOCAL_SHARE, STATISTICS, Region
from .trace import SUSPICIOUS, Trace, band_numbers, numbers

log = logging.getLogger(__name__)

# Rows of a step's measurements: the norms, then what guidance adds. Rows of the latent's patches follow.
_MEASURES = (*NORMS, "velocity", "guidance", "guidance_dot_uncond", "uncond", "guidance_dot_denoised")
_GUIDANCE = _MEASURES.index("guidance")

#: Why a run ended that was stopped.
STOPPED = "stopped, since every image of the batch had triggered"

#: The latent is looked at in at most this many patches a side.
PATCHES = 16


@dataclass(frozen=True)
class StepEvent:
    """What a live graph needs of one step; every list has one entry a sample of the batch.

    A score is ``None`` where nothing was scored; ``state`` is the verdict so far; a corrected norm is NaN where nothing was
    corrected. A step that comes again takes the place of the first one, and of all after it.
    """

    step: int
    sigma: float
    latent_norm: list[float]
    update_norm: list[float]
    denoised_norm: list[float]
    guidance_norm: list[float]
    update_score: list[float] | None
    denoised_score: list[float] | None
    tail: list[float] | None
    state: list[Verdict]
    mitigated: list[bool]
    corrected_latent_norm: list[float]
    corrected_update_norm: list[float]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping, some hundred bytes; ``null`` for what is no number."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in data.items():
            if name.endswith(("_norm", "_score", "tail")) and value is not None:
                data[name] = numbers(value)
        return data


@dataclass
class _Step:
    sigma: float
    end_angle: float
    measures: tuple[Tensor, ...]  # eight times, without guidance four times, [B] float32 on the latent's device
    patches: Tensor | None  # [B, height, width], mean square of x0 in each patch
    host: Tensor | None = None  # the same in host memory; on CUDA it is there once `arrived` has passed
    arrived: torch.cuda.Event | None = None


class StabilityMonitor:
    """Traces, judges and, on request, corrects one sampling run; knows no host.

    While it only traces, the device is never waited for: norms stay where they are computed and move once, at the end, or
    without blocking for live events. With ``mitigate`` a step waits for its own norms, some bytes, since whether to correct
    is decided from them. Whatever goes wrong inside is logged once and ends the watching, never the sampling.

    Args:
        profile: stability profile of the model; without one, and with one that does not fit ``settings``, the run is traced
            with the signals that need none, and left unscored and uncorrected.
        thresholds: constants of detection and mitigation.
        mitigate: whether to correct.
        stop: whether :attr:`should_stop` is to be known at every step, for a host that gives up runs that have triggered.
        on_step: called with a :class:`StepEvent` for every step, in order; on a GPU up to a few steps late.
        settings: what the run is made with, to be held against the profile and written into the traces.
    """

    def __init__(
        self,
        profile: StabilityProfile | None = None,
        thresholds: Thresholds | None = None,
        mitigate: bool = False,
        on_step: Callable[[StepEvent], None] | None = None,
        *,
        settings: RunSettings | None = None,
        stop: bool = False,
    ) -> None:
        self.profile = profile
        self.thresholds = thresholds or Thresholds()
        self.mitigate = mitigate
        self.stop = stop
        self.settings = settings or RunSettings()
        #: How the profile fits the settings, or ``None`` without a profile.
        self.check = profile.check(self.settings) if profile is not None else None
        #: What ended the watching early, if anything did.
        self.error: Exception | None = None
        self._on_step = on_step
        self._detector: Detector | None = None
        self._steps: list[_Step] = []
        self._pending: deque[_Step] = deque()  # steps not yet judged, oldest first
        self._norms: list[np.ndarray] = []  # [8 + patches, B] of every judged step
        self._judgements: list[Judgement | None] = []
        self._corrected: dict[int, np.ndarray] = {}  # step -> [2, B] latent and update norm, NaN where not corrected
        self._before: Detector | None = None  # the detector as it was before the last step, for retract()
        self._replaced: np.ndarray | None = None  # [B] bool, samples whose predictions are replaced in the step under way
        self._replaced_before: tuple[np.ndarray | None, Tensor | None] = (None, None)  # of the last step, for retract()
        self._given: Tensor | None = None  # the clean latent that the step under way is made with, if it is another
        #: Whether the sampler took other noise levels than its schedule's.
        self.off_schedule = False
        self._ended: str | None = None

    @torch.no_grad()
    def step(
        self,
        z_prev: Tensor,
        z_next: Tensor,
        x0: Tensor,
        *,
        sigma: float,
        x0_coefficient: float,
        eps_cond: Tensor | None = None,
        eps_uncond: Tensor | None = None,
        editable: bool = True,
    ) -> Tensor:
        """Takes in one solver step and returns the latent to go on with.

        Args:
            z_prev, z_next: latent before and after the step, ``[B, C, H, W]`` or ``[B, C, F, H, W]``, VP scale, any dtype.
            x0: clean latent that the network predicted at this step, after guidance, same shape.
            sigma: noise level before the step, in the model's own convention (see :class:`RunSettings`).
            x0_coefficient: coefficient of x0 in ``z_next``, ``sqrt(abar_{i+1})``.
            eps_cond, eps_uncond: noise predictions with and without the prompt, where guidance computed both.
            editable: whether the sampler would go on with a changed latent; :meth:`corrected_prediction` is the other way.

        Returns:
            ``z_next`` itself where nothing was corrected; otherwise a new tensor, in which samples that were not corrected
            are bit-identical.
        """
        if self.error is not None:
            return z_next
        try:
            return self._step(z_prev, z_next, x0, float(sigma), float(x0_coefficient), eps_cond, eps_uncond, editable)
        except Exception as error:
            self.fail(error)
            return z_next

    def _step(
        self,
        z_prev: Tensor,
        z_next: Tensor,
        x0: Tensor,
        sigma: float,
        x0_coefficient: float,
        eps_cond: Tensor | None,
        eps_uncond: Tensor | None,
        editable: bool,
    ) -> Tensor:
        level = NoiseLevel.from_model(sigma, self.settings.prediction_type)
        replaced, given = self._replaced_before = self._replaced, self._given
        self._replaced = self._given = None
        proposed = z_next
        if given is not None:
            # What the step would have been with the network's own prediction, to first order.
            proposed = widened(z_next) + response(level, x0_coefficient) * (widened(x0) - given)
        end_angle = math.acos(min(1.0, max(0.0, x0_coefficient)))
        step = _Step(sigma, end_angle, _measure(level, z_prev, proposed, x0, eps_cond, eps_uncond), _patches(x0))
        if self._steps and len(self._steps[0].measures[0]) != len(step.measures[0]):
            raise ValueError(
                f"the batch went from {len(self._steps[0].measures[0])} to {len(step.measures[0])} samples within a "
                "run: use one monitor a run"
            )
        self._steps.append(step)
        self._pending.append(step)
        if not self.corrects:
            if self.stop and self._scores:
                self._judge_all()
                self._emit(len(self._steps) - 1)
            elif self._on_step is not None:
                _send_to_host(step)
                self._judge_arrived()
            return z_next

        self._judge_all()
        judgement = self._judgements[-1]
        if replaced is not None:
            index = torch.as_tensor(np.flatnonzero(replaced), device=z_next.device)
            self._note_corrected(replaced, z_prev[index], z_next[index])
        if editable and judgement is not None and judgement.correct.any():
            z_next = self._corrected_latent(judgement, z_prev, z_next, x0, x0_coefficient, eps_cond, eps_uncond, replaced)
        self._emit(len(self._steps) - 1)
        return z_next

    @torch.no_grad()
    def corrected_prediction(
        self,
        x0: Tensor,
        x0_cond: Tensor | None = None,
        x0_uncond: Tensor | None = None,
        *,
        begins: bool = True,
        editable: bool = True,
    ) -> Tensor:
        """The clean latent that the step under way is to be made with, for hosts that can give the sampler another one.

        From a trigger on, and until both norms are back inside, samples get the prediction of the steering guidance (ours):
        exact for every solver, noise and history included, where moving the latent afterwards supposes a first-order step.
        Where there is no guidance to steer by and the latent cannot be changed either, x0 is rescaled to its reference norm.

        Args:
            x0: clean latent that the network predicted, after guidance, ``[B, ...]``.
            x0_cond, x0_uncond: its predictions with and without the prompt.
            begins: whether this is the first evaluation of its step; further ones follow what was decided there.
            editable: as for :meth:`step`.

        Returns:
            ``x0`` itself where nothing is corrected.
        """
        if self.error is not None or not self.corrects:
            return x0
        try:
            guidance = self.thresholds.steering_guidance
            steering = guidance is not None and x0_cond is not None and x0_uncond is not None
            if begins:
                judgement = self._judgements[-1] if self._judgements else None
                self._given = self._replaced = None
                if judgement is not None and (steering or not editable):
                    self._replaced = judgement.steer if steering else judgement.correct
            if self._replaced is None or not self._replaced.any():
                self._replaced = None
                return x0
            index = torch.as_tensor(np.flatnonzero(self._replaced), device=x0.device)
            if guidance is not None and x0_cond is not None and x0_uncond is not None:
                wanted = torch.lerp(x0_uncond[index].float(), x0_cond[index].float(), guidance)
            else:
                assert self.profile is not None
                row = min((self.profile.find(self._steps[-1].sigma) or 0) + 1, self.profile.steps - 1)
                wanted = rescale(x0[index].float(), float(self.profile.mean[row, NORMS.index("denoised")]))
            given = x0.index_copy(0, index, wanted.to(x0.dtype))
            if begins:
                self._given = given
            return given
        except Exception as error:
            self.fail(error)
            return x0

    def retract(self) -> None:
        """Takes the last step back: it turned out that the sampler only tried it. Not while steps wait to be judged."""
        if self.error is not None or not self.corrects:
            return
        for taken in (self._steps, self._norms, self._judgements):
            taken.pop()
        self._corrected.pop(len(self._steps), None)
        self._detector = self._before
        self._replaced, self._given = self._replaced_before

    @property
    def corrects(self) -> bool:
        """Whether this run is corrected, and every step judged at once."""
        return self.mitigate and self._scores

    @property
    def should_stop(self) -> bool:
        """Whether every image of the batch has triggered, so that the rest of the run will not change what is known."""
        if not self.stop or self.error is not None or self._detector is None:
            return False
        return bool((self._detector.trigger_step >= 0).all())

    @property
    def _scores(self) -> bool:
        if self.check is None or not self.check.valid:
            return False
        return self._region is not None or (self.check.exact and not self.off_schedule)

    @cached_property
    def _region(self) -> Region | None:
        """Where the profile's reference runs are in this run; ``None`` where the published rule decides, or nothing can."""
        if self.profile is None or self.check is None or not self.check.valid:
            return None
        if self.profile.reference is None or self.thresholds.published:
            return None
        angles = None if self.check.exact else planned_angles(self.settings)
        return self.profile.reference.region(angles, self.settings.guidance_scale)

    @property
    def steps(self) -> int:
        """Number of steps taken so far."""
        return len(self._steps)

    def outline(self) -> dict[str, Any]:
        """What is known before the first step, JSON-ready, for a live graph: planned ``steps`` and ``bands`` (as in a trace,
        of all steps to come), ``thresholds``, ``mitigation``, ``note`` and ``reference_count``."""
        bands = self._planned_bands()
        return {
            "steps": self.settings.steps,
            "bands": band_numbers(_named(bands)) if bands else {},
            "thresholds": self.thresholds.to_dict(),
            "mitigation": self.mitigate,
            "note": self._note(),
            "reference_count": self.profile.count if self.profile is not None and bands else None,
        }

    def _planned_bands(self) -> list[np.ndarray]:
        """Mean and standard deviation ``[2, 3]`` of every planned step, as far as they are known."""
        if not self._scores or self.settings.sigmas is None:
            return []
        assert self.profile is not None
        assert self.check is not None
        bands: list[np.ndarray] = []
        if self.check.exact:
            row = None
            for step, sigma in enumerate(self.settings.sigmas):
                if (row := self.profile.next_row(row, sigma, step)) is None:
                    break
                bands.append(np.stack([self.profile.mean[row], self.profile.std[row]]))
        elif self._region is not None:
            bands = [np.stack(self._region.bands(*pair)) for pair in pairwise(self._region.angles)]
        return bands

    def _corrected_latent(
        self,
        judgement: Judgement,
        z_prev: Tensor,
        z_next: Tensor,
        x0: Tensor,
        x0_coefficient: float,
        eps_cond: Tensor | None,
        eps_uncond: Tensor | None,
        replaced: np.ndarray | None,
    ) -> Tensor:
        assert self.profile is not None
        chosen = np.flatnonzero(judgement.correct)
        index = torch.as_tensor(chosen, device=z_next.device)
        before = z_prev[index]
        steered = None
        if (guidance := self.thresholds.steering_guidance) is not None and eps_cond is not None and eps_uncond is not None:
            level = NoiseLevel.from_model(self._steps[-1].sigma, self.settings.prediction_type)
            # At pure noise, where flow models begin, noise predictions say nothing of x0: the published step has to do.
            if level.alpha > 0.01:
                steered = steer(
                    before,
                    z_next[index],
                    x0[index],
                    eps_cond[index],
                    eps_uncond[index],
                    level=level,
                    x0_coefficient=x0_coefficient,
                    guidance=guidance,
                )
        if replaced is not None:
            # Where the step was made with another prediction already, it only has to lie in its region.
            made = torch.as_tensor(replaced[chosen], device=z_next.device).view(-1, *(1,) * (z_next.ndim - 1))
            steered = z_next[index] if steered is None else torch.where(made, z_next[index].float(), steered)
        after = correct(
            before,
            z_next[index],
            x0[index],
            x0_coefficient=x0_coefficient,
            x0_norm=float(judgement.bands[0, NORMS.index("denoised")]),
            bounds=judgement.bounds(self.thresholds.gamma),
            strong=torch.as_tensor(judgement.strong[chosen], device=z_next.device),
            steered=steered,
        )
        self._note_corrected(judgement.correct, before, after)
        return z_next.index_copy(0, index, after)

    def _note_corrected(self, samples: np.ndarray, before: Tensor, after: Tensor) -> None:
        """``samples`` ``[B]`` bool of the last step were corrected; the latents are theirs alone."""
        norms = np.full((2, len(samples)), np.nan)
        norms[:, samples] = torch.stack([sample_norm(after), sample_norm(widened(after) - before)]).cpu().numpy()
        # A step can be corrected in both ways; then the latent is what came out last.
        step = len(self._steps) - 1
        earlier = self._corrected.get(step, np.full_like(norms, np.nan))
        self._corrected[step] = np.where(np.isfinite(norms), norms, earlier)

    def _judge_all(self) -> None:
        """Judges every step taken so far, waiting for the device."""
        if not self._pending:
            return
        block = _block(self._pending).cpu().numpy()
        for measures in block:
            self._judge(self._pending.popleft(), measures)

    def _judge_arrived(self) -> None:
        """Judges the steps whose norms have reached host memory, in order, without waiting for any."""
        while self._pending:
            step = self._pending[0]
            if step.host is None or not (step.arrived is None or step.arrived.query()):
                return
            self._judge(self._pending.popleft(), step.host.numpy())
            self._emit(len(self._norms) - 1)

    def _judge(self, step: _Step, measures: np.ndarray) -> None:
        if self._scores and self._detector is None:
            assert self.profile is not None
            assert self.check is not None
            self._detector = Detector(
                self.profile,
                self.thresholds,
                measures.shape[1],
                region=self._region,
                prediction_type=self.settings.prediction_type,
                exact=self.check.exact and not self.off_schedule,
            )
        if self._detector is not None and self.corrects:
            self._before = self._detector.copy()
        self._norms.append(measures)
        steering = len(step.measures) == len(_MEASURES) and not self.thresholds.published
        judgement = None
        if self._detector is not None:
            signals = np.stack([measures[3], measures[2], measures[_GUIDANCE], _local_norm(measures)])
            judgement = self._detector.judge(
                step.sigma, step.end_angle, Measures(measures[: len(NORMS)], signals), steering=steering
            )
        self._judgements.append(judgement)

    def _emit(self, index: int) -> None:
        if self._on_step is None:
            return
        norms, judgement = self._norms[index], self._judgements[index]
        batch = norms.shape[1]
        corrected = self._corrected.get(index, np.full((2, batch), np.nan))
        event = StepEvent(
            step=index,
            sigma=self._steps[index].sigma,
            **{f"{name}_norm": norms[_MEASURES.index(name)].tolist() for name in (*NORMS, "guidance")},
            update_score=judgement.update_score.tolist() if judgement else None,
            denoised_score=judgement.denoised_score.tolist() if judgement else None,
            tail=judgement.tail.tolist() if judgement else None,
            state=judgement.state if judgement else ["unscored"] * batch,
            mitigated=np.isfinite(corrected[0]).tolist(),
            corrected_latent_norm=corrected[0].tolist(),
            corrected_update_norm=corrected[1].tolist(),
        )
        try:
            self._on_step(event)
        except Exception:
            log.warning("Memorization Guard: the live view failed and is switched off for this run.", exc_info=True)
            self._on_step = None

    def fail(self, error: Exception) -> None:
        """Ends the watching of this run because of ``error``, and says so once; sampling goes on."""
        self.error = error
        log.warning("Memorization Guard stopped watching this run; the image is not affected: %s", error, exc_info=True)

    def leave_schedule(self) -> None:
        """The sampler takes other noise levels than the settings say: bands, which are of one schedule, do not hold."""
        self.off_schedule = True
        if not self._scores:
            self._detector = None
            self._judgements = [None] * len(self._judgements)

    def end(self, reason: str) -> None:
        """Says why the run came to no regular end (interrupted, an error of the host); without a trigger it is unscored."""
        self._ended = reason

    @property
    def traces(self) -> list[Trace]:
        """One trace a sample, in batch order, of the steps so far; empty before the first.

        Waits for the device and sends the live events that are still due, so read it once the run is over.
        """
        # A log of runs keeps their numbers, not their latents.
        self._given, self._replaced_before = None, (None, None)
        try:
            due = len(self._norms)
            self._judge_all()
            for index in range(due, len(self._norms)):
                self._emit(index)
        except Exception as error:
            self.fail(error)
        if not self._norms:
            return []
        measures = np.stack(self._norms).astype(np.float64)  # [steps, 8 + patches, B]
        return [self._trace(measures[:, :, sample], sample) for sample in range(measures.shape[2])]

    def _trace(self, measures: np.ndarray, sample: int) -> Trace:
        latent, update, denoised, velocity, guidance, dot, uncond, denoised_dot = measures[:, : len(_MEASURES)].T
        patches = _patch_logs(measures)
        with np.errstate(divide="ignore", invalid="ignore"):
            alignment = np.clip(dot / (guidance * uncond), -1.0, 1.0)
            denoised_alignment = np.clip(denoised_dot / (guidance * denoised), -1.0, 1.0)
        broken = np.flatnonzero(~np.isfinite(measures[:, : len(NORMS)]).all(axis=1))
        corrected = np.full((2, len(measures)), np.nan)
        for step, norms in self._corrected.items():
            corrected[:, step] = norms[:, sample]
        trace = Trace(
            nonfinite_step=int(broken[0]) if len(broken) else None,
            note=self._note(),
            sigma=np.array([step.sigma for step in self._steps[: len(measures)]]),
            latent_norm=latent,
            update_norm=update,
            denoised_norm=denoised,
            update_score=np.full(len(measures), np.nan),
            denoised_score=np.full(len(measures), np.nan),
            tail=np.full(len(measures), np.nan),
            joint_deviation=np.full(len(measures), np.nan),
            guidance_deviation=np.full(len(measures), np.nan),
            local_deviation=np.full(len(measures), np.nan),
            velocity_norm=velocity,
            local_norm=_local_norm(measures.T).T,
            guidance_norm=guidance,
            uncond_norm=uncond,
            alignment=alignment,
            denoised_alignment=denoised_alignment,
            patch_mean=patches.mean(axis=1) if patches.shape[1] else np.full(len(measures), np.nan),
            patch_std=patches.std(axis=1) if patches.shape[1] else np.full(len(measures), np.nan),
            corrected_latent_norm=corrected[0],
            corrected_update_norm=corrected[1],
            settings=self.settings,
            thresholds=self.thresholds,
            mitigation=self.mitigate,
        )
        if self._detector is not None:
            self._add_scores(trace, self._detector, sample)
            self._add_map(trace, self._detector, patches)
        elif (settled := trace.uncalibrated_score) is not None and settled > SUSPICIOUS:
            hint = (
                f"The prompt alone had settled much of the image while it was still noise ({settled:.2f}; {SUSPICIOUS} and "
                "more is suspicious): it may be memorized. Calibrate a profile to know."
            )
            trace.note = hint if trace.note is None else f"{trace.note} {hint}"
        return trace

    def _add_map(self, trace: Trace, detector: Detector, patches: np.ndarray) -> None:
        step = self._steps[0]
        if step.patches is None or not np.isfinite(trace.local_deviation).any():
            return
        worst = int(np.nanargmax(trace.local_deviation))
        mean, std = detector.patch_region(self._steps[worst].sigma)
        trace.local_map = ((patches[worst] - mean) / std).reshape(step.patches.shape[1:])

    def _add_scores(self, trace: Trace, detector: Detector, sample: int) -> None:
        profile = detector.profile
        for step, judgement in enumerate(self._judgements):
            if judgement is not None:
                trace.update_score[step] = judgement.update_score[sample]
                trace.denoised_score[step] = judgement.denoised_score[sample]
                trace.tail[step] = judgement.tail[sample]
                for name, values in zip(STATISTICS, judgement.statistics, strict=True):
                    getattr(trace, f"{name}_deviation")[step] = values[sample]
        trigger = int(detector.trigger_step[sample])
        # What was not watched to its end cannot be called stable.
        cut_short = self.error is not None or self._ended is not None
        trace.verdict = "unscored" if cut_short and trigger < 0 else detector.verdict(sample)
        trace.trigger_step = trigger if trigger >= 0 else None
        nothing = np.full((2, len(NORMS)), np.nan)
        trace.bands = _named([nothing if judgement is None else judgement.bands for judgement in self._judgements])
        trace.reference_count = profile.count

    def _note(self) -> str | None:
        if self.error is not None:
            return f"Watching ended early: {self.error}"
        if self._ended is not None:
            return f"The run ended early: {self._ended}"
        if self.off_schedule and not self._scores:
            return "The sampler keeps to no fixed schedule: the run is traced, and cannot be scored with any profile."
        if self._detector is not None and self._detector.off_schedule is not None:
            return f"The run is not scored: {self._detector.off_schedule}. Calibrate a profile with the run's own schedule."
        if self.check is None or self.check == ProfileCheck():
            return None
        if self.check.valid and not self._scores:
            return f"The published method holds for one sampler and schedule ({'; '.join(map(str, self.check.carried))})."
        return str(self.check)


def _named(bands: Sequence[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Bands ``[2, 3]`` of steps as a trace has them."""
    stacked = np.stack(bands)
    return {name: {"mean": stacked[:, 0, i], "std": stacked[:, 1, i]} for i, name in enumerate(NORMS)}


def _measure(
    level: NoiseLevel, z_prev: Tensor, z_next: Tensor, x0: Tensor, eps_cond: Tensor | None, eps_uncond: Tensor | None
) -> tuple[Tensor, ...]:
    """The measurements of one step, each ``[B]`` float32 on the latent's device; only the norms without guidance."""
    # widened() copies nothing for float32; half precision would round the small difference of two large numbers.
    # v = (alpha z - x0) / beta.
    velocity = sample_norm(torch.sub(widened(x0), z_prev, alpha=level.alpha)) / max(level.beta, 1e-6)
    norms = sample_norm(z_next), sample_norm(widened(z_next) - z_prev), sample_norm(x0), velocity
    if eps_cond is None or eps_uncond is None:
        return norms
    direction = widened(eps_cond) - eps_uncond
    guidance = sample_norm(direction)
    denoised_dot = (direction * x0).flatten(1).sum(1, dtype=torch.float32)
    dot = direction.mul_(eps_uncond).flatten(1).sum(1, dtype=torch.float32)  # its own memory, which vecdot would ask for anew
    return *norms, guidance, dot, sample_norm(eps_uncond), denoised_dot


def _patches(x0: Tensor) -> Tensor | None:
    """Mean square of x0 in every patch, ``[B, height, width]`` float32, at most 16 a side of at least 2 x 2; over all channels
    and frames. ``None`` for latents without places (Flux packs its into a sequence)."""
    if x0.ndim not in (4, 5):
        return None
    squares = widened(x0).square().mean(dim=tuple(range(1, x0.ndim - 2)))
    height, width = (min(PATCHES, max(1, side // 2)) for side in squares.shape[1:])
    return torch.nn.functional.adaptive_avg_pool2d(squares[:, None], (height, width))[:, 0].float()


def _patch_logs(measures: np.ndarray) -> np.ndarray:
    """Logarithms of the patches' root mean squares out of measurements ``[..., 8 + patches]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 0.5 * np.log(measures[..., len(_MEASURES) :])


def _local_norm(measures: np.ndarray) -> np.ndarray:
    """Geometric mean over the largest quarter of patches, ``[...]``, of measurements ``[8 + patches, ...]``; NaN without."""
    logs = _patch_logs(np.moveaxis(measures, 0, -1))
    count = logs.shape[-1]
    if count < 1 / LOCAL_SHARE:
        return np.full(logs.shape[:-1], np.nan)
    first = count - round(count * LOCAL_SHARE)
    return np.exp(np.partition(logs, first, axis=-1)[..., first:].mean(axis=-1))


def _block(steps: Collection[_Step]) -> Tensor:
    """The measurements of ``steps`` as one tensor, ``[N, 8 + patches, B]``, NaN where there was no guidance."""
    missing = torch.full_like(next(iter(steps)).measures[0], torch.nan)
    rows = [row for step in steps for row in (*step.measures, *[missing] * (len(_MEASURES) - len(step.measures)))]
    block = torch.stack(rows).view(len(steps), len(_MEASURES), -1)
    patches = [step.patches.flatten(1).T for step in steps if step.patches is not None]
    return torch.cat([block, torch.stack(patches)], dim=1) if patches else block


def _send_to_host(step: _Step) -> None:
    measures = _block([step])[0]
    if not measures.is_cuda:
        step.host = measures.cpu()
        return
    step.host = torch.empty(measures.shape, dtype=torch.float32, pin_memory=True)
    step.host.copy_(measures, non_blocking=True)
    step.arrived = torch.cuda.Event()
    step.arrived.record()
