"""What the user sees: one definition for the dropdown's script, the accordion, and the settings page."""

from __future__ import annotations

import dataclasses
import html
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from modules import sd_models, shared
from modules.infotext_utils import PasteField
from modules.ui_common import create_refresh_button
from modules.ui_components import FormRow, InputAccordion

from ..memorization_guard import ProfileError, StabilityMonitor
from ..memorization_guard.automatic import AUTO
from ..memorization_guard.core.calibration import MIN_RUNS
from ..memorization_guard.core.settings import HOST_CONSTANTS, MODES
from ..memorization_guard.lab import prompts
from . import hosts, lab, profiles
from .session import TITLE, Options, pasted_result

COMPARE, CALIBRATE = "compare", "calibrate"
SECTION = ("memorization_guard", TITLE)

_ON = tuple(mode for mode in MODES if mode != "off")

_ABOUT = {
    "trace": "trace: watch and judge; the image is bit-identical to one without the guard",
    "mitigate": "mitigate: also correct images that count as memorized; needs a profile that fits",
    "stop": "stop: end a run as soon as every image of its batch counts as memorized, and show grey pictures instead; needs a "
    "profile too",
    COMPARE: "compare: make every image twice from the same seed, without and with mitigation, side by side",
    CALIBRATE: "calibrate: make a stability profile for the current model, sampler, steps, CFG and size",
}


class Controls:
    """The inputs of a script, in the order of its arguments, and what an image's infotext sets them to.

    Args:
        accordion: whether this is the accordion, which is switched on and off, or the dropdown's script, which has more modes.
        elem_id: makes element ids.
    """

    def __init__(self, *, accordion: bool, elem_id: Any) -> None:
        self._elem_id = elem_id
        if accordion:
            with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
                self.inputs = [enabled, *self._common(_ON)]
            # What the dropdown's script made comes back there. An image that we have no part in leaves the guard on.
            sent = [PasteField(enabled, _pasted_enabled)]
        else:
            self.inputs = self._common((*_ON, COMPARE, CALIBRATE))
            sent = []
        sent += map(PasteField, self.inputs[-len(_PASTED) :], _PASTED)
        if not accordion:
            self.inputs += self._calibration()
            if not hosts.HAS_UNET_PATCHER:
                self._lab_model()
        result = PasteField(self._pasted_result, lambda fields: gr.update(value=(r := pasted_result(fields)), visible=bool(r)))
        self.infotext_fields = [*sent, result]
        # *Send to img2img* hands on what is set in txt2img, of the fields whose second half is among these in both tabs.
        self.paste_field_names = [target for _, target in sent]

    def _common(self, modes: tuple[str, ...]) -> list[Any]:
        mode = gr.Radio(
            list(modes),
            value=modes[0],
            label="Mode",
            elem_id=self._elem_id("mode"),
            info="; ".join(_ABOUT[m] for m in modes) + ".",
        )
        with FormRow():
            profile = gr.Dropdown(
                profiles.names(),
                value=AUTO,
                label="Stability profile",
                elem_id=self._elem_id("profile"),
                info="auto: made before the first image with a model and its LoRAs, in about the time of ten images, and "
                "kept. The others are files in models/stability_profiles, made by 'calibrate' in the script of the same name. "
                "With None, the run is traced but not judged.",
            )
            # The page presses it too: before its user's first click, and after a calibration.
            create_refresh_button(
                profile, lambda: None, lambda: {"choices": profiles.names()}, self._elem_id("profile_refresh")
            )
        about = gr.HTML(elem_id=self._elem_id("about_profile"))
        profile.change(fn=_about_profile, inputs=[profile], outputs=[about], show_progress=False)
        self._pasted_result = gr.Textbox(
            label="Verdict on the pasted image", interactive=False, visible=False, elem_id=self._elem_id("pasted_result")
        )
        with gr.Accordion("Detection and mitigation", open=False):
            values = [self._constant(field) for field in HOST_CONSTANTS]
        return [mode, profile, *values]

    def _constant(self, field: dataclasses.Field[Any]) -> Any:
        if choices := field.metadata.get("choices"):
            return gr.Radio(
                list(choices),
                value=field.default,
                label=words(field.name),
                elem_id=self._elem_id(field.name),
                info=field.metadata["about"],
            )
        low, high, step = field.metadata["bounds"]
        return gr.Slider(
            low,
            high,
            value=field.default,
            step=step,
            label=words(field.name),
            elem_id=self._elem_id(field.name),
            info=field.metadata["about"],
        )

    def _calibration(self) -> list[Any]:
        with gr.Accordion("Calibrate", open=False):
            gr.HTML(
                "<p>For the mode 'calibrate'. The profile is made with what is set now: model, sampler, schedule, steps, CFG, "
                "size, negative prompt and styles, and the LoRAs that the prompt names. It is valid for the model with these "
                "LoRAs, with every sampler, schedule, CFG and size. No image is decoded or saved.</p>"
            )
            prompts = gr.Textbox(
                label="Reference prompts",
                lines=3,
                placeholder="400 built-in prompts",
                elem_id=self._elem_id("reference_prompts"),
                info=f"One per line, at least {MIN_RUNS}, better a few hundred. Use prompts like your own, about things that "
                "the model was not trained on again and again. The first 50 are sampled to the end, the others for one step. "
                "If empty, 400 built-in ones.",
            )
            with FormRow():
                name = gr.Textbox(
                    label="Name of the new profile",
                    placeholder="model, sampler, steps, CFG and size",
                    elem_id=self._elem_id("profile_name"),
                )
                replace = gr.Checkbox(False, label="Replace a profile of the same name", elem_id=self._elem_id("replace"))
        return [prompts, name, replace]

    def _lab_model(self) -> None:
        with gr.Accordion("Try it on a small model that memorizes", open=False):
            add = gr.Button("Add the lab model to the checkpoints", elem_id=self._elem_id("add_lab_model"))
            said = gr.HTML()
        add.click(fn=_add_lab_model, inputs=[], outputs=[said])


