"""What the guard does in ComfyUI where a run does not begin in noise, or another run follows it, on the lab model.

    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/comfyui_passes.py FOLDER

Each row of the table that it prints is a way to chain KSamplers, all of them on the model of one guard that has the CLIP.
Exact, template and ordinary prompts of the evaluation split are sampled so with mitigation and, from the same noise, without a
guard: ordinary ones only where something was corrected. Images that are given are those of ordinary prompts, so that a copy
comes from the prompt alone. Figures go to a JSON file a row in FOLDER; a second call does what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_lab import CFG, Lab, load
from comfyui_samplers import BATCH, batches

GROUPS = {"exact": 30, "template": 16, "ordinary": 200}
STEPS = 20
COLUMNS = (
    "triggered: exact",
    "template",
    "copies without: exact",
    "template",
    "with mitigation: exact",
    "template",
    "ordinary touched",
)


@dataclass
class Chain:
    """KSamplers in a row: each goes on from the latent of the one before.

    Args:
        model: guarded or not. prompts: one an image of the batch. seed: of the noise of the first of them.
    """

    lab: Lab
    model: Any
    prompts: list[str]
    seed: int

    def __post_init__(self) -> None:
        self.positive, self.negative = self.lab.encoded(self.prompts), self.lab.encoded([""])

    def sample(self, latent: Any, sampler: str = "euler", **how: Any) -> Any:
        """What ComfyUI's KSampler makes of a latent ``[B, 4, h, w]``; ``how`` as its function has it."""
        import comfy.sample
        import torch

        seeds = range(self.seed, self.seed + len(latent))
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds])
        if how.get("disable_noise"):
            noise = torch.zeros_like(noise)
        with torch.inference_mode():
            return comfy.sample.sample(
                self.model,
                noise,
                STEPS,
                CFG,
                sampler,
                "normal",
                self.positive,
                self.negative,
                latent,
                disable_pbar=True,
                **how,
            )

    def image(self) -> Any:
        """An image of the prompts, from noise."""
        import torch

        return self.sample(torch.zeros(len(self.prompts), 4, 16, 16))


def image_to_image(denoise: float) -> Callable[[Chain, Any], Any]:
    return lambda chain, given: chain.sample(given, denoise=denoise)


def inpainted(chain: Chain, given: Any) -> Any:
    """The inner three quarters of a side are painted anew, as behind Set Latent Noise Mask."""
    import torch

    mask = torch.zeros(len(given), 1, 16, 16)
    mask[..., 2:14, 2:14] = 1
    return chain.sample(given, noise_mask=mask)


def second_pass(denoise: float, size: int = 16) -> Callable[[Chain, Any], Any]:
    """A second KSampler over the first one's image, which may be enlarged between them."""

    def sample(chain: Chain, given: Any) -> Any:
        import comfy.utils

        first = chain.image()
        return chain.sample(comfy.utils.common_upscale(first, size, size, "bilinear", "disabled"), denoise=denoise)

    return sample


def split(at: int) -> Callable[[Chain, Any], Any]:
    """Two KSamplers Advanced: the second goes on after ``at`` of the steps, without noise of its own."""

    def sample(chain: Chain, given: Any) -> Any:
        import torch

        begun = chain.sample(torch.zeros(len(chain.prompts), 4, 16, 16), last_step=at, force_full_denoise=False)
        return chain.sample(begun, start_step=at, disable_noise=True)

    return sample


WAYS = {
    "image to image, denoise 0.3": image_to_image(0.3),
    "image to image, denoise 0.5": image_to_image(0.5),
    "image to image, denoise 0.75": image_to_image(0.75),
    "inpainting with a noise mask": inpainted,
    "KSampler Advanced, 4 of 20 steps, then the rest": split(4),
    "KSampler Advanced, 6 of 20 steps, then the rest": split(6),
    "KSampler Advanced, 10 of 20 steps, then the rest": split(10),
    "a second pass, denoise 0.6": second_pass(0.6),
    "a second pass, enlarged 1.5 times, denoise 0.6": second_pass(0.6, 24),
}


