"""The host's X/Y/Z plot: axes for it, and what is told of its cells."""

from __future__ import annotations

import dataclasses
from typing import Any

import modules.scripts
from modules import shared

from ..memorization_guard.core.settings import HOST_CONSTANTS, MODES
from ..memorization_guard.reports.label import labelled
from . import profiles
from .session import Options, Session

_PLOT = "xyz_grid.py"
#: Of our axes: short, since the grid has it over every column.
PREFIX = "Guard"
_AXES = "memorization_guard_axes"
_UNJUDGED = "memorization_guard_unjudged"  # on an image, as the host has its own there


def add_axes() -> None:
    """Adds ours to the axes of the plot, once."""
    plot = next((data.module for data in modules.scripts.scripts_data if data.script_class.__module__ == _PLOT), None)
    if plot is None or any(axis.label == f"{PREFIX} mode" for axis in plot.axis_options):
        return
    plot.axis_options += [
        plot.AxisOption(f"{PREFIX} mode", str, _set("mode"), choices=lambda: list(MODES)),
        plot.AxisOption(f"{PREFIX} profile", str, _set("profile"), choices=profiles.names),
        *(
            plot.AxisOption(
                f"{PREFIX} {field.name.replace('_', ' ')}", type(field.default), _set(field.name), **_choices(field)
            )
            for field in HOST_CONSTANTS
        ),
    ]


def _choices(field: dataclasses.Field[Any]) -> dict[str, Any]:
    choices = field.metadata.get("choices")
    return {} if choices is None else {"choices": lambda: list(choices)}


def _set(name: str) -> Any:
    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, _AXES, {**getattr(p, _AXES, {}), name: value})

    return apply


def applied(p: Any, options: Options | None) -> Options | None:
    """``options`` with what a plot's cell changes; the mode alone switches the guard on."""
    axes = dict(getattr(p, _AXES, {}))
    if (mode := axes.pop("mode", None)) is not None:
        options = dataclasses.replace(options or Options(), mode=mode)
    if options is None:
        return None
    if (profile := axes.pop("profile", None)) is not None:
        options = dataclasses.replace(options, profile=None if profile == profiles.NONE else profile)
    return dataclasses.replace(options, thresholds=dataclasses.replace(options.thresholds, **axes))


def cell(p: Any) -> str:
    """Which cell of a plot is being made, in the order of the gallery; empty where there is no plot."""
    number = p.script_args[0] if p.script_args else 0  # of the dropdown's script
    chosen = p.scripts.selectable_scripts[number - 1 : number] if number else []  # other extensions sample with fewer scripts
    if not chosen or type(chosen[0]).__module__ != _PLOT:
        return ""
    return f"cell {shared.state.job.partition(' out of ')[0]}"


def mark_unjudged(p: Any, processed: Any, session: Session | None) -> None:
    """Marks the images that were to be judged and were not, and the grid of a batch with such images."""
    unjudged = [session is None or not session.judged(*divmod(number, p.batch_size)) for number in range(len(p.all_prompts))]
    of_gallery = [any(unjudged)] * processed.index_of_first_image + unjudged
    for image, marked in zip(processed.images, of_gallery, strict=False):
        setattr(image, _UNJUDGED, marked)


def label_unjudged(params: Any) -> None:
    """Says on a grid of images which of them were not judged; the images themselves stay as they are.

    Args:
        params: the host's ``ImageGridLoopParams``.
    """
    params.imgs = [labelled(image, "not judged") if getattr(image, _UNJUDGED, False) else image for image in params.imgs]
