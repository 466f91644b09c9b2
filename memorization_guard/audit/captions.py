"""What is said of a training folder's captions: shared ones, missing ones, repeats, trigger words, tags."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .dataset import counted

if TYPE_CHECKING:
    from .training import TrainingImage

#: A word is a trigger word if it stands in this share of the captions; captions are lists of tags if this share of them has
#: :data:`_COMMAS` commas.
_TRIGGER_SHARE, _TAGS_SHARE, _COMMAS = 0.95, 0.5, 3
_WORDS = frozenset(("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"))


def notes(images: Sequence[TrainingImage], captions: Mapping[str, Sequence[int]], named_by_folder: int) -> list[str]:
    """What a reader of the report has to know of the captions, in sentences.

    Args:
        images: of a training folder. captions: the different ones, with the numbers of their images.
        named_by_folder: how many images have the name of their folder as caption.
    """
    bare = [image.name for image in images if image.caption is None]
    shared = sum(len(numbers) - 1 for numbers in captions.values())
    repeats = sorted({image.repeats for image in images})
    told = []
    if bare:
        told.append(
            f"{counted(len(bare), 'image')} without a caption, such as {bare[0]}: compared with, but no prompt was made."
        )
    if named_by_folder:
        told.append(
            f"{counted(named_by_folder, 'image')} without a caption file in a folder with a repeat count: as in kohya's "
            "trainers, the folder's name is the caption."
        )
    if shared:
        told.append(f"{counted(shared, 'image')} with the caption of another one: each caption is one prompt.")
    if repeats != [1]:
        shown = sum(image.repeats for image in images)
        told.append(
            f"Images are repeated {repeats[0]} to {repeats[-1]} times: an epoch shows {shown:,}."
            if len(repeats) > 1
            else f"Images are repeated {repeats[0]} times: an epoch shows {shown:,}."
        )
    if len(captions) > 1:
        words = _trigger_words(list(captions))
        if words:
            told.append(f"In nearly every caption: {', '.join(words)}. Such trigger words stay in the prompts.")
        if sum(text.count(",") >= _COMMAS for text in captions) >= _TAGS_SHARE * len(captions):
            told.append(
                "The captions are lists of tags. A trainer that shuffles or drops tags shows other captions too; the "
                "prompts have them as they are written."
            )
    return told


def _trigger_words(captions: Sequence[str]) -> list[str]:
    """Words that nearly every caption has, in the order of the first one that has them all."""
    counted = Counter(word for caption in captions for word in set(_words(caption)))
    often = {word for word, count in counted.items() if count >= _TRIGGER_SHARE * len(captions) and word not in _WORDS}
    return [word for word in dict.fromkeys(word for caption in captions[:100] for word in _words(caption)) if word in often][
        :8
    ]


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?()\[\]\"]+", caption.lower())
