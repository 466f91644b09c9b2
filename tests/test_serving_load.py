"""The example service behind its limits: clients that are slow, silent, gone, greedy or many.

The ordinary run lets 40 clients at the service for 3 seconds. 200 for a minute, with what they saw printed::

    LOAD_SECONDS=60 LOAD_CLIENTS=200 python -m pytest tests/test_serving_load.py -k many -s
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from prometheus_client.parser import text_string_to_metric_families

from memorization_guard import lab

ROOT = Path(__file__).parents[1]
SECONDS = float(os.environ.get("LOAD_SECONDS", 3))
CLIENTS = int(os.environ.get("LOAD_CLIENTS", 40))

#: KB by which the service's memory may grow during the later two thirds of the load.
GROWTH = 60_000

BODY = json.dumps({"prompt": lab.prompts("ordinary")[0], "seed": 1}).encode()


def post(body=BODY, length=None, path="/images"):
    length = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), length, body)


def get(path):
    return b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode()


@contextlib.contextmanager
def running(folder, **settings):
    """The service as its command starts it, in a process of its own; gives process and port."""
    file = folder / "settings.json"
    file.write_text(json.dumps({"steps": 4, **settings}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.serving", str(file), "--port", str(port)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, "it does not start"
                time.sleep(0.1)
            yield process, port
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A service with little patience: 64 connections, three seconds to ask, one to read; gives its port."""
    limits = {"max_connections": 64, "receive_seconds": 3, "send_seconds": 1}
    with running(tmp_path_factory.mktemp("strict"), **limits) as (_, port):
        yield port


def connect(port, receive_buffer=None):
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


def answer(client):
    """Status and content of the next answer; nothing if the connection ended."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in got and (data := client.recv(65536)):
            got += data
        if not got:
            return None
        head, _, content = got.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
        while len(content) < length and (data := client.recv(65536)):
            content += data
        return int(head.split()[1]), content
    return None


def metrics(port):
    with connect(port) as client:
        client.sendall(get("/metrics"))
        status, content = answer(client)
    assert status == 200
    families = text_string_to_metric_families(content.decode())
    return {(s.name.removeprefix("memorization_guard_"), *s.labels.values()): s.value for f in families for s in f.samples}


@contextlib.contextmanager
def closes(port, reason, at_least=1):
    before = metrics(port)["closed_connections_total", reason]
    yield
    assert metrics(port)["closed_connections_total", reason] - before >= at_least


@pytest.mark.parametrize("part", [b"", b"POST /images HTT", post(BODY[:10], len(BODY)), post(b"", 10)])
def test_a_request_that_does_not_come_whole_ends(strict, part):
    with closes(strict, "slow_request"), connect(strict) as client:
        client.sendall(part)
        begun = time.monotonic()
        assert answer(client) is None
        assert 2.9 < time.monotonic() - begun < 20


def until_it_ends(client, parts, pause):
    """Sends the parts over and over until the service has ended the connection."""
    end = time.monotonic() + 30
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            for part in parts:
                with contextlib.suppress(TimeoutError):
                    client.send(part)
                time.sleep(pause)
        pytest.fail("the connection stays")


def test_a_request_that_comes_a_byte_at_a_time_ends(strict):
    with closes(strict, "slow_request"), connect(strict) as client:
        until_it_ends(client, [bytes([byte]) for byte in post(b" " * 900)], 0.05)


def test_answers_that_are_not_read_end(strict):
    with closes(strict, "slow_reader"), connect(strict, receive_buffer=2048) as client:
        client.settimeout(0.1)
        until_it_ends(client, [get("/metrics") * 100], 0)


def test_a_slow_but_steady_client_is_served(strict):
    """The time for a request begins with it, and ends with it: neither older requests nor the image count."""
    with connect(strict) as client:
        for pause in (0.0, 0.6, 0.6, 0.6):
            time.sleep(pause)
            client.sendall(post()[:40])
            time.sleep(0.3)
            client.sendall(post()[40:])
            assert answer(client)[0] == 200


def test_a_body_that_is_too_large_is_answered_before_it_has_come(strict):
    announced, sent = 500_000_000, 0
    with connect(strict) as client:
        client.sendall(post(b"", announced))
        assert (answer(client) or [0])[0] == 413
    chunked = b"POST /images HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closes(strict, "slow_request"), connect(strict) as client:
        client.sendall(chunked)
        with contextlib.suppress(ConnectionError):
            while sent < announced:
                client.sendall(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n")
                sent += 0xFFFF
                time.sleep(0.01)
    assert sent < announced / 10


def test_an_answer_to_a_body_that_is_too_large_arrives(strict):
    """A client that sends all before it reads still gets it, and may ask again."""
    with connect(strict) as client:
        client.sendall(post(b" " * 3_000_000))
        status, content = answer(client)
        assert (status, json.loads(content)["error"]) == (413, "too_large")
        client.sendall(get("/healthz"))
        assert answer(client) == (200, b'{"status":"ok"}')


def test_whoever_asks_gets_the_place_of_whoever_does_not(strict):
    with contextlib.ExitStack() as stack, closes(strict, "full"):
        silent = [stack.enter_context(connect(strict)) for _ in range(100)]
        with connect(strict) as client:
            client.sendall(get("/healthz"))
            assert answer(client)[0] == 200
        assert metrics(strict)["connections",] <= 64
        assert [answer(each) for each in silent] == [None] * 100
    assert metrics(strict)["connections",] <= 2


NO_HTTP = [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000]


@pytest.mark.parametrize("sent", NO_HTTP, ids=["text", "tls", "long"])
def test_what_is_no_http_gets_the_same_form_of_error(strict, sent):
    with connect(strict) as client:
        client.sendall(sent)
        status, content = answer(client)
    assert (status, json.loads(content)["error"]) == (400, "invalid")


def test_another_protocol_leads_nowhere(strict):
    upgrade = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with connect(strict) as client:
        client.sendall(upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert answer(client)[0] == 200


def test_more_connections_than_the_system_allows_end_the_start(serving):
    settings = serving.settings.Settings(max_connections=10**9)
    with pytest.raises(serving.settings.SettingsError, match=r"but the system allows this process .* raise the limit"):
        serving.connections.limited(settings, serving.metrics.Metrics())


# --- many at once -----------------------------------------------------------------------------------------------------


async def read_answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
    return int(head.split()[1])


async def asks(reader, writer, _rng):
    writer.write(post())
    return await read_answer(reader)


async def asks_wrongly(reader, writer, rng):
    writer.write(
        rng.choice([post(b"[" * 9000), post(b"\xff"), post(b"{}"), post(path="/nowhere"), get("/images"), b"x\r\n\r\n"])
    )
    return await read_answer(reader)


async def leaves(_reader, writer, rng):
    writer.write(post())
    await asyncio.sleep(rng.random())


async def reads_slowly(reader, writer, _rng):
    writer.write(post())
    while True:
        if not await reader.read(100):
            return
        await asyncio.sleep(0.05)


async def never_reads(_reader, writer, _rng):
    while True:
        writer.write(get("/metrics") * 50)
        await writer.drain()
        await asyncio.sleep(0.01)


async def says_nothing(reader, _writer, _rng):
    await reader.read(1)


async def sends_slowly(_reader, writer, _rng):
    for byte in post():
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.2)


async def sends_too_much(reader, writer, _rng):
    writer.write(post(b"", 500_000_000) + b" " * 2_000_000)
    return await read_answer(reader)


#: Half of the clients ask as they should, and are told that the service is busy as often as not.
CLIENTS_OF = [asks] * 8 + [asks_wrongly, leaves, reads_slowly, never_reads, says_nothing, sends_slowly, sends_too_much]


def memory(pid):
    """KB that the process has in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


