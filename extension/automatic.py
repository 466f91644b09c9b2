"""The profile that makes itself: before the first image with a model and its networks, as a generation of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any

import modules.scripts
from modules import devices, processing, shared

from ..memorization_guard import StabilityProfile, Trace
from ..memorization_guard.automatic import AUTO, STEPS, guidance_of, profiles_in
from ..memorization_guard.core.asking import undisturbed
from ..memorization_guard.core.settings import Serves
from .profiles import FOLDER, networks_of, sample_references

log = logging.getLogger(__name__)

_PROFILES = profiles_in(FOLDER / AUTO)

#: What was sampled with so far, and the fingerprint that it turned out to have.
_weights: dict[tuple[Any, ...], str | None] = {}


class _Cancelled(Exception):  # noqa: N818 (the user's wish)
    """The user has interrupted or skipped it."""


def find(weights: str | None) -> tuple[StabilityProfile | None, str | None]:
    """The profile of what a run samples with, by its fingerprint, or why there is none."""
    profile, missing = _PROFILES.find(weights)
    if profile is None:
        _weights.clear()  # a checkpoint may have been replaced by one of the same name
    return profile, missing


def make(p: Any, script: modules.scripts.Script) -> None:
    """Makes the profile of what ``p`` will be sampled with, if there is none. *Skip* cancels it, and the image is made.

    Args:
        p: the host's processing object, before anything was done with it.
        script: whose hooks watch a run; no other extension takes part.
    """
    # The fingerprint is known once the host has loaded what it samples with: one evaluation tells it.
    chosen = (
        p.override_settings.get("sd_model_checkpoint") or shared.opts.sd_model_checkpoint,
        *networks_of(p),
        p.refiner_checkpoint,
        p.refiner_switch_at,
    )
    generation = functools.cache(lambda: _generation(p, script))

    def sample(prompts: list[str], seed: int, serves: Serves) -> list[Trace]:
        traces = sample_references(generation(), prompts, seed, serves)
        if shared.state.interrupted or shared.state.stopping_generation or shared.state.skipped:
            shared.state.skipped = False
            raise _Cancelled
        return traces

    with _state_kept():
        try:
            if chosen not in _weights:
                (trace,) = sample(["cat"], 0, "first")
                _weights[chosen] = trace.settings.model_hash
            _PROFILES.make(_weights[chosen], sample, _progress, cancelled=_Cancelled)
        except _Cancelled:
            log.info("Memorization Guard: making the profile of this model was cancelled.")
        except Exception:
            log.warning("Memorization Guard could not make the profile of this model.", exc_info=True)


def _progress(done: int, of: int) -> None:
    shared.state.job_count, shared.state.job_no = of, done
    shared.state.textinfo = f"Memorization Guard makes the profile of this model, once: {done} of {of} prompts"


def _generation(p: Any, script: modules.scripts.Script) -> Any:
    """A generation from text with the model, the networks and the size of ``p``, and nothing else of it."""
    one = processing.StableDiffusionProcessingTxt2Img(
        prompt=" ".join(networks_of(p)),
        negative_prompt="",
        styles=[],
        sampler_name="Euler",
        scheduler="Automatic",
        steps=STEPS,
        cfg_scale=guidance_of(p.cfg_scale),
        width=p.width,
        height=p.height,
        tiling=False,
        refiner_checkpoint=p.refiner_checkpoint,
        refiner_switch_at=p.refiner_switch_at,
        override_settings=dict(p.override_settings),
        override_settings_restore_afterwards=True,
    )
    for name in ("distilled_cfg_scale", "sd_model"):  # Forge's; the WebUI's model is a property
        if name in vars(p):
            setattr(one, name, getattr(p, name))
    runner = copy.copy(p.scripts)
    runner.alwayson_scripts, runner.selectable_scripts, runner.callback_map = [script], [], {}
    one.scripts, one.script_args = runner, [0, *p.script_args[1:]]  # the first is the script's number in the dropdown
    return one


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """The host's progress and random numbers are afterwards what they were: the generation that was asked for has not begun,
    and an image to start from is encoded with what the one before has left."""
    state = shared.state
    names = ("job", "job_no", "job_count", "sampling_step", "sampling_steps", "textinfo", "processing_has_refined_job_count")
    kept = {name: getattr(state, name) for name in names}
    try:
        with undisturbed(devices.device):
            yield
    finally:
        for name, value in kept.items():
            setattr(state, name, value)
