"""The JSON form of a trace: valid against the shipped schema, and back without loss."""

import dataclasses
import json

import jsonschema
import numpy as np
import pytest

from memorization_guard import StabilityMonitor, Trace, trace_schema
from memorization_guard.core.trace import STATEMENT, Steps, rarity, worst

CASES = {
    "without a profile": {},
    "without guidance": {"guided": False},
    "stable": {"scored": True},
    "triggered": {"scored": True, "memorized": 2.0},
    "mitigated": {"scored": True, "mode": "mitigate", "memorized": 2.0},
    "broken": {"scored": True, "mode": "mitigate", "mix": lambda c, u: c * np.nan},
    "ended early": {"scored": True, "stop": 3},
}


@pytest.fixture
def traces(world, profile):
    def of(scored=False, mode="trace", **more):
        monitor = StabilityMonitor(profile if scored else None, mode=mode, settings=world.settings())
        world.sample(monitor, seeds=(500, 501), **more)
        return monitor.traces

    return of


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_trace_is_valid_strict_json_and_comes_back(case, traces):
    for trace in traces(**case):
        text = json.dumps(trace.to_dict(), allow_nan=False)
        data = json.loads(text)
        jsonschema.Draft202012Validator(trace_schema()).validate(data)
        again = Trace.from_dict(data)
        # What is computed from numbers that were rounded may be off by their last digit.
        computed = ("score", "joint_score", "uncalibrated_score")
        assert {**again.to_dict(), **{name: data[name] for name in computed}} == data
        for name in computed:
            assert getattr(again, name) == (None if data[name] is None else pytest.approx(data[name], rel=1e-5))
        for kind in ("steps", "evaluations"):
            for f in dataclasses.fields(getattr(trace, kind)):
                ours, theirs = (getattr(getattr(one, kind), f.name) for one in (trace, again))
                np.testing.assert_allclose(theirs, ours, rtol=1e-6)
                assert theirs.dtype == ours.dtype
        np.testing.assert_allclose(again.guidance_norm, trace.guidance_norm, rtol=1e-5)
        assert (again.verdict, again.settings, again.thresholds, again.mode) == (
            trace.verdict, trace.settings, trace.thresholds, trace.mode,
        )  # fmt: skip


def test_the_schema_is_a_schema_and_knows_every_field(traces):
    schema = trace_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = traces(scored=True)[0].to_dict()
    assert set(schema["properties"]) == set(data)
    for part in ("settings", "thresholds", "steps", "evaluations"):
        assert set(schema["properties"][part]["properties"]) == set(data[part])


def test_the_documents_name_every_field(traces, request):
    text = (request.config.rootpath / "docs" / "trace.md").read_text(encoding="utf-8")
    data = traces(scored=True)[0].to_dict()
    names = (*data, *data["steps"], *data["evaluations"], *data["settings"], *data["thresholds"])
    assert [name for name in names if name not in text] == []


WORDS = {"words": ["a"], "p_values": [0.001], "text": "cat", "p_value": 0.9, "left_out": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "not a trace"),
        (lambda d: d.update(version=2), "reads 8"),
        (lambda d: d.pop("steps"), "incomplete"),
        (lambda d: d["evaluations"].pop("velocity"), "incomplete"),
        (lambda d: d["steps"].update(sigma="12345"), "incomplete"),
        (lambda d: d["steps"]["sigma"].pop(), "different lengths"),
        (lambda d: d["evaluations"]["sigma"].pop(), "different lengths"),
        (lambda d: d["bands"]["latent"]["mean"].pop(), "different lengths"),
        (lambda d: d["steps"]["sigma"].__setitem__(0, [1.0]), "damaged|inhomogeneous"),
        (lambda d: d["steps"].update({name: [[1.0]] for name in d["steps"]}), "holds lists"),
        (lambda d: d["settings"].update(latent_shape=[float("inf")]), r"latent_shape is \[inf\]"),
        (lambda d: d.update(note={"a": 1}), "note is no text"),
        (lambda d: d.update(verdict="fine"), "known: stable"),
        (lambda d: d.update(mode="watch"), "known: off"),
        (lambda d: d.update(trigger_step=99), "trigger_step is 99"),
        (lambda d: d["thresholds"].update(gamma=-1), "gamma"),
        (lambda d: d["thresholds"].update(unknown=1), "thresholds"),
        (lambda d: d.update(words=WORDS | {"words": "a"}), "no list of texts"),
        (lambda d: d.update(words=WORDS | {"words": [], "p_values": []}), "no list of texts"),
        (lambda d: d.update(words=WORDS | {"words": [1]}), "no list of texts"),
        (lambda d: d.update(words=WORDS | {"p_values": [0.1, 0.1]}), "no share"),
        (lambda d: d.update(words=WORDS | {"p_values": [float("nan")]}), "no share"),
        (lambda d: d.update(words=WORDS | {"p_value": 2}), "no share"),
        (lambda d: d.update(words=WORDS | {"p_value": None}), "damaged"),
    ],
)
def test_damaged_json_is_refused_in_clear_words(change, message, traces):
    data = traces(scored=True)[0].to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        Trace.from_dict(data)


def test_a_trace_says_what_it_does_not_prove(traces):
    assert traces()[0].to_dict()["statement"] == STATEMENT


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="not a trace"):
        Trace.from_dict([1, 2])


def test_the_worst_of_several_runs_is_a_trigger_then_what_was_not_judged():
    def of(verdict, p_value, score=1.0):
        steps = Steps(update_score=np.array([score]), denoised_score=np.array([score]))
        return Trace(verdict=verdict, steps=steps, p_value=p_value)

    common, rarer, unscored = of("stable", 0.5), of("stable", 0.1), Trace()
    copy, rare_copy, mild, strong = of("likely copy", 1e-3), of("likely copy", 1e-5), of("mild", np.nan), of("strong", np.nan)
    assert worst([common, rarer]) is rarer
    assert worst([rarer, unscored]) is unscored
    assert worst([unscored, copy, common]) is copy
    assert worst([copy, rare_copy]) is rare_copy
    assert worst([strong, mild]) is strong


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ((0.9,), "most"),
        ((0.3,), "1 in 3"),
        ((0.01, 0.000125), "1 in 100"),
        ((0.00005,), "1 in 20,000"),
        ((0.000125, 1 / 8000), "rarer than 1 in 8,000"),
        ((0.0001251, 1 / 8000), "1 in 8,000"),
    ],
)
def test_a_share_is_said_in_words(share, words):
    assert rarity(*share) == words
