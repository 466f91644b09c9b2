"""Prompt lists: files of users, and a list of our own."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .core.calibration import MIN_RUNS, CalibrationError
from .core.errors import GuardError

#: The seeds of a list's images begin this far above those of the reference prompts, and a second list's this far above the
#: first's, so that no noise is used twice.
SEED_STRIDE = 1_000_000

#: Names of the key or column of a prompt, in the order in which they are tried.
COLUMNS = ("caption", "prompt", "text")


class PromptListError(GuardError, ValueError):
    """A prompt list that cannot be used."""


def reference_prompts() -> list[str]:
    """400 diverse prompts of our own to calibrate a model with. They describe nothing that models are known to copy.

    The first 50, a mix of all, are sampled to the end; of the others the first evaluation is taken. Of every prompt two more
    evaluations are taken, in a noise of ours and in its negative.
    """
    return resources.files(__package__).joinpath("reference_prompts.txt").read_text(encoding="utf-8").splitlines()


def typed_prompts(text: str) -> list[str]:
    """Reference prompts from typed text, one a line.

    Raises:
        CalibrationError: if they are fewer than a profile needs.
    """
    return enough([line.strip() for line in text.splitlines() if line.strip()])


def enough(prompts: list[str]) -> list[str]:
    """Returns ``prompts`` if a profile can be made from them.

    Raises:
        CalibrationError: if they are fewer than a profile needs.
    """
    if len(prompts) < MIN_RUNS:
        raise CalibrationError(f"{len(prompts)} reference prompts: give at least {MIN_RUNS}, better a few hundred, one a line")
    return prompts


@dataclass(frozen=True)
class ListedPrompt:
    """A prompt of a list, with the other values of its line.

    Attributes:
        text: the prompt.
        line: number of its line (in a table, of its row), from 1.
        kind: from the key or column ``kind`` or ``group``, or ``None``.
        seed: from ``seed``, or ``None``.
        images: names of training images, from ``image``, which holds one name or a list.
    """

    text: str
    line: int
    kind: str | None = None
    seed: int | None = None
    images: tuple[str, ...] = ()


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """All prompts of a list at once. Formats and errors as for :func:`stream_prompts`.

    Raises:
        PromptListError: also if the list holds no prompt.
    """
    prompts = [listed.text for listed in stream_prompts(path)]
    if not prompts:
        raise PromptListError(f"{path} holds no prompt")
    return prompts


def stream_prompts(path: str | os.PathLike[str], column: str | None = None) -> Iterator[ListedPrompt]:
    """The prompts of a list one by one, so that a list may hold millions. Blank lines and empty cells are skipped.

    A line is a prompt in ``.txt`` and an object in ``.jsonl``; a row is a prompt in ``.csv`` (comma, semicolon or tab) and
    ``.parquet``. Text is UTF-8, with or without a byte order mark.

    Args:
        path: the list; its suffix tells the format.
        column: key or column of the prompt; if not given, ``caption``, ``prompt`` or ``text``, in upper or lower case.

    Raises:
        FileNotFoundError: if there is no such file.
        PromptListError: if the list cannot be read; the message names the line.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PromptListError(
            f"{path}: prompt lists are .txt (a prompt a line), .jsonl (objects with a caption or prompt), .csv or .parquet"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt list at {path}")
    return reader(path, column)


def _read_txt(path: Path, _column: str | None) -> Iterator[ListedPrompt]:
    for line, text in _lines(path):
        yield ListedPrompt(text, line)


def _read_jsonl(path: Path, column: str | None) -> Iterator[ListedPrompt]:
    for line, text in _lines(path):
        where = f"{path}, line {line}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise PromptListError(f"{where}: not JSON ({error.msg})") from None
        keys = _Keys(row, column) if isinstance(row, dict) else None
        found = keys.listed(row, line, where) if keys is not None else None
        if found is None:
            raise PromptListError(
                f"{where}: no text under the key {repr(column) if column else f'{COLUMNS[0]!r} or {COLUMNS[1]!r}'}"
            )
        yield found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbers of the lines that are not blank, and their stripped text. Only line feeds end a line."""
    with open(path, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise PromptListError(f"{path}, line {line}, is not UTF-8 text: save it as UTF-8") from None
            if text:
                yield line, text


def _read_csv(path: Path, column: str | None) -> Iterator[ListedPrompt]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            header = stream.readline()
            stream.seek(0)
            # Prompts contain commas, so the separator is looked for in the names of the columns.
            rows = csv.DictReader(stream, delimiter=max(",;\t", key=header.count))
            keys = _Keys(rows.fieldnames or (), column)
            if keys.text is None:
                raise PromptListError(_no_column(path, rows.fieldnames or (), column))
            for row in rows:
                if listed := keys.listed(row, rows.line_num, f"{path}, line {rows.line_num}"):
                    yield listed
        except UnicodeDecodeError:
            raise PromptListError(f"{path} is not UTF-8 text: save it as UTF-8") from None
        except csv.Error as error:
            raise PromptListError(f"{path}, line {rows.line_num}: {error}") from None


def _read_parquet(path: Path, column: str | None) -> Iterator[ListedPrompt]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise PromptListError(f'{path}: .parquet needs pyarrow: pip install "memorization-guard[audit]"') from None
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            keys = _Keys(names, column)
            if keys.text is None:
                raise PromptListError(_no_column(path, names, column))
            line = 0
            for batch in file.iter_batches(batch_size=8192, columns=[name for name in keys if name is not None]):
                for row in batch.to_pylist():
                    line += 1
                    if listed := keys.listed(row, line, f"{path}, row {line}"):
                        yield listed
    except pa.ArrowException as error:
        raise PromptListError(f"{path} cannot be read as Parquet: {error}") from None


def _no_column(path: Path, names: Iterable[str], column: str | None) -> str:
    wanted = repr(column) if column else " or ".join(map(repr, COLUMNS))
    return f"{path} has no column {wanted}; it has {', '.join(map(repr, names))}: name the one that holds the prompts"


class _Keys:
    """The keys of a row that hold each value; ``None`` for a value without a key."""

    def __init__(self, names: Iterable[str], column: str | None) -> None:
        by_name = {name.lower(): name for name in reversed(list(names)) if name}
        exact = set(by_name.values())

        def first(*wanted: str) -> str | None:
            return next((by_name[name] for name in wanted if name in by_name), None)

        self.text = (column if column in exact else None) if column else first(*COLUMNS)
        self.kind, self.seed, self.image = first("kind", "group"), first("seed"), first("image")

    def __iter__(self) -> Iterator[str | None]:
        yield from dict.fromkeys((self.text, self.kind, self.seed, self.image))

    def listed(self, row: Mapping[str, Any], line: int, where: str) -> ListedPrompt | None:
        """The prompt of a row; ``None`` if the row holds no text."""
        text, kind, seed, image = (
            None if key is None else row.get(key) for key in (self.text, self.kind, self.seed, self.image)
        )
        if not isinstance(text, str) or not text.strip():
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptListError(f"{where}: the prompt holds half a character (a lone surrogate)") from None
        if seed is not None and seed != "":
            try:
                seed = int(seed)
            except (ValueError, TypeError, OverflowError):
                seed = -1
            if not 0 <= seed < 2**63:
                raise PromptListError(f"{where}: the seed is {row.get(self.seed or '')!r}; give a whole number from 0")
        else:
            seed = None
        images = (
            tuple(map(str, image)) if isinstance(image, list) else (str(image),) if isinstance(image, str) and image else ()
        )
        return ListedPrompt(text.strip(), line, str(kind) if kind else None, seed, images)
