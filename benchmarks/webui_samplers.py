"""What the guard sees and does with every sampler of a running WebUI, Forge or reForge: the tables in docs/webui.md.

    python benchmarks/webui_samplers.py http://127.0.0.1:7860 [--write webui]

The server needs --api and this repository among its extensions. With the lab model chosen, which the script's page adds,
copies are counted, before and after mitigation, on prompts of the tuning split. With any other model it is only said whether a
correction reaches the image, with thresholds that everything leaves. One profile, calibrated with Euler, is carried over to
all samplers; DDIM CFG++, whose scale is far away, has its own. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import statistics
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

from memorization_guard import Thresholds, Trace, lab

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "webui.md"

STEPS, CFG, SIZE = 20, 7.5, 128
REFERENCES, IMAGES = 50, 8
PROFILE_SAMPLER, CFG_PP = "Euler", "DDIM CFG++"
#: Names of the profile for all samplers, and of that for CFG++.
PROFILE, CFG_PP_PROFILE = "benchmark", "benchmark cfg++"
TITLE = "Memorization Guard"
LAB = "memorization-guard-lab"


class Server:
    """A running host, with a sampler and settings of its own."""

    def __init__(self, url: str, steps: int, size: int) -> None:
        self.url = url.rstrip("/")
        self.settings = {"steps": steps, "width": size, "height": size, "cfg_scale": CFG}

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=900) as answer:
            return json.loads(answer.read())

    def sample(self, prompt: str, sampler: str, seed: int, *guard: Any) -> tuple[Image.Image, Trace | None]:
        """An image and what was seen of it, unguarded without arguments of the accordion."""
        body = {"prompt": prompt, "sampler_name": sampler, "seed": seed, **self.settings}
        if guard:
            body["alwayson_scripts"] = {TITLE: {"args": [True, *guard]}}
        answer = self.ask("/sdapi/v1/txt2img", body)
        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")
        report = json.loads(answer["info"])["extra_generation_params"].get(f"{TITLE} traces")
        return image, Trace.from_dict(report["images"][0][0]["trace"]) if report else None

    def calibrate(self, sampler: str, prompts: list[str], name: str) -> None:
        """Makes a profile with the sampler."""
        arguments = ["calibrate", "None", *constants(Thresholds()), "\n".join(prompts), name, True]
        body = {"prompt": "", "sampler_name": sampler, "seed": 1000, "batch_size": 8, **self.settings}
        self.ask("/sdapi/v1/txt2img", {**body, "script_name": TITLE, "script_args": arguments})


def constants(thresholds: Thresholds) -> list[Any]:
    """Correction and thresholds in the order of the script's arguments."""
    return ["steer by guidance", *thresholds.to_dict().values()]


def lab_row(server: Server, sampler: str, count: int, thresholds: Thresholds) -> list[str]:
    """The table's row of one sampler, from ``count`` memorized and as many ordinary images."""
    exact = list(itertools.islice(itertools.cycle(lab.prompts("exact", "tuning")), count))
    ordinary = lab.prompts("ordinary", "tuning")[:count]
    plain = [server.sample(prompt, sampler, 100 + i)[0] for i, prompt in enumerate(exact)]
    traced = [server.sample(prompt, sampler, 100 + i, "trace", "None") for i, prompt in enumerate(exact)]
    same = all(a.tobytes() == b.tobytes() for a, (b, _) in zip(plain, traced, strict=True))
    row = [sampler, f"{traced[0][1].steps} of {STEPS}", "yes" if same else "**no**"]
    copies = f"{_copies(plain, exact)} of {count}"
    guard = "mitigate", _profile(sampler), *constants(thresholds)
    images, traces = zip(*(server.sample(prompt, sampler, 100 + i, *guard) for i, prompt in enumerate(exact)), strict=True)
    if all(trace.verdict == "unscored" for trace in traces):
        return [*row, "not scored", "-", copies, "-", "-"]
    untouched = [server.sample(prompt, sampler, 200 + i, *guard)[1] for i, prompt in enumerate(ordinary)]
    first = [int(trace.mitigated.argmax()) for trace in traces if trace.mitigated.any()]
    return [
        *row,
        f"{sum(trace.trigger_step is not None for trace in traces)} of {count}",
        f"{len(first)} of {count}" + (f", from step {statistics.median(first):g}" if first else ""),
        copies,
        f"{_copies(images, exact)} of {count}",
        f"{sum(bool(trace.mitigated.any()) for trace in untouched)} of {count}",
    ]


