"""A word on a picture, as for those of a grid that were not judged."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .drawing import font_of

_GROUND, _INK = (32, 32, 32), (240, 240, 240)


def labelled(picture: Image.Image, text: str) -> Image.Image:
    """A copy of ``picture`` with ``text`` in its lower left corner."""
    drawn = picture.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    letters, _ = font_of(max(9.0, min(picture.width / 16, 28.0)))
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=letters)
    pad = (bottom - top) // 3
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    canvas.rectangle((0, picture.height - height, width, picture.height), fill=_GROUND)
    canvas.text((pad - left, picture.height - height + pad - top), text, fill=_INK, font=letters)
    return drawn
