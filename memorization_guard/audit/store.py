"""How results get into the folder of an audit, each of them once, even if processes are killed at any moment.

An unfinished part has a journal. Every batch is appended to it and flushed to the disk before the next one begins; its line
has a checksum, so that a damaged line costs its batch and nothing else. When all images of the part are there, the part is
written whole and the journal is deleted. The process that works on a part holds its
lock, which the operating system releases when the process dies. A kill, a full disk or a lost machine therefore costs only
the batches that were being sampled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from ..files import parse_json, read_whole, write_whole
from ..fingerprint import content_hash
from . import AuditError
from .dataset import IMAGES, MANIFEST, PROFILE, RESULTS, SCHEMA, TRAINING, write_table
from .plan import Job

log = logging.getLogger(__name__)

WORK = ".work"
LOCK = ".lock"

#: Bytes of the largest journal that is read, of a thousand traces.
MAX_JOURNAL = 512 * 2**20

#: Key of a row's image as PNG, which is replaced by the name of its file.
PNG = "png"


def clear(folder: Path) -> None:
    """Deletes the files that only an unfinished audit needs."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def untidy(folder: Path) -> bool:
    """Whether a finished audit has leftover files of its work."""
    return (folder / WORK).exists() or any(folder.glob(".*.part"))


class Store:
    """Writes into the folder of an audit.

    Raises:
        AuditError: if the folder holds no audit but other files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Files of another process that has begun and is calibrating are ours too.
        ours = (PROFILE, RESULTS, IMAGES, TRAINING, WORK, LOCK)
        new = folder.is_dir() and not (folder / MANIFEST).exists()
        if new and any(p.name not in ours and p.suffix != ".part" for p in folder.iterdir()):
            raise AuditError(f"{folder} holds files that do not belong to an audit: name another folder")

    @property
    def work(self) -> Path:
        """Folder of the files that are needed only until the audit is finished."""
        return self.folder / WORK

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block that only one process is in at a time; others wait. Makes the folder if need be.

        Raises:
            OSError: if the folder cannot be made or written to.
        """
        for inside in (RESULTS, IMAGES, WORK):
            (self.folder / inside).mkdir(parents=True, exist_ok=True)
        # This lock is not in the folder of work, which is deleted while other processes may wait here.
        with FileLock(self.folder / LOCK):
            _sweep(self.folder)
            yield

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest."""
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")

    def done(self, number: int) -> bool:
        """Whether a part is finished."""
        return self._result(number).exists()

    def claim(self, number: int, jobs: Sequence[Job]) -> Part | None:
        """Takes a part to work on; ``None`` if it is finished, or if another process works on it.

        Raises:
            AuditError: if its journal belongs to another audit.
        """
        lock = FileLock(self.work / f"part-{number:06d}.lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):
            # Another process has it, or has just finished the audit and deleted the folder of work.
            return None
        try:
            # Checked again with the lock held: another process may just have finished the part.
            if self.done(number):
                _remove(lock)
                return None
            _sweep(self._result(number).parent, self._result(number).name)
            _sweep(self.folder / IMAGES / f"{number:06d}")
            _sweep(self.work, f"part-{number:06d}.jsonl")
            return Part(self, number, jobs, lock)
        except BaseException:
            lock.release()
            raise

    def _result(self, number: int) -> Path:
        return self.folder / RESULTS / f"part-{number:06d}.parquet"


class Part:
    """A part that this process works on. Made by :meth:`Store.claim`."""

    def __init__(self, store: Store, number: int, jobs: Sequence[Job], lock: FileLock) -> None:
        self._store, self._number, self._lock = store, number, lock
        self._journal_path = store.work / f"part-{number:06d}.jsonl"
        self._images = [job.image for job in jobs]
        self._key = content_hash([[job.image, job.prompt, job.seed] for job in jobs])
        self._rows: dict[int, dict[str, Any]] = {}
        self._read_journal()
        #: Images that are still to be made.
        self.missing = [job for job in jobs if job.image not in self._rows]
        #: Number of images that were found finished.
        self.found = len(self._rows)
        #: Whether all images are there and the part is written.
        self.finished = False
        if not self.missing:
            self._finish()

    def _read_journal(self) -> None:
        header = _line({"key": self._key}, "")
        content = read_whole(self._journal_path, MAX_JOURNAL) if self._journal_path.exists() else b""
        # What follows the last line feed is a batch that a kill or a full disk has cut off.
        *lines, _ = content.split(b"\n")
        kept, damaged = [header], 0
        for number, line in enumerate(lines):
            if number == 0 and (other := _read(line, "")) is not None:
                if other != {"key": self._key}:
                    raise AuditError(f"{self._journal_path} is the journal of other images: delete it to make these again")
            elif (rows := _rows(_read(line, self._key))) is None:
                damaged += 1
            else:
                self._rows |= rows
                kept.append(line + b"\n")
        if damaged:
            log.warning(
                "%s: %d of %d lines are damaged; their images are made again.", self._journal_path, damaged, len(lines)
            )
        if (whole := b"".join(kept)) != content:
            write_whole(self._journal_path, whole)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps a batch: once this returns, it survives a kill. Rows that are there already are ignored.

        Raises:
            OSError: if the disk is full; the batch is then not kept.
        """
        new = [dict(row) for row in rows if row["image"] not in self._rows]
        if not new:
            return
        for row in new:
            png = row.pop(PNG, None)
            row["file"] = None if png is None else self._save_image(row["image"], png)
        with open(self._journal_path, "ab") as stream:
            stream.write(_line(new, self._key))
            stream.flush()
            os.fsync(stream.fileno())
        self._rows |= {row["image"]: row for row in new}
        if len(self._rows) == len(self._images):
            self._finish()

    def release(self) -> None:
        """Leaves the part to other processes; its finished images are kept."""
        self._lock.release()

    def _save_image(self, image: int, png: bytes) -> str:
        name = f"{IMAGES}/{self._number:06d}/{image:08d}.png"
        path = self._store.folder / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, png)
        return name

    def _finish(self) -> None:
        write_table(self._store._result(self._number), [self._rows[image] for image in self._images])
        self._journal_path.unlink(missing_ok=True)
        self.finished = True
        _remove(self._lock)


