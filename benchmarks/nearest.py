"""Memory and time of the search for the nearest training images, with made-up vectors.

python benchmarks/nearest.py --images 100000 --outputs 1000 --dimensions 512
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from memorization_guard.audit.nearest import BLOCK, Vectors, search


class _Nothing:
    def open(self) -> None:
        """No image: the encoder below makes vectors up."""


class _MadeUp:
    name = key = "made up"
    device = "cpu"

    def __init__(self, dimensions: int) -> None:
        self._draws, self._dimensions = np.random.default_rng(0), dimensions

    def __call__(self, images: list[object]) -> np.ndarray:
        rows = self._draws.standard_normal((len(images), self._dimensions), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _peak() -> int:
    """Bytes of memory at the highest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=512)
    arguments = parser.parse_args()
    encoder = _MadeUp(arguments.dimensions)
    with tempfile.TemporaryDirectory() as folder:
        vectors = Vectors.make(Path(folder), [_Nothing()] * arguments.images, encoder, key="", progress=False)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        queries = vectors.take(np.arange(min(BLOCK, arguments.outputs)))
        queries = np.resize(queries, (arguments.outputs, arguments.dimensions))
        before, start, used = _peak(), time.perf_counter(), time.process_time()
        found = search([queries, queries[:, ::-1].copy()], vectors)
        took, used = time.perf_counter() - start, time.process_time() - used
    right = (found.nearest == np.arange(arguments.outputs) % BLOCK).mean()
    print(
        f"{arguments.images:,} images, {arguments.outputs:,} outputs and their mirror images, {arguments.dimensions} "
        f"dimensions: {size / 2**20:,.0f} MB on the disk, {took:.1f} s ({used:.1f} s of processor time, "
        f"{torch.get_num_threads()} threads), {(_peak() - before) / 2**20:,.0f} MB of memory more than before "
        f"({before / 2**20:,.0f} MB), {right:.2%} found"
    )


if __name__ == "__main__":
    main()
