"""A guarded diffusers pipeline as a web service: one guard a request, the verdict in the response's headers.

    pip install ".[serve]"
    python examples/serving.py [settings.json] [--host 127.0.0.1] [--port 8000]

Without a settings file it serves the small model that comes with Memorization Guard. ``docs/serving.md`` describes settings,
answers and metrics.
"""

import argparse
import asyncio
import base64
import io
import logging
import math
import queue
import secrets
import threading
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memorization_guard import GuardError, Mode, StabilityProfile, Thresholds, Trace
from memorization_guard.core.settings import TRIGGERED, VERDICTS
from memorization_guard.core.trace import STATEMENT
from memorization_guard.diffusers import copy_sharing_weights, guard
from memorization_guard.lab import PROFILE as LAB_PROFILE
from memorization_guard.pipelines import load_pipeline, quiet_libraries

log = logging.getLogger("serving")

Action = Literal["allow", "mitigate", "refuse"]
Outcome = Literal["served", "mitigated", "refused", "failed", "turned_away", "abandoned"]

#: How the guard of a run works for each action. An image that would be refused need not be sampled to its end.
MODES: dict[Action, Mode] = {"allow": "trace", "mitigate": "mitigate", "refuse": "stop"}

#: Seconds between two checks whether the client of a waiting request is still there.
LOOK = 0.5


class SettingsError(GuardError):
    """Settings that the service cannot run with."""


class Policy(BaseModel):
    """What is done with an image that triggered, and with one that could not be scored. A stable image is always served.

    ``mitigate`` steers the run away from the copy and serves the image. If no step was steered, or if the run was not watched
    to its end, the image is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    triggered: Action = "mitigate"
    unscored: Literal["allow", "refuse"] = "allow"

    def decide(self, trace: Trace) -> Outcome:
        """What becomes of the image of a run."""
        if trace.verdict == "stable":
            return "served"
        action = self.triggered if trace.verdict in TRIGGERED else self.unscored
        if action == "mitigate":
            return "mitigated" if trace.mitigated.any() and len(trace.steps) == trace.settings.steps else "refused"
        return "served" if action == "allow" else "refused"


class Settings(BaseModel):
    """What the service runs with. Unknown names are refused, so that a misspelt one is not silently without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = "lab"  #: "lab", a diffusers folder, or a .safetensors checkpoint
    profile: str | None = None  #: stability profile of the model; "lab" brings its own
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    concurrency: int = Field(default=2, ge=1, le=64)  #: images sampled at the same time
    queue: int = Field(default=8, ge=0, le=10_000)  #: requests that wait beside those; further ones are turned away
    steps: int = Field(default=50, ge=1)  #: where a request names none
    max_steps: int = Field(default=100, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0, allow_inf_nan=False)  #: where a request names none
    max_guidance_scale: float = Field(default=12.0, ge=0, allow_inf_nan=False)
    max_prompt: int = Field(default=1000, ge=1)  #: characters
    policy: Policy = Policy()
    thresholds: dict[str, Any] = {}  #: fields of memorization_guard.Thresholds whose value is not the default

    @property
    def profile_path(self) -> str | Path | None:
        return LAB_PROFILE if self.profile is None and self.model == "lab" else self.profile

    def problem(self) -> str | None:
        """Why the settings contradict each other, and what to do; ``None`` if they do not."""
        if self.profile_path is None and self.policy != Policy(triggered="allow", unscored="allow"):
            return (
                "profile: without one every image is unscored, and this policy never takes effect or refuses everything; make "
                "one with 'memorization-guard calibrate', or set triggered and unscored to allow"
            )
        if self.steps > self.max_steps or self.guidance_scale > self.max_guidance_scale:
            return "steps or guidance_scale is above its own maximum: lower it, or raise max_steps or max_guidance_scale"
        return None


def read_settings(path: str | Path) -> Settings:
    """Reads a JSON file of settings.

    Raises:
        SettingsError: if there is no such file, or a setting is unknown or out of range.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    try:
        return Settings.model_validate_json(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: {_problems(error.errors())}") from None


def _problems(errors: Any) -> str:
    """Validation errors in one line, without what was sent: that could be a prompt."""
    return "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in errors)


class ImageRequest(BaseModel):
    """What a client may ask for, within the limits of the settings. The size is fixed, since a profile holds for one size."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    def beyond(self, settings: Settings) -> str | None:
        """The limit of the settings that the request exceeds, as a sentence."""
        if len(self.prompt) > settings.max_prompt:
            return f"prompt: at most {settings.max_prompt} characters"
        if self.steps is not None and self.steps > settings.max_steps:
            return f"steps: at most {settings.max_steps}"
        if self.guidance_scale is not None and self.guidance_scale > settings.max_guidance_scale:
            return f"guidance_scale: at most {settings.max_guidance_scale:g}"
        return None


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


