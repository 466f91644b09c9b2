"""Parquet files that somebody else may have written, opened within limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Bytes of the largest footer. What three of its bytes say of a column takes some 700 in memory.
MAX_FOOTER = 4 * 2**20

#: The longest list in a footer, such as the columns of a row group. The reader makes room for as many as a list says it has
#: before it looks whether they are there.
MAX_ENTRIES = 10_000


@contextmanager
def open_parquet(path: str | os.PathLike[str], **options: Any) -> Iterator[pq.ParquetFile]:
    """The file, for the time of a block. Opened here, since pyarrow takes a name for an address, and none that is not UTF-8.

    Args:
        options: of ``pyarrow.parquet.ParquetFile``.

    Raises:
        pyarrow.ArrowException, OSError: if it cannot be read, also if its footer is beyond the limits.
    """
    with open(path, "rb") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell() >= 8:
            stream.seek(-8, os.SEEK_END)
            footer = int.from_bytes(stream.read(4), "little")
            if footer > MAX_FOOTER:
                raise pa.ArrowInvalid(f"its footer says that it has {footer} bytes; up to {MAX_FOOTER} are read")
        stream.seek(0)
        limits = {"thrift_string_size_limit": MAX_FOOTER, "thrift_container_size_limit": MAX_ENTRIES}
        with pq.ParquetFile(stream, **limits, **options) as file:
            yield file
