"""The JSON form of a trace: valid against the shipped schema, and back without loss."""

import json

import jsonschema
import numpy as np
import pytest
import torch

from memorization_guard import Calibrator, RunSettings, StabilityMonitor, Trace, trace_schema
from memorization_guard.core.trace import STATEMENT, STEP_FIELDS, rarity, worst

STEPS = 6


def traces(profile=None, *, mitigate=False, factor=1.0, guided=True, broken=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    monitor = StabilityMonitor(
        profile, mitigate=mitigate, settings=RunSettings(model="lab", steps=STEPS, latent_shape=(4, 8, 8))
    )
    z = torch.randn(2, 4, 8, 8, generator=generator)
    for i in range(STEPS):
        x0 = torch.randn(2, 4, 8, 8, generator=generator) * factor
        z_next = 0.9 * z + 0.3 * x0
        if broken and i == 3:
            z_next[0] = torch.nan
        predictions = {"eps_cond": x0, "eps_uncond": z} if guided else {}
        z = monitor.step(z, z_next, x0, sigma=float(STEPS - i), x0_coefficient=0.3, **predictions)
    return monitor.traces


@pytest.fixture(scope="module")
def profile():
    calibrator = Calibrator()
    for seed in range(10, 30):
        for trace in traces(seed=seed):
            calibrator.add(trace)
    return calibrator.profile()


CASES = {
    "without a profile": {},
    "without guidance": {"guided": False},
    "stable": {"scored": True},
    "mitigated": {"scored": True, "mitigate": True, "factor": 8.0},
    "broken": {"scored": True, "mitigate": True, "broken": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_trace_is_valid_strict_json_and_comes_back(case, profile):
    case = dict(case)
    for trace in traces(profile if case.pop("scored", False) else None, **case):
        text = json.dumps(trace.to_dict(), allow_nan=False)
        data = json.loads(text)
        jsonschema.Draft202012Validator(trace_schema()).validate(data)
        again = Trace.from_dict(data)
        # What is computed from numbers that were rounded may be off by their last digit.
        computed = ("score", "joint_score", "uncalibrated_score")
        assert {**again.to_dict(), **{name: data[name] for name in computed}} == data
        for name in computed:
            assert getattr(again, name) == (None if data[name] is None else pytest.approx(data[name], rel=1e-5))
        for name in STEP_FIELDS:
            np.testing.assert_allclose(getattr(again, name), getattr(trace, name), rtol=1e-6)
        np.testing.assert_array_equal(again.mitigated, trace.mitigated)
        assert (again.verdict, again.settings.model, again.thresholds) == (trace.verdict, "lab", trace.thresholds)


def test_the_schema_is_a_schema_and_knows_every_field(profile):
    schema = trace_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = traces(profile)[0].to_dict()
    assert set(schema["properties"]) == set(data)
    for part in ("settings", "thresholds", "steps"):
        assert set(schema["properties"][part]["properties"]) == set(data[part])


def test_the_documents_name_every_field(profile, request):
    text = (request.config.rootpath / "docs" / "trace.md").read_text(encoding="utf-8")
    data = traces(profile)[0].to_dict()
    assert [name for name in (*data, *data["steps"], *data["settings"], *data["thresholds"]) if name not in text] == []


def broken(change):
    data = traces()[0].to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "not a trace"),
        (lambda d: d.update(version=3), "update it"),
        (lambda d: d.pop("steps"), "incomplete"),
        (lambda d: d["steps"].pop("alignment"), "incomplete"),
        (lambda d: d["steps"].update(sigma="12345"), "incomplete"),
        (lambda d: d["steps"]["sigma"].pop(), "different lengths"),
        (lambda d: d["steps"]["sigma"].__setitem__(0, [1.0]), "damaged|inhomogeneous"),
        (lambda d: d["steps"].update({name: [[1.0]] for name in STEP_FIELDS}), "holds lists"),
        (lambda d: d["settings"].update(latent_shape=[float("inf")]), "damaged"),
        (lambda d: d.update(note={"a": 1}), "note is no text"),
        (lambda d: d.update(verdict="fine"), "known: stable"),
        (lambda d: d["thresholds"].update(gamma=-1), "gamma"),
        (lambda d: d["thresholds"].update(unknown=1), "thresholds"),
    ],
)
def test_damaged_json_is_refused_in_clear_words(change, message):
    with pytest.raises(ValueError, match=message):
        Trace.from_dict(broken(change))


def test_a_trace_from_before_there_was_a_statement_is_read_and_valid():
    data = traces()[0].to_dict()
    assert data.pop("statement") == STATEMENT
    jsonschema.Draft202012Validator(trace_schema()).validate(data)
    again = Trace.from_dict(data).to_dict()
    assert (again["statement"], again["steps"]) == (STATEMENT, data["steps"])


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="not a trace"):
        Trace.from_dict([1, 2])


def test_the_worst_of_several_runs_is_a_trigger_then_what_was_not_judged():
    def of(verdict, score):
        return Trace(verdict=verdict, update_score=np.array([score]), denoised_score=np.array([score]))

    stable, higher, unscored, mild, strong = of("stable", 1), of("stable", 2), Trace(), of("mild", 5), of("strong", 4)
    assert worst([stable, higher]) is higher
    assert worst([higher, unscored]) is unscored
    assert worst([unscored, mild, stable]) is mild
    assert worst([strong, mild]) is strong


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.9, "most"), (0.3, "1 in 3"), (0.01, "1 in 100"), (0.00005, "1 in 20,000"), (1e-9, "less than 1 in 1,000,000")],
)
def test_a_share_is_said_in_words(share, words):
    assert rarity(share) == words


def test_without_a_profile_a_prompt_that_settles_the_image_is_pointed_out():
    def guided(difference):
        monitor = StabilityMonitor(settings=RunSettings(prediction_type="epsilon", latent_shape=(4, 8, 8)))
        z = torch.randn(1, 4, 8, 8)
        for sigma in (10.0, 5.0, 1.0):
            monitor.step(z, z, z, sigma=sigma, x0_coefficient=0.5, eps_cond=z + difference / sigma, eps_uncond=z)
        return monitor.traces[0]

    ordinary, settled = guided(0.2), guided(0.6)
    assert (ordinary.uncalibrated_score, settled.uncalibrated_score) == pytest.approx((0.2, 0.6), rel=1e-4)
    assert ordinary.note is None
    assert "may be memorized" in settled.note
    assert settled.verdict == "unscored"
