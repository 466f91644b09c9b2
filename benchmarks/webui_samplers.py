"""What the guard does with every sampler of a running WebUI, Forge or reForge: the tables in docs/webui.md.

    python benchmarks/webui_samplers.py http://127.0.0.1:7860 FOLDER [--samplers Euler "DPM fast"] [--write webui]

The server needs --api, and among its extensions this repository and ``benchmarks/webui_batch``. One profile, calibrated with
Euler, judges every sampler. With the lab model chosen, which the script's page adds, exact, template and ordinary prompts of
the evaluation split are sampled mitigated, the memorized ones from the same noise without the guard too, and copies are
counted. With any other model it is only seen whether each sampler is judged and a correction reaches the image, with
thresholds that everything exceeds. Figures of each sampler go to a JSON file in FOLDER; a second call does what is missing. A
sampler takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from memorization_guard import Thresholds, Trace, lab

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "webui.md"

CFG, BATCH = 7.5, 10
#: Samplers that need more steps than asked for: below 20 Restart never goes back.
FEWEST_STEPS = {"Restart": 20}
FIRST_SEED = {"exact": 100, "template": 1100, "ordinary": 2100}
PROFILE = "benchmark"
TITLE = "Memorization Guard"
LAB = "memorization-guard-lab"
#: Thresholds that every image exceeds.
EVERYTHING = Thresholds(false_positive_rate=0.999)

LAB_HEAD = [
    *("sampler", "steps traced", "bit-identical", "triggered: exact", "template", "ordinary"),
    *("copies without: exact", "template", "left after mitigation: exact", "template", "ordinary touched"),
]
OTHER_HEAD = ["sampler", "steps traced", "bit-identical", "judged", "corrected from evaluation", "reaches the image"]


class Server:
    """A running host, and the settings of all its generations."""

    def __init__(self, url: str, steps: int, size: int) -> None:
        self._url, self._steps = url.rstrip("/"), steps
        self.settings = {"width": size, "height": size, "cfg_scale": CFG}

    def steps(self, sampler: str) -> int:
        return max(self._steps, FEWEST_STEPS.get(sampler, 0))

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.loads(answer.read())

    def sample(self, prompts: list[str], sampler: str, seed: int, *guard: Any) -> tuple[list[Image.Image], list[Trace]]:
        """Images of a batch and their traces; unguarded without arguments of the accordion."""
        batch = {"script_name": "Batch of prompts", "script_args": ["\n".join(prompts)]}
        body = {"prompt": "", "sampler_name": sampler, "seed": seed, "steps": self.steps(sampler), **self.settings, **batch}
        if guard:
            body["alwayson_scripts"] = {TITLE: {"args": [True, *guard]}}
        answer = self.ask("/sdapi/v1/txt2img", body)
        images = [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in answer["images"]]
        report = json.loads(answer["info"])["extra_generation_params"].get(f"{TITLE} traces", {"images": []})
        return images, [Trace.from_dict(runs[0]["trace"]) for runs in report["images"]]

    def calibrate(self) -> None:
        arguments = ["calibrate", "None", *constants(Thresholds()), "\n".join(lab.prompts("reference")), PROFILE]
        body = {"prompt": "", "sampler_name": "Euler", "seed": 1000, "steps": self._steps, **self.settings}
        self.ask("/sdapi/v1/txt2img", {**body, "batch_size": BATCH, "script_name": TITLE, "script_args": [*arguments, True]})


def constants(thresholds: Thresholds) -> list[Any]:
    """In the order of the scripts' arguments."""
    return [thresholds.false_positive_rate, thresholds.steering_guidance, thresholds.gamma, thresholds.correction]


def batches(group: str, count: int) -> Iterator[tuple[list[str], int]]:
    """The first ``count`` evaluation prompts of a group, and the seed of the first of each batch."""
    prompts = lab.prompts(group, "evaluation")[:count]
    for start in range(0, len(prompts), BATCH):
        yield prompts[start : start + BATCH], FIRST_SEED[group] + start


def figures(server: Server, sampler: str, counts: dict[str, int]) -> dict[str, Any]:
    """What is seen of one sampler with the lab model, as JSON has it."""
    found: dict[str, Any] = {"sampler": sampler, "identical": True}
    for group, count in counts.items():
        total = dict.fromkeys(("images", "unscored", "triggered", "corrected", "copies", "left"), 0)
        for prompts, seed in batches(group, count):
            mitigated, traces = server.sample(prompts, sampler, seed, "mitigate", PROFILE)
            total["images"] += len(prompts)
            total["unscored"] += sum(trace.verdict == "unscored" for trace in traces)
            total["triggered"] += sum(trace.trigger_step is not None for trace in traces)
            total["corrected"] += sum(bool(trace.mitigated.any()) for trace in traces)
            if group == "ordinary":
                continue
            plain, _ = server.sample(prompts, sampler, seed)
            total["copies"] += copies(plain, prompts)
            total["left"] += copies(mitigated, prompts)
            if group == "exact":
                traced, traces = server.sample(prompts, sampler, seed, "trace", PROFILE)
                found["identical"] &= [each.tobytes() for each in plain] == [each.tobytes() for each in traced]
                found["steps"] = f"{len(traces[0].steps)} of {server.steps(sampler)}"
        found[group] = total
    return found


