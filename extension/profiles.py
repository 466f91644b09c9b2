"""Stability profiles as files of the host: in ``models/stability_profiles``, by name."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from modules import paths, processing, shared

from ..memorization_guard import CalibrationError, StabilityProfile, Trace
from ..memorization_guard.automatic import AUTO, is_automatic
from ..memorization_guard.core.calibration import ReferenceRuns, told_left_out
from ..memorization_guard.core.profile import EXTENSION, ProfileError, name_problem
from ..memorization_guard.core.settings import Serves
from ..memorization_guard.files import write_whole
from ..memorization_guard.prompts import reference_prompts, typed_prompts
from . import hosts, sampling
from .session import CALIBRATING, SESSION

FOLDER = Path(paths.models_path) / "stability_profiles"
NONE = "None"


def names() -> list[str]:
    """What the list of profiles offers; those that made themselves are behind ``auto``."""
    return [AUTO, NONE, *sorted(name for name in _files() if not is_automatic(name))]


def load(name: str) -> StabilityProfile:
    """The profile of a name from :func:`names`.

    Raises:
        ProfileError: if there is none of this name, or its file cannot be used.
    """
    if (path := _files().get(name)) is None:
        raise ProfileError(f"there is no stability profile {name!r} in {FOLDER}: choose another")
    return StabilityProfile.load(path)


def add(file: Path, name: str) -> str:
    """Adds a copy of a profile that is known to be one, and gives its name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_whole(FOLDER / f"{name}{EXTENSION}", file.read_bytes())
    return name


def _files() -> dict[str, Path]:
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob(f"*{EXTENSION}")}


def describe(profile: StabilityProfile) -> str:
    """What a profile was made from, in a line."""
    s = profile.settings
    parts = [s.model, s.sampler, f"{s.steps} steps" if s.steps else None]
    parts.append(f"CFG {s.guidance_scale:g}" if s.guidance_scale is not None else None)
    if s.latent_shape is not None:
        parts.append("latent " + " x ".join(map(str, s.latent_shape)))
    prompts = profile.reference_prompts or profile.count
    return ", ".join(str(part) for part in parts if part) + f"; from {prompts} reference prompts"


def calibrate(p: Any, text: str, name: str, overwrite: bool) -> tuple[str, StabilityProfile, list[str]]:
    """Samples reference prompts with the settings of ``p``, and saves the profile that they give. No image is decoded.

    An interrupted calibration goes on where it stopped when it is asked for again with the same settings.

    Args:
        text: reference prompts, one a line; our own where there are none.
        name: of the profile; made up from the settings where it is empty.
        overwrite: whether one of the same name may be replaced.

    Returns:
        The profile's name, the profile, and which prompts were left out and why, a line each.

    Raises:
        CalibrationError: if the settings or the prompts cannot give a profile, or the user interrupted it.
    """
    if not isinstance(p, processing.StableDiffusionProcessingTxt2Img):
        raise CalibrationError("calibrate in txt2img: a profile of the full schedule holds for img2img as well")
    model = hosts.load_model(p)
    prompts = typed_prompts(text) if text.strip() else reference_prompts()
    name = name.strip().removesuffix(EXTENSION) or _name(p)
    if problem := name_problem(name):
        raise CalibrationError(problem)
    path = FOLDER / f"{name}{EXTENSION}"
    if path.exists() and not overwrite:
        raise CalibrationError(f"there is a profile {name!r} already: give another name, or tick 'Replace'")

    seed = int(processing.get_fixed_seed(p.seed if p.seed not in (-1, None, "") else 0))
    identity = [
        *(prompts, p.negative_prompt, p.styles, seed, p.sampler_name, getattr(p, "scheduler", None), p.steps, p.cfg_scale),
        *(p.width, p.height, p.prompt if "<" in str(p.prompt) else "", sampling.checkpoint_hash(model), p.override_settings),
    ]
    runs = ReferenceRuns.within(FOLDER, identity)
    shared.state.job_count = math.ceil((len(prompts) - len(runs.traces)) / p.batch_size)
    while batch := runs.next_batch(len(prompts), p.batch_size):
        start, end, serves = batch
        traces = sample_references(p, prompts[start:end], seed + start, serves)
        if shared.state.interrupted or shared.state.stopping_generation:
            raise CalibrationError(
                f"stopped after {start} of {len(prompts)} reference prompts: the same settings again go on from there"
            )
        runs.add(traces, end - start)
    profile, left_out = runs.profile()
    profile.save(path)
    runs.forget()
    return name, profile, told_left_out(left_out, prompts)


def sample_references(p: Any, prompts: list[str], seed: int, serves: Serves) -> list[Trace]:
    """The traces of ``prompts``, sampled in one batch as ``p`` would, with its networks, as long as they are needed."""
    one = copy.copy(p)
    networks = " ".join(_networks(str(p.prompt)))
    one.prompt = [f"{prompt} {networks}".strip() for prompt in prompts]
    one.seed, one.batch_size, one.n_iter = seed, len(prompts), 1
    one.enable_hr = one.restore_faces = False
    one.do_not_save_samples = one.do_not_save_grid = True
    one.extra_generation_params = {}
    setattr(one, CALIBRATING, serves)
    processing.process_images(one)
    session = getattr(one, SESSION)
    return [trace for run in session.runs for trace in run.traces]


def networks_of(p: Any) -> list[str]:
    """The extra networks that the prompt and the styles of ``p`` name, in order."""
    prompt = p.prompt[0] if isinstance(p.prompt, list) else p.prompt
    return sorted(set(_networks(shared.prompt_styles.apply_styles_to_prompt(str(prompt), p.styles or []))))


def _networks(prompt: str) -> list[str]:
    """The extra networks that a prompt names, as it names them."""
    from modules import extra_networks

    return [match.group(0) for match in extra_networks.re_extra_net.finditer(prompt)]


def _name(p: Any) -> str:
    model = getattr(p, "sd_model_name", None) or p.sd_model.sd_checkpoint_info.name_for_extra
    scheduler = getattr(p, "scheduler", None)
    schedule = f" {scheduler}" if scheduler and scheduler != "Automatic" else ""
    name = f"{model} {p.sampler_name}{schedule} {p.steps} cfg {p.cfg_scale:g} {p.width}x{p.height}"
    return "".join(character if character not in '/\\:*?"<>|' else "-" for character in name)[:120]
