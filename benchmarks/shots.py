"""What the benchmarks of other methods share: which images, how they are sampled, what a way of sampling costs, and tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from memorization_guard.adapters.hooks import replaced
from memorization_guard.adapters.network import denoisers
from memorization_guard.lab import Lab
from memorization_guard.lab.evaluate import FIRST_SEED

GUIDANCE = 7.5

#: Images a prompt, by group.
IMAGES = {"exact": 8, "template": 12, "rare": 4, "ordinary": 2, "settled": 2}


@dataclass(frozen=True)
class Shot:
    """One image to be sampled."""

    group: str
    prompt: str
    seed: int


def shots(lab: Lab, split: str, groups: Sequence[str], per_group: int | None = None) -> list[Shot]:
    """Images of every prompt, seeds counted up from those of ``lab.evaluate``. With a limit a group, as many prompts as
    possible come first."""
    result = []
    for group in groups:
        count = IMAGES[group]
        first = FIRST_SEED[split] + 10_000 * list(IMAGES).index(group)
        texts = lab.prompts(group, split)
        members = [Shot(group, text, first + i * count + j) for j in range(count) for i, text in enumerate(texts)]
        result += members[:per_group]
    return result


def starting_latents(pipe: Any, part: Sequence[Shot]) -> Tensor:
    """The noise that a pipeline draws for these seeds: ``[B, C, H, W]``, drawn on the CPU so that devices agree."""
    config = denoisers(pipe)[0].config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(shot.seed)) for shot in part]
    return torch.cat(noise).to(pipe.device)


def embeddings(pipe: Any, part: Sequence[Shot]) -> tuple[Tensor, Tensor]:
    """The empty prompt's and the prompts' embeddings, as the pipeline makes them."""
    cond, uncond = pipe.encode_prompt([shot.prompt for shot in part], pipe.device, 1, True)
    return uncond, cond


def latents_of(pipe: Any, part: Sequence[Shot], **options: Any) -> Tensor:
    """Samples without decoding: the latents ``[B, C, H, W]`` that the pipeline hands on."""
    prompts = [shot.prompt for shot in part]
    return pipe(prompts, latents=starting_latents(pipe, part), output_type="latent", **options).images


def sample(pipe: Any, part: Sequence[Shot], steps: int, **instead: Any) -> np.ndarray:
    """Images ``[B, H, W, 3]`` uint8; ``instead`` are arguments of the pipeline to use instead."""
    arguments = {"prompt": [shot.prompt for shot in part], "latents": starting_latents(pipe, part)} | instead
    images = pipe(num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np", **arguments).images
    return (images * 255).round().astype(np.uint8)


@dataclass
class Calls:
    """Calls of the network: evaluations alone, products of its Jacobian with a vector, and passes backwards through it."""

    forward: int = 0
    jvp: int = 0
    backward: int = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Calls]:
    """Counts the calls in a block. Two prompts in one batch, as guidance has them, are one call, and so is a whole batch."""
    (network,) = denoisers(pipe)
    forward, calls = network.forward, Calls()

    def passed_back(_gradient: Tensor) -> None:
        calls.backward += 1

    def counting(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        if forward_ad.unpack_dual(output[0]).tangent is not None:
            calls.jvp += 1
        else:
            calls.forward += 1
        if output[0].requires_grad:
            output[0].register_hook(passed_back)
        return output

    # Not a hook: whoever has the network answer once more goes past the hooks.
    with replaced(network, "forward", counting):
        yield calls


def peak_memory(call: Callable[[], object]) -> int:
    """The peak size of all CPU tensors during ``call``, in bytes, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def costs(pipe: Any, ways: dict[str, Callable[[list[Shot]], object]], images: Sequence[Shot]) -> dict[str, dict[str, Any]]:
    """What each way of sampling costs beyond the way named ``"plain"``, one image at a time.

    All ways take their turn at each image, in another order each time, so that other load on the machine affects all alike.

    Returns:
        By way ``time_ratio``, the median ratio to plain, and ``time_ratio_95``, its bootstrap interval over the images;
        ``extra_calls``, means an image; ``extra_memory``, of the first image, in bytes.
    """
    names = list(ways)
    for way in ways.values():
        way([images[0]])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, list[Calls]] = {name: [] for name in names}
    for turn, shot in enumerate(images):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with counted(pipe) as count:
                start = time.perf_counter()
                ways[name]([shot])
                seconds[name].append(time.perf_counter() - start)
            calls[name].append(count)
    memory = {name: peak_memory(lambda way=way: way([images[0]])) for name, way in ways.items()}
    rng = np.random.default_rng(0)
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        ratios = np.array(seconds[name]) / np.array(seconds["plain"])
        drawn = np.median(ratios[rng.integers(len(ratios), size=(400, len(ratios)))], axis=1)
        result[name] = {
            "time_ratio": float(np.median(ratios)),
            "time_ratio_95": np.quantile(drawn, [0.025, 0.975]).tolist(),
            "extra_calls": {
                kind: statistics.fmean(getattr(c, kind) for c in calls[name])
                - statistics.fmean(getattr(c, kind) for c in calls["plain"])
                for kind in ("forward", "jvp", "backward")
            },
            "extra_memory": memory[name] - memory["plain"],
        }
    result["plain"]["seconds"] = statistics.median(seconds["plain"])
    result["plain"]["memory"] = memory["plain"]
    return result


def describe(cost: dict[str, Any]) -> list[str]:
    """The cells of a table: extra calls, time, extra memory."""
    named = {"forward": "", "jvp": " JVP", "backward": " backward"}
    calls = [f"{count:.4g}{named[kind]}" for kind, count in cost["extra_calls"].items() if count]
    low, high = cost["time_ratio_95"]
    memory = max(0, cost["extra_memory"]) / 2**20
    return [", ".join(calls) or "0", f"{cost['time_ratio']:.3f} ({low:.3f}-{high:.3f})", f"{memory:.1f} MiB"]


def print_counts(groups: dict[str, dict[str, Any]]) -> None:
    """How many images and prompts the figures rest on."""
    print(", ".join(f"{group}: {row['images']} images of {row['prompts']} prompts" for group, row in groups.items()))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def interval(values: dict[str, Any], name: str, digits: int = 3) -> str:
    """A figure of ``memorization_guard.statistics`` with its interval, as text."""
    low, high = values[f"{name}_95"]
    return f"{values[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
