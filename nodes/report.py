"""Nodes that stand behind the sampler: what was seen of the images, and a gate that holds some of them back."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..memorization_guard import Trace, evidence
from ..memorization_guard.core.trace import worst
from ..memorization_guard.reports import graph
from ..memorization_guard.reports.words import unusual
from .guard import CATEGORY, TraceType, also_found_as
from .runs import Run, TraceLog

#: Key of the traces in what the node shows.
SHOWN = "memorization_guard"

#: Which images the gate passes of those that were corrected.
PASS_CORRECTED = ("none", "without the words", "all")


class StabilityReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardReport",
            display_name="Stability Report",
            category=CATEGORY,
            description=(
                "Tells what Memorization Guard found out about the images that pass through. Puts the trace, with a hash of "
                "the pixels, into the metadata that Save Image writes, so that it can be checked later whether they belong "
                "together."
            ),
            **also_found_as("duplicate", "plagiarism", "overfit", "copyright", "memorized", "evidence"),
            inputs=[
                _trace_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent that came out of the sampler; it is passed through. Connect this or the image, so "
                    "that the report knows which run is meant and waits for it.",
                ),
                io.Image.Input("image", optional=True, tooltip="The image that was decoded from it; it is passed through."),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="The latent, unchanged."),
                io.Image.Output("image_out", display_name="IMAGE", tooltip="The image, unchanged."),
                io.Boolean.Output(
                    "stable", display_name="stable", tooltip="Whether every image was judged, and none is a likely copy."
                ),
                io.Float.Output(
                    "score",
                    display_name="score",
                    tooltip="The largest published score (S_mem) of the images: the largest distance of the update norm from "
                    "the reference, in standard deviations. Not a number if the profile is of another sampler or schedule.",
                ),
                io.String.Output(
                    "trace_json", display_name="trace (JSON)", tooltip="The traces as JSON, as docs/trace.md describes them."
                ),
                io.Image.Output(
                    "graph", display_name="graph", tooltip="The stability graph of each image, with one row per run."
                ),
                io.Image.Output(
                    "map",
                    display_name="map",
                    tooltip="The image in grey, with the places in red that the prompt settles in noise: what the model may "
                    "have copied. If there is no such map, the unchanged image.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trace: TraceLog | None = None, latent: Any = None, image: Any = None) -> io.NodeOutput:
        if latent is None and image is None:
            raise ValueError("connect the sampler's latent, or the image decoded from it: it tells which run is meant")
        runs = _runs_behind(cls.hidden, trace)
        count = len(latent["samples"]) if latent is not None else len(image)
        rows = [run.traces for run in runs]
        judged = _by_image(rows, count)
        entries: list[Any] = [
            {"sampler_node": run.sampler_node, "traces": [one.to_dict() for one in traces]}
            for run, traces in zip(runs, rows, strict=True)
        ]
        if cls.hidden.extra_pnginfo is not None:
            record = _record(runs, rows, judged, image, cls.hidden.dynprompt.get_original_prompt())
            cls.hidden.extra_pnginfo.setdefault(evidence.KEY, {})[str(cls.hidden.unique_id)] = record
        scores = [score for one in judged if (score := one.score) is not None]
        return io.NodeOutput(
            latent,
            image,
            all(one.verdict == "stable" for one in judged),
            max(scores, default=math.nan),
            json.dumps(entries),
            _graphs(rows, count),
            None if image is None else _maps(image, judged),
            ui={SHOWN: entries or [{"sampler_node": None, "traces": [one.to_dict() for one in judged[:1]]}]},
        )


class MemorizationGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemorizationGuardGate",
            display_name="Memorization Gate",
            category=CATEGORY,
            description="Passes only the images that were judged stable, and says how many it held back and why.",
            **also_found_as("duplicate", "plagiarism", "overfit", "copyright", "memorized", "filter"),
            inputs=[
                io.Image.Input("image", tooltip="The images that were decoded from the guarded sampler's latent."),
                _trace_input(),
                io.Combo.Input(
                    "when_empty",
                    options=["block", "placeholder"],
                    default="block",
                    tooltip="What happens if no image passes. block: nothing behind the gate runs. placeholder: a grey image "
                    "of the same size takes the place of each.",
                ),
                io.Boolean.Input(
                    "pass_unscored",
                    default=False,
                    tooltip="Whether images pass that could not be judged, for example without a profile that fits.",
                ),
                io.Combo.Input(
                    "pass_corrected",
                    options=[*PASS_CORRECTED],
                    default=PASS_CORRECTED[0],
                    tooltip="Which corrected images pass. without the words: those that were sampled without the words that "
                    "call the copy up. all: also those that were steered away from their prompt; nothing tells whether they "
                    "are still copies.",
                ),
            ],
            outputs=[
                io.Image.Output("passed", display_name="IMAGE", tooltip="Images that pass, in their order."),
                io.Int.Output("held_back", display_name="held back", tooltip="How many were held back."),
                io.String.Output("reasons", display_name="reasons", tooltip="Why they were held back, one line per image."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        when_empty: str,
        pass_unscored: bool,
        pass_corrected: str,
        trace: TraceLog | None = None,
    ) -> io.NodeOutput:
        judged = _by_image([run.traces for run in _runs_behind(cls.hidden, trace)], len(image))
        reasons = {}
        for number, one in enumerate(judged):
            passes = one.verdict == "stable"
            passes |= one.verdict == "unscored" and pass_unscored
            passes |= bool(one.mitigated.any()) and (pass_corrected == "all" or (pass_corrected != "none" and one.left_out))
            if not passes:
                reasons[number] = _reason(one)
        lines = [f"Image {number + 1} held back: {reason}." for number, reason in reasons.items()]
        text = "\n".join([f"{len(image) - len(reasons)} of {len(image)} images passed.", *lines])
        kept = [number for number in range(len(image)) if number not in reasons]
        if kept:
            images: Any = image[kept]
        elif when_empty == "block":
            images = ExecutionBlocker(None)
        else:
            images = torch.full_like(image, 0.5)
        return io.NodeOutput(images, len(reasons), text, ui={"text": (text,)})


def _trace_input() -> Any:
    """Optional, since a guard that is bypassed gives none: that is said, and the workflow runs."""
    return TraceType.Input(
        "trace", optional=True, tooltip="From Memorization Guard. Without it, every image counts as not judged."
    )


def _runs_behind(hidden: Any, trace: TraceLog | None) -> list[Run]:
    """The runs that led to this node's image or latent; none without a trace."""
    if trace is None:
        return []
    prompt = hidden.dynprompt

    def get_node(node: str) -> Any:
        return prompt.get_node(node) if prompt.has_node(node) else None

    inputs = get_node(hidden.unique_id)["inputs"]
    links = [inputs[name] for name in ("latent", "image") if isinstance(inputs.get(name), list)]
    return trace.runs_behind(get_node, [str(link[0]) for link in links])


