"""What guarding costs a service, and what sampling two images at once gains: the lab model, copies that share its weights.

    OMP_NUM_THREADS=1 python benchmarks/serving.py [--turns 12] [--steps 50]

The four ways, guarded or not and one image at a time or two, take turns in one process and are compared turn by turn, as in
``overhead.py``. Figures are medians, with the quartiles as their spread. CPU seconds are those of the process, which other
programs on the machine disturb less than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from memorization_guard.diffusers import copy_sharing_weights, guard
from memorization_guard.lab import pipeline, prompts
from memorization_guard.lab import profile as lab_profile

IMAGES = 4

Way = tuple[bool, int]


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def sampler(at_once: int, steps: int) -> Callable[[bool, int], tuple[float, float]]:
    """A function that samples :data:`IMAGES` images and gives the wall and CPU seconds of each."""
    pipe, profile, texts = pipeline(), lab_profile(), prompts("ordinary")[:IMAGES]
    pipes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(at_once):
        pipes.put(copy_sharing_weights(pipe))

    def paint(number: int, guarded: bool) -> None:
        pipe = pipes.get()
        # With mitigation, as the service does by default.
        with guard(pipe, profile, "mitigate") if guarded else contextlib.nullcontext() as run:
            pipe(texts[number], num_inference_steps=steps, generator=torch.Generator().manual_seed(number))
        assert run is None or len(run.traces) == 1
        pipes.put(pipe)

    def sample(guarded: bool, workers: int) -> tuple[float, float]:
        begun, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda number: paint(number, guarded), range(IMAGES)))
        return (time.perf_counter() - begun) / IMAGES, (time.process_time() - cpu) / IMAGES

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    sample = sampler(2, arguments.steps)
    ways: list[Way] = [(False, 1), (True, 1), (False, 2), (True, 2)]
    for way in ways:
        sample(*way)
    taken: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(arguments.turns):
        for way in ways[turn % 4 :] + ways[: turn % 4]:
            taken[way].append(sample(*way))

    def ratios(one: Way, other: Way, clock: int) -> str:
        return quartiles([a[clock] / b[clock] for a, b in zip(taken[one], taken[other], strict=True)])

    print(f"{arguments.turns} turns of {IMAGES} images, {arguments.steps} steps, torch threads {torch.get_num_threads()}")
    for guarded, workers in ways:
        seconds = quartiles([wall for wall, _ in taken[guarded, workers]])
        print(f"  {'guarded' if guarded else 'plain':8} {workers} at once: {seconds} s an image")
    for workers in (1, 2):
        print(f"guarded / plain, {workers} at once: {ratios((True, workers), (False, workers), 0)} on the clock,")
        print(f"                            {ratios((True, workers), (False, workers), 1)} in CPU seconds")
    print(f"two at once / one, guarded: {ratios((True, 2), (True, 1), 0)} seconds an image on the clock")


if __name__ == "__main__":
    main()
