"""Prompt lists: files of users, and a list of our own."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .core.calibration import MIN_RUNS, CalibrationError
from .core.errors import GuardError
from .files import ContentError, parse_json

#: The seeds of a list's images begin this far above those of the reference prompts, and a second list's this far above the
#: first's, so that no noise is used twice.
SEED_STRIDE = 1_000_000

#: Bytes of the longest line, row or value of a list.
MAX_LINE = 2**20

#: Characters of all prompts of a list that is kept in memory, each counted with :data:`_OVERHEAD` more.
MAX_LIST = 64 * 2**20
_OVERHEAD = 64

#: A Parquet file may write the same value for many rows in a few bytes. It may hold so many rows and bytes of text, and beyond
#: them so many for each of its own bytes.
MAX_ROWS, ROWS_A_BYTE = 1_000_000, 8
MAX_TEXT, TEXT_A_BYTE = 64 * 2**20, 200

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
        images: names of training images, from ``image`` or ``file_name``, which holds one name or a list.
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
    return [listed.text for listed in list_prompts(path)]


def list_prompts(path: str | os.PathLike[str]) -> list[ListedPrompt]:
    """As :func:`read_prompts`, with the other values of each line.

    Raises:
        PromptListError: also if the list is too long to be kept in memory.
    """
    prompts, size = [], 0
    for listed in stream_prompts(path):
        size += len(listed.text) + sum(map(len, listed.images)) + _OVERHEAD
        if size > MAX_LIST:
            raise PromptListError(
                f"{path} is too long: more than {MAX_LIST >> 20} MB of prompts, of which all are needed at once"
            )
        prompts.append(listed)
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
            row = parse_json(text)
        except ContentError as error:
            raise PromptListError(f"{where}: {error}") from None
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
        for line, raw in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
            if len(raw) > MAX_LINE:
                raise PromptListError(f"{path}, line {line}, is longer than {MAX_LINE >> 20} MB: a line holds one prompt")
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise PromptListError(f"{path}, line {line}, is not UTF-8 text: save it as UTF-8") from None
            if text:
                yield line, text


def _read_csv(path: Path, column: str | None) -> Iterator[ListedPrompt]:
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        while line := stream.readline(MAX_LINE + 1):
            taken += len(line)
            if taken > MAX_LINE:
                raise PromptListError(f"{path} has a row that is longer than {MAX_LINE >> 20} MB")
            yield line

    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            header = stream.readline(MAX_LINE)
            stream.seek(0)
            # Prompts contain commas, so the separator is looked for in the names of the columns.
            rows = csv.DictReader(lines(), delimiter=max(",;\t", key=header.count))
            keys = _Keys(rows.fieldnames or (), column)
            if keys.text is None:
                raise PromptListError(_no_column(path, rows.fieldnames or (), column))
            for row in rows:
                taken = 0
                if listed := keys.listed(row, rows.line_num, f"{path}, line {rows.line_num}"):
                    yield listed
        except UnicodeDecodeError:
            raise PromptListError(f"{path} is not UTF-8 text: save it as UTF-8") from None
        except csv.Error as error:
            raise PromptListError(f"{path}, line {rows.line_num}: {error}") from None


def _read_parquet(path: Path, column: str | None) -> Iterator[ListedPrompt]:
    try:
        import pyarrow as pa

        from .parquet import open_parquet
    except ImportError:
        raise PromptListError(f'{path}: .parquet needs pyarrow: pip install "memorization-guard[audit]"') from None
    try:
        with open_parquet(path) as file:
            schema, keys = file.schema_arrow, _Keys(file.schema_arrow.names, column)
            if keys.text is None:
                raise PromptListError(_no_column(path, schema.names, column))
            columns = [name for name in keys if name is not None]
            texts = _check_growth(path, file, columns)
        # Texts come as numbers of the different ones, so that a long text in many rows is in memory once.
        with open_parquet(path, read_dictionary=texts, buffer_size=MAX_LINE) as file:
            line, left = 0, MAX_TEXT + TEXT_A_BYTE * path.stat().st_size
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                left -= sum(_text_size(path, column) for column in batch.columns)
                if left < 0:
                    raise PromptListError(_grows(path))
                values = [
                    (column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).to_pylist()
                    for column in batch.columns
                ]
                for row in zip(*values, strict=True):
                    line += 1
                    if listed := keys.listed(dict(zip(batch.schema.names, row, strict=True)), line, f"{path}, row {line}"):
                        yield listed
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise PromptListError(f"{path} cannot be read as Parquet: {error}") from None


def _check_growth(path: Path, file: Any, columns: Iterable[str]) -> list[str]:
    """Refuses a file that says of itself that it is far larger in memory; gives those of its columns that hold text."""
    wanted = set(columns)
    about = [file.schema.column(number) for number in range(len(file.schema))]
    chosen = [number for number, leaf in enumerate(about) if leaf.path.split(".")[0] in wanted]
    size, about_file = path.stat().st_size, file.metadata
    # Not what is said of a column: pyarrow ends the process over some of that, where it should raise an error.
    content = sum(about_file.row_group(number).total_byte_size for number in range(file.num_row_groups))
    if about_file.num_rows > MAX_ROWS + ROWS_A_BYTE * size or content > MAX_TEXT + TEXT_A_BYTE * size:
        raise PromptListError(_grows(path))
    return [about[number].path for number in chosen if about[number].physical_type == "BYTE_ARRAY"]


def _text_size(path: Path, column: Any) -> int:
    """Bytes of text in a column of a batch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary)
    if (pc.max(lengths).as_py() or 0) > MAX_LINE:
        raise PromptListError(f"{path} has a value that is longer than {MAX_LINE >> 20} MB")
    return pc.sum(lengths.take(column.indices)).as_py() or 0


