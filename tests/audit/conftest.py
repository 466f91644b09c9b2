"""A tiny model and lists for it, and audits of both that take seconds; audits without a model, given row by row."""

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
from memorization_guard.core.trace import STEP_FIELDS


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
        options = {"reference": [f"a blue dog in the sun {n}" for n in range(10)], "progress": False} | options
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
    "settings": {"steps": 20, "guidance_scale": 7.5, "seeds_per_prompt": 2, "mitigate": False, "stop": False},
    "thresholds": Thresholds().to_dict(),
    "profile": {"sha256": "cc", "reference_runs": 50},
}


def make_trace(tail=0.5, *, corrected=False, note=None, scored=True, steps=20):
    """A run of that rarity; it triggers below 1 in 1,000, strongly below 1 in a million."""
    nothing = {name: np.full(steps, np.nan) for name in STEP_FIELDS}
    if not scored:
        norms = {name: np.ones(steps) for name in ("latent_norm", "update_norm", "denoised_norm")}
        return Trace(note=note, **nothing | norms | {"sigma": np.linspace(10, 1, steps)})
    rising = np.linspace(0, 1, steps)
    tails = 10.0 ** (np.log10(tail) * rising)
    tails[-1] = tail
    triggered = tail < 0.001
    band = {"mean": np.full(steps, 2.0), "std": np.full(steps, 0.1)}
    after = np.where(rising > 0.8, 2.0, np.nan) if corrected and triggered else np.full(steps, np.nan)
    return Trace(
        verdict="stable" if not triggered else "strong" if tail < 1e-6 else "mild",
        trigger_step=int(np.argmax(tails < 0.001)) if triggered else None,
        note=note,
        bands={"latent": band, "update": band, "denoised": band},
        mitigation=corrected,
        **nothing
        | {
            "sigma": np.linspace(10, 1, steps),
            "latent_norm": np.full(steps, 30.0),
            "update_norm": 2 + rising * -np.log10(tail) / 5,
            "denoised_norm": np.full(steps, 20.0),
            "update_score": rising * -np.log10(tail) * 2,
            "denoised_score": rising * -np.log10(tail) * 1.5,
            "tail": tails,
            "guidance_norm": np.ones(steps),
            "corrected_latent_norm": after,
            "corrected_update_norm": after,
        },
    )


def make_row(image, prompt, trace, *, seed=None, kind=None, file=None):
    """A row of the results, as of ``dataset.SCHEMA``."""
    text = trace.to_dict()
    columns = ("verdict", "score", "joint_score", "tail_probability", "local_score", "uncalibrated_score", "trigger_step")
    return {name: text[name] for name in (*columns, "nonfinite_step", "note", "settings")} | {
        "image": image,
        "row": image,
        "prompt": prompt,
        "kind": kind,
        "seed": image if seed is None else seed,
        "steps": trace.steps,
        "corrected_steps": int(trace.mitigated.sum()),
        "file": file,
        "trace": json.dumps(text),
    }


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
