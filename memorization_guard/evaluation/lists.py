"""The prompt lists of an evaluation, with the training images that their prompts may reproduce."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..files import ContentError
from ..pictures import FORMATS, opened
from ..prompts import PromptListError, list_prompts
from . import EvaluationError

#: The formats of training images.
PHOTOGRAPHS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A line of a prompt list.

    Attributes:
        text: the prompt.
        kind: what the line's key ``kind`` or ``group`` says (``"verbatim"``, ``"template"``), if it says anything.
        images: the training images that the prompt may reproduce.
    """

    text: str
    kind: str | None = None
    images: tuple[Path, ...] = ()


def read_list(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Reads a prompt list, and finds the training images of its prompts.

    Args:
        path: as for :func:`memorization_guard.prompts.list_prompts`.
        images: folder of training images. Those of a prompt are the files that its line's ``image`` names (one, or a list
            of them), or else every file whose name is the number of its line, from 1 (``17.png``, ``0017.jpg``).

    Raises:
        FileNotFoundError: if the list or a named image is missing.
        PromptListError: if the list cannot be read, or the folder holds no image for any of its prompts.
        EvaluationError: if a training image cannot be opened.
    """
    path = Path(path)
    by_number: dict[int, list[Path]] = {}
    if images is not None:
        for file in sorted(Path(images).iterdir()):
            if file.is_file() and file.stem.isdecimal():
                by_number.setdefault(int(file.stem), []).append(file)
    prompts = []
    for listed in list_prompts(path):
        files = by_number.get(listed.line, [])
        if images is not None and listed.images:
            files = [Path(images) / name for name in listed.images]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{path}, line {listed.line}: there is no image at {file}")
        for file in files:
            _check(file)
        prompts.append(Prompt(text=listed.text, kind=listed.kind, images=tuple(files)))
    if images is not None and not any(prompt.images for prompt in prompts):
        raise PromptListError(
            f"{images} holds no training image for {path}: name each after the number of its prompt's line (1.png), or name "
            "it under the key 'image' of the .jsonl"
        )
    return prompts


def _check(file: Path) -> None:
    """Opens a training image, so that a damaged one is known before sampling begins."""
    try:
        with opened(file, PHOTOGRAPHS) as image:
            image.verify()
    except ContentError as error:
        raise EvaluationError(str(error)) from None
