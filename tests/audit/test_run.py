"""An audit on one machine: what it writes, what it refuses, and how it goes on."""

import dataclasses
import json
import threading

import duckdb
import pandas as pd
import pytest
import torch
from PIL import Image

from memorization_guard import StabilityProfile, Trace, evidence
from memorization_guard.audit import AuditError
from memorization_guard.audit.dataset import MANIFEST, PROFILE, SCHEMA, read_manifest, scan
from memorization_guard.audit.run import Local
from memorization_guard.audit.worker import Worker
from memorization_guard.core.calibration import CalibrationError
from memorization_guard.core.settings import Thresholds
from memorization_guard.diffusers import guard
from memorization_guard.prompts import SEED_STRIDE


def rows(folder):
    return pd.read_parquet(folder / "results").sort_values("image").to_dict("records")


def plain(found):
    """Rows that can be compared: the trace's text holds the settings too."""
    return [{name: str(value) for name, value in row.items() if name != "settings"} for row in found]


def test_an_audit_is_a_row_an_image_that_everybody_can_read(run, recipe, prompts, tmp_path):
    folder = tmp_path / "audit"
    assert run() is True
    texts = [json.loads(line)["caption"] for line in prompts.read_text().splitlines()]
    found = rows(folder)
    assert [row["prompt"] for row in found] == [text for text in texts for _ in range(2)]
    assert [row["seed"] for row in found] == list(range(SEED_STRIDE, SEED_STRIDE + 18))
    assert [row["row"] for row in found] == [n // 2 for n in range(18)]
    assert list(found[0]) == SCHEMA.names
    trace = Trace.from_dict(json.loads(found[3]["trace"]))
    assert (trace.verdict, len(trace.steps), trace.reference_count) == (found[3]["verdict"], 2, 10)
    assert found[3]["p_value"] == pytest.approx(trace.p_value, rel=1e-6)
    kinds = duckdb.sql(
        f"select kind, count(*), any_value(settings.sampler) from '{folder}/results/*.parquet' group by 1 order by 1"
    )
    assert kinds.fetchall() == [("cat", 8, "PNDM"), ("dog", 10, "PNDM")]
    manifest = read_manifest(folder)
    assert manifest["images"] == 18
    assert manifest["finished"]
    assert manifest["statement"] == trace.to_dict()["statement"]
    assert manifest["model"]["components"]["unet"] == trace.settings.model_hash
    assert manifest["versions"]["torch"] == torch.__version__
    assert (folder / "report.html").exists()
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "images", MANIFEST, PROFILE, "report.html", "results"]
    assert StabilityProfile.load(folder / PROFILE).count == 10


def test_an_image_is_what_the_pipeline_makes_of_its_prompt_and_seed(run, recipe, tiny_pipe, tmp_path):
    run(recipe=dataclasses.replace(recipe, keep="all"), batch_size=1)
    row = rows(tmp_path / "audit")[5]
    with guard(tiny_pipe, StabilityProfile.load(tmp_path / "audit" / PROFILE)) as seen:
        made = tiny_pipe(
            row["prompt"],
            generator=torch.Generator().manual_seed(row["seed"]),
            num_inference_steps=2,
            guidance_scale=7.5,
            height=16,
            width=16,
        ).images[0]
    file = tmp_path / "audit" / row["file"]
    assert Image.open(file).tobytes() == made.tobytes()
    assert seen.traces[0].to_dict()["steps"] == json.loads(row["trace"])["steps"]
    assert evidence.verify(file).belongs == "match"
    settings = json.loads(Image.open(file).text[evidence.SETTINGS_KEY])
    assert (settings["prompt"], settings["seed"]) == (row["prompt"], row["seed"])


