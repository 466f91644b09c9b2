"""Axes for the host's X/Y/Z plot."""

from __future__ import annotations

import dataclasses
from typing import Any

import modules.scripts

from ..memorization_guard.core.settings import MODES
from . import profiles
from .session import CONSTANTS, TITLE, Options

_AXES = "memorization_guard_axes"


def add_axes() -> None:
    """Adds ours to the axes of the plot, once."""
    plot = next((data.module for data in modules.scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"), None)
    if plot is None or any(axis.label.startswith(f"[{TITLE}]") for axis in plot.axis_options):
        return
    plot.axis_options += [
        plot.AxisOption(f"[{TITLE}] Mode", str, _set("mode"), choices=lambda: list(MODES)),
        plot.AxisOption(f"[{TITLE}] Profile", str, _set("profile"), choices=profiles.names),
        *(
            plot.AxisOption(f"[{TITLE}] {field.name}", int if isinstance(field.default, int) else float, _set(field.name))
            for field in CONSTANTS
        ),
    ]


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
