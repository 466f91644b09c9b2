"""How many connections there may be, and how slow they may be.

uvicorn closes a connection that stays silent after an answer, and no other: one that never asks, that asks a byte at a time or
that never reads its answer stays for as long as the client likes. Its ``limit_concurrency`` counts these too, closes none of
them, and then answers everybody with 503, Prometheus included. So the limits are here.
"""

import asyncio
import socket
from typing import Any

try:
    import resource
except ImportError:  # Windows sets no such limit
    resource = None  # type: ignore[assignment]

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import problem
from .metrics import Metrics
from .settings import Reason, Settings, SettingsError

#: Seconds between two looks at all connections.
LOOK = 0.5

#: Connections that wait with the system until they are taken in.
WAITING = 2048

#: Open files of the process that are no connections.
OTHER_FILES = 64

#: Seconds in which the rest of a request that is already answered is thrown away. A connection that is closed while data
#: comes in is reset, and the client may lose the answer.
LINGER = 2.0


class Connection(H11Protocol):
    """A connection that knows since when it keeps the service waiting. A subclass of :func:`limited` sets the limits."""

    settings: Settings
    metrics: Metrics
    open: set["Connection"]

    #: When the request that is awaited could begin, in seconds of the loop's clock.
    since = 0.0
    #: When an answer was first seen that the client had not taken yet.
    unread_since: float | None = None
    #: Nothing has come since the last answer.
    silent = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        others = self.open
        if len(others) >= self.settings.max_connections:
            # Whoever has waited longest with a request or with reading gives way. Such are there, or nobody waits for a place:
            # the settings allow more connections than requests at a time.
            idle = [each for each in others if not each.waits_for_us()]
            victim = min(idle, key=lambda each: each.since, default=self)
            victim.end("full")
            if victim is self:
                return
        if not others:
            self.loop.call_later(LOOK, look, self.loop, others)
        others.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.silent:
            self.since = self.loop.time()
            self.silent = False
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        self.silent = True
        super().on_response_complete()

    def waits_for_us(self) -> bool:
        """Whether the request has come whole and is not answered yet."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def overdue(self, now: float) -> Reason | None:
        """Which limit the connection has passed."""
        if self.transport.get_write_buffer_size():
            self.unread_since = self.unread_since or now
            return "slow_reader" if now - self.unread_since > self.settings.send_seconds else None
        self.unread_since = None
        if self.waits_for_us():
            return None
        answered = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        limit = LINGER if answered else self.settings.receive_seconds
        return "slow_request" if now - self.since > limit else None

    def end(self, reason: Reason) -> None:
        self.metrics.closed_connections.labels(reason).inc()
        self.open.discard(self)
        self.transport.abort()  # close would wait until everything is read

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in the form of every other error."""
        answer = problem(400, msg)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def look(loop: asyncio.AbstractEventLoop, connections: set[Connection]) -> None:
    """Ends the connections that are overdue, and looks again as long as there are any."""
    now = loop.time()
    for connection in tuple(connections):
        if reason := connection.overdue(now):
            connection.end(reason)
    if connections:
        loop.call_later(LOOK, look, loop, connections)


class Server(uvicorn.Server):
    """A server whose connections wait with the system until they are taken in. What the system cannot keep it lets try again,
    seconds later."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for each in server.sockets:
                with each.dup() as listening:
                    listening.listen(WAITING)


def limited(settings: Settings, metrics: Metrics) -> dict[str, Any]:
    """What uvicorn is configured with for these settings.

    Raises:
        SettingsError: if the system allows this process fewer connections.
    """
    if resource is not None:
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = settings.max_connections + OTHER_FILES
        if resource.RLIM_INFINITY not in (allowed, most) and most < wanted:
            raise SettingsError(
                f"max_connections is {settings.max_connections}, but the system allows this process {most} open files: "
                "set it lower, or raise the limit with 'ulimit -n'"
            )
        if allowed != resource.RLIM_INFINITY and allowed < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    connections: set[Connection] = set()
    metrics.connections.set_function(lambda: len(connections))
    given: dict[str, Any] = {"settings": settings, "metrics": metrics, "open": connections}
    return {
        "http": type("LimitedConnection", (Connection,), given),
        # Another protocol would take a connection away from its limits.
        "ws": "none",
        # So many are taken in at once, and three rounds later they are read. Of many that come together, none then has to give
        # way before it could ask.
        "backlog": max(1, settings.max_connections // 16),
    }
