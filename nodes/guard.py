"""The node that watches, and on request corrects, whatever its model samples."""

from __future__ import annotations

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


def _threshold(name: str, low: float, high: float, step: float, tooltip: str) -> Any:
    """An advanced widget for a field of :class:`Thresholds`, of the field's type and default."""
    default = getattr(Thresholds(), name)
    kind = io.Int if isinstance(default, int) else io.Float
    return _advanced(kind.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip))


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
                        "without this node. mitigate: also correct runs that leave the region; needs a profile that fits."
                    ),
                ),
                StabilityProfileType.Input(
                    "profile",
                    optional=True,
                    tooltip=(
                        "Stability profile of this model, sampler, step count, cfg and size, from Load or Calibrate Stability "
                        "Profile. Without one the run is traced, and not judged."
                    ),
                ),
                _threshold(
                    "tau_mild",
                    0.1,
                    100.0,
                    0.1,
                    "Standard deviations off, in update and predicted image, from which a run counts as memorized. Published "
                    "value: 3.",
                ),
                _threshold(
                    "tau_strong",
                    0.1,
                    1000.0,
                    0.5,
                    "Standard deviations off, in the predicted image, from which it counts as strongly memorized. Published "
                    "value: 14.",
                ),
                _threshold(
                    "gamma",
                    0.1,
                    100.0,
                    0.1,
                    "Half width, in standard deviations, of the band that a corrected latent is brought back into. Published "
                    "value: 3.",
                ),
                _threshold(
                    "mild_steps",
                    0,
                    1000,
                    1,
                    "A mild run is corrected in this many first steps, counted as of 50. Published value: 10. Not used where "
                    "a run is steered by its guidance.",
                ),
                _threshold(
                    "tau_steer",
                    0.1,
                    1000.0,
                    0.1,
                    "Standard deviations off from which a run is steered by its guidance. At least tau_mild; measured on the "
                    "bundled model: 4.5, and 3 for samplers that add noise in each step.",
                ),
                _threshold(
                    "steering_guidance",
                    -30.0,
                    30.0,
                    0.5,
                    "Guidance scale that a steered step is made with. Below 0 leads away from the prompt, with strong "
                    "contrasts; 0 is as without the prompt, and calmer.",
                ),
                _advanced(
                    io.Combo.Input(
                        "correction",
                        options=[STEER, PUBLISHED],
                        default=STEER,
                        tooltip="published: the two-stage norm correction of Huang et al. (KDD 2026) alone. steer by "
                        "guidance: ours, where cfg is above 1; the published one elsewhere.",
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
        cls, tau_mild: float | None = None, tau_strong: float | None = None, tau_steer: float | None = None
    ) -> bool | str:
        # What comes through a link is not known yet, and is checked when the node runs.
        values = {"tau_mild": tau_mild, "tau_strong": tau_strong, "tau_steer": tau_steer}
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
