"""Image files that somebody hands over: opened within limits of size, and by decoders that start no other program."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .files import ContentError, read_whole

#: Bytes of the largest file that is read. Pillow has a limit of pixels, 90 million, and 1 MB for a text within.
MAX_FILE = 256 * 2**20

#: The formats that the hosts write. Pillow opens more formats, and calls other programs for some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")


@contextmanager
def opened(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """An image file; its pixels are decoded when they are asked for, which counts as opening.

    Raises:
        ContentError: if it is too large, or cannot be read as an image; the message names the file.
        OSError: if the file cannot be read.
    """
    try:
        content = read_whole(path, MAX_FILE)
    except ContentError as error:
        raise ContentError(f"{path.name} cannot be read as an image: {error}") from None
    with decoded(content, path.name, formats) as image:
        yield image


@contextmanager
def decoded(content: bytes, name: str, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """An image file's content, as :func:`opened` gives it; ``name`` is for the message.

    Raises:
        ContentError: as there.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            # Up to twice its own limit Pillow warns and goes on.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=[name for name in formats if name in Image.OPEN]) as image:
                yield image
    except Exception as error:  # decoders fail in many ways on files that were made to break them
        bomb = isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))
        why = str(error) if bomb else type(error).__name__
        raise ContentError(f"{name} cannot be read as an image ({', '.join(formats)}): {why}") from None
