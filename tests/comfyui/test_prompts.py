"""Other prompts in the place of a run's own, inside ComfyUI: whatever mixes predictions, in batches, in all kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memorization_guard.lab import prompts

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
TINY = Path(__file__).with_name("tiny_models.py").read_text(encoding="utf-8")

LAB = """
sys.path.insert(0, args[0])
import torch
from comfyui_lab import Lab, Method, context_windows, methods
lab = Lab(module)
Encoder = module("nodes.prompts").Encoder
exact, ordinary = lab.lab.prompts("exact", "tuning")[0:9:8], lab.lab.prompts("ordinary", "tuning")[:1]

def told(traces):
    return [trace.words and [*trace.words.words] for trace in traces]

def sample(prompts, mode=None, texts=None, **how):
    guard = {} if mode is None else {"mode": mode, "profile": lab.profile}
    if texts is not None:
        guard["encoder"] = Encoder(lab.clip, lambda: texts)
    found = lab.sample(prompts, 5, **({"steps": 12} | how), **guard)
    return found.latents, found.traces
"""


def names(caption: str) -> set[str]:
    return set(caption.split()[-2:])


def test_of_a_batch_each_image_has_its_own_words_and_ordinary_ones_are_left_alone(in_comfyui: Any) -> None:
    result = in_comfyui(
        LAB
        + """
batch = [exact[0], ordinary[0], exact[1], exact[0]]
plain, _ = sample(batch)
for name, texts in (("kept", [*exact, *ordinary]), ("one known", exact[:1]), ("none known", [*ordinary])):
    latents, traces = sample(batch, "mitigate", texts)
    result[name] = {
        "words": told(traces),
        "verdicts": [trace.verdict for trace in traces],
        "same": [torch.equal(a, b) for a, b in zip(plain, latents)],
        "copies": sum(lab.copies(latents[[0, 2, 3]], [*exact, exact[0]])),
    }
steered, _ = sample(batch, "mitigate")
result["steered"] = torch.equal(steered, latents)
result["exact"] = exact
""",
        BENCHMARKS,
    )
    first, second = result.pop("exact")
    assert result.pop("steered"), "with no text known the run is steered as without a CLIP"
    for name, found in result.items():
        assert found["verdicts"] == ["corrected", "stable", "corrected", "corrected"], name
        assert found["same"] == [False, True, False, False], name
        assert found["copies"] == 0, name
    kept = result["kept"]["words"]
    assert kept[1] is None
    for words, caption in ((kept[0], first), (kept[2], second), (kept[3], first)):
        assert set(words) & names(caption)
    assert result["one known"]["words"] == [kept[0], None, None, kept[0]]
    assert result["none known"]["words"] == [None] * 4


def test_whatever_mixes_predictions_goes_on_with_the_other_prompt(in_comfyui: Any) -> None:
    result = in_comfyui(
        LAB
        + """
import comfy_extras.nodes_easycache as cache

ways = methods()
ways = {name: ways[name] for name in ("CFG", "PAG", "SAG", "SLG", "PerpNeg", "DualCFG", "dynamic thresholding")}
ways["context windows"] = Method(context_windows)
ways["EasyCache"] = Method(lambda model: cache.EasyCacheNode.execute(model, 0.02, 0.15, 0.95, False).args[0])
for name, method in ways.items():
    for first in ((False, True) if name in ("SAG", "EasyCache") else (False,)):
        how = {"method": method, "guard_first": first, "sampler": "euler_ancestral"}
        plain, _ = sample(exact[:1], **how)
        traced, seen = sample(exact[:1], "trace", exact, **how)
        kept, traces = sample(exact[:1], "mitigate", exact, **how)
        without, _ = sample([traces[0].words.text] if traces[0].words else exact[:1], **how)
        result[f"{name}, guard {'before' if first else 'after'}"] = {
            "identical": torch.equal(plain, traced),
            "words": told([*seen, *traces]),
            "verdicts": [trace.verdict for trace in (*seen, *traces)],
            "left": sum(lab.copies(kept, exact[:1])),
            "off": float((kept - without).abs().max() / without.abs().max()),
        }
""",
        BENCHMARKS,
        timeout=600,
    )
    for name, found in result.items():
        assert found["identical"], name
        assert found["verdicts"] == ["likely copy", "corrected"], name
        assert found["words"][0] == found["words"][1], name
        assert set(found["words"][0]) & names(prompts("exact", "tuning")[0]), name
        assert found["left"] == 0, name
        # The picture is the one of the prompt without the words.
        assert found["off"] < 1e-3, name


def test_of_two_guards_in_a_row_one_rewrites(in_comfyui: Any) -> None:
    result = in_comfyui(
        LAB
        + """
