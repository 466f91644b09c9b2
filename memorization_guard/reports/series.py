"""The lines of a chart: each series has a colour and a dash pattern."""

from __future__ import annotations

# Colours after Okabe & Ito (2008), as in graph.py. A dash pattern says the same as the colour.
SERIES = ("#31689b", "#bf4600", "#007a5e", "#8e3a86", "#7a6200", "#1c2430")
DARK_SERIES = ("#8fc1ee", "#ff9455", "#3ddcae", "#e39bdb", "#e0c14a", "#e8ecf2")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")


def line(number: int, path: str) -> str:
    """An SVG path in the colour and dash pattern of series ``number``."""
    dash = _DASHES[(number + number // len(SERIES)) % len(_DASHES)]  # the seventh line has the first one's colour
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="c{number % len(SERIES)}"{dash} d="{path}"/>'
