"""A tiny model and lists for it, and audits of both that take seconds; audits without a model, given row by row."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from memorization_guard import Thresholds, Trace
from memorization_guard.audit import dataset
from memorization_guard.audit.plan import Plan
from memorization_guard.audit.run import Local, audit
from memorization_guard.audit.worker import Recipe
from memorization_guard.core.trace import Evaluations, Steps
from memorization_guard.core.words import Words
from memorization_guard.reports.audit import write_report


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"caption": f"a red cat {n}", "kind": "cat" if n % 2 else "dog"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(model):
    return Recipe(model=str(model), steps=2, height=16, width=16, device="cpu")


@pytest.fixture
def run(recipe, prompts, tmp_path):
    """An audit of the tiny model, as the command makes it; by keyword what is to be otherwise."""

    def run_audit(folder=None, *, recipe=recipe, prompts=prompts, seeds_per_prompt=2, batch_size=4, workers=None, **options):
        plan = Plan.of(prompts, seeds_per_prompt=seeds_per_prompt)
        options = {"reference": [f"a red cat {letter}" for letter in "abcdefghij"], "progress": False} | options
        options |= {"report": write_report}
        hands = workers or (lambda: Local(recipe))
        return audit(recipe, plan, folder or tmp_path / "audit", hands, batch_size=batch_size, **options)

    return run_audit


MANIFEST = {
    "format": dataset.FORMAT,
    "version": dataset.FORMAT_VERSION,
    "created": "2026-01-02T03:04:05+00:00",
    "finished": "2026-01-02T04:04:05+00:00",
    "model": {"name": "base", "components": {"unet": "ab12"}, "loras": [{"file": "a.safetensors", "weight": 0.8}]},
    "prompts": {"file": "prompts.txt", "sha256": "aa", "rows": 2},
    "settings": {"steps": 20, "guidance_scale": 7.5, "seeds_per_prompt": 2, "mode": "trace"},
    "thresholds": Thresholds().to_dict(),
    "profile": {"sha256": "cc", "reference_runs": 50, "reference_prompts": 400},
}


def make_trace(p_value=0.5, *, corrected=False, note=None, scored=True, steps=20, words=None, without=""):
    """A run of that rarity, with one evaluation a step; it triggers if it is rarer than 1 in 1,000, the rarer the earlier.
    ``words`` are those that call the copy up, if any were told."""
    sigma, unknown = np.linspace(10, 1, steps), np.full(steps, np.nan)
    rising = np.linspace(0, 1, steps)
    triggered = scored and p_value < 0.001
    mitigated = np.full(steps, corrected and triggered) & (rising > 0.8)
    far = rising * -np.log10(p_value)
    nothing = {field.name: unknown for field in dataclasses.fields(Evaluations)}
    band = {"mean": np.full(steps, 2.0), "std": np.full(steps, 0.1)}
    return Trace(
        verdict="likely copy" if triggered else "stable" if scored else "unscored",
        trigger_step=int(np.argmax(far > 3)) if triggered else None,
        note=note,
        p_value=p_value if scored else None,
        words=None if words is None else Words(tuple(words), (0.001,) * len(words), without, 0.6),
        mode="mitigate" if corrected else "trace",
        bands={"latent": band, "update": band, "denoised": band} if scored else {},
        steps=Steps(
            sigma=sigma,
            latent_norm=np.full(steps, 30.0),
            update_norm=2 + far / 5,
            denoised_norm=np.full(steps, 20.0),
            update_score=far * 2 if scored else unknown,
            denoised_score=far * 1.5 if scored else unknown,
            mitigated=mitigated,
        ),
        evaluations=Evaluations(
            **nothing
            | {
                "step": np.arange(steps),
                "sigma": sigma,
                "guidance": np.ones(steps),
                "detail": 0.1 + far,
                "corrected": mitigated,
            }
        ),
    )


def make_row(image, prompt, trace, *, seed=None, kind=None, file=None, screened_out=False):
    """A row of the results, as of ``dataset.SCHEMA``."""
    text = trace.to_dict()
    columns = ("verdict", "score", "joint_score", "p_value", "detail", "uncalibrated_score", "trigger_step")
    return {name: text[name] for name in (*columns, "nonfinite_step", "note", "settings")} | {
        "image": image,
        "row": image,
        "prompt": prompt,
        "kind": kind,
        "seed": image if seed is None else seed,
        "screened_out": screened_out,
        "steps": len(trace.steps),
        "corrected_steps": int(trace.mitigated.sum()),
        "words": None if trace.words is None else list(trace.words.words),
        "prompt_without_words": None if trace.words is None else trace.words.text,
        "file": file,
        "trace": json.dumps(text),
    }


class MadeUp:
    """Workers of an audit that make up their rows, for tests to add how."""

    count = 1

    def describe(self):
        about = {"pipeline": "None", "components": {}, "files": {}, "loras": [], "scheduler": {}, "dtype": "float32"}
        return about | {"device": "cpu", "versions": {}}

    def trial(self, job, profile):
        pass

    def close(self):
        pass


@pytest.fixture(scope="session")
def audits(tmp_path_factory):
    """``audits(rows, manifest changes..., pictures={file: colour}, part=rows a part)`` writes an audit, returns its folder."""

    def write(rows, *, pictures=None, part=7, **changes):
        folder = tmp_path_factory.mktemp("audit")
        (folder / dataset.RESULTS).mkdir()
        manifest = MANIFEST | {"images": len(rows)} | changes
        (folder / dataset.MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))
        for number, start in enumerate(range(0, len(rows), part)):
            dataset.write_table(folder / dataset.RESULTS / f"part-{number:06}.parquet", rows[start : start + part])
        for file, color in (pictures or {}).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (600, 400), color).save(folder / file)
        return folder

    write.trace, write.row = make_trace, make_row
    return write
