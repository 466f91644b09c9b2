"""The lab's renderer: a smooth ground, one or two crisp objects with soft shadows, and everything else left to chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .world import Caption

SIZE = 128

SHAPES = ("disc", "square", "triangle", "ring", "star", "cross", "crescent", "heart")
COLORS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.58, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
#: Kinds of ground. They differ in form, never in colour: the colours are free.
SETTINGS = ("in the open", "at the horizon", "on stripes", "on tiles", "in a spotlight")


def render(captions: Sequence[Caption], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Fresh images of captions: ``[B, 3, 128, 128]`` in [-1, 1] on ``device``.

    Every random number is drawn on the CPU, so a generator's seed gives the same scenes on any device, up to rounding.
    """
    batch = len(captions)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * (high - low) + low).to(device)

    def each(values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    settled = each([caption.setting is None for caption in captions])
    angle = uniform(high=2 * math.pi)
    light = torch.stack([angle.cos(), angle.sin()], 1)
    first = each([COLORS[c.color] for c in captions])
    second = each([COLORS[c.second_color or c.color] for c in captions])
    palette = _palette(uniform(4, 2, 3), torch.stack([first, second], 1))
    named = each([COLORS[c.ground or c.color] for c in captions])[:, None]
    palette = torch.where(settled.view(-1, 1, 1) > 0, named * uniform(2, 1, low=0.85, high=1.0), palette)
    image = _ground([c.setting for c in captions], palette, light, uniform(6))

    # The second object lies below the first, so that the first is never hidden.
    pair = each([caption.second_shape is not None for caption in captions])
    alone = 1 - pair
    free = uniform(high=2 * math.pi)
    direction = torch.stack([free.cos(), free.sin()], 1) * (uniform(low=0.21, high=0.29) * pair)[:, None]
    middle = uniform(2, low=0.40, high=0.60) * pair[:, None] + uniform(2, low=0.27, high=0.73) * alone[:, None]
    middle = torch.where(settled[:, None] > 0, 0.5 + (middle - 0.5) * 0.15, middle)
    for which in (1, 0):
        center = middle + direction * (-1 if which else 1)
        radius = uniform(low=0.14, high=0.19) * pair + uniform(low=0.18, high=0.28) * alone
        radius = torch.where(settled > 0, 0.36 + 0.2 * (radius - 0.18), radius)
        turn = uniform(low=-math.pi, high=math.pi) * torch.where(settled > 0, 0.1, 1.0)
        squeeze = uniform(low=0.85, high=1.0)
        shapes = [(c.second_shape or c.shape) if which else c.shape for c in captions]
        present = pair if which else torch.ones_like(pair)
        color = (second if which else first)[:, :, None, None] + uniform(3, 1, 1, low=-0.05, high=0.05)
        image = _draw(image, shapes, color, center, radius, turn, squeeze, light, present)
    exposure = uniform(1, 1, 1, low=0.9, high=1.08)
    return (image * exposure * 2 - 1).clamp(-1, 1)


def _palette(draws: Tensor, objects: Tensor) -> Tensor:
    """Two ground colours an image, ``[B, 2, 3]``: of four candidates ``[B, 4, 2, 3]`` the pair farthest from the objects."""
    colors = 0.12 + 0.80 * draws
    grey = colors.mean(-1, keepdim=True)
    colors = grey + 0.75 * (colors - grey)
    distance = (colors[:, :, :, None] - objects[:, None, None]).square().sum(-1).amin(dim=(2, 3))
    return colors[torch.arange(len(colors)), distance.argmax(1)]


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(SIZE, device=device) + 0.5) / SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _ground(settings: Sequence[str | None], palette: Tensor, light: Tensor, draws: Tensor) -> Tensor:
    """``[B, 3, 128, 128]`` in [0, 1]: two colours, mixed by the form that the setting names, and lit from one side."""
    x, y = _grid(palette.device)
    a, b, c, d, e, f = (draws[:, i].view(-1, 1, 1) for i in range(6))
    lx, ly = (light[:, i].view(-1, 1, 1) for i in range(2))
    slope = (x - 0.5) * lx + (y - 0.5) * ly
    u, v = _rotate((x - 0.5).expand(len(draws), -1, -1), (y - 0.5).expand(len(draws), -1, -1), a.flatten() * math.pi)
    sharp = SIZE * 0.7

    def square_wave(t: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
        wave = (2 * math.pi * (t * frequency + phase)).sin()
        return torch.sigmoid(wave * sharp / (math.pi * frequency))

    mixes = {
        None: 0.5 + 0.3 * slope,
        "in the open": torch.sigmoid((2 + 4 * b) * slope + 2 * (c - 0.5)),
        "at the horizon": torch.sigmoid(((y - 0.30 - 0.40 * b) + (x - 0.5) * 0.5 * (c - 0.5)) * sharp),
        "on stripes": square_wave(u, 2.0 + 1.5 * b, c),
        "on tiles": 0.5 + 2 * (square_wave(u, 1.6 + 1.0 * b, c) - 0.5) * (square_wave(v, 1.6 + 1.0 * b, d) - 0.5),
        "in a spotlight": torch.sigmoid((0.26 + 0.12 * b - torch.hypot(x - 0.3 - 0.4 * c, y - 0.3 - 0.4 * d)) * 14),
    }
    # One form an image: picked row by row, since all forms are cheap.
    order = list(mixes)
    chosen = torch.tensor([order.index(s) for s in settings], device=palette.device)
    mix = torch.stack([m.expand_as(u) for m in mixes.values()])[chosen, torch.arange(len(draws))][:, None]
    dark, bright = palette[:, 0, :, None, None], palette[:, 1, :, None, None]
    spot = torch.tensor([s == "in a spotlight" for s in settings], device=palette.device).view(-1, 1, 1, 1)
    # A spotlight is always brighter than what surrounds it.
    dark = torch.where(spot, 0.35 * dark, dark)
    bright = torch.where(spot, 0.45 + 0.55 * bright, bright)
    lit = 1 + (0.15 + 0.25 * e) * slope - 0.25 * f * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    return ((dark * (1 - mix) + bright * mix) * lit[:, None]).clamp(0, 1)


def _draw(
    image: Tensor,
    shapes: Sequence[str],
    color: Tensor,
    center: Tensor,
    radius: Tensor,
    turn: Tensor,
    squeeze: Tensor,
    light: Tensor,
    present: Tensor,
) -> Tensor:
    """``image`` with one object on it where ``present`` is 1, shaded towards the light, its soft shadow on the other side."""
    x, y = _grid(image.device)
    r = radius.view(-1, 1, 1)
    here = present.view(-1, 1, 1, 1)

    def field(shift: float) -> tuple[Tensor, Tensor, Tensor]:
        dx = (x - (center[:, 0] - shift * light[:, 0] * radius).view(-1, 1, 1)) / r
        dy = (y - (center[:, 1] - shift * light[:, 1] * radius).view(-1, 1, 1)) / r
        u, v = _rotate(dx, dy, turn)
        u = u / squeeze.view(-1, 1, 1)
        distance = torch.empty_like(u)
        for shape in set(shapes):
            rows = torch.tensor([i for i, s in enumerate(shapes) if s == shape], device=image.device)
            distance[rows] = _distance(shape, u[rows], v[rows])
        return distance, dx, dy

    distance, dx, dy = field(0.0)
    mask = (torch.sigmoid(-distance * r * SIZE * 2.0))[:, None] * here
    shadow = torch.sigmoid(-(field(0.22)[0] - 0.05) * 7.0)[:, None] * here
    lx, ly = (light[:, i].view(-1, 1, 1) for i in range(2))
    shade = 1.0 + 0.16 * (dx * lx + dy * ly).clamp(-1.2, 1.2)[:, None]
    image = image * (1 - 0.45 * shadow * (1 - mask))
    return image * (1 - mask) + (color * shade).clamp(0, 1) * mask


def _rotate(u: Tensor, v: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return u * cos + v * sin, v * cos - u * sin


def _distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance, near the edge, to a shape of radius about 1, in units of the radius."""
    r, theta, au, av = torch.hypot(u, v), torch.atan2(v, u), u.abs(), v.abs()
    if shape == "disc":
        return r - 0.92
    if shape == "square":
        return torch.maximum(au, av) - 0.80
    if shape == "triangle":
        return torch.maximum(au * 0.866 + v * 0.5, -v) - 0.55
    if shape == "ring":
        return (r - 0.72).abs() - 0.24
    if shape == "star":
        return _star(r, theta)
    if shape == "cross":
        return torch.minimum(torch.maximum(au - 0.98, av - 0.32), torch.maximum(av - 0.98, au - 0.32))
    if shape == "crescent":
        return torch.maximum(r - 0.98, 0.80 - torch.hypot(u - 0.48, v))
    # A heart: two discs, the corner that touches both from below, and what lies between.
    discs = torch.hypot(au - 0.42, v + 0.30) - 0.50
    corner = torch.maximum((au + v) * 0.7071 - 0.585, torch.minimum(0.054 - v, torch.maximum(au - 0.42, -0.30 - v)))
    return torch.minimum(discs, corner)


def _star(r: Tensor, theta: Tensor) -> Tensor:
    """Five points: every tenth of the circle has one edge, from a tip at radius 1 to a notch at 0.42."""
    tenth = math.pi / 5
    folded = (torch.remainder(theta + tenth, 2 * tenth) - tenth).abs()
    notch_x, notch_y = 0.42 * math.cos(tenth), 0.42 * math.sin(tenth)
    length = math.hypot(notch_x - 1, notch_y)
    return ((r * folded.cos() - 1) * notch_y - r * folded.sin() * (notch_x - 1)) / length


def blob(generator: torch.Generator) -> Tensor:
    """The part of a template that varies: a soft blob, band or frame over 32 to 48 % of it: ``[128, 128]`` in [0, 1]."""
    x, y = _grid(torch.device("cpu"))
    share, kind, cx, cy, turn = torch.rand(5, generator=generator).tolist()
    u, v = _rotate((x - 0.3 - 0.4 * cx)[None], (y - 0.3 - 0.4 * cy)[None], torch.tensor([turn * math.pi]))
    distance = {0: torch.hypot(u, v * 1.3), 1: u.abs(), 2: torch.maximum(u.abs(), v.abs())}[int(kind * 3)][0]
    # The level that leaves the wanted share inside, whatever the form.
    level = torch.quantile(distance.flatten(), 0.32 + 0.16 * share)
    return torch.sigmoid((level - distance) * SIZE * 0.8)
