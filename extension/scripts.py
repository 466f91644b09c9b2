"""What the host calls: the script of the dropdown, and the accordion that is always there and does the watching for both."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import modules.scripts
import torch
from modules import processing, progress, script_callbacks, shared

from ..memorization_guard import Mode, StabilityMonitor, StabilityProfile
from ..memorization_guard.automatic import AUTO
from ..memorization_guard.reports import withheld
from . import automatic, profiles, sampling, xyz
from .controls import CALIBRATE, COMPARE, Controls, add_settings, setting
from .live import LiveRuns, add_route
from .session import CALIBRATING, CHOSEN, FAILED, LABEL, SESSION, TITLE, Options, Session

log = logging.getLogger(__name__)

LIVE = LiveRuns()


class _Decoded(list[torch.Tensor]):
    """Stands for images that nobody will look at."""

    already_decoded = True


class _InInfo(dict[str, Any]):
    """A field of the API's ``info`` that the infotext of an image leaves out: the host asks a callable for its text."""

    def __call__(self, **_: Any) -> None:
        return None


class _WithControls(modules.scripts.Script):
    """Both scripts have one definition of what the user sees."""

    accordion: bool

    def title(self) -> str:
        return TITLE

    def elem_id(self, item_id: str) -> str:
        kind = "accordion" if self.accordion else "script"
        return f"memorization_guard_{self.tabname}_{kind}_{item_id}"

    def ui(self, is_img2img: bool) -> list[Any]:
        controls = Controls(accordion=self.accordion, elem_id=self.elem_id)
        self.infotext_fields, self.paste_field_names = controls.infotext_fields, controls.paste_field_names
        return controls.inputs


class MemorizationGuardAccordion(_WithControls):
    """Watches the runs of every generation that asks for it, from here, from the dropdown or from a plot."""

    accordion = True

    def show(self, is_img2img: bool) -> Any:
        return modules.scripts.AlwaysVisible

    def before_process(self, p: Any, enabled: bool = False, *args: Any) -> None:
        setattr(p, SESSION, None)
        setattr(p, FAILED, None)
        session = None
        # What was written for another cell of a plot, which may share the mapping.
        fields = p.extra_generation_params.items()
        p.extra_generation_params = {name: value for name, value in fields if not name.startswith(TITLE)}
        try:
            options, profile = self._choice(p, enabled, args)
            if options is not None and options.mode != "off":
                calibrating = getattr(p, CALIBRATING, None)
                page = None if calibrating else progress.current_task
                label = getattr(p, LABEL, "") or xyz.cell(p)
                first = 1 if label else LIVE.number(page, p.batch_size * p.n_iter)
                finds_profile = None
                if options.profile == AUTO:
                    automatic.make(p, self)
                    finds_profile = automatic.find
                session = Session(
                    options,
                    profile,
                    live=LIVE,
                    task=page,
                    label=label,
                    first=first,
                    serves=calibrating,
                    automatic=finds_profile,
                )
                if enabled and getattr(p, CHOSEN, None) is not None:
                    session.say(p, "the script of the dropdown and the accordion are both on: the script's settings hold")
        except (ValueError, OSError) as error:
            # The image is made all the same.
            log.warning("%s: not watched: %s", TITLE, error)
            p.comment(f"{TITLE}: not watched: {error}")
            setattr(p, FAILED, f"not watched: {error}")
        setattr(p, SESSION, session)

    def _choice(self, p: Any, enabled: bool, args: tuple[Any, ...]) -> tuple[Options | None, StabilityProfile | None]:
        options = getattr(p, CHOSEN, None) or (Options.of(*args) if enabled else None)
        options = xyz.applied(p, options)
        if getattr(p, CALIBRATING, False):
            options = Options()
        named = None if options is None or options.profile == AUTO else options.profile
        return options, None if named is None else profiles.load(named)

    def process(self, p: Any, *args: Any) -> None:
        if (session := getattr(p, SESSION, None)) is not None:
            session.write_infotext(p)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if (session := getattr(p, SESSION, None)) is not None:
            sampling.watch_next_run(p, session)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        if getattr(p, CALIBRATING, False):
            ps.samples = _Decoded(torch.zeros(3, 8, 8) for _ in ps.samples)

    def postprocess_image_after_composite(self, p: Any, pp: Any, *args: Any) -> None:
        session = getattr(p, SESSION, None)
        if session is not None and p.save_samples():
            session.saving = p.iteration, p.batch_index
        if session is not None and session.withholds(p.iteration, p.batch_index):
            pp.image = withheld.picture(pp.image.size)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        session, failed = getattr(p, SESSION, None), getattr(p, FAILED, None)
        if failed is not None and getattr(p, "is_api", False):
            p.extra_generation_params[f"{TITLE} traces"] = _InInfo(images=[], warnings=[failed])
        if session is not None or failed is not None:
            xyz.mark_unjudged(p, processed, session)
        if session is None or getattr(p, CALIBRATING, False):
            return
        said = len(p.comments)
        if not session.runs:
            session.say(p, "not watched: this sampler is not called as those of the host are")
        session.tell_verdicts(p)
        session.tell_images(p, processed)
        processed.comments += "".join(f"{comment}\n" for comment in list(p.comments)[said:])
        if getattr(p, "is_api", False):
            # The host calls what it finds callable, and writes what it does not know as null.
            p.extra_generation_params[f"{TITLE} traces"] = _InInfo(images=session.report(p), warnings=session.said)
        if setting("gallery_graph"):
            for number in range(len(p.all_prompts)):
                for drawn in session.graphs(*divmod(number, p.batch_size)):
                    processed.images.append(drawn)
                    processed.infotexts.append(
                        processed.infotexts[min(processed.index_of_first_image + number, len(processed.infotexts) - 1)]
                    )


