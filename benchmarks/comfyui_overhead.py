"""What the guard costs in a running ComfyUI: KSampler runs on the lab model, plain and guarded in turns, in one server.

    python benchmarks/comfyui_overhead.py http://127.0.0.1:8188 [turns]
    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/comfyui_overhead.py

The first needs `websockets`: a client listens, so that live events are sent as they are to a browser. Each turn samples plain,
traced, mitigated and plain again; times are the server's own, from the start of a prompt to its end, and figures are medians
of the ratio within a turn with their quartiles. Plain against plain says what such a figure means on this machine.

The second runs in a process of its own, without a server. The network's answers are recorded once and given back from then on,
so that nothing is left of a step but ComfyUI's code and ours: the difference, guarded to plain, is what our code costs.
"""

from __future__ import annotations

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


def inside(turns: int = 60) -> None:
    """Prints what the guard adds to a step, in microseconds, where the network's answers cost nothing."""
    from comfyui_lab import Lab, Method, load

    lab = Lab(load())
    prompts = {"ordinary": lab.lab.prompts("ordinary", "tuning")[:1], "memorized": lab.lab.prompts("exact", "tuning")[1:2]}
    for kind, prompt in prompts.items():
        answers: list[Any] = []
        count = 0

        def recorded(apply: Any, parts: Any, answers: list[Any] = answers) -> Any:
            nonlocal count
            if count == len(answers):
                answers.append(apply(parts["input"], parts["timestep"], **parts["c"]))
            count += 1
            return answers[count - 1]

        def patched(model: Any, recorded: Any = recorded) -> Any:
            model = model.clone()
            model.set_model_unet_function_wrapper(recorded)
            return model

        def run(mode: str | None, prompt: list[str] = prompt, patched: Any = patched) -> float:
            nonlocal count
            count = 0
            guard = {"mode": mode, "profile": lab.profile} if mode else {}
            return lab.sample(prompt, 5, steps=STEPS, method=Method(patched), **guard).seconds

        modes = (None, "trace", "mitigate", None)
        taken: dict[int, list[float]] = {i: [] for i in range(len(modes))}
        for turn in range(turns + 3):
            for i, mode in enumerate(modes):
                seconds = run(mode)
                if turn >= 3:  # the first runs load and warm up
                    taken[i].append(seconds)
        medians = [statistics.median(values) for values in taken.values()]
        added = [1e6 * (median - medians[0]) / STEPS for median in medians]
        print(
            f"{kind} prompt, {STEPS} steps: ComfyUI alone {1e6 * medians[0] / STEPS:.0f} us a step; added by trace "
            f"{added[1]:.0f}, by mitigate {added[2]:.0f}, by nothing {added[3]:.0f}"
        )


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