async def load(port):
    """Lets the clients in, and counts what was answered to whom."""
    end, said = time.monotonic() + SECONDS, Counter()

    async def client(number):
        rng, act = random.Random(number), CLIENTS_OF[number % len(CLIENTS_OF)]
        while (left := end - time.monotonic()) > 0:
            writer, got = None, "ended"
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                got = await asyncio.wait_for(act(reader, writer, rng), left + 5)
            except (OSError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError):
                pass
            finally:
                if writer is not None:
                    writer.transport.abort()
            said[act.__name__, got] += 1
            await asyncio.sleep(0.05)

    await asyncio.gather(*map(client, range(CLIENTS)))
    return said


def look(port, pid, done):
    """Looks at the metrics until all clients are done; gives the seconds of each look, and the memory then."""
    looks, sizes = [], []
    while not done.is_set():
        begun = time.monotonic()
        metrics(port)
        looks.append(time.monotonic() - begun)
        sizes.append(memory(pid))
        time.sleep(0.1)
    return looks, sizes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_many_clients_at_once(tmp_path):
    settings = {"receive_seconds": 5, "send_seconds": 2}
    with running(tmp_path, **settings) as (process, port), ThreadPoolExecutor(1) as pool:
        with connect(port) as client:
            client.sendall(post())
            assert answer(client)[0] == 200
        done = threading.Event()
        looking = pool.submit(look, port, process.pid, done)
        try:
            said = asyncio.run(load(port))
        finally:
            done.set()
        looks, sizes = looking.result()
        time.sleep(8)
        after = metrics(port)
        assert process.poll() is None
    third = sizes[len(sizes) // 3 :]
    print(f"\n{CLIENTS} clients, {SECONDS:g} s, {sum(said.values())} requests and other visits")
    for (kind, got), count in sorted(said.items(), key=str):
        print(f"  {kind:15} {got!s:6} {count}")
    parts = statistics.quantiles(looks, n=100, method="inclusive")
    print(f"/metrics: {len(looks)} answers, median {parts[49]:.3f} s, 99 % {parts[98]:.3f} s, longest {max(looks):.3f} s")
    first, least, most, last = (size >> 10 for size in (sizes[0], min(third), max(third), sizes[-1]))
    print(f"memory: {first} MB at first, {least} to {most} MB in the later two thirds, {last} MB at last")
    print({labels: value for labels, value in after.items() if labels[0] in ("requests_total", "closed_connections_total")})
    assert max(looks) < 10
    assert max(third) - third[0] < GROWTH
    assert said["asks", 200] > 0
    assert {got for kind, got in said if kind == "asks"} <= {200, 503, "ended"}
    assert {got for kind, got in said if kind == "asks_wrongly"} <= {400, 404, 405, "ended"}
    assert {got for kind, got in said if kind == "sends_too_much"} <= {413, "ended"}
    assert said["sends_too_much", 413] > 0
    # Everybody has left, and nothing of them is left.
    assert (after["admitted",], after["connections",]) == (0, 1)
