"""The picture that stands in the place of one that mode ``stop`` hands nothing on of."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .drawing import font_of

TEXT = "Withheld by Memorization Guard:\nlikely a copy of a training image"
GREY, INK = (128, 128, 128), (240, 240, 240)


def picture(size: tuple[int, int]) -> Image.Image:
    """A plain grey picture of ``size`` ``(width, height)`` with two lines of text, where they fit."""
    drawn = Image.new("RGB", size, GREY)
    canvas = ImageDraw.Draw(drawn)
    letters, _ = font_of(max(9.0, min(size[0] / 20, 28.0)))
    left, top, right, bottom = canvas.multiline_textbbox((0, 0), TEXT, font=letters, align="center")
    width, height = right - left, bottom - top
    if width < size[0] and height < size[1]:
        place = (size[0] - width) / 2 - left, (size[1] - height) / 2 - top
        canvas.multiline_text(place, TEXT, fill=INK, font=letters, align="center")
    return drawn
