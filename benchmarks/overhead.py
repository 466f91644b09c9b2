"""What watching costs: traced and mitigated against plain sampling, and the bare monitor.

    python benchmarks/overhead.py [--device cuda] [--runs 12]

Plain, traced and mitigated runs take turns in one process and are compared turn by turn, so that a machine that gets slower
or busier in between weighs on all of them alike. The figure is the median ratio, with the quartiles as its spread; the
spread of plain against plain says what such a figure means on this machine. The bare monitor takes in an evaluation and a
latent a step, timed by the processor time of its thread (on CUDA by the clock); its floor is what three norms and one
difference cost alone, on the same tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memorization_guard import NoiseLevel, RunSettings, StabilityMonitor
from memorization_guard.core.settings import Mode
from memorization_guard.diffusers import guard
from memorization_guard.lab import pipeline, prompts
from memorization_guard.lab import profile as lab_profile

LATENTS = ((1, 4, 64, 64), (8, 16, 128, 128))
STEPS = 50


def timed(call: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def sampling(device: str, runs: int) -> None:
    pipe = pipeline().to(device)
    stability = lab_profile()
    prompt = prompts("ordinary")[0]

    def sample() -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(prompt, num_inference_steps=STEPS, guidance_scale=7.5, generator=generator)

    def watched(mode: Mode) -> None:
        with guard(pipe, stability, mode) as run:
            sample()
        assert len(run.traces) == 1

    ways: dict[str, Callable[[], None]] = {
        "plain": sample,
        "plain again": sample,
        "traced": lambda: watched("trace"),
        "mitigation on": lambda: watched("mitigate"),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(runs):
        # Another order each turn, so that no way always comes after the same one.
        for name in names[turn % 4 :] + names[: turn % 4]:
            seconds[name].append(timed(ways[name], device))
    print(f"bundled pipeline, {STEPS} steps, {runs} turns: plain takes {statistics.median(seconds['plain']):.3f} s")
    for name in names[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        print(f"  {name:14} / plain: {quartiles(ratios)}")


class _Counter(TorchDispatchMode):
    """Counts tensors created by operators, views and in-place results aside."""

    def __init__(self) -> None:
        super().__init__()
        self.created = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if isinstance(result, torch.Tensor) and returns and returns[0].alias_info is None:
            self.created += 1
        return result


def synchronisations(call: Callable[[], object]) -> int:
    """Calls of the CUDA runtime that wait for the device, or copy to the host, in one call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
    return sum(
        event.count
        for event in recorded.key_averages()
        if "Synchronize" in event.key or "DtoH" in event.key or event.key == "aten::_local_scalar_dense"
    )


def bare(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, cond, uncond, other = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    sigmas = [torch.full((shape[0],), 14.0 * 0.9**i, device=device) for i in range(STEPS)]
    levels = [NoiseLevel.from_sigma(14.0 * 0.9**i) for i in range(STEPS)]
    settings = RunSettings(guidance_scale=7.5, prediction_type="epsilon")
    turns = 40 if x.numel() < 1 << 18 else 5
    clock = time.perf_counter if device == "cuda" else time.thread_time

    def floor() -> None:
        for y in (x, x - other, cond):
            torch.linalg.vector_norm(y.flatten(1), dim=1)

    def run(without: torch.Tensor | None) -> None:
        monitor = StabilityMonitor(settings=settings)
        for number, (sigma, level) in enumerate(zip(sigmas, levels, strict=True)):
            latent = x if number % 2 else other
            monitor.predicted(latent, sigma, cond, without)
            monitor.latent(latent, level, evaluated=True)

    def per_step(call: Callable[[], object], steps: int) -> str:
        call()
        return quartiles([timed(call, device, clock) / steps * 1e6 for _ in range(turns)])

    name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} on {device}"
    print(f"bare monitor, {name}, microseconds a step:")
    print(f"  {'floor':20} {per_step(floor, 1)}")
    for name, without in (("one prediction", None), ("both predictions", uncond)):
        microseconds = per_step(lambda without=without: run(without), STEPS)  # type: ignore[misc]
        with _Counter() as counter:
            run(without)
        waits = ""
        if device == "cuda":
            waits = f", synchronisations a run {synchronisations(lambda without=without: run(without))}"  # type: ignore[misc]
        print(f"  {name:20} {microseconds}; tensors allocated a step {counter.created / STEPS:.0f}{waits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=12)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in LATENTS:
        bare(arguments.device, shape, torch.float32)
    if arguments.device == "cuda":
        bare(arguments.device, (8, 4, 128, 128), torch.float16)
    sampling(arguments.device, arguments.runs)


if __name__ == "__main__":
    main()