def copies(images: list[Image.Image], prompts: list[str]) -> int:
    scores = [lab.copy_score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return sum(score > lab.COPY_THRESHOLD for score in scores)


def other_figures(server: Server, sampler: str) -> dict[str, Any]:
    """The same for a model of which no training image is known."""
    prompts = lab.prompts("ordinary", "tuning")[:2]
    plain, _ = server.sample(prompts, sampler, 100)
    traced, traces = server.sample(prompts, sampler, 100, "trace", "None")
    mitigated, corrected = server.sample(prompts, sampler, 100, "mitigate", PROFILE, *constants(EVERYTHING))
    pixels = [[image.tobytes() for image in images] for images in (plain, traced, mitigated)]
    return {
        "sampler": sampler,
        "steps": f"{len(traces[0].steps)} of {server.steps(sampler)}",
        "identical": pixels[0] == pixels[1],
        "judged": all(trace.verdict != "unscored" for trace in corrected),
        "first": max(int(trace.evaluations.corrected.argmax()) for trace in corrected),
        "reaches": all(trace.mitigated.any() for trace in corrected)
        and all(a != b for a, b in zip(pixels[0], pixels[2], strict=True)),
    }


def row(found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    yes = {True: "yes", False: "**no**"}
    first = [found["sampler"], found["steps"], yes[found["identical"]]]
    if "reaches" in found:
        return [*first, yes[found["judged"]], str(found["first"]), yes[found["reaches"]]]

    def share(group: str, what: str) -> str:
        return f"{found[group][what]} of {found[group]['images']}"

    memorized = ("exact", "template")
    return [
        *first,
        *(share(group, "triggered") for group in (*memorized, "ordinary")),
        *(share(group, "copies") for group in memorized),
        *(share(group, "left") for group in memorized),
        share("ordinary", "corrected"),
    ]


def write(host: str, said: str, lines: list[str]) -> None:
    """Puts the table into its place in the document."""
    place = re.compile(rf"(<!-- samplers {host}: begin -->\n).*(\n<!-- samplers {host}: end -->)", re.DOTALL)
    text, found = place.subn(
        lambda edges: "\n".join([edges[1], said, "", *lines, edges[2]]), DOCUMENT.read_text(encoding="utf-8")
    )
    if not found:
        raise SystemExit(f"{DOCUMENT} has no place for a table of {host!r}")
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    """Measures what is missing, prints the lines as they come, and writes the table where it is told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samplers", nargs="*", help="all, if none is named")
    parser.add_argument("--exact", type=int, default=30)
    parser.add_argument("--template", type=int, default=16)
    parser.add_argument("--ordinary", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--write", metavar="HOST", help="the document's table to replace: webui, forge or reforge")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    server = Server(arguments.url, arguments.steps, arguments.size)
    of_lab = LAB in (server.ask("/sdapi/v1/options")["sd_model_checkpoint"] or "")
    counts = {group: getattr(arguments, group) for group in FIRST_SEED}
    if not (calibrated := arguments.folder / "calibrated").exists():
        server.calibrate()
        calibrated.touch()
    head = LAB_HEAD if of_lab else OTHER_HEAD
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    every = [each["name"] for each in server.ask("/sdapi/v1/samplers")]
    chosen = arguments.samplers or every
    for sampler in chosen:
        file = arguments.folder / f"{sampler}.json"
        if not file.exists():
            found = figures(server, sampler, counts) if of_lab else other_figures(server, sampler)
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        lines.append("| " + " | ".join(row(json.loads(file.read_text(encoding="utf-8")))) + " |")
        print(lines[-1], flush=True)
    if arguments.write is not None:
        said = f"{arguments.steps} steps, and where a sampler needs more, as many as the table says, CFG {CFG}; "
        said += f"one profile, from the lab's reference prompts under Euler with {arguments.steps} steps, for all."
        if missing := [sampler for sampler in every if sampler not in chosen]:
            said += f" Not run: {', '.join(missing)}."
        write(arguments.write, said, lines)


if __name__ == "__main__":
    main()