for guider in ("CFG", "PerpNeg"):
    logs = []
    def guarded(model):
        for _ in range(2):
            encoder = Encoder(lab.clip, lambda: exact)
            model, log = lab.sampling.guard(model, mode="mitigate", profile=lab.profile, encoder=encoder)
            logs.append(log)
        return model
    latents, _ = sample(exact, method=Method(guarded, methods()[guider].guider))
    traces = [log.runs()[0].traces for log in logs]
    result[guider] = {"words": [told(each) for each in traces], "left": sum(lab.copies(latents, exact))}
""",
        BENCHMARKS,
    )
    for name, found in result.items():
        for words in zip(*found["words"], strict=True):
            assert sorted(map(bool, words)) == [False, True], name
        assert found["left"] == 0, name


def test_models_of_all_kinds_go_on_as_if_the_other_prompt_had_been_their_own(in_comfyui: Any) -> None:
    """The text encoder takes the model's place on the device each time, and long texts take more of a conditioning."""
    result = in_comfyui(
        TINY
        + """
sampling, prompts = module("nodes.sampling"), module("nodes.prompts")
core = pack.__name__ + ".memorization_guard.core."
judge, words = (sys.modules[core + name] for name in ("judge", "words"))
runs_of = sys.modules[core + "calibration"].ReferenceRuns

def patched(name):
    model = tiny(name)
    weights = {key: value for key, value in model.model.state_dict().items() if key.endswith("weight") and value.ndim == 2}
    model.add_patches({key: ("diff", (torch.full_like(value, 0.01),)) for key, value in weights.items()}, 1.0)
    return model

def run(name, model, text, seed=3, batch=2):
    positive, negative = Clip(name).encode_from_tokens_scheduled(text), Clip(name).encode_from_tokens_scheduled("")
    latent = torch.zeros(batch, *MODELS[name][-1])
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 6, 4.0, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=seed
        )

asked = []
def find(text, detail, tail):
    asked.append(detail(["a cat", "a very very very long prompt", "a cat", text]).tolist())
    return words.Words(("red",), (0.001,), "a cat", 0.9)

def triggers(self, detail, tail):
    self.p_value, self.trigger = detail * 0 + 0.0001, (detail * 0).astype(int)

profiles = {}
for name in ("SD 1", "SD 2 v", "SDXL", "SD3", "Flux", "Wan"):
    guarded, log = sampling.guard(patched(name), mode="trace", serves="whole")
    run(name, guarded, "a dog", batch=8)
    references = runs_of(None, name)
    references.add([trace for each in log.runs() for trace in each.traces], 8)
    profiles[name] = references.profile()[0]
words.find, judge.Judge._judge = find, triggers
for name, profile in profiles.items():
    guarded, log = sampling.guard(patched(name), mode="trace", serves="whole")
    own = run(name, guarded, "a cat")
    whole = log.runs()[0].traces[0].asked
    encoder = prompts.Encoder(Clip(name), lambda: ["another text", "a red cat"])
    guarded, log = sampling.guard(patched(name), mode="mitigate", profile=profile, encoder=encoder)
    asked.clear()
    kept = run(name, guarded, "a red cat")
    traces = log.runs()[0].traces
    result[name] = {
        "identical": torch.equal(kept, own),
        "changed": not torch.equal(kept, run(name, patched(name), "a red cat")),
        "patched": not torch.equal(own, run(name, tiny(name), "a cat")),
        "words": [trace.words and trace.words.text for trace in traces],
        "verdicts": [trace.verdict for trace in traces],
        "error": str(log.runs()[0].monitor.error),
        "asked": [*asked, whole],
    }
""",
        timeout=600,
    )
    assert len(result) == 6
    for name, found in result.items():
        assert found["error"] == "None", name
        assert found["words"] == ["a cat"] * 2, name
        assert found["verdicts"] == ["corrected"] * 2, name
        assert found["identical"], name
        assert found["changed"], name
        assert found["patched"], name
        first, long, again, own = found["asked"][0]
        assert first == again, name
        assert len({first, long, own}) == 3, name
        assert abs(first / found["asked"][1] - 1) < 1e-3, name