def test_only_what_triggered_is_decoded_and_kept(run, recipe, tmp_path):
    def triggering(share):
        return dataclasses.replace(recipe, thresholds=Thresholds(false_positive_rate=share))

    # Of ordinary images, half triggers if half may.
    run(tmp_path / "all", recipe=dataclasses.replace(recipe, keep="all"))
    run(tmp_path / "half", recipe=triggering(0.5))
    every, half = rows(tmp_path / "all"), rows(tmp_path / "half")
    kept = [row for row in half if row["file"] is not None and row["file"] == row["file"]]
    assert 0 < len(kept) < len(half)
    assert [row["image"] for row in kept] == [row["image"] for row in half if row["verdict"] != "stable"]
    for row in kept:
        same = tmp_path / "all" / every[row["image"]]["file"]
        assert Image.open(tmp_path / "half" / row["file"]).tobytes() == Image.open(same).tobytes()
    run(tmp_path / "none", recipe=dataclasses.replace(triggering(0.5), keep="none"))
    assert not any((tmp_path / "none" / "images").iterdir())
    assert [row["verdict"] for row in rows(tmp_path / "none")] == [row["verdict"] for row in half]


def test_stop_ends_a_batch_once_all_of_it_has_triggered(run, recipe, tmp_path):
    # Whatever triggers, in the first step, is rarer than nearly everything.
    hasty = dataclasses.replace(recipe, steps=4, mode="stop", thresholds=Thresholds(false_positive_rate=0.5))
    run(recipe=hasty, batch_size=1)
    found = rows(tmp_path / "audit")
    stopped = [row for row in found if row["verdict"] != "stable"]
    assert stopped
    # PNDM evaluates its first step twice, so that a run can end within it.
    assert all(row["trigger_step"] <= row["steps"] <= row["trigger_step"] + 1 for row in stopped)
    assert all(row["steps"] == 4 for row in found if row["verdict"] == "stable")


def test_a_finished_audit_does_nothing_when_called_again(run, tmp_path):
    run()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "audit").rglob("*")}

    def nobody():
        raise AssertionError("a model was loaded for nothing")

    assert run(workers=nobody) is False
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "audit").rglob("*")} == before
    # As it is left by a kill while the report was written.
    (tmp_path / "audit" / "report.html").unlink()
    (tmp_path / "audit" / ".report.html.x.part").write_text("<!doc")
    (tmp_path / "audit" / ".work").mkdir()
    assert run(workers=nobody) is False
    assert (tmp_path / "audit" / "report.html").exists()
    assert sorted(tmp_path.glob("audit/*")) == sorted(path for path in before if path.parent == tmp_path / "audit")


class Fragile(Local):
    """A worker that fails at the batch after so many."""

    def __init__(self, recipe, good):
        super().__init__(recipe)
        self._good = good
        self.made = []

    def sample(self, batches, profile):
        for number, batch in enumerate(batches):
            if number == self._good:
                raise RuntimeError("CUDA out of memory")
            if batch is not None:
                self.made += [job.image for job in batch.jobs]
            yield None if batch is None else (batch, self._worker.sample(batch.jobs, profile))


def test_it_goes_on_where_it_stopped_and_gives_the_same(run, recipe, tmp_path):
    run(tmp_path / "whole")
    first, second = Fragile(recipe, 2), Fragile(recipe, None)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(workers=lambda: first)
    assert read_manifest(tmp_path / "audit")["finished"] is None
    assert run(workers=lambda: second) is True
    assert first.made + second.made == list(range(18))
    assert plain(rows(tmp_path / "audit")) == plain(rows(tmp_path / "whole"))


