"""Files that are read within limits and written whole or not at all, and names out of data, which become paths.

Whoever hands a file over may have made it to do harm, so no file is read whole without a limit, and no JSON without one of
depth.
"""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

from .core.errors import GuardError

#: Bytes of the largest JSON that is read: some hundred traces. What it makes in memory can be twenty times as much.
MAX_JSON = 32 * 2**20

#: Lists and objects within each other in JSON: far more than we write, far less than Python's own calls can follow.
MAX_DEPTH = 64

#: Bytes of a file's name that leave room for what :func:`write_whole` puts around it; file systems take 255.
MAX_NAME = 200


class ContentError(GuardError, ValueError):
    """A file that is too large to be read, or text that is no JSON of ours; the message is one line."""


def read_whole(path: str | os.PathLike[str], limit: int = MAX_JSON) -> bytes:
    """The content of an ordinary file.

    Raises:
        ContentError: if it has more than ``limit`` bytes; nothing is read then.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise ContentError(f"{os.fspath(path)} is larger than {limit >> 20} MB")
        return stream.read()


def parse_json(text: str | bytes, limit: int = MAX_JSON) -> Any:
    """The content of JSON that somebody else may have written.

    Raises:
        ContentError: if it is no JSON, is longer than ``limit``, or is nested deeper than :data:`MAX_DEPTH`.
    """
    if len(text) > limit:
        raise ContentError(f"the JSON is larger than {limit >> 20} MB")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ContentError("the JSON is nested too deep") from None
    except ValueError as error:
        # Python's word for a number of thousands of digits speaks of its own settings.
        known = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        raise ContentError(f"not JSON: {error if known else 'a number has too many digits'}") from None
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for each in level
            for part in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            if isinstance(part, (dict, list))
        ]
        if not level:
            return data
    raise ContentError("the JSON is nested too deep")


def shown_name(path: str | os.PathLike[str]) -> str:
    """The name of a file as text. Bytes of a name that are no UTF-8, as of files from old systems, become U+FFFD."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


def path_inside(folder: Path, name: str) -> Path:
    """The file that ``name`` means in ``folder``. Every name that comes out of data becomes a path here.

    Args:
        folder: the only folder whose files may be meant.
        name: relative to it, such as a row's ``file``.

    Raises:
        ValueError: if no file can have this name (it is empty, or holds a control character or half a surrogate pair), or if
            it leads out of the folder, also by a link.
    """
    if not name or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise ValueError(f"{name!r} cannot be the name of a file")
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        raise ValueError(f"{name!r} cannot be the name of a file") from None
    if not inside:
        raise ValueError(f"{name!r} lies outside {folder}")
    return path


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Writes ``data`` to ``path`` in one step, by way of a temporary file beside it; text as UTF-8.

    Half a character, as stands for a byte in the name of a file that is no UTF-8, becomes a question mark.

    Raises:
        OSError: if the folder is missing or not writable, or the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    content = data.encode("utf-8", "replace") if isinstance(data, str) else data
    # The temporary file's name is longer, and has to be one that the file system takes too.
    short = os.fsdecode(os.fsencode(path.name)[:MAX_NAME])
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{short}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner can read; an ordinary file follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
