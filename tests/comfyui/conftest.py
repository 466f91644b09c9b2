"""The real ComfyUI for the tests in this folder: one server for all of them, and a subprocess for what happens inside it.

    COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python pytest tests/comfyui

Without ``COMFYUI_PATH`` the tests are skipped; ``COMFYUI_PYTHON`` is this interpreter unless set. With pytest-xdist,
``--dist loadgroup`` keeps them on one worker, hence on one server; otherwise every worker starts a server of its own.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from memorization_guard.automatic import AUTO

REPOSITORY = Path(__file__).parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
#: Seconds until the server must answer; it needs about 12 on one idle core.
START_TIMEOUT = 180.0
#: One thread, so that tests side by side do not fight for cores; no downloads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's tests where there is no ComfyUI, and keeps them together under ``--dist loadgroup``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("comfyui"))
            if not COMFYUI:
                item.add_marker(pytest.mark.skip(reason="COMFYUI_PATH is not set: no ComfyUI to run in"))


# Graphs


@dataclass(frozen=True)
class Node:
    """A node of a graph; ``node[0]`` is the link to its first output."""

    id: str

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Graph:
    """A workflow, written node by node.

    >>> g = graph()  # the fixture
    >>> image = g.node("VAEDecode", samples=sampler[0], vae=lab[2])
    >>> server.queue(g.prompt()).wait()
    """

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}

    def node(self, class_type: str, **inputs: Any) -> Node:
        """Adds a node; inputs are values, or links taken from other nodes."""
        node = Node(str(len(self._nodes) + 1))
        self._nodes[node.id] = {"class_type": class_type, "inputs": inputs}
        return node

    def prompt(self) -> dict[str, Any]:
        """The workflow in ComfyUI's API format."""
        return json.loads(json.dumps(self._nodes))


@pytest.fixture(scope="session")
def graph() -> type[Graph]:
    """The class :class:`Graph`: ``g = graph()`` begins a workflow."""
    return Graph


# The server


class ComfyUIError(RuntimeError):
    """ComfyUI refused a workflow, or a node of it failed; the message is ComfyUI's."""


class Event(NamedTuple):
    """A message of the websocket: when it came (``time.monotonic()``), its type, its data."""

    time: float
    type: str
    data: dict[str, Any]


