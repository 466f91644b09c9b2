"""Nodes for stability profiles: to load, to save, and to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui

from ..memorization_guard import StabilityProfile
from ..memorization_guard.automatic import is_automatic
from ..memorization_guard.core.calibration import MIN_RUNS, ReferenceRuns, told_left_out
from ..memorization_guard.core.profile import EXTENSION, name_problem
from ..memorization_guard.prompts import enough, read_prompts, reference_prompts, typed_prompts
from .guard import CATEGORY, StabilityProfileType, also_found_as
from .models import model_hash
from .prompts import encoded
from .references import FOLDER, profile_folder, sample_references
from .sampling import is_guarded

BUILT_IN, TEXT = "built-in list", "text below"


class LoadStabilityProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardLoadProfile",
            display_name="Load Stability Profile",
            category=CATEGORY,
            description="Loads a stability profile from models/stability_profiles.",
            inputs=[
                io.Combo.Input(
                    "profile_name",
                    options=[name for name in folder_paths.get_filename_list(FOLDER) if not is_automatic(name)],
                    tooltip="A file of models/stability_profiles, or of a folder that extra_model_paths.yaml names under "
                    "stability_profiles. Press R after adding one.",
                )
            ],
            outputs=[StabilityProfileType.Output(display_name="PROFILE", tooltip="For Memorization Guard.")],
        )

    @classmethod
    def fingerprint_inputs(cls, profile_name: str) -> Any:
        path = folder_paths.get_full_path(FOLDER, profile_name)
        return Path(path).stat().st_mtime_ns if path is not None else None

    @classmethod
    def execute(cls, profile_name: str) -> io.NodeOutput:
        return io.NodeOutput(StabilityProfile.load(folder_paths.get_full_path_or_raise(FOLDER, profile_name)))


class SaveStabilityProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardSaveProfile",
            display_name="Save Stability Profile",
            category=CATEGORY,
            description="Saves a stability profile to models/stability_profiles.",
            inputs=[
                StabilityProfileType.Input("profile", tooltip="From Calibrate Stability Profile."),
                io.String.Input(
                    "name",
                    default="my model euler 30 cfg 7",
                    tooltip="Name of the file, without folder and suffix. Say what the profile was made with: model, sampler, "
                    "steps, cfg, size.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Whether to replace a profile of the same name."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return True if name is None else name_problem(name) or True

    @classmethod
    def execute(cls, profile: StabilityProfile, name: str, overwrite: bool) -> io.NodeOutput:
        if problem := name_problem(name):
            raise ValueError(problem)
        folder = profile_folder()
        path = folder / f"{name.strip().removesuffix(EXTENSION)}{EXTENSION}"
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path.name} is there already: choose another name, or switch 'overwrite' on")
        folder.mkdir(parents=True, exist_ok=True)
        profile.save(path)
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {path}"))


def _prompt_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    return (
        sorted(file.name for file in folder.iterdir() if file.suffix.lower() in (".txt", ".jsonl")) if folder.is_dir() else []
    )


class CalibrateStabilityProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardCalibrate",
            display_name="Calibrate Stability Profile",
            category=CATEGORY,
            description=(
                "Samples reference prompts, which the model should not have memorized, and measures what it predicts for "
                "them. The profile is valid for this model with every sampler, step count, cfg and size. No image is decoded."
            ),
            **also_found_as("memorization", "reference prompts", "overfit"),
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs, but without Memorization Guard."),
                io.Clip.Input("clip", tooltip="Encodes the reference prompts."),
                io.Combo.Input(
                    "prompts",
                    options=[BUILT_IN, TEXT, *_prompt_files()],
                    default=BUILT_IN,
                    tooltip="built-in list: 400 diverse prompts. text below: one prompt per line. Or a file in ComfyUI's "
                    "input folder: .txt (one prompt per line) or .jsonl (with a key caption or prompt). Press R after adding "
                    "a file.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip=f"Reference prompts for 'text below', one per line: at least {MIN_RUNS}, better a few hundred. "
                    "The first 50 are sampled to the end, the others for one step. Use prompts like your own, about things "
                    "that the model was not trained on again and again.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", tooltip="Negative prompt for all of them: the one that you use."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63,
                    tooltip="The first prompt gets the noise of this seed, and each further prompt that of the next one.",
                ),
                io.Int.Input("steps", default=30, min=1, max=10000, tooltip="As in your KSampler."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As in your KSampler."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in your KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in your KSampler."),
                io.Int.Input("width", default=512, min=16, max=16384, step=8, tooltip="As in your Empty Latent Image."),
                io.Int.Input("height", default=512, min=16, max=16384, step=8, tooltip="As in your Empty Latent Image."),
                io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="How many prompts are sampled at once."),
            ],
            outputs=[
                StabilityProfileType.Output(display_name="PROFILE", tooltip="For Memorization Guard, and to be saved."),
                io.String.Output(
                    display_name="report", tooltip="How many prompts were used, and which were left out and why."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompts: str, **_: Any) -> Any:
        if prompts in (BUILT_IN, TEXT):
            return prompts
        path = Path(folder_paths.get_input_directory()) / prompts
        return path.stat().st_mtime_ns if path.is_file() else None

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        prompts: str,
        text: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        width: int,
        height: int,
        batch_size: int,
    ) -> io.NodeOutput:
        if is_guarded(model):
            raise ValueError("this model is guarded already: connect the model as it is before Memorization Guard")
        texts = _prompts(prompts, text)
        latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, height // 8, width // 8))
        identity = [texts, negative, seed, steps, cfg, sampler_name, scheduler, list(latent.shape), model_hash(model)]
        runs = ReferenceRuns.within(profile_folder(), identity)

        (unconditional,) = encoded(clip, [negative])
        bar = comfy.utils.ProgressBar(len(texts))
        while batch := runs.next_batch(len(texts), batch_size):
            start, end, serves = batch
            bar.update_absolute(start, len(texts))
            traces = sample_references(
                model,
                encoded(clip, texts[start:end]),
                unconditional,
                seed + start,
                serves,
                steps=steps,
                cfg=cfg,
                latent=latent,
                sampler_name=sampler_name,
                scheduler=scheduler,
            )
            runs.add(traces, end - start)
        bar.update_absolute(len(texts), len(texts))
        profile, left_out = runs.profile()
        runs.forget()
        report = [f"Profile from {len(texts) - len(left_out)} of {len(texts)} reference prompts."]
        report += told_left_out(left_out, texts)
        return io.NodeOutput(profile, "\n".join(report), ui=ui.PreviewText("\n".join(report)))


def _prompts(source: str, text: str) -> list[str]:
    if source == BUILT_IN:
        return reference_prompts()
    if source == TEXT:
        return typed_prompts(text)
    return enough(read_prompts(Path(folder_paths.get_input_directory()) / Path(source).name))
