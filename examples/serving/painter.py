"""Samples requests, a few at a time and each with a guard and pipeline of its own; a few more may wait."""

import io
import logging
import queue
import secrets
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from memorization_guard import GuardError, StabilityProfile, Thresholds, Trace
from memorization_guard.diffusers import copy_sharing_weights, guard
from memorization_guard.pipelines import load_pipeline, quiet_libraries

from .metrics import Metrics
from .settings import MODES, ImageRequest, Outcome, Settings, SettingsError

log = logging.getLogger("serving")


@dataclass(frozen=True)
class Painted:
    """The result of a request. ``png`` is empty where the image must not leave the server."""

    outcome: Outcome
    trace: Trace
    seed: int
    png: bytes = b""

    def headers(self) -> dict[str, str]:
        """The verdict as response headers. A number that there is not has no header."""
        trace = self.trace
        numbers = {
            "Score": trace.score,
            "P-Value": trace.p_value,
            "Trigger-Step": trace.trigger_step,
            "Corrected-Steps": int(trace.mitigated.sum()),
        }
        given = {f"X-Memorization-{name}": f"{value:.7g}" for name, value in numbers.items() if value is not None}
        words = {"X-Memorization-Verdict": trace.verdict, "X-Memorization-Outcome": self.outcome}
        return words | given | {"X-Seed": str(self.seed)}


class BusyError(Exception):
    """As many requests as may wait are waiting."""


class Painter:
    """Samples requests on one set of weights, ``settings.concurrency`` at a time, each with a guard and pipeline of its own.

    Raises:
        SettingsError: if the model cannot be served by these settings. One image is sampled to find out.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        if problem := settings.problem():
            raise SettingsError(problem)
        try:
            self._thresholds = Thresholds(**settings.thresholds)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"thresholds: {error}") from None
        path = settings.profile_path
        try:
            self._profile = StabilityProfile.load(path) if path is not None else None
            quiet_libraries()  # diffusers prints the words of a prompt that it cuts off
            pipe = load_pipeline(settings.model, device=settings.device, dtype=settings.dtype)
            pipes = [copy_sharing_weights(pipe) for _ in range(settings.concurrency)]
        except (GuardError, OSError, TypeError) as error:
            raise SettingsError(str(error)) from error
        upcasts = hasattr(pipe, "upcast_vae") and pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
        if upcasts and settings.concurrency > 1:
            raise SettingsError(
                "this pipeline casts its shared autoencoder to float32 and back whenever it decodes, which disturbs images "
                "that are sampled at the same time: set concurrency to 1, or dtype to bfloat16 or float32"
            )
        self._pipes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for pipe in pipes:
            self._pipes.put(pipe)
        self._pool = ThreadPoolExecutor(settings.concurrency, "sampling")
        self._places = threading.BoundedSemaphore(settings.concurrency + settings.queue)
        #: How long the last image took.
        self.seconds = self._try()

    def _try(self) -> float:
        try:
            trace, _, seconds, _ = self._sample(ImageRequest(prompt="a photograph"), seed=0)
        except Exception as error:
            raise SettingsError(f"{self.settings.model} cannot be sampled: {type(error).__name__}: {error}") from error
        if self._profile is not None and trace.verdict == "unscored":
            raise SettingsError(f"no image could be scored with the profile: {trace.note or 'the log says why'}")
        return seconds

    def submit(self, request: ImageRequest) -> "Future[Painted | None]":
        """Puts a request into the queue. The result is ``None`` where sampling failed; the log says why.

        Raises:
            BusyError: if the queue is full.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError
        self._metrics.admitted.inc()
        try:
            future = self._pool.submit(self._paint, request)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(lambda _: self._leave())
        return future

    def _leave(self) -> None:
        self._metrics.admitted.dec()
        self._places.release()

    def close(self) -> None:
        """Waits for the images that are being sampled, and drops the requests that wait."""
        self._pool.shutdown(cancel_futures=True)

    def _paint(self, request: ImageRequest) -> Painted | None:
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        try:
            trace, image, seconds, overhead = self._sample(request, seed)
            self.seconds = seconds
            metrics = self._metrics
            metrics.sampling.observe(seconds)
            metrics.overhead.observe(overhead)
            metrics.verdicts.labels(trace.verdict).inc()
            metrics.corrected_images.inc(bool(trace.mitigated.any()))
            metrics.corrected_steps.inc(int(trace.mitigated.sum()))
            outcome = self.settings.policy.decide(trace)
            if outcome == "refused":
                return Painted(outcome, trace, seed)
            file = io.BytesIO()
            image.save(file, "PNG")
            return Painted(outcome, trace, seed, file.getvalue())
        except Exception as error:
            # The log has the place but not the message, in which a library may quote the prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("sampling failed with %s at\n%s", type(error).__name__, where)
            return None

    def _sample(self, request: ImageRequest, seed: int) -> tuple[Trace, Any, float, float]:
        """Trace, image, the seconds that sampling took, and those of the guard, during sampling and after it."""
        settings = self.settings
        pipe = self._pipes.get()
        try:
            begun = time.perf_counter()
            with guard(pipe, self._profile, MODES[settings.policy.triggered], self._thresholds) as run:
                image = pipe(
                    request.prompt,
                    num_inference_steps=settings.steps if request.steps is None else request.steps,
                    guidance_scale=settings.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
            sampled = time.perf_counter()
        finally:
            self._pipes.put(pipe)
        # If the guard failed, the log says why, and the image is unscored.
        trace = next(iter(run.traces), Trace(note="The run could not be watched."))
        return trace, image, sampled - begun, run.overhead_seconds + time.perf_counter() - sampled
