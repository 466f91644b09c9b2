"""Two audits held against each other."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from memorization_guard.audit import AuditError
from memorization_guard.audit.comparison import CHANGES, compare
from memorization_guard.reports.comparison import write_comparison
from memorization_guard.statistics import clustered_difference, clustered_rate, mcnemar

HOSTILE = "<img src=x onerror=\"document.title='broken'\"> & </script><!--"
SETTINGS = {"steps": 20, "guidance_scale": 7.5, "seeds_per_prompt": 2, "mode": "trace"}


# ------------------------------------------------------------------------------------------------------------- the figures


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_one(became, ceased):
    expected = binomtest(became, became + ceased).pvalue if became + ceased else 1.0
    assert mcnemar(became, ceased) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_mcnemar_of_many():
    assert mcnemar(400_000, 401_500) == pytest.approx(binomtest(400_000, 801_500).pvalue, rel=1e-6)
    assert mcnemar(0, 5000) == 0.0


counts = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(counts)
def test_a_difference_holds_its_rate_and_turns_with_its_sides(prompts):
    sizes = np.array([max(row) for row in prompts], dtype=int)
    before, after = (np.array([row[n] for row in prompts], dtype=int) for n in (0, 1))
    found, turned = clustered_difference(before, after, sizes), clustered_difference(after, before, sizes)
    if not sizes.sum():
        assert found == {"rate": None, "interval": None}
        return
    low, high = found["interval"]
    assert -1 <= low <= found["rate"] + 1e-12
    assert found["rate"] - 1e-12 <= high <= 1
    assert turned["rate"] == pytest.approx(-found["rate"])
    assert turned["interval"] == pytest.approx([-high, -low], abs=1e-9)


@pytest.mark.parametrize(("prompts", "seeds", "memorized", "kept", "new"), [(500, 4, 0.05, 0.5, 0.01), (60, 6, 0.3, 0.8, 0.1)])
def test_differences_hold_the_truth_as_often_as_they_say(prompts, seeds, memorized, kept, new):
    rng, runs, inside, apart = np.random.default_rng(3), 600, 0, 0
    truth = (memorized * kept + (1 - memorized) * new - memorized) / 2
    for _ in range(runs):
        first = rng.random(prompts) < memorized
        second = np.where(first, rng.random(prompts) < kept, rng.random(prompts) < new)
        rate = rng.random(prompts)
        before, after = rng.binomial(seeds, rate * first), rng.binomial(seeds, rate * second)
        sizes = np.full(prompts, seeds)
        low, high = clustered_difference(before, after, sizes)["interval"]
        inside += low <= truth <= high
        # Without the pairs, the interval would be wider than it need be.
        a, b = (clustered_rate(events, sizes)["interval"] for events in (before, after))
        apart += (high - low) / np.hypot(a[1] - a[0], b[1] - b[0]) / runs
    assert 0.91 <= inside / runs <= 0.985
    assert apart < 0.95


# --------------------------------------------------------------------------------------------------------------- comparing


def made(audits, plan, **changes):
    """An audit from ``{(prompt, seed): p-value}``; a p-value of ``None`` is an image that is not scored."""
    corrected = changes.get("settings", {}).get("mode") == "mitigate"
    rows = [
        audits.row(
            image,
            prompt,
            audits.trace(scored=False) if p_value is None else audits.trace(p_value, corrected=corrected),
            seed=seed,
            file=f"images/{image}.png" if p_value is not None and p_value < 0.001 else None,
        )
        for image, ((prompt, seed), p_value) in enumerate(plan.items())
    ]
    pictures = {row["file"]: "red" for row in rows if row["file"]}
    return audits(rows, part=5, pictures=pictures, **changes)


A = {
    ("same", 0): 1e-8, ("same", 1): 0.5, ("gone", 0): 1e-5, ("gone", 1): 1e-4, (HOSTILE, 0): 0.4, (HOSTILE, 1): 0.3,
    ("never", 0): 0.2, ("never", 1): 0.6, ("unscored", 0): None, ("only a", 0): 1e-7, ("some", 0): 0.5, ("some", 9): 1e-7,
}  # fmt: skip
B = {
    ("some", 0): 0.5, (HOSTILE, 1): 1e-9, (HOSTILE, 0): 0.4, ("only b", 0): 0.5, ("only b", 1): 1e-7, ("unscored", 0): 1e-7,
    ("never", 1): 0.6, ("never", 0): 0.01, ("gone", 1): 0.03, ("gone", 0): 0.02, ("same", 1): 1e-5, ("same", 0): 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(audits):
    return made(audits, A), made(audits, B, model={"name": "fine-tune"}, profile={"sha256": "dd", "reference_runs": 50})


def test_images_are_paired_by_prompt_and_seed_and_not_by_place(pair):
    found = compare(*pair)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["pairs"] == {
        "images": 9,
        "prompts": 5,
        "unscored": 1,
        "only_a": {"images": 2, "prompts": 1},
        "only_b": {"images": 2, "prompts": 1},
        "duplicates": 0,
    }
    without = {name: value for name, value in found["images"].items() if name != "difference"}
    assert without == {"became": 2, "no_longer": 3, "stays": 0, "never": 4}
    assert [found["prompts"][name] for name in ("became", "no_longer", "stays", "never")] == [1, 1, 1, 2]
    assert found["prompts"]["mcnemar"] == 1.0
    assert found["images"]["difference"]["rate"] == pytest.approx(-1 / 9)
    assert (found["a"]["triggered"]["count"], found["b"]["triggered"]["count"]) == (3, 2)
    assert (found["a"]["prompts_triggered"]["count"], found["a"]["prompts_triggered"]["of"]) == (2, 5)
    assert [row["prompt"] for name in CHANGES for row in found[name]] == [HOSTILE, "gone", "same"]
    became = found["became"][0]
    assert (became["seed"], became["image_a"], became["image_b"]) == (1, 5, 1)
    assert (became["triggered_a"], became["triggered_b"], became["rarest_a"], became["rarest_b"]) == (0, 1, 0.3, 1e-9)
    assert (became["file_a"], became["file_b"]) == (None, "images/1.png")
    # Another model has another profile: that is no warning.
    assert {row["field"] for row in found["compared"]} >= {"model: name", "profile: sha256"}
    warnings = " ".join(found["warnings"])
    assert "2 images (1 whole prompt) of audit A have no counterpart" in warnings
    assert "1 pair left out" in warnings
    assert "differ" not in warnings


prompts = st.sampled_from(["a", "b", "c", "", "d " * 30])
seeds = st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, -(2**63)])
p_values = st.sampled_from([1e-9, 1e-4, 0.01, 0.5, None])
plans = st.lists(st.tuples(prompts, seeds, p_values), max_size=25)


@settings(max_examples=60)
@given(plans, plans)
def test_the_counts_are_those_of_going_through_them_by_hand(audits, first, second):
    traces = {
        p_value: audits.trace(scored=False) if p_value is None else audits.trace(p_value)
        for p_value in (1e-9, 1e-4, 0.01, 0.5, None)
    }
    folders = [
        audits([audits.row(i, prompt, traces[p_value], seed=seed) for i, (prompt, seed, p_value) in enumerate(plan)])
        for plan in (first, second)
    ]
    found = compare(*folders)
    sides = []
    for plan in (first, second):
        side = {}
        for prompt, seed, p_value in plan:
            side.setdefault((prompt, seed), p_value)
        sides.append(side)
    a, b = sides
    both = [pair for pair in a if pair in b and a[pair] is not None and b[pair] is not None]
    assert found["pairs"]["images"] == len(both)
    assert found["pairs"]["unscored"] == len([pair for pair in a if pair in b]) - len(both)
    assert found["pairs"]["duplicates"] == len(first) + len(second) - len(a) - len(b)
    assert found["pairs"]["only_a"] == {
        "images": len(a.keys() - b.keys()),
        "prompts": len({prompt for prompt, _ in a} - {prompt for prompt, _ in b}),
    }
    became = [pair for pair in both if a[pair] > 0.001 > b[pair]]
    assert found["images"]["became"] == len(became)
    triggered = [{prompt for prompt, seed in both if side[prompt, seed] < 0.001} for side in sides]
    assert {row["prompt"] for row in found["became"]} == triggered[1] - triggered[0]
    assert {row["prompt"] for row in found["no_longer"]} == triggered[0] - triggered[1]
    assert {row["prompt"] for row in found["stays"]} == triggered[0] & triggered[1]
    for row in found["became"]:
        mine = [seed for prompt, seed in both if prompt == row["prompt"]]
        assert row["rarest_b"] == min(b[row["prompt"], seed] for seed in mine) == b[row["prompt"], row["seed"]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": SETTINGS | {"steps": 30}}, "settings: steps: 20 in A, 30 in B"),
        ({"settings": SETTINGS | {"guidance_scale": 3}}, "settings: guidance scale: 7.5 in A, 3 in B"),
        ({"settings": SETTINGS | {"batch_size": 3}}, None),
        ({"prompts": {"file": "other.txt", "sha256": "aa", "rows": 2}}, None),
        ({"prompts": {"file": "prompts.txt", "sha256": "bb", "rows": 2}}, "the list of prompts: aa in A, bb in B"),
        ({"profile": {"sha256": "dd", "reference_runs": 50}}, "profile: sha256: cc in A, dd in B"),
        ({"thresholds": {"false_positive_rate": 0.01}}, "thresholds: false positive rate: 0.005 in A, 0.01 in B"),
        ({"finished": None}, "Audit B is not finished"),
        ({"model": {"name": "other"}}, None),
    ],
)
def test_whatever_else_may_be_the_cause_is_a_warning(audits, changes, told):
    rows = [audits.row(0, "p", audits.trace())]
    warnings = compare(audits(rows), audits(rows, **changes))["warnings"]
    if told is None:
        assert warnings == []
    else:
        assert any(told in warning for warning in warnings)


def test_what_a_verdict_means_under_mitigation_is_said(audits):
    plan = {(f"p{n}", 0): 1e-6 if n < 3 else 0.5 for n in range(9)}
    plain, mitigated = made(audits, plan), made(audits, plan, settings=SETTINGS | {"mode": "mitigate"})
    found = compare(plain, mitigated)
    assert (found["b"]["corrected"], found["b"]["uncorrected"], found["a"]["corrected"]) == (3, 0, 0)
    assert found["warnings"] == []
    assert found["compared"] == [{"field": "settings: mode", "a": "trace", "b": "mitigate"}]
    assert "of 3 images that triggered, 3 were corrected and 0 were not" in found["notes"][0]
    assert "No number here says whether a corrected image is still a copy" in found["notes"][1]
    stopped = compare(plain, made(audits, plan, settings=SETTINGS | {"mode": "stop"}))
    assert "those 3 images were not finished" in stopped["notes"][0]
    assert compare(plain, plain)["notes"] == []


def test_nothing_to_compare(audits, tmp_path):
    one, other = (audits([audits.row(0, prompt, audits.trace())]) for prompt in ("a", "b"))
    found = compare(one, other)
    assert found["images"]["difference"] == {"rate": None, "interval": None}
    assert any("there is nothing to compare" in warning for warning in found["warnings"])
    write_comparison(found, tmp_path / "nothing.html")
    with pytest.raises(FileNotFoundError):
        compare(one, tmp_path)


# -------------------------------------------------------------------------------------------------------------------- files


def test_a_comparison_is_written_by_its_suffix(pair, tmp_path):
    found = compare(*pair)
    for suffix in ("html", "json", "csv", "parquet"):
        write_comparison(found, tmp_path / f"c.{suffix}")
    assert json.loads((tmp_path / "c.json").read_text()) == found
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["change"], row["prompt"]) for row in rows] == [("became", HOSTILE), ("no_longer", "gone"), ("stays", "same")]
    assert pq.read_table(tmp_path / "c.parquet").to_pylist() == [row for name in CHANGES for row in found[name]]
    with pytest.raises(AuditError, match=r"\.csv or \.parquet"):
        write_comparison(found, tmp_path / "c.txt")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_both_sides(pair, tmp_path, browser, width):
    write_comparison(compare(*pair), tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    page, complaints = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("data:", "blob:", "file:")) else None)
    page.goto((tmp_path / "c.html").as_uri())
    cards = page.locator(".cards article")
    assert cards.locator("h3").all_inner_texts() == [HOSTILE, "gone"]
    for n in range(2):
        cards.nth(n).scroll_into_view_if_needed()
        cards.nth(n).locator(".pair > div:last-child .mg-band").wait_for()
        assert cards.nth(n).locator(".mg-svg").count() == 2
    assert (cards.locator("img").count(), cards.locator(".none-saved").count()) == (2, 2)
    page.click("text=1 prompt memorized in both")
    assert page.locator("details[open] td.prompt").inner_text() == "same"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#audited .bad").all_inner_texts()[:2] == ["base", "fine-tune"]
    assert page.title() == "Two audits compared"
    assert complaints == []
    page.close()