class MemorizationGuardScript(_WithControls):
    """The script of the dropdown; the accordion's hooks do its watching."""

    accordion = False

    def show(self, is_img2img: bool) -> Any:
        return True

    def run(self, p: Any, mode: str, *args: Any) -> Any:
        *common, prompts, name, replace = args
        if mode == CALIBRATE:
            return self._calibrate(p, prompts, name, replace)
        compare = mode == COMPARE
        options = Options.of("mitigate" if compare else mode, *common)
        if options.profile not in (None, AUTO):
            profiles.load(options.profile)  # what is wrong with it shall be said before anything is sampled
        elif options.profile is None and options.mode in ("mitigate", "stop"):
            raise ValueError(StabilityMonitor(mode=options.mode).outline()["note"])
        p.extra_generation_params["Script"] = TITLE
        if not compare:
            setattr(p, CHOSEN, options)
            return processing.process_images(p)
        return self._compare(p, options)

    def _compare(self, p: Any, options: Options) -> Any:
        processing.fix_seed(p)
        p.do_not_save_grid = True
        shared.state.job_count = 2 * p.n_iter
        made = []
        labels: dict[Mode, str] = {"trace": "without mitigation", "mitigate": "with mitigation"}
        for mode, label in labels.items():
            one = copy.copy(p)
            one.comments = {}
            one.extra_generation_params = dict(p.extra_generation_params)
            setattr(one, CHOSEN, dataclasses.replace(options, mode=mode))
            setattr(one, LABEL, label)
            made.append((processing.process_images(one), getattr(one, SESSION)))
            if shared.state.interrupted or shared.state.stopping_generation:
                break
        return _side_by_side(made, p.batch_size)

    def _calibrate(self, p: Any, prompts: str, name: str, replace: bool) -> Any:
        name, profile, left_out = profiles.calibrate(p, prompts, name, replace)
        LIVE.send(progress.current_task, {"kind": "profiles", "run": "calibration"})
        saved = f"{TITLE}: saved the stability profile {name!r} ({profiles.describe(profile)})."
        text = "\n".join([saved, *left_out])
        p.all_prompts, p.all_negative_prompts, p.all_seeds, p.all_subseeds = (
            [p.prompt],
            [p.negative_prompt],
            [p.seed],
            [p.subseed],
        )
        p.sd_model_name, p.sd_model_hash = p.sd_model.sd_checkpoint_info.name_for_extra, p.sd_model.sd_model_hash
        return processing.Processed(p, [], seed=p.seed, info=text, infotexts=[text])


def _side_by_side(made: list[tuple[Any, Session | None]], batch_size: int) -> Any:
    """The first of several results of the same images, with the pictures of all: image by image, and then their graphs."""
    pictures = [(processed.images, processed.infotexts) for processed, _ in made]
    result = made[0][0]
    result.images, result.infotexts = [], []
    for number in range(min(len(images) for images, _ in pictures)):
        for images, infotexts in pictures:
            result.images.append(images[number])
            result.infotexts.append(infotexts[number])
        for (_, session), (_, infotexts) in zip(made, pictures, strict=True):
            for drawn in session.graphs(*divmod(number, batch_size)) if session is not None else ():
                result.images.append(drawn)
                result.infotexts.append(infotexts[number])
    result.comments = "".join(dict.fromkeys(line for processed, _ in made for line in processed.comments.splitlines(True)))
    result.index_of_first_image = 0
    return result


def register() -> None:
    """Tells the host what else is to be called."""
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_before_ui(xyz.add_axes)
    script_callbacks.on_app_started(lambda _, app: add_route(app, LIVE, _is_running))
    script_callbacks.on_image_grid(xyz.label_unjudged)
    script_callbacks.on_before_image_saved(_before_image_saved)
    script_callbacks.on_image_saved(_image_saved)


def _is_running(task: str) -> bool:
    return task == progress.current_task or task in progress.pending_tasks


def _before_image_saved(params: Any) -> None:
    if (session := getattr(params.p, SESSION, None)) is not None:
        session.before_save(params, in_image=shared.opts.enable_pnginfo)


def _image_saved(params: Any) -> None:
    session = getattr(params.p, SESSION, None)
    if session is not None and setting("save_trace"):
        session.save_trace(params)