class Passes:
    """Measures rows; the images that are given are made once."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._given: dict[int, Any] = {}

    def given(self, count: int, seed: int) -> Any:
        """Latents of ``count`` ordinary prompts of the tuning split, another one for each seed."""
        if seed not in self._given:
            every = self._lab.lab.prompts("ordinary", "tuning")
            prompts = [every[(seed + i) % len(every)] for i in range(BATCH)]
            self._given[seed] = Chain(self._lab, self._lab.model, prompts, seed + 50_000).image()
        return self._given[seed][:count]

    def measured(self, way: Callable[[Chain, Any], Any], counts: dict[str, int]) -> dict[str, Any]:
        """The figures of one row, as JSON holds them."""
        figures: dict[str, Any] = {}
        for group, count in counts.items():
            total = dict.fromkeys(("images", "triggered", "unscored", "touched", "copies", "left"), 0)
            for prompts, seed in batches(self._lab, group, count, BATCH):
                given = self.given(len(prompts), seed)
                model, log = self._lab.sampling.guard(
                    self._lab.model, mode="mitigate", profile=self._lab.profile, encoder=self._lab.encoder(prompts)
                )
                mitigated = way(Chain(self._lab, model, prompts, seed), given)
                runs = [run.traces for run in log.runs()]
                total["images"] += len(prompts)
                total["unscored"] += sum(trace.verdict == "unscored" for traces in runs for trace in traces)
                for traces in zip(*runs, strict=True):
                    total["triggered"] += any(trace.trigger_step is not None for trace in traces)
                    total["touched"] += any(bool(trace.mitigated.any()) for trace in traces)
                if group != "ordinary":
                    plain = way(Chain(self._lab, self._lab.model, prompts, seed), given)
                    total["copies"] += self._copies(plain, prompts)
                    total["left"] += self._copies(mitigated, prompts)
            figures[group] = total
        return figures

    def _copies(self, latents: Any, prompts: list[str]) -> int:
        """How many latents are copies of what was duplicated under their prompts; larger images are looked at smaller."""
        import torch

        if latents.shape[-1] == 16:
            return sum(self._lab.copies(latents, prompts))
        with torch.inference_mode():
            images = self._lab.vae.decode(latents).movedim(-1, 1)
            images = torch.nn.functional.interpolate(images, (128, 128), mode="area").movedim(1, -1)
            pixels = (images.clamp(0, 1) * 255).round().byte().numpy()
        lab = self._lab.lab
        return sum(lab.copy_score(image, prompt) > lab.COPY_THRESHOLD for image, prompt in zip(pixels, prompts, strict=True))


def row(name: str, figures: dict[str, Any]) -> str:
    """A row of the table."""
    exact, template, ordinary = (figures[group] for group in GROUPS)

    def of(total: dict[str, int], what: str) -> str:
        return f"{total[what]} of {total['images']}"

    cells = [of(total, what) for what in ("triggered", "copies", "left") for total in (exact, template)]
    return "| " + " | ".join([name, *cells, of(ordinary, "touched")]) + " |"


def main() -> None:
    """Measures what is missing, and prints the rows of the table as they come."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the figures, a file a row")
    for group, count in GROUPS.items():
        parser.add_argument(f"--{group}", type=int, default=count, help=f"{group} prompts")
    arguments = parser.parse_args()
    counts = {group: getattr(arguments, group) for group in GROUPS}
    passes = Passes(Lab(load()))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print("| run | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1), sep="\n")
    for number, (name, way) in enumerate(WAYS.items()):
        file = arguments.folder / f"pass-{number}.json"
        figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if (figures.get("counts"), figures.get("name")) != (counts, name):
            figures = {"name": name, "counts": counts} | passes.measured(way, counts)
            file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        print(row(name, figures), flush=True)


if __name__ == "__main__":
    main()
