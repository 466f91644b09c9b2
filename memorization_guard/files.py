"""Files that are written whole or not at all, and names out of data, which are checked before they become paths."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path


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

    Raises:
        OSError: if the folder is missing or not writable, or the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
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
