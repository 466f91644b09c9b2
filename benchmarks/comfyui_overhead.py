"""What the guard costs in a running ComfyUI: KSampler runs on the lab model, plain and guarded in turns, in one server.

    python benchmarks/comfyui_overhead.py http://127.0.0.1:8188 [turns]
    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/comfyui_overhead.py

The first needs `websockets`: a client listens, so that live events are sent as they are to a browser. Each turn samples plain,
traced, mitigated and plain again; times are the server's own, from the start of a prompt to its end, and figures are medians
of the ratio within a turn with their quartiles. Plain against plain says what such a figure means on this machine.

The second runs in a process of its own, without a server, and adds up the time that is spent in the guard's code alone: on a
machine whose noise is larger than the cost, that is the figure to go by.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import threading
import time
import urllib.request
import uuid
from typing import Any

STEPS = 50
PROMPT = "a plain red disc on grass"


def workflow(mode: str | None, seed: int) -> dict[str, Any]:
    """A prompt in API format; the guard is left out without a mode."""
    settings = {"seed": seed, "steps": STEPS, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    model = ["lab", 0]
    # A profile of the right settings, so that every step is judged; in every prompt, so that it stays in the cache.
    calibration = {name: settings[name] for name in ("steps", "cfg", "sampler_name", "scheduler")}
    calibration |= {"model": model, "clip": ["lab", 1], "prompts": "built-in list", "text": "", "negative": "", "seed": 0}
    nodes = {
        "lab": ("MemorizationGuardLoadLabModel", {}),
        "positive": ("CLIPTextEncode", {"clip": ["lab", 1], "text": PROMPT}),
        "negative": ("CLIPTextEncode", {"clip": ["lab", 1], "text": ""}),
        "empty": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "profile": ("MemorizationGuardCalibrate", calibration | {"width": 128, "height": 128, "batch_size": 16}),
        "said": ("PreviewAny", {"source": ["profile", 1]}),
    }
    if mode is not None:
        nodes["guard"] = ("MemorizationGuard", {"model": model, "mode": mode, "profile": ["profile", 0]})
        model = ["guard", 0]
    links = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
    nodes["sampler"] = ("KSampler", settings | links)
    nodes["out"] = ("PreviewAny", {"source": ["sampler", 0]})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def seconds(server: str, client: str, prompt: dict[str, Any]) -> float:
    """Runs a prompt; how long the server took for it."""
    body = json.dumps({"prompt": prompt, "client_id": client}).encode()
    request = urllib.request.Request(f"{server}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        job = json.load(answer)["prompt_id"]
    while True:
        with urllib.request.urlopen(f"{server}/history/{job}") as answer:
            history = json.load(answer)
        if job in history:
            break
        time.sleep(0.05)
    status = history[job]["status"]
    if status["status_str"] != "success":
        raise SystemExit(f"the prompt failed: {status}")
    times = {kind: data["timestamp"] for kind, data in status["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def inside() -> None:
    """Prints the time spent in the guard's own code, a run and a step."""
    from comfyui_samplers import CFG, Lab, load

    module = load()
    lab = Lab(module)
    spent = {"seconds": 0.0, "depth": 0}

    def clocked(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began, spent["depth"] = time.perf_counter(), spent["depth"] + 1
            try:
                return function(*args, **kwargs)
            finally:
                spent["depth"] -= 1
                spent["seconds"] += time.perf_counter() - began if spent["depth"] == 0 else 0.0

        return call

    # Everything of ours that a run goes through; the network's evaluation is not inside any of it.
    for owner, names in (
        (module("memorization_guard.adapters.kdiffusion").SamplerWatch, ("_guarded", "saw_guidance", "__init__")),
        (module("nodes.sampling")._Guard, ("_begin", "_end")),
    ):
        for name in names:
            setattr(owner, name, clocked(getattr(owner, name)))

    profile = lab.profile("euler", 24)
    for mode in ("trace", "mitigate"):
        shares, costs = [], []
        for turn in range(12):
            spent["seconds"] = 0.0
            _, run, seconds = lab.sample([PROMPT], "euler", turn, mode=mode, profile=profile)
            shares.append(spent["seconds"] / seconds)
            costs.append(1e6 * spent["seconds"] / run.monitor.steps)
        share, cost = statistics.median(shares[2:]), statistics.median(costs[2:])
        print(f"{mode}, cfg {CFG}: {cost:.0f} us a step, {100 * share:.2f} % of the run")


def main() -> None:
    """Prints the ratios."""
    if len(sys.argv) < 2:
        inside()
        return
    from websockets.sync.client import connect

    server, turns = sys.argv[1].rstrip("/"), int(sys.argv[2]) if len(sys.argv) > 2 else 30
    client = uuid.uuid4().hex
    socket = connect(f"{server.replace('http', 'ws', 1)}/ws?clientId={client}", max_size=None)
    threading.Thread(target=lambda: [None for _ in socket], daemon=True).start()
    kinds = (None, "trace", "mitigate", None)
    for kind in kinds:  # loads, calibrates, warms up
        seconds(server, client, workflow(kind, 10**6))
    ratios: dict[str, list[float]] = {"trace": [], "mitigate": [], "plain": []}
    plain = []
    for turn in range(turns):
        # Every kind comes first as often as any other.
        order = [(turn + i) % len(kinds) for i in range(len(kinds))]
        taken = {i: seconds(server, client, workflow(kinds[i], 4 * turn + i)) for i in order}
        plain.append(taken[0])
        for i, name in ((1, "trace"), (2, "mitigate"), (3, "plain")):
            ratios[name].append(taken[i] / taken[0])
    print(f"plain: median {statistics.median(plain):.3f} s a run of {STEPS} steps, {turns} turns")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name} to plain: {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
