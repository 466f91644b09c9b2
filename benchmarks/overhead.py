"""What watching costs: traced and mitigated against plain sampling, and the bare monitor.

    python benchmarks/overhead.py [--device cuda] [--runs 12]

Plain, traced and mitigated runs take turns in one process and are compared turn by turn, so that a machine that gets slower
or busier in between weighs on all of them alike. The figure is the median ratio, with the quartiles as its spread; the
spread of plain against plain says what such a figure means on this machine. The floor of the monitor is what the three
norms and the difference alone cost, called on the same tensors without anything of ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memorization_guard import StabilityMonitor
from memorization_guard.diffusers import guard
from memorization_guard.lab import pipeline, prompts
from memorization_guard.lab import profile as lab_profile

LATENTS = ((1, 4, 64, 64), (8, 16, 128, 128))
STEPS = 50


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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

    def watched(mitigate: bool) -> None:
        with guard(pipe, stability, mitigate=mitigate) as run:
            sample()
        assert len(run.traces) == 1

    ways: dict[str, Callable[[], None]] = {
        "plain": sample,
        "plain again": sample,
        "traced": lambda: watched(False),
        "mitigation on": lambda: watched(True),
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


def bare(device: str, shape: tuple[int, ...]) -> None:
    z_prev, z_next, x0, cond, uncond = (torch.randn(shape, device=device) for _ in range(5))
    turns = 40 if z_prev.numel() < 1 << 18 else 5

    def floor() -> None:
        for x in (z_next, z_next - z_prev, x0):
            torch.linalg.vector_norm(x.flatten(1), dim=1)

    def per_step(new_step: Callable[[], Callable[[], object]]) -> str:
        def run() -> None:
            step = new_step()
            for _ in range(STEPS):
                step()

        run()
        return quartiles([timed(run, device) / STEPS * 1e6 for _ in range(turns)])

    print(f"bare monitor, {'x'.join(map(str, shape))} float32 on {device}, microseconds a step:")
    print(f"  {'floor':20} {per_step(lambda: floor)}")
    predictions = {"eps_cond": cond, "eps_uncond": uncond}
    for name, extra in (("norms", {}), ("norms and guidance", predictions)):

        def new_step(extra: dict[str, torch.Tensor] = extra) -> Callable[[], object]:
            return partial(StabilityMonitor().step, z_prev, z_next, x0, sigma=1.0, x0_coefficient=0.5, **extra)

        microseconds, step = per_step(new_step), new_step()
        with _Counter() as counter:
            step()
        waits = f", synchronisations {synchronisations(step)}" if device == "cuda" else ""
        print(f"  {name:20} {microseconds}; tensors allocated {counter.created}{waits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=12)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in LATENTS:
        bare(arguments.device, shape)
    sampling(arguments.device, arguments.runs)


if __name__ == "__main__":
    main()
