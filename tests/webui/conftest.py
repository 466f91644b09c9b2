"""The real hosts for the tests in this folder: one server each, asked over its API.

    A1111_PATH=/path/to/stable-diffusion-webui A1111_PYTHON=/path/to/its/python \\
    FORGE_PATH=/path/to/forge FORGE_PYTHON=/path/to/its/python \\
    REFORGE_PATH=/path/to/reForge REFORGE_PYTHON=/path/to/its/python pytest tests/webui

Without the path of a host its tests are skipped. The WebUI samples the lab model, which has memorized some images. Forge and
reForge tell models by their layout; they sample a model of random weights, which is made with Forge's classes for both.
``docs/development.md`` says what a host needs without a GPU.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from memorization_guard import Thresholds, Trace

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TITLE = "Memorization Guard"
#: Seconds until the server must answer; it needs about 20 on one idle core.
START_TIMEOUT = 240.0

#: Kind of host -> variables with its checkout and its interpreter, arguments for a machine without a GPU.
HOSTS = {
    "webui": ("A1111_PATH", "A1111_PYTHON", ["--use-cpu", "all", "--no-half", "--no-half-vae"]),
    "forge": ("FORGE_PATH", "FORGE_PYTHON", ["--always-cpu", "--all-in-fp32", "--attention-pytorch"]),
    "reforge": ("REFORGE_PATH", "REFORGE_PYTHON", ["--always-cpu", "--all-in-fp32", "--attention-pytorch"]),
}
ARGUMENTS = [
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check", "--skip-version-check",
    "--skip-install", "--no-download-sd-model", "--no-hashing", "--disable-nan-check", "--api",
]  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
    "SD_WEBUI_RESTARTING": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


@dataclass
class Answer:
    """What the API gave back for a generation."""

    images: list[Image.Image]
    info: dict[str, Any]

    @property
    def pixels(self) -> list[bytes]:
        return [image.tobytes() for image in self.images]

    @property
    def traces(self) -> list[list[Trace]]:
        """For every image the traces of its runs."""
        report = self.info["extra_generation_params"][f"{TITLE} traces"]
        return [[Trace.from_dict(run["trace"]) for run in runs] for runs in report["images"]]

    @property
    def trace(self) -> Trace:
        """The one trace of the one image."""
        ((trace,),) = self.traces
        return trace


@dataclass
class Host:
    """A running host. Settings of every generation are ``usual`` and what a test adds."""

    kind: str
    url: str
    data: Path
    log: Path
    usual: dict[str, Any] = field(default_factory=dict)

    def ask(self, path: str, body: Any = None, timeout: float = 300.0) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()[:2000]}") from None

    def make(self, *guard: Any, path: str = "txt2img", **settings: Any) -> Answer:
        """A generation; with the accordion on, where there are arguments for it."""
        if guard:
            settings["alwayson_scripts"] = {TITLE: {"args": [True, *guard]}} | settings.get("alwayson_scripts", {})
        answer = self.ask(f"/sdapi/v1/{path}", {**self.usual, **settings})
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
        return Answer([image.convert("RGB") for image in images], json.loads(answer["info"]))

    def script(
        self, mode: str, profile: str = "None", *calibration: Any, thresholds: Thresholds | None = None, **settings: Any
    ) -> Answer:
        """A generation by the dropdown's script."""
        arguments = [mode, profile, *self.constants(thresholds or Thresholds()), *(calibration or ("", "", False))]
        return self.make(script_name=TITLE, script_args=arguments, **settings)

    @staticmethod
    def constants(thresholds: Thresholds) -> list[Any]:
        """Those that the scripts offer, in the order of their arguments."""
        return [thresholds.false_positive_rate, thresholds.steering_guidance, thresholds.gamma, thresholds.correction]

    def calibrate(self, name: str, prompts: list[str], **settings: Any) -> None:
        settings = {"batch_size": 8, "seed": 1000, "prompt": "", **settings}
        self.script("calibrate", "None", "\n".join(prompts), name, True, **settings)

    @contextlib.contextmanager
    def options(self, **values: Any) -> Iterator[None]:
        """Settings of the host for a while. It does not put back itself what it had no value of its own for."""
        before = self.ask("/sdapi/v1/options")
        self.ask("/sdapi/v1/options", values)
        try:
            yield
        finally:
            # What nobody has set yet is not among them, and off or empty.
            self.ask("/sdapi/v1/options", {name: before.get(name, type(value)()) for name, value in values.items()})

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a host together under ``--dist loadgroup``, and sorts them by host."""
    for item in items:
        if HERE in item.path.parents:
            # By its parameters: the name of a test that gives each of them an id does not have the host's.
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            kind = next((kind for kind in HOSTS if kind in parameters), "webui")
            item.add_marker(pytest.mark.xdist_group(f"host-{kind}"))
            for name in (HOSTS[kind][0], *(["FORGE_PATH"] if kind == "reforge" else [])):
                if not os.environ.get(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not set: no host to run in"))


def lab_module() -> ModuleType:
    """``extension/lab.py``, under the name that it has in the host."""
    name = "memorization_guard_pack"
    spec = importlib.util.spec_from_file_location(
        name, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.extension.lab")


@contextlib.contextmanager
def start(kind: str, folder: Path, *arguments: str, extensions: dict[str, Path] | None = None) -> Iterator[Host]:
    """A server with data of its own, this repository among its extensions; stopped on leaving."""
    path_name, python_name, own = HOSTS[kind]
    root = os.environ[path_name]
    python = os.environ.get(python_name, sys.executable)
    checkpoints = folder / "checkpoints"
    for each in (checkpoints, folder / "extensions", folder / "models/Stable-diffusion", folder / "embeddings"):
        each.mkdir(parents=True, exist_ok=True)
    for name, target in {"memorization-guard": REPOSITORY, **(extensions or {})}.items():
        (folder / "extensions" / name).symlink_to(target, target_is_directory=True)
    environment = {**os.environ, **ENVIRONMENT}
    if kind == "webui":
        lab_module().write(checkpoints)
        usual = {"width": 128, "height": 128, "steps": 10, "cfg_scale": 7.5}
    else:
        file = checkpoints / "random-sd15.safetensors"
        forge = os.environ.get(HOSTS["forge"][1], sys.executable)
        subprocess.run(
            [forge, str(HERE / "random_checkpoint.py"), str(file)], env=environment, check=True, capture_output=True
        )
        usual = {"width": 64, "height": 64, "steps": 6, "cfg_scale": 5, "hr_additional_modules": ["Use same choices"]}
    settings = {"auto_launch_browser": "Disable", "CLIP_stop_at_last_layers": 1, "samples_save": False, "grid_save": False}
    (folder / "config.json").write_text(json.dumps(settings | {"show_progress_type": "Approx cheap"}), encoding="utf-8")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [python, "launch.py", *ARGUMENTS, *own, "--gradio-allowed-path", root, "--port", str(port)]
    command += ["--data-dir", str(folder), "--ckpt-dir", str(checkpoints), *arguments]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, cwd=root, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    host = Host(
        kind, f"http://127.0.0.1:{port}", folder, log, {"sampler_name": "Euler", "seed": 1, "prompt": "a fox", **usual}
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while "Startup time" not in host.said():  # it answers earlier, with scripts that have no inputs yet
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{kind} did not start:\n{host.said()[-4000:]}")
            time.sleep(0.5)
        yield host
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Host]]:
    """Gives the host of a kind, started where it is not running yet."""
    found: dict[str, Host] = {}
    with contextlib.ExitStack() as servers:

        def host(kind: str) -> Host:
            if kind not in found:
                others = {"decoys": HERE / "decoys", "z-decoys": HERE / "decoys", "guidance": HERE / "other_guidance"}
                others["batch"] = REPOSITORY / "benchmarks/webui_batch"
                found[kind] = servers.enter_context(start(kind, tmp_path_factory.mktemp(kind), extensions=others))
            return found[kind]

        yield host


@pytest.fixture(params=list(HOSTS))
def host(request: pytest.FixtureRequest, running: Callable[[str], Host]) -> Host:
    """Each host in turn."""
    return running(request.param)


@pytest.fixture
def webui(running: Callable[[str], Host]) -> Host:
    """The WebUI, with the lab model."""
    return running("webui")