def words(name: str) -> str:
    """The name of a constant as a label."""
    return name.replace("_", " ").capitalize()


def add_settings() -> None:
    """The host's settings page."""
    for name, label in (
        ("save_trace", "Save each image's trace as a .stability.json file beside it"),
        ("gallery_graph", "Add the stability graph of each image to the gallery"),
    ):
        shared.opts.add_option(f"memorization_guard_{name}", shared.OptionInfo(False, label, section=SECTION))


def setting(name: str) -> bool:
    return bool(getattr(shared.opts, f"memorization_guard_{name}", False))


def _add_lab_model() -> str:
    """Puts the bundled model and its profile where the host looks for such files, and says how to use them."""
    try:
        lab.write(Path(shared.cmd_opts.ckpt_dir or sd_models.model_path))
        profile = profiles.add(lab.PROFILE, f"{lab.NAME} euler 30 cfg 7.5")
    except OSError as error:
        return f"<p class='error'>The lab model could not be written: {html.escape(str(error))}</p>"
    sd_models.list_models()
    return (
        f"<p>Added, with its profile. Refresh the list of checkpoints and choose <b>{lab.NAME}</b>; set Euler, 30 steps, CFG "
        f"7.5, 128 x 128; refresh the list of profiles and choose <b>{html.escape(profile)}</b>. This prompt is memorized: "
        f"<b>{html.escape(prompts('exact', 'tuning')[0])}</b>; this one is not: "
        f"<b>{html.escape(prompts('ordinary', 'tuning')[0])}</b>.</p>"
    )


def _about_profile(name: str | None) -> str:
    """What a profile was made from, and what it holds for. The rest of what is set in the page has no part in a verdict."""
    if name in (None, "", AUTO, profiles.NONE):
        return ""
    try:
        profile = profiles.load(name)
    except (ProfileError, OSError) as error:
        return f"<p class='error'>{html.escape(str(error))}</p>"
    about = html.escape(profiles.describe(profile))
    if problem := StabilityMonitor(profile, settings=profile.settings).outline()["note"]:
        return f"<p>{about}.</p><p class='error'>{html.escape(problem)}</p>"
    return (
        f"<p>{about}. It is valid for the checkpoint and the LoRAs that it was made with, with every sampler, schedule, step "
        "count, CFG and size.</p>"
    )


def _pasted_enabled(fields: Mapping[str, str]) -> bool | None:
    """Whether a pasted image switches the accordion on or off; ``None`` where it says nothing of us."""
    return None if TITLE not in fields else fields.get("Script") != TITLE


def _pasted(get: Callable[[Options], Any]) -> Callable[[Mapping[str, str]], Any]:
    """Sets an input to what ``get`` finds in the choice of a pasted image; leaves it alone where it is no image of ours."""

    def paste(fields: Mapping[str, str]) -> Any:
        options = Options.from_infotext(fields)
        return None if options is None else get(options)

    return paste


def _pasted_profile(options: Options) -> Any:
    name, offered = options.profile or profiles.NONE, profiles.names()
    return gr.update(value=name, choices=offered) if name in offered else None  # it may be another computer's


#: What sets the inputs that both scripts and both tabs have to what they were for a pasted image, in their order.
_PASTED = [
    _pasted(operator.attrgetter("mode")),
    _pasted(_pasted_profile),
    *(_pasted(operator.attrgetter(f"thresholds.{field.name}")) for field in HOST_CONSTANTS),
]