def _by_image(runs: list[list[Trace]], count: int) -> list[Trace]:
    """For each of ``count`` images the trace that says most against it.

    A run with another number of images (tiles, a repeated latent) speaks for all of them.
    """
    runs = [traces for traces in runs if traces]
    if not runs:
        note = (
            "No run of a guard led here. It may be bypassed, its mode may be off, the sampler's model may come from "
            "elsewhere, or the sampler's result was taken from the cache: change the seed to sample again."
        )
        return [Trace(note=note)] * count
    return [
        worst(trace for traces in runs for trace in (traces[number : number + 1] if len(traces) == count else traces))
        for number in range(count)
    ]


def _record(runs: list[Run], rows: list[list[Trace]], judged: list[Trace], image: Any, prompt: Any) -> dict[str, Any]:
    """The evidence that Save Image embeds beside ``prompt``: of every run, or why there is none.

    Args:
        runs, rows: the runs, and the traces of each. judged: for each image what its runs come to. image: the images
            ``[count, H, W, C]`` that are passed on, or ``None``.
    """
    count = len(judged)
    found = [
        (trace, number if len(traces) == count else None, f"sampler {run.sampler_node}")
        for run, traces in zip(runs, rows, strict=True)
        for number, trace in enumerate(traces)
    ] or [(trace, number, "") for number, trace in enumerate(judged)]
    traces, images, names = zip(*found, strict=True)
    return evidence.record(traces, images=images, runs=names, pixels=_pixels(image), settings=prompt, settings_in="prompt")


def _pixels(images: Any) -> list[str] | None:
    """The hash of each image as Save Image writes it; 7 ms for 1024 x 1024 pixels, a twentieth of what that takes."""
    if images is None:
        return None
    try:
        return [evidence.pixel_hash(np.clip(255.0 * one.cpu().numpy(), 0, 255).astype(np.uint8)) for one in images]
    except (TypeError, ValueError):
        return None  # not what Save Image can write either


def _reason(trace: Trace) -> str:
    if trace.verdict == "unscored":
        return f"not judged ({(trace.note or 'no profile').rstrip('.')})"
    corrected = ", and was corrected" if trace.mitigated.any() else ""
    rare = "" if trace.rarity is None else f", {unusual(trace.rarity)}"
    return f"{trace.verdict}, triggered at step {trace.trigger_step}{rare}{corrected}"


def _graphs(runs: list[list[Trace]], count: int) -> torch.Tensor:
    """``[count, H, W, 3]``: the graphs of each image, one below the other."""
    runs = [traces for traces in runs if traces] or [_by_image([], count)]
    columns = []
    for number in range(count):
        rows = [graph.image(traces[min(number, len(traces) - 1)]) for traces in runs]
        columns.append(np.concatenate([np.asarray(row, dtype=np.float32) / 255.0 for row in rows]))
    return torch.from_numpy(np.stack(columns))


def _maps(images: torch.Tensor, judged: list[Trace]) -> torch.Tensor:
    """``images`` ``[count, H, W, C]`` with the local map of each laid over it, where there is one."""
    mapped = images.clone()
    for number, trace in enumerate(judged):
        if trace.local_map.size:
            pixels = (images[number, ..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
            overlaid = np.asarray(graph.overlay(Image.fromarray(pixels), trace), dtype=np.float32) / 255.0
            mapped[number, ..., :3] = torch.from_numpy(overlaid)
    return mapped
