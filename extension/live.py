"""What a run does, kept for the page that draws it. Knows no host: it is told which tasks are running."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Query, Response

ROUTE = "/memorization-guard/live"

_MOST_TASKS = 8
_MOST_RUNS = 100  # of all tasks together; of one the page shows as many
_MOST_STEPS = 2000  # of a run


@dataclass
class _Task:
    sent: int = 0  # events so far; each has its number, from 1 on
    images: int = 0  # that are to be made, as far as is known
    runs: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # name -> numbers and JSON texts


class LiveRuns:
    """The events of the last tasks, for pages that ask for them; safe to use from any thread.

    An event is ``{"kind": "begin" | "step" | "end" | "images" | "profiles", "run": name, ...}``. It is kept as the text that
    is sent, so it does not matter what becomes of it later. Of the tasks the last 8 are kept, of their runs the last 100, and
    of a run that has ended its begin, its end, which carries the traces, and its images' infotexts: a page that comes late
    draws the same from those.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}  # the one that was last sent to stands last

    def send(self, task: str | None, event: Mapping[str, Any]) -> None:
        """Adds an event to a task; without a task, as for an API's client, it is dropped.

        Raises:
            ValueError, TypeError: where the event holds something that JSON has no word for, such as NaN.
        """
        if task is None:
            return
        kind, run, text = event["kind"], event["run"], json.dumps(event, allow_nan=False)
        with self._lock:
            log = self._task(task)
            if kind == "begin":
                log.runs.pop(run, None)
            events = log.runs.setdefault(run, [])
            if kind == "end":
                del events[1:]
            elif len(events) > _MOST_STEPS:
                return
            log.sent += 1
            events.append((log.sent, text))
            while sum(len(each.runs) for each in self._tasks.values()) > _MOST_RUNS:
                _drop_oldest(self._tasks if len(self._tasks) > 1 else log.runs)

    def number(self, task: str | None, images: int) -> int:
        """The number of the first of so many ``images``, which a call of the task makes next; the first call's is 1."""
        with self._lock:
            if task is None:
                return 1
            log = self._task(task)
            log.images += images
            return log.images - images + 1

    def since(self, task: str, cursor: int) -> tuple[list[str], int]:
        """The events of a task after those up to ``cursor``, as JSON texts in order, and the cursor to go on from.

        The first cursor is 0. A task that is not known, or no more, has no events, and begins at 0.
        """
        with self._lock:
            log = self._tasks.get(task) or _Task()
            events = sorted(event for run in log.runs.values() for event in run if event[0] > cursor)
            return [text for _, text in events], log.sent

    def _task(self, task: str) -> _Task:
        log = self._tasks[task] = self._tasks.pop(task, _Task())
        if len(self._tasks) > _MOST_TASKS:
            _drop_oldest(self._tasks)
        return log


def _drop_oldest(entries: dict[str, Any]) -> None:
    del entries[next(iter(entries))]


def add_route(app: FastAPI, runs: LiveRuns, is_running: Callable[[str], bool]) -> None:
    """Lets the page ask ``GET /memorization-guard/live?task=ID&cursor=N``, once an app.

    The answer is ``{"cursor": N, "running": bool, "events": [...]}``; its cursor goes into the next question, and a task that
    is not running sends nothing more. Bad parameters are answered with 422.

    A run is shown to whom the page is open. With ``--gradio-auth`` those are the users who have logged in, by Gradio's own
    check; others get 401. With ``--api-auth`` alone the page is open to all, and so is this route: what a question must know
    is the id of a task, which the page makes up at random for each generation, and which is listed nowhere here. An app
    without Gradio (``--nowebui``) has no page and gets no route.

    Args:
        app: the host's app, as ``on_app_started`` gives it.
        is_running: whether a task, by its id, is under way or waits for its turn.
    """
    checks: dict[str, Any] = {getattr(route, "path", ""): route for route in app.routes}
    if ROUTE in checks or "/login_check" not in checks:
        return

    async def live(task: str = Query(..., min_length=1, max_length=100), cursor: int = Query(0, ge=0)) -> Response:
        running = is_running(task)  # before the events are read, so that after a no there are none left
        events, at = runs.since(task, cursor)
        body = f'{{"cursor": {at}, "running": {json.dumps(running)}, "events": [{", ".join(events)}]}}'
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    check = Depends(checks["/login_check"].endpoint)
    app.add_api_route(ROUTE, live, methods=["GET"], response_model=None, dependencies=[check], include_in_schema=False)
