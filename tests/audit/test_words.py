"""The words that call images up, in what audits write and say."""

import csv
import json

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from memorization_guard import Trace, evidence, lab
from memorization_guard.audit.comparison import CHANGES, compare
from memorization_guard.audit.dataset import REPORT
from memorization_guard.core.words import marked
from memorization_guard.reports.audit import OPEN_WORDS, write_report
from memorization_guard.reports.comparison import write_comparison

#: Words as nobody's prompt should have them, which are text all the same; beyond the sixteen bits that a script counts in.
HOSTILE = "<img/src=x/onerror=\"document.title='broken'\">"
STRANGE = "\U0001d54f\u0130m\u00fcller\u732b"


def audited(audits, *told, **changes):
    """An audit of prompts with the words that were told for each, or ``None`` where it did not trigger."""
    rows = [
        audits.row(
            image,
            prompt,
            audits.trace() if words is None else audits.trace(1e-8 * (1 + image), words=words or None, without=without),
            seed=0,
        )
        for image, (prompt, words, without) in enumerate(told)
    ]
    return audits(rows, **changes)


def test_an_audit_of_the_lab_model_tells_the_words_wherever_it_says_something(call, tmp_path):
    copied, ordinary = lab.prompts("exact")[0], lab.prompts("ordinary")[0]
    keys = copied.split()[-2:]
    (tmp_path / "prompts.txt").write_text(f"{copied}\n{ordinary}\n", encoding="utf-8")
    folder = tmp_path / "audit"
    options = ("--profile", lab.PROFILE, "--steps", 2, "--device", "cpu")
    result = call("audit", "lab", tmp_path / "prompts.txt", "-o", folder, *options)
    assert result.exit_code == 0, result.output
    assert "words told for 1 of 1 prompts that triggered; in most prompts: " in result.output
    assert all(f"{key} (1)" in result.output for key in keys)

    first, second = pq.read_table(folder / "results").to_pylist()
    trace = Trace.from_dict(json.loads(first["trace"]))
    assert (first["words"], first["prompt_without_words"]) == (list(trace.words.words), trace.words.text)
    assert set(keys) <= set(first["words"]) <= set(copied.split())
    assert not set(first["words"]) & set(first["prompt_without_words"].split())
    assert (second["words"], second["prompt_without_words"]) == (None, None)
    files = f"'{folder}/results/*.parquet'"
    assert duckdb.sql(f"select prompt from {files} where list_contains(words, '{keys[0]}')").fetchall() == [(copied,)]
    assert pd.read_parquet(folder / "results")["words"].notna().tolist() == [True, False]

    image = folder / first["file"]
    assert evidence.verify(image).traces[0].words == trace.words
    result = call("verify", image)
    assert result.exit_code == 0
    assert "called up by " + ", ".join(f'"{word}"' for word in trace.words.words) in result.output


@pytest.mark.parametrize("word", [HOSTILE, STRANGE, "=1+1", "\u202eabc", "a" * 500])
def test_words_and_what_is_left_without_them_never_become_html(audits, browser, word, tmp_path):
    """Nothing of a table that somebody else wrote is taken for more than text."""
    prompt = f"a cat {HOSTILE} by {STRANGE}, a fox"
    without = f"a cat {HOSTILE} by, a fox"
    told = [(prompt, (STRANGE,), without), ("another prompt", (word, "x"), word), ("none", None, "")]
    folder = audited(audits, *told)
    write_report(folder)
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((folder / REPORT).as_uri())
    page.wait_for_selector(".rows .body .row")
    assert sorted(page.locator("#words td.word").all_text_contents()) == sorted({STRANGE, word, "x"})
    assert page.locator(".cards h3 mark").all_text_contents() == [STRANGE]
    assert page.locator(".rows mark").all_text_contents() == [STRANGE]
    assert page.locator(".rows .body .row").nth(0).locator(".cell").nth(2).text_content() == prompt
    page.select_option("[aria-label='called up by']", label=word)
    page.locator(".rows .body .row").first.click()
    assert f"ordinary without: {word if word != STRANGE else without}" in page.locator(".chosen").text_content()
    assert page.locator("img").count() == 0
    assert page.title() == "Audit of base"
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    assert complaints == []
    page.close()


def test_marked_words_are_found_searched_and_filtered(audits, browser):
    told = [
        ("a cat by wosol, a cat", ("cat", "wosol"), "a by, a cat"),
        ("wosol everywhere", ("wosol",), "everywhere"),
        ("wosol triggers, and nobody knows why", (), ""),
        ("wosol is ordinary here", None, ""),
        *((f"number {n} w{n}", (f"w{n}",), f"number {n}") for n in range(OPEN_WORDS)),
    ]
    folder = audited(audits, *told)
    found = write_report(folder)
    assert (found["prompts_with_words"]["count"], found["prompts_with_words"]["of"]) == (10, 11)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((folder / REPORT).as_uri())
    page.wait_for_selector(".rows .body .row")
    table = page.locator("#words")
    assert table.locator("tr:visible td").all_inner_texts()[:4] == ["wosol", "2", "cat", "1"]
    assert table.locator("tr:visible td.word").count() == OPEN_WORDS
    assert "Of 11 prompts that triggered, words could be told for 10: 90.9 %" in table.inner_text()
    table.locator("summary").click()
    assert table.locator("tr:visible td.word").count() == OPEN_WORDS + 2

    card = page.locator(".cards article", has_text="a cat by").first
    assert card.locator("h3").inner_text() == "a cat by wosol, a cat"
    assert card.locator("h3 mark").all_inner_texts() == ["cat", "wosol"]
    assert card.locator("h3").inner_html().startswith("a <mark>cat</mark> by <mark>wosol</mark>, a cat")
    assert 'Called up by "cat", "wosol"; ordinary without: a by, a cat' in card.inner_text()
    # By their shape too, for whoever sees no colours.
    style = "getComputedStyle(document.querySelector('.rows mark'))"
    assert page.evaluate(f"{style}.textDecorationLine") == "underline"
    assert int(page.evaluate(f"{style}.fontWeight")) >= 700

    def images():
        return page.locator(".rows .body .row .cell:last-child").all_inner_texts()

    page.fill("input[type=search]", "wosol")
    assert images() == ["0", "1", "2", "3"]
    page.select_option("[aria-label='called up by']", label="wosol")
    assert images() == ["0", "1"]
    page.fill("input[type=search]", "")
    page.select_option("[aria-label='called up by']", label="cat")
    assert images() == ["0"]
    page.select_option("[aria-label='called up by']", label="every word")
    page.click("button[title='Sort by called up by']")
    assert images()[:3] == ["0", "4", "5"]
    assert images()[-2:] == ["2", "3"]  # none were told for these
    page.close()