def _line(content: Any, key: str) -> bytes:
    """A line of a journal: a checksum and JSON. The checksum holds the part's key, so that no other part's line is taken."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return _checksum(text, key) + b" " + text + b"\n"


def _read(line: bytes, key: str) -> Any:
    """What :func:`_line` wrote, from the line without its end; ``None`` if it is damaged."""
    checksum, _, text = line.partition(b" ")
    return parse_json(text) if checksum == _checksum(text, key) else None


def _checksum(text: bytes, key: str) -> bytes:
    return hashlib.sha256(key.encode() + text).hexdigest().encode()


def _rows(batch: Any) -> dict[int, dict[str, Any]] | None:
    """The rows of a batch in a journal, by image; ``None`` if they cannot be written as part of the results."""
    if not isinstance(batch, list) or not all(isinstance(row, dict) and type(row.get("image")) is int for row in batch):
        return None
    if any(row.get(field.name) is None for row in batch for field in SCHEMA if not field.nullable):
        return None
    try:
        pa.Table.from_pylist(batch, schema=SCHEMA).validate(full=True)
    except (TypeError, OverflowError, pa.ArrowException):
        return None
    return {row["image"]: row for row in batch}


def _sweep(folder: Path, name: str = "*") -> None:
    """Deletes the temporary files of ``name`` that a killed :func:`write_whole` has left."""
    for leftover in folder.glob(f".{name}.*.part"):
        leftover.unlink(missing_ok=True)


def _remove(lock: FileLock) -> None:
    """Releases and deletes the lock of a finished part. A process that locks the deleted file finds the part finished."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