def _grows(path: Path) -> str:
    return f"{path} is far larger in memory than on the disk, as no list of prompts is: write it anew, or as .jsonl"


def _no_column(path: Path, names: Iterable[str], column: str | None) -> str:
    wanted = repr(column) if column else " or ".join(map(repr, COLUMNS))
    return f"{path} has no column {wanted}; it has {', '.join(map(repr, names)):.500}: name the one that holds the prompts"


class _Keys:
    """The keys of a row that hold each value; ``None`` for a value without a key."""

    def __init__(self, names: Iterable[str], column: str | None) -> None:
        by_name = {name.lower(): name for name in reversed(list(names)) if name}
        exact = set(by_name.values())

        def first(*wanted: str) -> str | None:
            return next((by_name[name] for name in wanted if name in by_name), None)

        self.text = (column if column in exact else None) if column else first(*COLUMNS)
        self.kind, self.seed, self.image = first("kind", "group"), first("seed"), first("image", "file_name")

    def __iter__(self) -> Iterator[str | None]:
        yield from dict.fromkeys((self.text, self.kind, self.seed, self.image))

    def listed(self, row: Mapping[str, Any], line: int, where: str) -> ListedPrompt | None:
        """The prompt of a row; ``None`` if the row holds no text."""
        text, kind, seed, image = (
            None if key is None else row.get(key) for key in (self.text, self.kind, self.seed, self.image)
        )
        if not isinstance(text, str) or not text.strip():
            return None
        images = (
            tuple(map(str, image)) if isinstance(image, list) else (str(image),) if isinstance(image, str) and image else ()
        )
        listed = ListedPrompt(text.strip(), line, str(kind) if kind else None, None, images)
        try:
            "".join((listed.text, listed.kind or "", *images)).encode()
        except UnicodeEncodeError:
            raise PromptListError(f"{where}: the prompt holds half a character (a lone surrogate)") from None
        if seed is not None and seed != "":
            try:
                seed = int(seed)
            except (ValueError, TypeError, OverflowError):
                seed = -1
            if not 0 <= seed < 2**63:
                raise PromptListError(f"{where}: the seed is {row.get(self.seed or '')!r:.60}; give a whole number from 0")
            listed = replace(listed, seed=seed)
        return listed
