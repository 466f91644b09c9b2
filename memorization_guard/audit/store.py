"""How results get into the folder of an audit: each once, whatever is killed when.

A part under way has a journal, to which every batch is appended and flushed to the disk before the next one begins; when all
of its images are there, the part is written whole and the journal deleted. Who works on a part holds its lock, which the
operating system lets go of when the process dies. So a kill, a full disk or a lost machine costs the batches in flight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import write_whole
from ..fingerprint import content_hash
from . import AuditError
from .dataset import IMAGES, MANIFEST, PROFILE, RESULTS, write_table
from .plan import Job

WORK = ".work"
LOCK = ".lock"

#: Key under which a row brings its image as PNG; the file's name takes its place.
PNG = "png"


def clear(folder: Path) -> None:
    """Deletes what only an unfinished audit needs."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def untidy(folder: Path) -> bool:
    """Whether there is anything in the folder of a finished audit that is not of its results."""
    return (folder / WORK).exists() or any(folder.glob(".*.part"))


class Store:
    """The folder of an audit, to be written to.

    Raises:
        AuditError: if it is no audit, and holds other files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Another process may have begun, and be calibrating.
        ours = (PROFILE, RESULTS, IMAGES, WORK, LOCK)
        new = folder.is_dir() and not (folder / MANIFEST).exists()
        if new and any(p.name not in ours and p.suffix != ".part" for p in folder.iterdir()):
            raise AuditError(f"{folder} holds files that are of no audit: name another folder")

    @property
    def work(self) -> Path:
        """Folder of what is needed only until the audit is finished."""
        return self.folder / WORK

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in such a block at the same time; waits for one that is. Makes the folder if need be.

        Raises:
            OSError: if it cannot be made or written to.
        """
        for inside in (RESULTS, IMAGES, WORK):
            (self.folder / inside).mkdir(parents=True, exist_ok=True)
        # Not in the folder of work, which goes when the audit is finished, while others may be waiting here.
        with FileLock(self.folder / LOCK):
            _sweep(self.folder)
            yield

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Puts the manifest in place of the one before."""
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")

    def done(self, number: int) -> bool:
        """Whether a part is finished."""
        return self._result(number).exists()

    def claim(self, number: int, jobs: Sequence[Job]) -> Part | None:
        """Takes a part to work on; ``None`` if it is done, or somebody else's just now.

        Raises:
            AuditError: if its journal is of another audit, or damaged.
        """
        lock = FileLock(self.work / f"part-{number:06d}.lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):
            # It is in other hands; or they have just finished the audit, and the folder of work is gone.
            return None
        try:
            # Looked at under the lock: whoever held it may just have finished.
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
        #: What is still to be made.
        self.missing = [job for job in jobs if job.image not in self._rows]
        #: How many were found made.
        self.found = len(self._rows)
        #: Whether all of it is there, and the part left to nobody.
        self.finished = False
        if not self.missing:
            self._finish()

    def _read_journal(self) -> None:
        header = json.dumps({"key": self._key}).encode() + b"\n"
        content = self._journal_path.read_bytes() if self._journal_path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            write_whole(self._journal_path, header)
            return
        first, *lines = whole.splitlines(keepends=True)
        if first != header:
            raise AuditError(f"{self._journal_path} is the journal of other images: delete it to make these anew")
        kept = len(first)
        for line in lines:
            try:
                self._rows |= {row["image"]: row for row in json.loads(line)}
            except (ValueError, KeyError, TypeError):
                break  # what a failing disk garbled is made anew, with all after it
            kept += len(line)
        # Appending is to go on after the last whole batch.
        if kept < len(content):
            os.truncate(self._journal_path, kept)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps a batch for good: when this returns, no kill takes it away. Rows that are there already are not taken again.

        Raises:
            OSError: if the disk is full; the batch then counts as not made.
        """
        new = [dict(row) for row in rows if row["image"] not in self._rows]
        if not new:
            return
        for row in new:
            png = row.pop(PNG, None)
            row["file"] = None if png is None else self._save_image(row["image"], png)
        with open(self._journal_path, "ab") as stream:
            stream.write(json.dumps(new, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._rows |= {row["image"]: row for row in new}
        if len(self._rows) == len(self._images):
            self._finish()

    def release(self) -> None:
        """Leaves the part to others; nothing of it is lost."""
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


def _sweep(folder: Path, name: str = "*") -> None:
    """Deletes what :func:`write_whole` has left beside ``name`` where it was killed."""
    for leftover in folder.glob(f".{name}.*.part"):
        leftover.unlink(missing_ok=True)


def _remove(lock: FileLock) -> None:
    """Lets go of the lock of a finished part. Whoever holds the deleted file's lock meanwhile finds the part done."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
