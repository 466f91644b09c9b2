"""From which epoch or strength on does a LoRA copy its training images? What several audits with one training folder say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import ContentError, parse_json, read_whole
from . import AuditError
from .copies import SUMMARY
from .dataset import TRAINING, mapping, read_manifest

#: What a point has of an audit: shares with their intervals, by the key in ``training/summary.json``.
SHARES = {
    "images_copied": "training images that came back",
    "captions_copied": "captions that gave a copy",
    "outputs_triggered": "outputs that triggered",
}


def read_curve(folders: Sequence[Path]) -> dict[str, Any]:
    """The audits as points, in the order of the epochs or strengths.

    Returns:
        ``"axis"``, what the positions are: the ``strength`` of one LoRA, the ``number`` in its file's name, or the ``order``
        in which the folders were given. ``"points"``: of each audit its ``"name"``, ``"folder"``, ``"position"`` and the
        shares of :data:`SHARES` (``"count"``, ``"of"``, ``"rate"``, ``"interval"``). ``"encoder"``, ``"threshold"``,
        ``"images"``: what is the same in all.

    Raises:
        FileNotFoundError: if a folder is no audit, or was not held against a training folder.
        AuditError: if one cannot be read, or was made otherwise than the first.
    """
    from ..statistics import exact_rate

    points: list[dict[str, Any]] = []
    same: list[dict[str, Any]] = []
    for folder in folders:
        manifest = read_manifest(folder)
        try:
            found = parse_json(read_whole(folder / TRAINING / SUMMARY))
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} was not held against a training folder: audit with --training") from None
        except ContentError as error:
            raise AuditError(f"{folder / TRAINING / SUMMARY} cannot be read: {error}") from None
        try:
            loras = [(str(lora["file"]), float(lora["weight"])) for lora in mapping(manifest.get("model"))["loras"]]
            count, of = sum(found["verdicts"]["triggered"].values()), int(found["outputs"])
            if not of:
                raise ValueError("an audit has outputs")
            shares = found | {"outputs_triggered": exact_rate(count, of)}
            points.append(
                {"folder": str(folder), "name": _name(loras), "loras": loras}
                | {key: {name: shares[key][name] for name in ("count", "of", "rate", "interval")} for key in SHARES}
            )
            same.append(
                {
                    "training folder": (found["training"]["images"], found["training"]["captions"]),
                    "encoder": found["encoder"],
                    "threshold": found["threshold"]["value"],
                    "settings": manifest["settings"],
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise AuditError(f"{folder / TRAINING / SUMMARY} is damaged: delete it and call the audit again") from None
        if differing := [name for name, value in same[-1].items() if value != same[0][name]]:
            raise AuditError(f"{folder} was made with another {differing[0]} than {folders[0]}, so they are no curve")
    axis, positions = _positions([point.pop("loras") for point in points])
    ordered = sorted(({**point, "position": place} for point, place in zip(points, positions, strict=True)), key=_place)
    about = same[0]
    return {
        "axis": axis,
        "points": ordered,
        "encoder": about["encoder"],
        "threshold": about["threshold"],
        "images": about["training folder"][0],
    }


def _place(point: dict[str, Any]) -> float:
    return float(point["position"])


def _name(loras: Sequence[tuple[str, float]]) -> str:
    return ", ".join(file if weight == 1 else f"{file}, {weight:g}" for file, weight in loras) or "no LoRA"


def _positions(audits: Sequence[Sequence[tuple[str, float]]]) -> tuple[str, list[float]]:
    """Where each audit stands, and what that is. The model without a LoRA stands at 0."""
    if all(len(loras) <= 1 for loras in audits):
        files = {file for loras in audits for file, _ in loras}
        strengths = [loras[0][1] if loras else 0.0 for loras in audits]
        if len(files) == 1 and len(set(strengths)) == len(audits):
            return "strength", strengths
        numbers = [re.findall("[0-9]+", Path(loras[0][0]).stem)[-1:] if loras else ["0"] for loras in audits]
        found = [float(number[0]) for number in numbers if number]
        if len(set(found)) == len(audits) and len({loras[0][1] for loras in audits if loras}) <= 1:
            return "number", found
    return "order", [float(number) for number in range(1, len(audits) + 1)]
