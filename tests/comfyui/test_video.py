"""Video models with a profile that makes itself: of one frame, by which the whole video is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = Path(__file__).with_name("tiny_models.py").read_text(encoding="utf-8")

#: A stand-in for a text encoder, and what a run with it as the guard's CLIP leaves.
SETUP = (
    TINY
    + """
import zlib
sampling, references = module("nodes.sampling"), module("nodes.references")
core = sys.modules[pack.__name__ + ".memorization_guard"]

class Clip:
    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return [[torch.randn(1, 7, 64, generator=generator), {"pooled_output": torch.zeros(1, 1)}]]

def run(name, mode="trace", **thresholds):
    model = tiny(name)
    thresholds = core.Thresholds(**thresholds)
    guarded, log = sampling.guard(model, mode=mode, thresholds=thresholds, automatic=references.Automatic(Clip()))
    made = sample(guarded, name)
    found = {"identical": torch.equal(sample(model, name), made), "finite": bool(torch.isfinite(made).all())}
    return found | {"traces": [trace.to_dict() for trace in log.runs()[0].traces]}
"""
)


def test_a_video_is_judged_by_one_frame_and_corrected_whole(in_comfyui: Any) -> None:
    result = in_comfyui(
        SETUP
        + """
result["trace"] = run("Wan")
result["mitigate"] = run("Wan", mode="mitigate", false_positive_rate=0.999)
"""
    )
    assert result["trace"]["identical"]
    for trace in result["trace"]["traces"]:
        assert trace["verdict"] in ("stable", "likely copy")
        assert trace["p_value"] is not None
        assert trace["note"] is None
        assert trace["settings"]["latent_shape"] == [16, 3, 8, 8]
        assert len(trace["steps"]["sigma"]) == 6
    assert result["mitigate"]["finite"]
    assert not result["mitigate"]["identical"]
    assert [trace["verdict"] for trace in result["mitigate"]["traces"]] == ["corrected", "corrected"]


def test_a_video_that_begins_with_an_image_is_not_judged_and_says_why(in_comfyui: Any) -> None:
    """The image is part of what the network is given, in all of the video's frames: it cannot be asked about one."""
    result = in_comfyui(SETUP + 'result["run"] = run("Wan, from an image", mode="mitigate")')
    assert result["run"]["identical"]
    for trace in result["run"]["traces"]:
        assert trace["verdict"] == "unscored"
        assert trace["note"].startswith(
            "The run has latents of (16, 3, 8, 8), the profile of (16, 1, 8, 8), "
            "and what the prompt does could not be asked for ("
        )
