"""Prompt lists: as users have them on disk, and one that comes with us."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

from .calibration import MIN_RUNS, CalibrationError


def reference_prompts() -> list[str]:
    """64 diverse prompts of our own writing, to calibrate a model with; of nothing that is known for being copied."""
    return resources.files(__package__).joinpath("reference_prompts.txt").read_text(encoding="utf-8").splitlines()


def typed_prompts(text: str) -> list[str]:
    """Reference prompts that somebody typed, one a line.

    Raises:
        CalibrationError: if there are fewer than a profile needs.
    """
    return enough([line.strip() for line in text.splitlines() if line.strip()])


def enough(prompts: list[str]) -> list[str]:
    """``prompts`` themselves.

    Raises:
        CalibrationError: if they are fewer than a profile needs.
    """
    if len(prompts) < MIN_RUNS:
        raise CalibrationError(f"{len(prompts)} reference prompts: give at least {MIN_RUNS}, better 50, one a line")
    return prompts


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Prompts of a ``.txt`` file, a prompt a line, or a ``.jsonl`` file, objects with a ``caption`` or ``prompt``.

    Blank lines are skipped; UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as either, naming the line, or holds no prompt.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompt lists are .txt (a prompt a line) or .jsonl (objects with a caption or prompt)")
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt list at {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompts.append(line.strip() if path.suffix.lower() == ".txt" else _from_json(line, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _from_json(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from None
    text = (row.get("caption") or row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: no text under the key 'caption' or 'prompt'")
    return text.strip()