def test_two_at_once_share_the_work(run, recipe, tmp_path, prompts):
    prompts.write_text("".join(json.dumps({"caption": f"a red cat {n}"}) + "\n" for n in range(130)))
    hands = [Fragile(recipe, None), Fragile(recipe, None)]
    threads = [
        threading.Thread(target=run, kwargs={"workers": lambda one=one: one, "seeds_per_prompt": 1, "batch_size": 16})
        for one in hands
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = sorted(hands[0].made + hands[1].made)
    assert made == list(range(130)), "an image was made twice, or not at all"
    assert all(one.made for one in hands)
    assert [row["image"] for row in rows(tmp_path / "audit")] == list(range(130))
    assert read_manifest(tmp_path / "audit")["finished"]
    assert not (tmp_path / "audit" / ".work").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds_per_prompt": 3}, r"other settings: seeds per prompt \(it has 2, you ask for 3\)"),
        ({"reference": [f"something else {n}" for n in range(9)]}, "other profile: reference sha256"),
    ],
)
def test_another_audit_is_not_mixed_in(run, change, message):
    run()
    with pytest.raises(AuditError, match=message):
        run(**change)


def test_another_model_under_the_same_name_is_found_out(run, model, tiny_pipe):
    run()
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight.neg_()
    tiny_pipe.save_pretrained(model)
    tiny_pipe.unet.conv_in.weight.data.neg_()
    with pytest.raises(AuditError, match="other model: files"):
        run()


def test_a_changed_list_is_found_out(run, prompts):
    run()
    prompts.write_text(prompts.read_text() + '{"caption": "one more"}\n')
    with pytest.raises(AuditError, match="other prompts: sha256"):
        run()


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "thesis.txt").write_text("mine")
    with pytest.raises(AuditError, match="holds files that do not belong to an audit"):
        run()
    assert [p.name for p in (tmp_path / "audit").iterdir()] == ["thesis.txt"]


def test_a_profile_that_does_not_fit_is_said_before_anything_is_kept(run, of_another_model, tmp_path):
    run(tmp_path / "first")
    profile = tmp_path / "first" / PROFILE
    other = of_another_model(StabilityProfile.load(profile), tmp_path / "other.safetensors")
    with pytest.raises(AuditError, match="model hash"):
        run(profile=other)
    assert not (tmp_path / "audit" / MANIFEST).exists()
    assert run(profile=profile) is True
    assert read_manifest(tmp_path / "audit")["profile"]["from"] == PROFILE
    assert (tmp_path / "audit" / PROFILE).read_bytes() == profile.read_bytes()


def test_too_few_reference_prompts_are_said(run):
    with pytest.raises(CalibrationError, match="at least 8"):
        run(reference=["a", "b"])


def test_a_list_with_seeds_of_its_own(run, prompts, tmp_path):
    prompts.write_text('{"prompt": "a red cat", "seed": 9223372036854775807}\n{"prompt": "a blue dog"}\n')
    run()
    assert [row["seed"] for row in rows(tmp_path / "audit")] == [2**63 - 1, 0, SEED_STRIDE + 2, SEED_STRIDE + 3]


def test_mitigation_is_counted(run, recipe, tmp_path):
    run(recipe=dataclasses.replace(recipe, steps=6, mode="mitigate", thresholds=Thresholds(false_positive_rate=0.5)))
    found = rows(tmp_path / "audit")
    corrected = [row for row in found if row["corrected_steps"]]
    assert corrected
    assert all(row["trigger_step"] == row["trigger_step"] for row in corrected)


def test_half_precision_is_part_of_what_an_audit_is(run, recipe):
    half = dataclasses.replace(recipe, dtype="bfloat16")
    run(recipe=half)
    assert Worker(half).describe()["dtype"] == "bfloat16"
    with pytest.raises(AuditError, match="other settings: dtype"):
        run()


def test_a_damaged_part_is_named_and_made_anew_once_it_is_deleted(run, tmp_path):
    run()
    part = next((tmp_path / "audit" / "results").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(AuditError, match=r"part-000000\.parquet cannot be read.*delete it"):
        list(scan(tmp_path / "audit", ["image"]))
    part.unlink()
    (tmp_path / "audit" / "comparison.html").write_text("of this audit with another")
    assert run() is True
    assert [row["image"] for row in rows(tmp_path / "audit")] == list(range(18))
    assert run() is False