@dataclass
class Run:
    """A queued workflow."""

    server: Server
    prompt_id: str
    client_id: str
    #: What ComfyUI told this client, from before the workflow was queued until after it ended; grows while it runs.
    events: list[Event]
    _socket: Any = field(default=None, repr=False)
    _listening: threading.Event = field(default_factory=threading.Event, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def wait(self, timeout: float = 120) -> dict[str, Any]:
        """Waits for the end; the history entry.

        Raises:
            ComfyUIError: if a node failed or the run was interrupted.
            TimeoutError: if it takes longer than ``timeout`` seconds.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the workflow did not end within {timeout} s; server log:\n{self.server.log()[-3000:]}")
        for event in self.events:
            if event.type == "execution_error":
                trace = "".join(event.data.get("traceback", ()))
                raise ComfyUIError(f"{event.data.get('node_type')}: {event.data['exception_message'].strip()}\n{trace}")
            if event.type == "execution_interrupted":
                raise ComfyUIError(f"interrupted at node {event.data.get('node_id')} ({event.data.get('node_type')})")
        return self.history()

    def history(self) -> dict[str, Any]:
        """The history entry of an ended run."""
        return self.server.get(f"/history/{self.prompt_id}")[self.prompt_id]

    def outputs(self, node: Node | str) -> dict[str, Any]:
        """What an output node of an ended run showed, ``{}`` if nothing."""
        return self.history()["outputs"].get(getattr(node, "id", node), {})

    def images(self, node: Node | str) -> list[Image.Image]:
        """The images that a Save Image or Preview Image node wrote, read whole; ``.text`` is their metadata."""
        images = []
        for place in self.outputs(node).get("images", []):
            image = Image.open(io.BytesIO(self.server.fetch(f"/view?{urllib.parse.urlencode(place)}")))
            image.load()
            images.append(image)
        return images

    def _listen(self) -> None:
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        address = f"{self.server.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        try:
            with connect(address, max_size=None) as self._socket:
                self._socket.recv(timeout=30)  # the server's status: from here on it knows the client
                self._listening.set()
                for message in self._socket:
                    if isinstance(message, str) and self._note(json.loads(message)):
                        break
        except ConnectionClosed:
            pass
        finally:
            self._ended.set()

    def _note(self, message: dict[str, Any]) -> bool:
        """Keeps a message if it belongs to this run; whether it is the last, for which the history entry is written before."""
        event = Event(time.monotonic(), message["type"], message.get("data", {}))
        if event.data.get("prompt_id", self.prompt_id) != self.prompt_id:
            return False
        self.events.append(event)
        return event.type == "executing" and event.data["node"] is None


class Server:
    """A running ComfyUI with this repository as a custom node pack."""

    def __init__(self, url: str, folder: Path, log_file: Path) -> None:
        self.url = url
        #: The base directory: ``models``, ``input``, ``output`` and so on are in it.
        self.folder = folder
        self._log_file = log_file

    def queue(self, prompt: dict[str, Any], extra_data: dict[str, Any] | None = None, client_id: str | None = None) -> Run:
        """Queues a workflow in API format and listens to it, as a client of its own unless ``client_id`` names one.

        Raises:
            ComfyUIError: if ComfyUI finds it invalid, or a part of it; the message holds the errors of the nodes.
        """
        run = Run(self, str(uuid.uuid4()), client_id or uuid.uuid4().hex, [])
        threading.Thread(target=run._listen, daemon=True).start()
        if not run._listening.wait(30):
            raise TimeoutError(f"no websocket to {self.url}; server log:\n{self.log()[-3000:]}")
        job = {"prompt": prompt, "prompt_id": run.prompt_id, "client_id": run.client_id, "extra_data": extra_data or {}}
        try:
            if errors := self.post("/prompt", job)["node_errors"]:
                self.post("/queue", {"delete": [run.prompt_id]})
                raise ComfyUIError(f"only a part of the workflow is valid: {errors}")
        except ComfyUIError:
            run._socket.close()
            raise
        return run

    def interrupt(self) -> None:
        """Stops the workflow that is running."""
        self.post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = False) -> None:
        """Unloads the models, and with ``free_memory`` forgets cached outputs too: done before the next workflow runs."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What the server tells the frontend about its nodes, or about one."""
        return self.get(f"/object_info/{node}")[node] if node else self.get("/object_info")

    def get(self, path: str) -> Any:
        """The answer to a GET request, in JSON."""
        return json.loads(self.fetch(path))

    def post(self, path: str, content: Any) -> Any:
        """The answer to a POST request, in JSON; ``None`` if it is empty."""
        answer = self.fetch(path, json.dumps(content).encode())
        return json.loads(answer) if answer else None

    def fetch(self, path: str, data: bytes | None = None) -> bytes:
        """The answer to a request as it is.

        Raises:
            ComfyUIError: if it is an error.
        """
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyUIError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None

    def log(self) -> str:
        """What the server has printed up to now."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, started for the first test that asks, ended after the last."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH is not set: no ComfyUI to run in")
    pytest.importorskip("websockets", reason='websockets is missing: pip install "memorization-guard[test]"')
    folder = tmp_path_factory.mktemp("comfyui")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_file = folder / "server.log"
    command = [PYTHON, "main.py", "--port", str(port), "--listen", "127.0.0.1", "--disable-auto-launch", *_arguments(folder)]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=COMFYUI,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", folder, log_file)
        end = time.monotonic() + START_TIMEOUT
        while True:
            try:
                server.get("/system_stats")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"ComfyUI does not start ({command}):\n{server.log()[-5000:]}")
                time.sleep(0.3)
        if f"(IMPORT FAILED): {folder / 'custom_nodes'}" in server.log():
            pytest.fail(f"ComfyUI could not load the pack:\n{server.log()[-5000:]}")
        yield server
    finally:
        for end_it in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, end_it)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    continue


@pytest.fixture
def automatic_profiles(server: Server) -> Iterator[Path]:
    """Their folder, empty before and after: a guard without a profile would find one of another test."""
    folder = server.folder / "models" / "stability_profiles" / AUTO
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _arguments(folder: Path) -> list[str]:
    """Makes a base directory with this repository among its custom nodes, and gives the arguments to use it."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (folder / name).mkdir()
    (folder / "custom_nodes" / "memorization-guard").symlink_to(REPOSITORY, target_is_directory=True)
    database = f"sqlite:///{folder / 'user' / 'comfyui.db'}"
    return ["--cpu", "--base-directory", str(folder), "--database-url", database, "--disable-api-nodes"]


# Inside ComfyUI

#: ``{0}``: arguments of the command line; then the snippet runs with ``pack``, ``module(name)`` and ``args``.
_INSIDE = """
import asyncio, importlib, json, sys
with open(sys.argv[1], encoding="utf-8") as _file:
    _job = json.load(_file)
sys.path.insert(0, _job["comfyui"])
sys.argv = ["main.py", *_job["arguments"]]
import comfy.options
comfy.options.enable_args_parsing()
import main  # as far as it goes without being the main program: paths, logging
import nodes
if not asyncio.run(nodes.load_custom_node(_job["pack"])):
    raise SystemExit("ComfyUI could not load the pack")
pack = sys.modules[_job["pack"].replace(".", "_x_")]
def module(name):
    return importlib.import_module("." + name, pack.__name__)
args, result = _job["args"], {}
exec(compile(_job["source"], "<in_comfyui>", "exec"))
with open(_job["answer"], "w", encoding="utf-8") as _file:
    json.dump(result, _file)
"""


@pytest.fixture(scope="session")
def in_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``in_comfyui(source, *args)`` runs Python in a process of its own, with ComfyUI and this pack loaded, but no server.

    The source finds ``args``, the pack as ``pack``, ``module("nodes.lab")`` for a module of it, and puts what it finds out
    into the dict ``result``, which is returned. Arguments and results are whatever JSON can hold; tensors go by way of files.
    ``flags`` are more arguments of ComfyUI's command line.
    """

    def run(source: str, *args: Any, flags: tuple[str, ...] = (), timeout: float = 300) -> dict[str, Any]:
        if not COMFYUI:
            pytest.skip("COMFYUI_PATH is not set: no ComfyUI to run in")
        folder = tmp_path_factory.mktemp("in_comfyui")
        job, answer = folder / "job.json", folder / "answer.json"
        content = {
            "comfyui": str(Path(COMFYUI).resolve()),
            "arguments": [*_arguments(folder), *flags],
            "pack": str(folder / "custom_nodes" / "memorization-guard"),
            "source": source,
            "args": args,
            "answer": str(answer),
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        process = subprocess.run(
            [PYTHON, "-c", _INSIDE, str(job)],
            cwd=COMFYUI,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if process.returncode or not answer.is_file():
            raise AssertionError(f"the snippet failed inside ComfyUI:\n{process.stdout[-5000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))

    return run
