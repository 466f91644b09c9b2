"""What the guard sees and does with every sampler of a ComfyUI, on the lab model: the table in docs/comfyui.md.

    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/comfyui_samplers.py

Names of samplers, and other settings (--help), print rows only. One profile, calibrated with euler from reference prompts, is
carried over to all samplers; to those of CFG++, whose scale is far away, another, calibrated with euler_cfg_pp. With each,
memorized and ordinary prompts of the tuning split are sampled without the guard, traced, and mitigated, from the same noise.
Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "comfyui.md"
BEGIN, END = "<!-- samplers: begin -->", "<!-- samplers: end -->"

STEPS, CFG, SCHEDULER = 20, 7.5, "normal"
#: The scale of CFG++ is another one, of 1 to 2.
CFG_PP = 1.5
REFERENCES, IMAGES = 50, 8
#: What the profiles are made with that are carried over to the other samplers.
PROFILE_SAMPLER, CFG_PP_PROFILE_SAMPLER = "euler", "euler_cfg_pp"


def load() -> Any:
    """ComfyUI's modules on the path, and this repository as a pack of it: ``module("nodes.lab")`` gives a module."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import main  # noqa: F401

    import nodes

    if not asyncio.run(nodes.load_custom_node(str(REPOSITORY))):
        raise SystemExit("ComfyUI could not load the pack")
    name = str(REPOSITORY).replace(".", "_x_")
    return lambda part: importlib.import_module(f".{part}", name)


class Lab:
    """The lab model, sampled by ComfyUI."""

    def __init__(self, module: Any) -> None:
        self.sampling, self.lab = module("nodes.sampling"), module("memorization_guard.lab")
        self.calibration = module("memorization_guard.core.calibration")
        self.model, self.clip, self.vae, _ = module("nodes.lab").LoadLabModel.execute().args

    def sample(self, prompts: list[str], sampler: str, seed: int, **guard: Any) -> tuple[Any, Any, Any]:
        """Latents of the prompts, the guard's only run and the seconds it took; unguarded without ``mode``."""
        import comfy.sample
        import torch

        cfg = CFG_PP if sampler.endswith("cfg_pp") else CFG
        model, log = self.sampling.guard(self.model, **guard) if guard else (self.model, None)
        encoded = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt)) for prompt in prompts]
        positive = [[torch.cat([one[0][0] for one in encoded]), {}]]
        negative = [[self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))[0][0], {}]]
        latent = torch.zeros(len(prompts), 4, 16, 16)
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed + i) for i in range(len(prompts))])
        began = time.perf_counter()
        with torch.inference_mode():
            samples = comfy.sample.sample(
                model, noise, STEPS, cfg, sampler, SCHEDULER, positive, negative, latent, disable_pbar=True, seed=seed
            )
        return samples, log.runs()[0] if log else None, time.perf_counter() - began

    @functools.cache  # noqa: B019 (there is one lab)
    def profile(self, sampler: str, references: int) -> Any:
        """A profile of the sampler, from so many reference prompts."""
        runs = self.calibration.ReferenceRuns(None, sampler)
        prompts = self.lab.prompts("reference")[:references]
        runs.add(self.sample(prompts, sampler, 1000, mode="trace")[1].traces, len(prompts))
        return runs.profile()[0]

    def copies(self, latents: Any, prompts: list[str]) -> int:
        """How many of the latents are copies of what was duplicated under their prompts."""
        import torch

        with torch.inference_mode():
            images = (self.vae.decode(latents).clamp(0, 1) * 255).round().byte().numpy()
        scores = [self.lab.copy_score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return sum(score > self.lab.COPY_THRESHOLD for score in scores)


def row(lab: Lab, sampler: str, count: int, references: int, thresholds: Any) -> list[str]:
    """The table's row of one sampler, from ``count`` memorized and as many ordinary images."""
    import torch

    exact = list(itertools.islice(itertools.cycle(lab.lab.prompts("exact", "tuning")), count))
    ordinary = lab.lab.prompts("ordinary", "tuning")[:count]
    plain, _, _ = lab.sample(exact, sampler, 100)
    traced, run, _ = lab.sample(exact, sampler, 100, mode="trace")
    identical = "yes" if torch.equal(plain, traced) else "**no**"
    seen = f"{run.traces[0].steps} of {STEPS}"
    before = lab.copies(plain, exact)
    profile = lab.profile(CFG_PP_PROFILE_SAMPLER if sampler.endswith("cfg_pp") else PROFILE_SAMPLER, references)
    mitigated, run, _ = lab.sample(exact, sampler, 100, mode="mitigate", profile=profile, thresholds=thresholds)
    if all(trace.verdict == "unscored" for trace in run.traces):
        return [sampler, seen, identical, "not scored", "-", f"{before} of {count}", "-", "-"]
    triggered = sum(trace.trigger_step is not None for trace in run.traces)
    _, untouched, _ = lab.sample(ordinary, sampler, 200, mode="mitigate", profile=profile, thresholds=thresholds)
    touched = sum(bool(trace.mitigated.any()) for trace in untouched.traces)
    return [
        sampler,
        seen,
        identical,
        f"{triggered} of {count}",
        _first_corrected(run.traces),
        f"{before} of {count}",
        f"{lab.copies(mitigated, exact)} of {count}",
        f"{touched} of {count}",
    ]


def _first_corrected(traces: list[Any]) -> str:
    """How many images were corrected, and from which step on."""
    first = [int(trace.mitigated.argmax()) for trace in traces if trace.mitigated.any()]
    return f"{len(first)} of {len(traces)}" + (f", from step {statistics.median(first):g}" if first else "")


def main() -> None:
    """Measures every sampler, printing rows as they come, and puts the table into the document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("samplers", nargs="*", help="all, if none is named")
    parser.add_argument("--images", type=int, default=IMAGES, help="memorized images, and ordinary ones")
    parser.add_argument("--references", type=int, default=REFERENCES, help="reference prompts of the profile")
    parser.add_argument("--false-alarms", type=float)
    parser.add_argument("--steering-guidance", type=float)
    arguments, usual = parser.parse_args(), len(sys.argv) == 1
    module = load()
    lab = Lab(module)
    changed = {"false_alarms": arguments.false_alarms, "steering_guidance": arguments.steering_guidance}
    changed = {name: value for name, value in changed.items() if value is not None}
    thresholds = module("memorization_guard.core.detection").Thresholds(**changed)
    import comfy.samplers
    from comfyui_version import __version__

    head = [
        "sampler",
        "steps seen",
        "bit-identical",
        "triggered",
        "corrected",
        "copies without",
        "with mitigation",
        "ordinary touched",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    chosen = arguments.samplers or comfy.samplers.KSampler.SAMPLERS
    for sampler in chosen:
        lines.append("| " + " | ".join(row(lab, sampler, arguments.images, arguments.references, thresholds)) + " |")
        print(lines[-1], flush=True)
    if not usual:
        return
    said = (
        f"ComfyUI {__version__}, lab model, {STEPS} steps, scheduler {SCHEDULER}, cfg {CFG} (CFG++ {CFG_PP}), one profile "
        f"from {REFERENCES} reference prompts under {PROFILE_SAMPLER} for all (CFG++: under {CFG_PP_PROFILE_SAMPLER}), "
        f"{IMAGES} memorized and {IMAGES} ordinary images of the tuning split."
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + "\n\n" + said + "\n\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
