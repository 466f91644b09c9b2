"""``memorization-guard audit --training``: what it asks for, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .output import print_table, printable, warn

if TYPE_CHECKING:
    from ..audit.copies import TrainingAudit


def check_options(
    prompts: Path | None, training: Path | None, encoder: Path | None, threshold: float | None, images: str, mode: str
) -> None:
    """Refuses options that do not go together.

    Raises:
        UsageError: naming them.
    """
    if training is None:
        if prompts is None:
            raise UsageError("give PROMPTS, a list of prompts, or --training, a folder of training images with captions")
        if encoder is not None or threshold is not None:
            raise UsageError("--encoder and --copy-threshold are for --training, a folder of training images")
        return
    if images == "none":
        raise UsageError("--training compares images, so all are kept: leave --images none out")
    if mode != "trace":
        raise UsageError(
            f"--training compares images as the model makes them, and samples those that trigger once more with mitigation: "
            f"leave --mode {mode} out"
        )


def training_audit(
    training: Path, output: Path, *, encoder: Path | None, column: str | None, threshold: float | None, device: str
) -> TrainingAudit:
    """The training folder and the encoder, read.

    Raises:
        GuardError, FileNotFoundError: if one of them cannot be used.
    """
    from ..audit.copies import TrainingAudit
    from ..audit.training import read_training
    from ..evaluation.encoders import open_encoder

    vectors = open_encoder(encoder, device=device)
    return TrainingAudit(output, read_training(training, column), vectors, threshold=threshold, device=vectors.device)


def print_copies(output: Path, found: dict[str, Any]) -> None:
    """What was found, in the terminal."""
    from ..audit.copies import GALLERY, PAIRS

    threshold = found["threshold"]
    told = [printable(note) for note in found["training"]["notes"]]
    if found["unscored"]:
        told.append(f"{found['unscored']:,} of {found['outputs']:,} outputs were not judged: they count as not triggered")
    if threshold["rough"]:
        told.append(f"the threshold is rough: it comes from {threshold['images']} images; see --copy-threshold")
    if threshold["doubles"]:
        told.append(
            f"{threshold['doubles']} of {threshold['looked_at']} training images that were looked at are there twice or more"
        )
    warn(told)
    rates = [
        ("training images that came back", found["images_copied"]),
        ("captions that gave a copy", found["captions_copied"]),
        ("outputs that are copies", found["outputs_copied"]),
        ("copies that the guard found", found["copies_found"]),
        ("other outputs that triggered", found["others_triggered"]),
        ("found copies that mitigation left", found["copies_left"]),
    ]
    rows = []
    for name, rate in rates:
        share = "-" if rate["rate"] is None else "{:.1%} ({:.1%}-{:.1%})".format(rate["rate"], *rate["interval"])
        rows.append((name, f"{rate['of']:,}", f"{rate['count']:,}", share))
    how = "given" if threshold["given"] else "from the folder's own images"
    title = f"copies: similarity of {threshold['value']:.3f} or more ({how}), {printable(found['encoder'])}"
    print_table(title, ("", "#of", "#number", "#share"), rows)
    print(f"{output / GALLERY} shows them; {output / PAIRS}.csv holds a row an image.")
