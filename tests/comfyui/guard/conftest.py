"""The usual nodes around a guard, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memorization_guard import Trace
from memorization_guard.lab import prompts

EXACT = prompts("exact", "tuning")[0]
STEPS, CFG = 30, 7.5


@dataclass
class Bench:
    """The usual nodes around a guard; ``guard`` is the guarded model, ``model`` the same without."""

    g: Any
    lab: Any
    guard: Any
    model: Any
    positive: Any
    negative: Any
    latent: Any

    def text(self, text: str) -> Any:
        return self.g.node("CLIPTextEncode", clip=self.lab[1], text=text)[0]

    def lora(self) -> Any:
        """The model with a small LoRA behind the guard."""
        return self.g.node("LoraLoaderModelOnly", model=self.model, lora_name="small.safetensors", strength_model=0.5)[0]

    def ksampler(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "seed": 5,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        }
        return self.g.node("KSampler", **(inputs | changes))[0]

    def advanced(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "noise_seed": 5,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
        }
        return self.g.node("KSamplerAdvanced", **(inputs | changes))[0]

    def sampler_custom(self, **changes: Any) -> Any:
        inputs = {
            "model": self.model,
            "add_noise": True,
            "noise_seed": 5,
            "cfg": CFG,
            "positive": self.positive,
            "negative": self.negative,
            "sampler": self.g.node("KSamplerSelect", sampler_name="euler")[0],
            "sigmas": self.sigmas(),
            "latent_image": self.latent,
        }
        return self.g.node("SamplerCustom", **(inputs | changes))[0]

    def sigmas(self, **changes: Any) -> Any:
        inputs = {"model": self.model, "scheduler": "normal", "steps": STEPS, "denoise": 1.0}
        return self.g.node("BasicScheduler", **(inputs | changes))[0]

    def custom(self, guider: str, **inputs: Any) -> Any:
        chosen = self.g.node("KSamplerSelect", sampler_name="euler")[0]
        noise = self.g.node("RandomNoise", noise_seed=5)[0]
        guide = self.g.node(guider, model=self.model, **inputs)[0]
        return self.g.node(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guide,
            sampler=chosen,
            sigmas=self.sigmas(),
            latent_image=self.latent,
        )[0]


@pytest.fixture
def bench(graph: Any) -> Callable[..., Bench]:
    def make(
        mode: str | None = "trace", text: str = EXACT, batch: int = 1, profile: bool = True, clip: bool = False, **guard: Any
    ) -> Bench:
        g = graph()
        lab = g.node("MemorizationGuardLoadLabModel")
        model, watcher = lab[0], None
        if mode is not None:
            if profile:
                guard["profile"] = lab[3]
            if clip:
                guard["clip"] = lab[1]
            watcher = g.node("MemorizationGuard", model=model, mode=mode, **guard)
            model = watcher[0]
        made = Bench(
            g, lab, watcher, model, None, None, g.node("EmptyLatentImage", width=128, height=128, batch_size=batch)[0]
        )
        made.positive, made.negative = made.text(text), made.text("")
        return made

    return make


@pytest.fixture(scope="session", autouse=True)
def lora(server: Any) -> None:
    """A small LoRA for the lab model, in the server's folder."""
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    width = {"up": (96, 2), "down": (2, 128)}
    weights = {f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in width.items()}
    (server.folder / "models" / "loras").mkdir(exist_ok=True)
    save_file(weights, server.folder / "models" / "loras" / "small.safetensors")


@dataclass
class Result:
    images: list[np.ndarray]
    runs: list[list[Trace]]
    run: Any
    metadata: dict[str, Any]


@pytest.fixture
def finish(server: Any) -> Callable[..., Result]:
    """Decodes and saves a latent, with a report where there is a guard, and runs it all."""

    def run(bench: Bench, latent: Any, fresh: bool = True) -> Result:
        report = None
        if bench.guard is not None:
            report = bench.g.node("MemorizationGuardReport", trace=bench.guard[1], latent=latent)
            latent = report[0]
        save = bench.g.node(
            "SaveImage", images=bench.g.node("VAEDecode", samples=latent, vae=bench.lab[2])[0], filename_prefix="t"
        )
        if fresh:
            server.free(unload_models=False, free_memory=True)
        queued = server.queue(bench.g.prompt(), extra_data={"extra_pnginfo": {}})
        queued.wait()
        pictures = queued.images(save)
        runs = queued.outputs(report)["memorization_guard"] if report is not None else []
        return Result(
            [np.asarray(picture) for picture in pictures],
            [[Trace.from_dict(trace) for trace in entry["traces"]] for entry in runs],
            queued,
            pictures[0].text,
        )

    return run
