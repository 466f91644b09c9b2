"""The addresses of the service, its answers, and its errors, which all have one form."""

import asyncio
import base64
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from memorization_guard.core.trace import STATEMENT

from .metrics import Metrics
from .painter import BusyError, Painted, Painter
from .settings import ImageRequest, Outcome, Settings, problems

#: Seconds between two checks whether the client of a waiting request is still there.
LOOK = 0.5

#: The word for an error, by its status.
ERRORS = {
    400: "invalid",
    404: "not_found",
    405: "not_allowed",
    413: "too_large",
    422: "refused",
    500: "failed",
    503: "busy",
}


def problem(status: int, message: str, headers: dict[str, str] | None = None, **more: object) -> JSONResponse:
    """The answer to every request that gets no image: a word for programs, a sentence for people."""
    return JSONResponse({"error": ERRORS[status], "message": message, **more}, status, headers)


def create_app(settings: Settings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The service, ready to answer: model and profile are loaded and tried here.

    Raises:
        SettingsError: if it cannot run with these settings.
    """
    metrics = metrics or Metrics()
    painter = Painter(settings or Settings(), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        painter.close()

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="Memorization Guard", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)

    def answer(outcome: Outcome, response: Response) -> Response:
        metrics.requests.labels(outcome).inc()
        return response

    @app.exception_handler(HTTPException)
    async def no_such_address(_: Request, error: HTTPException) -> Response:
        message = "there are POST /images, GET /metrics, GET /healthz and GET /openapi.json"
        return problem(error.status_code, message, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def broken(*_: object) -> Response:
        return problem(500, "the service failed; its log says where")

    @app.post("/images", openapi_extra=_BODY)
    async def images(request: Request) -> Response:
        try:
            asked = await _asked(request, painter.settings)
        except ClientDisconnect:
            return Response(status_code=499)
        if isinstance(asked, Response):
            return asked
        try:
            future = painter.submit(asked)
        except BusyError:
            seconds = str(math.ceil(painter.seconds))
            return answer("turned_away", problem(503, "too many requests are waiting", {"Retry-After": seconds}))
        result = asyncio.wrap_future(future)
        while not result.done():
            await asyncio.wait({result}, timeout=LOOK)
            if not result.done() and await request.is_disconnected():
                future.cancel()  # does not end an image that is already being sampled
                return answer("abandoned", Response(status_code=499))
        painted = result.result()
        if painted is None:
            return answer("failed", problem(500, "the image could not be made"))
        return answer(painted.outcome, _painted(painted, request.headers.get("accept", "")))

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


#: What OpenAPI says of the body, which :func:`_asked` reads.
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}}


async def _asked(request: Request, settings: Settings) -> ImageRequest | Response:
    """What the client asks for, or the answer that says what is wrong with it. Of a body that is too large no more is read.

    FastAPI would read any body whole, and has one form of error for a wrong field and another for what is no JSON.
    """
    too_large = problem(413, f"the body may have {settings.max_body} bytes")
    declared = request.headers.get("content-length", "0")
    if int(declared) > settings.max_body:
        return too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > settings.max_body:
            return too_large
    try:
        asked = ImageRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        return problem(400, problems(error))
    beyond = asked.beyond(settings)
    return asked if beyond is None else problem(400, beyond)


def _painted(painted: Painted, accept: str) -> Response:
    headers, trace = painted.headers(), painted.trace
    if painted.outcome == "refused":
        message = "this service does not give out an image of this verdict; another prompt may give one of another"
        words = None if trace.words is None else trace.words.words
        return problem(422, message, headers, verdict=trace.verdict, words=words, statement=STATEMENT)
    if "application/json" not in accept:
        return Response(painted.png, headers=headers, media_type="image/png")
    content = {
        "outcome": painted.outcome,
        "seed": painted.seed,
        "image": base64.b64encode(painted.png).decode(),
        "trace": trace.to_dict(),
    }
    return JSONResponse(content, headers=headers)