class Metrics:
    """The metrics for Prometheus. Labels are words from short lists; nothing that a client sends becomes a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = "memorization_guard", self.registry
        self.requests = Counter(f"{name}_requests", "Requests by what came of them.", ["outcome"], registry=registry)
        self.verdicts = Counter(f"{name}_verdicts", "Sampled images by verdict.", ["verdict"], registry=registry)
        self.corrected_images = Counter(f"{name}_corrected_images", "Sampled images that were steered.", registry=registry)
        self.corrected_steps = Counter(f"{name}_corrected_steps", "Sampler steps that were steered.", registry=registry)
        self.admitted = Gauge(f"{name}_admitted", "Requests that are being sampled or wait.", registry=registry)
        self.sampling = Histogram(
            f"{name}_sampling_seconds",
            "From prompt to image, waiting not counted.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100),
            registry=registry,
        )
        self.overhead = Histogram(
            f"{name}_overhead_seconds",
            "Part of sampling_seconds in which the guard's own code ran, and the time to make the trace.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 10),
            registry=registry,
        )
        # A rate of something that never happened is then 0 instead of absent.
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)
        for verdict in VERDICTS:
            self.verdicts.labels(verdict)


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


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service, ready to answer: model and profile are loaded and tried here.

    Raises:
        SettingsError: if it cannot run with these settings.
    """
    metrics = Metrics()
    painter = Painter(settings or Settings(), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        painter.close()

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="Memorization Guard", docs_url=None, redoc_url=None, lifespan=lifespan)

    def answer(outcome: Outcome, response: Response) -> Response:
        metrics.requests.labels(outcome).inc()
        return response

    @app.exception_handler(RequestValidationError)
    async def bad_input(_: Request, error: RequestValidationError) -> Response:
        return _problem(400, "invalid", _problems(error.errors()))

    @app.post("/images")
    async def images(body: ImageRequest, request: Request) -> Response:
        if problem := body.beyond(painter.settings):
            return _problem(400, "invalid", problem)
        try:
            future = painter.submit(body)
        except BusyError:
            seconds = str(math.ceil(painter.seconds))
            message = "too many requests are waiting"
            return answer("turned_away", _problem(503, "busy", message, headers={"Retry-After": seconds}))
        result = asyncio.wrap_future(future)
        while not result.done():
            await asyncio.wait({result}, timeout=LOOK)
            if not result.done() and await request.is_disconnected():
                future.cancel()  # does not end an image that is already being sampled
                return answer("abandoned", Response(status_code=499))
        painted = result.result()
        if painted is None:
            return answer("failed", _problem(500, "failed", "the image could not be made"))
        return answer(painted.outcome, _painted(painted, request.headers.get("accept", "")))

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def _problem(status: int, error: str, message: str, headers: dict[str, str] | None = None, **more: object) -> JSONResponse:
    return JSONResponse({"error": error, "message": message, **more}, status, headers)


def _painted(painted: Painted, accept: str) -> Response:
    headers, trace = painted.headers(), painted.trace
    if painted.outcome == "refused":
        message = "this service does not give out an image of this verdict; another prompt may give one of another"
        words = None if trace.words is None else trace.words.words
        return _problem(422, "refused", message, headers, verdict=trace.verdict, words=words, statement=STATEMENT)
    if "application/json" not in accept:
        return Response(painted.png, headers=headers, media_type="image/png")
    content = {
        "outcome": painted.outcome,
        "seed": painted.seed,
        "image": base64.b64encode(painted.png).decode(),
        "trace": trace.to_dict(),
    }
    return JSONResponse(content, headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve guarded images over HTTP.")
    parser.add_argument("settings", nargs="?", help="JSON file; without one the lab model is served")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        app = create_app(read_settings(arguments.settings) if arguments.settings else None)
    except SettingsError as error:
        raise SystemExit(f"serving: {error}") from None
    uvicorn.run(app, host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
