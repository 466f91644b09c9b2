"""The node that watches, and on request corrects, whatever its model samples."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.v0_0_2 import io

from ..memorization_guard import Thresholds
from .sampling import MODES, guard

CATEGORY = "memorization guard"

STEER, PUBLISHED = "steer by guidance", "published"

StabilityProfileType = io.Custom("STABILITY_PROFILE")
TraceType = io.Custom("STABILITY_TRACE")


def _advanced(widget: Any) -> Any:
    """The widget, folded away until the user asks for advanced inputs; callers of the API may leave it out."""
    widget.extra_dict = {"advanced": True}
    widget.optional = True
    return widget


def _threshold(field: dataclasses.Field[Any]) -> Any:
    """An advanced widget for a field of :class:`Thresholds`."""
    low, high, step = field.metadata["bounds"]
    kind = io.Int if isinstance(field.default, int) else io.Float
    return _advanced(
        kind.Input(field.name, default=field.default, min=low, max=high, step=step, tooltip=field.metadata["about"])
    )


class MemorizationGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuard",
            display_name="Memorization Guard",
            category=CATEGORY,
            description=(
                "Watches the latent while this model samples, and shows live whether the run leaves the region that ordinary "
                "prompts stay in, as it does when the model reproduces a training image. On 'mitigate' it steers away."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to watch. Put this node last, right before the sampler."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="trace",
                    tooltip=(
                        "off: the model passes through untouched. trace: watch and judge; the image is bit-identical to one "
                        "without this node. mitigate: also correct runs that leave the region; needs a profile that fits. "
                        "stop: end a run as soon as every image of its batch counts as memorized, with the images as "
                        "predicted so far; needs a profile too."
                    ),
                ),
                StabilityProfileType.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "Stability profile of this model and size, from Load or Calibrate Stability Profile; it is carried "
                        "over to other samplers, step counts and similar cfg. Without one the run is traced, not judged."
                    ),
                ),
                *map(_threshold, dataclasses.fields(Thresholds)),
                _advanced(
                    io.Combo.Input(
                        "correction",
                        options=[STEER, PUBLISHED],
                        default=STEER,
                        tooltip="published: detection and norm correction of Huang et al. (KDD 2026), which need a profile "
                        "of this very sampler, schedule and cfg. steer by guidance: ours; where cfg is 1 it corrects as "
                        "published.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The watched model: connect it to the sampler."),
                TraceType.Output(
                    display_name="TRACE",
                    tooltip="What was seen while this model sampled: for Stability Report and Memorization Gate.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            # Two guards alike are still two: each shows its own sampler's run.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(
        cls, tau_mild: float | None = None, tau_strong: float | None = None, false_alarms: float | None = None
    ) -> bool | str:
        # What comes through a link is not known yet, and is checked when the node runs.
        values = {"tau_mild": tau_mild, "tau_strong": tau_strong, "false_alarms": false_alarms}
        try:
            Thresholds(**{name: value for name, value in values.items() if value is not None})
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model: Any, mode: str, profile: Any = None, correction: str = STEER, **thresholds: float
    ) -> io.NodeOutput:
        if correction != STEER:
            thresholds["steering_guidance"] = None
        return io.NodeOutput(
            *guard(model, mode=mode, profile=profile, thresholds=Thresholds(**thresholds), node=cls.hidden.unique_id)
        )