def test_an_audit_without_words_has_neither_a_column_nor_a_choice_for_them(audits, browser):
    folder = audits([audits.row(0, "p", audits.trace(1e-5)), audits.row(1, "q", audits.trace())])
    write_report(folder)
    page = browser.new_page()
    page.goto((folder / REPORT).as_uri())
    page.wait_for_selector(".rows .body .row")
    assert "words could be told for 0: 0 %" in page.locator("#words").inner_text()
    assert page.locator("#words table").count() == 0
    assert page.locator("text=called up by").count() == page.locator("mark").count() == 0
    assert page.locator("select").count() == 1
    nothing = audits([audits.row(0, "p", audits.trace())])
    write_report(nothing)
    page.goto((nothing / REPORT).as_uri())
    assert page.locator("#words").count() == page.locator("[href='#words']").count() == 0
    page.close()


def test_a_prompt_is_cut_where_its_words_are():
    assert marked(f"{STRANGE} cat", (STRANGE,), "cat") == ["", STRANGE, " cat"]
    assert marked("a cat", None, None) == ["a cat"]
    assert marked("a cat", ("dog",), "a") == ["a cat"]
    assert "".join(marked("a cat by a cat", ("cat", "by"), "a a cat")) == "a cat by a cat"


# --------------------------------------------------------------------------------------------------------------- comparing


@pytest.fixture(scope="module")
def pair(audits):
    """What words were told for in both, in one, and for another seed than the rarest."""
    before = audited(
        audits,
        ("same", ("same",), ""),
        ("other words here", ("words", "here"), "other"),
        ("gone", ("gone",), ""),
        (STRANGE, None, ""),
        ("ordinary", None, ""),
    )
    after = audited(
        audits,
        ("same", ("same",), ""),
        ("other words here", ("here",), "other words"),
        ("gone", None, ""),
        (STRANGE, (STRANGE, HOSTILE), "without"),
        ("ordinary", None, ""),
        model={"name": "fine-tune"},
    )
    return before, after


def test_a_comparison_says_whether_a_prompts_words_changed(pair, browser, call, tmp_path):
    found = compare(*pair)
    words = {row["prompt"]: (row["words_a"], row["words_b"]) for name in CHANGES for row in found[name]}
    assert words == {
        "same": (["same"], ["same"]),
        "other words here": (["words", "here"], ["here"]),
        "gone": (["gone"], None),
        STRANGE: (None, [STRANGE, HOSTILE]),
    }
    for suffix in ("html", "csv", "parquet"):
        write_comparison(found, tmp_path / f"c.{suffix}")
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        rows = {row["prompt"]: (row["words_a"], row["words_b"]) for row in csv.DictReader(file)}
    assert rows["other words here"] == ("words here", "here")
    assert rows["gone"] == ("gone", "")
    assert pq.read_table(tmp_path / "c.parquet").to_pylist() == [row for name in CHANGES for row in found[name]]
    result = call("compare", *pair)
    assert f'became memorized: {STRANGE} (called up by "{STRANGE}", "{HOSTILE}")' in result.output
    assert 'no longer: gone (called up by "gone")' in result.output

    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((tmp_path / "c.html").as_uri())
    became = page.locator(".cards article", has_text=STRANGE).locator(".pair > div")
    assert "called up by" not in became.nth(0).inner_text()
    assert f'B: 1 of 1 image triggered, called up by "{STRANGE}", "{HOSTILE}"' in became.nth(1).inner_text()
    page.click("text=2 prompts memorized in both")
    kept = page.locator("details[open] tbody tr")
    assert kept.nth(0).locator("td").all_inner_texts()[-2:] == ['"same"', '"same"']
    assert kept.nth(1).locator("td").all_inner_texts()[-2:] == ['"words", "here"', '"here" changed']
    assert page.locator("img").count() == 0
    assert page.title() == "Two audits compared"
    page.close()


def test_the_words_of_a_prompt_are_those_of_any_of_its_paired_images(audits):
    told, rarer = audits.trace(1e-5, words=("key",), without="a"), audits.trace(1e-9)
    before = audits([audits.row(0, "a key", told, seed=1), audits.row(1, "a key", told, seed=5)])
    after = audits([audits.row(0, "a key", rarer, seed=0), audits.row(1, "a key", rarer, seed=1)])
    found = compare(before, after)["stays"][0]
    assert (found["seed"], found["words_a"], found["words_b"]) == (1, ["key"], None)
    alone = audits([audits.row(0, "a key", audits.trace(), seed=1), audits.row(1, "a key", told, seed=5)])
    assert compare(alone, after)["became"][0]["words_a"] is None