def _profile(sampler: str) -> str:
    return CFG_PP_PROFILE if sampler == CFG_PP else PROFILE


def _copies(images: Any, prompts: list[str]) -> int:
    scores = [lab.copy_score(image.reduce(2), prompt) for image, prompt in zip(images, prompts, strict=True)]
    return sum(score > lab.COPY_THRESHOLD for score in scores)


def other_row(server: Server, sampler: str) -> list[str]:
    """The same for a model of which no training image is known."""
    prompt = lab.prompts("ordinary", "tuning")[0]
    plain, _ = server.sample(prompt, sampler, 100)
    traced, trace = server.sample(prompt, sampler, 100, "trace", "None")
    row = [sampler, f"{trace.steps} of {server.settings['steps']}", "yes" if plain.tobytes() == traced.tobytes() else "**no**"]
    everything = Thresholds(false_alarms=0.999)
    image, trace = server.sample(prompt, sampler, 100, "mitigate", _profile(sampler), *constants(everything))
    changed = "yes" if trace.mitigated.any() and image.tobytes() != plain.tobytes() else "**no**"
    return [*row, "**no**" if trace.verdict == "unscored" else "yes", changed]


LAB_HEAD = ["triggered", "corrected", "copies without", "with mitigation", "ordinary touched"]
OTHER_HEAD = ["scored", "correction reaches the image"]


def main() -> None:
    """Measures every sampler, printing rows as they come, and puts the table into the document if it is told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("samplers", nargs="*", help="all, if none is named")
    parser.add_argument("--images", type=int, default=IMAGES, help="memorized images, and ordinary ones")
    parser.add_argument("--references", type=int, default=REFERENCES, help="reference prompts of the profile")
    parser.add_argument("--false-alarms", type=float, default=Thresholds().false_alarms)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--write", metavar="HOST", help="the document's table to replace: webui, forge or reforge")
    arguments = parser.parse_args()
    server = Server(arguments.url, arguments.steps, arguments.size)
    model = server.ask("/sdapi/v1/options")["sd_model_checkpoint"]
    of_lab = LAB in (model or "")
    head = ["sampler", "steps seen", "bit-identical", *(LAB_HEAD if of_lab else OTHER_HEAD)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    thresholds = Thresholds(false_alarms=arguments.false_alarms)
    samplers = arguments.samplers or [each["name"] for each in server.ask("/sdapi/v1/samplers")]
    references = lab.prompts("reference")[: arguments.references]
    server.calibrate(PROFILE_SAMPLER, references, PROFILE)
    if CFG_PP in samplers:
        server.calibrate(CFG_PP, references, CFG_PP_PROFILE)
    for sampler in samplers:
        row = lab_row(server, sampler, arguments.images, thresholds) if of_lab else other_row(server, sampler)
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    if arguments.write is None:
        return
    begin, end = (f"<!-- samplers {arguments.write}: {edge} -->" for edge in ("begin", "end"))
    said = (
        f"{arguments.steps} steps, CFG {CFG}, one profile from {arguments.references} reference prompts under "
        f"{PROFILE_SAMPLER} for all ({CFG_PP}: its own)"
    )
    if of_lab:
        said += f"; lab model, {arguments.images} memorized and {arguments.images} ordinary images of the tuning split"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{DOCUMENT} has no place for a table of {arguments.write!r}")
    DOCUMENT.write_text(f"{before}{begin}\n\n{said}.\n\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
