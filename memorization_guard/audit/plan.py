"""Which images an audit makes: every prompt of a list in its order, each with one or several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..fingerprint import file_hash
from ..prompts import SEED_STRIDE, ListedPrompt, PromptListError, stream_prompts

#: Bounds of the number of images in a part. A part is then finished soon, and ten million images are only ten thousand files.
SMALLEST_PART, LARGEST_PART = 64, 1024
#: Number of parts of a smaller audit, so that there is work for several processes.
PARTS = 16
#: Prompts that are checked together when the list is read again.
BLOCK = 1024


@dataclass(frozen=True)
class Job:
    """One image to be made.

    Attributes:
        image: its number in the audit, from 0. row: the number of its prompt in the list, from 0.
        prompt, kind: from the list.
        seed: of its noise, which is drawn on the CPU so that it is the same on every device.
    """

    image: int
    row: int
    prompt: str
    kind: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """All images of an audit. They are read from the list each time and not kept in memory. Every block of prompts is held
    against what it was when the list was read first, so that no image is made of a list that was changed since.

    Attributes:
        source: the file of prompts. column: the name of its column, if it was given.
        sha256: hash of the file. rows: number of prompts.
        blocks: a number for every :data:`BLOCK` prompts, the same for the same prompts within this process.
        seeds_per_prompt: images of each prompt.
        seed: the first image has the seed ``seed + SEED_STRIDE``, so that it shares no noise with a calibration, and each
            image after it the next one. Where the list names a seed, the images of that prompt begin there.
    """

    source: Path
    column: str | None
    sha256: str
    rows: int
    blocks: tuple[int, ...]
    seeds_per_prompt: int
    seed: int

    @classmethod
    def of(cls, path: Path, *, column: str | None = None, seeds_per_prompt: int = 1, seed: int = 0) -> Plan:
        """Reads the whole list once, so that a bad line is found before the first image is made.

        Raises:
            FileNotFoundError: if there is no such file.
            PromptListError: if it cannot be read, holds no prompt, or is changed meanwhile.
        """
        rows, blocks = 0, []
        sha256 = file_hash(path) if path.is_file() else ""
        for block in _blocks(path, column):
            rows += len(block)
            blocks.append(_number(block))
        if not rows:
            raise PromptListError(f"{path} holds no prompt")
        if file_hash(path) != sha256:
            raise PromptListError(f"{path} was changed while it was read: call again once it is whole")
        return cls(path, column, sha256, rows, tuple(blocks), seeds_per_prompt, seed)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.rows * self.seeds_per_prompt

    @property
    def part_size(self) -> int:
        """Number of images in a part, a multiple of 64."""
        wanted = -(-self.images // (PARTS * SMALLEST_PART)) * SMALLEST_PART
        return min(LARGEST_PART, max(SMALLEST_PART, wanted))

    def parts(self, size: int) -> Iterator[list[Job]]:
        """The images, ``size`` at a time; the last part may be smaller.

        Raises:
            PromptListError: at the first block of prompts that is not what it was.
        """
        jobs = self._jobs()
        while part := list(islice(jobs, size)):
            yield part

    def _jobs(self) -> Iterator[Job]:
        for row, listed in enumerate(self._prompts()):
            image = row * self.seeds_per_prompt
            first = self.seed + SEED_STRIDE + image if listed.seed is None else listed.seed
            for repetition in range(self.seeds_per_prompt):
                # After 2**63 - 1, seeds go on from 0.
                yield Job(image + repetition, row, listed.text, listed.kind, (first + repetition) % 2**63)

    def _prompts(self) -> Iterator[ListedPrompt]:
        blocks = _blocks(self.source, self.column)
        for known in (*self.blocks, None):
            try:
                block = next(blocks, None)
            except PromptListError:  # it could be read before
                block = []
            if (None if block is None else _number(block)) != known:
                raise PromptListError(f"{self.source} was changed during the audit: put it back as it was")
            yield from block or ()


def _blocks(path: Path, column: str | None) -> Iterator[list[ListedPrompt]]:
    prompts = stream_prompts(path, column)
    while block := list(islice(prompts, BLOCK)):
        yield block


def _number(block: list[ListedPrompt]) -> int:
    return hash(tuple((listed.text, listed.kind, str(listed.seed)) for listed in block))
