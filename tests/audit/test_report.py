"""The report of an audit: its figures, its intervals, and its page in a real browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from memorization_guard import Thresholds
from memorization_guard.audit import dataset
from memorization_guard.audit.summary import COLUMNS, WORDS, Rarest, summarize
from memorization_guard.core.trace import STATEMENT
from memorization_guard.reports.audit import write_report
from memorization_guard.reports.pieces import share, thumbnail
from memorization_guard.statistics import clustered_rate

HOSTILE = "<img src=x onerror=\"document.title='broken'\"> & </script><!-- \x07 ' \u2028"


class Tags(HTMLParser):
    """The tags and the text of a page; what stands in scripts and styles is no text."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


# ------------------------------------------------------------------------------------------------------------- intervals


@given(st.integers(1, 300), st.data())
def test_independent_images_have_wilsons_interval(prompts, data):
    events = data.draw(st.integers(0, prompts))
    found = clustered_rate(np.arange(prompts) < events, np.ones(prompts))
    expected = binomtest(events, prompts).proportion_ci(method="wilson")
    assert (found["count"], found["of"]) == (events, prompts)
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40))
def test_an_interval_holds_its_rate_and_is_no_narrower_than_of_independent_images(prompts):
    sizes = np.array([max(pair) for pair in prompts], dtype=int)
    events = np.array([min(pair) for pair in prompts], dtype=int)
    found = clustered_rate(events, sizes)
    if not sizes.sum():
        assert found["rate"] is found["interval"] is None
        return
    low, high = found["interval"]
    assert 0 <= low <= found["rate"] <= high <= 1
    plain = binomtest(int(events.sum()), int(sizes.sum())).proportion_ci(method="wilson")
    assert high - low >= plain.high - plain.low - 1e-9
    assert 1 <= found["effective"] <= sizes.sum()


def test_seeds_that_all_say_the_same_are_worth_one_image_each():
    events = np.arange(200) < 12
    once, often = clustered_rate(events, np.ones(200)), clustered_rate(10 * events, np.full(200, 10))
    assert often["interval"] == pytest.approx(once["interval"], rel=0.03)
    nothing = clustered_rate(np.zeros(200), np.full(200, 10))
    assert nothing["interval"][1] == pytest.approx(binomtest(0, 200).proportion_ci(method="wilson").high)


@pytest.mark.parametrize(
    ("prompts", "seeds", "memorized", "shape"),
    [
        (1000, 10, 0.003, (1, 1)),
        (300, 4, 0.05, (0.5, 0.5)),
        (50, 5, 0.2, (1, 1)),
        (8, 20, 0.4, (1, 1)),
        (400, 10, 1.0, (0.3, 60)),
    ],
)
def test_intervals_hold_the_true_rate_as_often_as_they_say(prompts, seeds, memorized, shape):
    rng, runs, inside, naive = np.random.default_rng(1), 600, 0, 0
    truth = memorized * shape[0] / sum(shape)
    for _ in range(runs):
        sizes = rng.integers(seeds // 2, seeds + 1, prompts)
        events = rng.binomial(sizes, rng.beta(*shape, prompts) * (rng.random(prompts) < memorized))
        low, high = clustered_rate(events, sizes)["interval"]
        inside += low <= truth <= high
        plain = binomtest(int(events.sum()), int(sizes.sum())).proportion_ci(method="wilson")
        naive += plain.low <= truth <= plain.high
    assert 0.91 <= inside / runs <= 0.99
    if shape[0] <= 1 and memorized < 1:
        assert naive / runs < 0.9  # seeds taken for independent: the test would see it


# ------------------------------------------------------------------------------------------------------------- the summary


@pytest.fixture(scope="module")
def audit(audits):
    """30 prompts of two seeds; three prompts trigger, one of them with both seeds; some images saved."""
    rows = []
    for image in range(60):
        prompt, p_value = image // 2, 0.02 + 0.015 * (image % 60)
        p_value = {4: 1e-8, 5: 2e-4, 20: 5e-5, 41: 9e-4}.get(image, min(p_value, 0.9))
        text = HOSTILE if image in (4, 5) else f"a prompt {prompt} " + "of-many-words" * (6 if prompt == 10 else 1)
        file = {4: "images/000000/4.png", 20: "images/000000/20.png", 41: "images/gone.png"}.get(image)
        rows.append(
            audits.row(image, text, audits.trace(p_value), seed=7 + image % 2, kind="photo" if prompt % 3 else None, file=file)
        )
    pictures = {"images/000000/4.png": "red", "images/000000/20.png": "blue"}
    folder = audits(rows, pictures=pictures, surprise={"deep": [1, {"er": HOSTILE}]})
    write_report(folder)
    return folder


def test_what_came_out_is_counted(audit):
    found = summarize(audit)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["finished"], found["images"], found["planned"], found["prompts"], found["scored"]) == (True, 60, 60, 30, 60)
    assert (found["triggered"]["count"], found["triggered"]["of"], found["triggered"]["chance"]) == (
        4,
        60,
        pytest.approx(60 * 0.005),
    )
    assert (found["prompts_triggered"]["count"], found["prompts_triggered"]["of"]) == (3, 30)
    assert found["prompts_triggered"]["chance"] == pytest.approx(30 * (1 - 0.995**2))
    assert {name: rate["count"] for name, rate in found["verdicts"].items()} == {
        "stable": 56,
        "corrected": 0,
        "likely copy": 4,
        "mild": 0,
        "strong": 0,
        "unscored": 0,
    }
    kinds = {group["kind"]: group for group in found["kinds"]}
    assert set(kinds) == {"photo", None}
    assert sum(group["triggered"]["count"] for group in kinds.values()) == 4
    assert kinds[None]["images"] == 20
    shares = dict(zip(found["distribution"]["p_value"], found["distribution"]["share"], strict=True))
    assert (shares[1.0], shares[0.001], shares[1e-4], shares[1e-6]) == pytest.approx((1, 4 / 60, 2 / 60, 1 / 60))
    assert [row["image"] for row in found["worst"][:3]] == [4, 20, 41]
    assert len({row["prompt"] for row in found["worst"]}) == len(found["worst"]) == 30
    assert found["warnings"] == []


def test_words_are_counted_by_the_prompts_they_were_told_for(audits):
    told = audits.trace(1e-5, words=("wosol", "m\u00fcller"), without="a cat")
    other = audits.trace(1e-5, words=("wosol",), without="a dog")
    plan = [
        ("one", told),
        ("two", other),
        ("one", told),
        ("three", audits.trace(1e-5)),
        ("four", audits.trace()),
        ("two", other),
    ]
    rows = [audits.row(i, prompt, trace, kind=str(i % 2)) for i, (prompt, trace) in enumerate(plan)]
    found = summarize(audits(rows, part=2))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["words"] == [{"word": "wosol", "prompts": 2}, {"word": "m\u00fcller", "prompts": 1}]
    assert found["words_left_out"] == 0
    share = found["prompts_with_words"]
    assert (share["count"], share["of"], share["rate"]) == (2, 3, pytest.approx(2 / 3))
    assert {row["prompt"]: (row["words"], row["prompt_without_words"]) for row in found["worst"]} == {
        "one": (["wosol", "m\u00fcller"], "a cat"),
        "two": (["wosol"], "a dog"),
        "three": (None, None),
        "four": (None, None),
    }
    many = summarize(audits([audits.row(i, f"p{i}", audits.trace(1e-5, words=(f"w{i:02}", "x"))) for i in range(60)]))
    assert [row["word"] for row in many["words"]] == ["x", *(f"w{n:02}" for n in range(WORDS - 1))]
    assert many["words_left_out"] == 61 - WORDS
    nothing = summarize(audits([audits.row(0, "p", audits.trace())]))
    assert (nothing["words"], nothing["prompts_with_words"]["rate"]) == ([], None)


def test_words_of_many_prompts_are_counted_in_little_memory_and_right(audits, monkeypatch):
    """Whatever is summed up on the way."""
    monkeypatch.setattr("memorization_guard.audit.summary.SUMMED", 3)
    traces = [audits.trace(1e-5, words=words) for words in (("a", "b"), ("b",), ("c", "b"))]
    rows = [audits.row(i, f"p{i % 7}", traces[i % 7 % 3]) for i in range(40)]
    found = summarize(audits(rows, part=2))
    assert found["words"] == [{"word": "b", "prompts": 7}, {"word": "a", "prompts": 3}, {"word": "c", "prompts": 2}]
    assert (found["prompts"], found["prompts_with_words"]["count"]) == (7, 7)


def test_a_prompt_that_comes_again_later_is_one_prompt(audits):
    rows = [audits.row(i, f"prompt {i % 5}", audits.trace(1e-5 if i % 5 == 0 else 0.5)) for i in range(40)]
    found = summarize(audits(rows, part=3))
    assert (found["prompts"], found["prompts_triggered"]["count"], found["triggered"]["count"]) == (5, 1, 8)


@settings(max_examples=40)
@given(st.lists(st.none() | st.sampled_from([1e-9, 1e-4, 0.001, 0.01, 0.3]), min_size=1, max_size=60), st.integers(1, 9))
def test_the_rarest_rows_are_those_of_sorting_everything(p_values, limit):
    batch = dataset.pa.RecordBatch.from_pylist(
        [dict.fromkeys(COLUMNS) | {"image": i, "p_value": p_value} for i, p_value in enumerate(p_values)],
        schema=dataset.pa.schema([dataset.SCHEMA.field(name).with_nullable(True) for name in COLUMNS]),
    )
    rarest = Rarest(limit)
    for start in range(0, len(p_values), 4):
        rarest.add(batch.slice(start, 4))
    expected = sorted(range(len(p_values)), key=lambda i: (2.0 if p_values[i] is None else p_values[i], i))[:limit]
    assert rarest.table()["image"].to_pylist() == expected


def test_traces_are_read_for_the_cards_alone(audit, monkeypatch):
    asked, scan = [], dataset.scan
    monkeypatch.setattr(dataset, "scan", lambda folder, columns: asked.append(set(columns)) or scan(folder, columns))
    summarize(audit)
    assert asked
    assert not any({"trace", "settings"} & columns for columns in asked)
    traces = dataset.read_traces(audit, [4, 59, 1000])
    assert {image: trace.verdict for image, trace in traces.items()} == {4: "likely copy", 59: "stable"}


def test_an_unfinished_audit_says_so(audits):
    folder = audits([audits.row(i, f"p{i}", audits.trace()) for i in range(10)], images=50, finished=None)
    found = write_report(folder)
    assert not found["finished"]
    assert "10 of 50 planned images" in found["warnings"][0]
    assert "10 of 50 planned images" in Tags((folder / dataset.REPORT).read_text()).text
    # Parts that were lost make a finished audit unfinished.
    assert not summarize(audits([audits.row(0, "p", audits.trace())], images=2))["finished"]


def test_images_that_cannot_be_scored_are_no_ordinary_ones(audits):
    note = "The profile does not fit <this> run."
    unscored = [audits.row(i, f"p{i}", audits.trace(scored=False, note=note)) for i in range(6)]
    folder = audits(unscored)
    found = write_report(folder)
    assert found["triggered"]["rate"] is None
    assert found["unscored"] == [{"note": note, "images": 6}]
    text = Tags((folder / dataset.REPORT).read_text()).text
    assert "Calibrate one for this model" in text
    assert note in text
    some = summarize(audits([*unscored, audits.row(6, "p6", audits.trace(1e-5))]))
    assert (some["triggered"]["count"], some["triggered"]["of"], some["prompts_triggered"]["of"]) == (1, 1, 1)
    assert "6 of 7 images could not be scored" in some["warnings"][0]


def test_an_audit_without_rows_or_without_what_the_manifest_should_say_has_a_report(audits):
    nothing = audits([], finished=None, images=100)
    assert "No image was sampled yet." in write_report(nothing)["warnings"]
    missing = dict.fromkeys(("model", "prompts", "settings", "thresholds", "profile", "finished", "images", "created"), ...)
    bare = audits([audits.row(0, "p", audits.trace(1e-5))], **missing)
    assert write_report(bare)["triggered"]["chance"] is None
    odd = audits([audits.row(0, "p", audits.trace(1e-5))], model="a name", settings=[1, [2]], thresholds=3, profile=None)
    assert write_report(odd)["model"] is None
    assert "a name" in Tags((odd / dataset.REPORT).read_text()).text


def test_the_published_method_has_no_nominal_share(audits):
    folder = audits([audits.row(0, "p", audits.trace(1e-5))], thresholds=Thresholds(method="published").to_dict())
    found = write_report(folder)
    assert found["false_positive_rate"] is found["triggered"]["chance"] is None
    assert "published method does not tell" in Tags((folder / dataset.REPORT).read_text()).text


# ---------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_says_everything_and_loads_nothing(audit):
    text = (audit / dataset.REPORT).read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    assert "default-src 'none'" in text
    assert STATEMENT in re.sub(r"\s+", " ", tags.text)
    for what in (
        "base",
        "a.safetensors",
        "0.8",
        "ab12",
        "guidance scale",
        "surprise deep 2 er",
        "reference runs",
        "6.7 %",
        "400 reference prompts show nothing rarer than 1 in 400",
        "a fit, which ends at 1 in 8,000",
    ):
        assert what in tags.text, what
    assert tags.text.count("image not saved") == len(summarize(audit)["worst"]) - 3
    assert "images/gone.png is missing" in tags.text
    assert sum("data-trace" in attributes for _, attributes in tags.seen) == 30


hostile_text = st.text(max_size=40) | st.sampled_from(
    [HOSTILE, "</script>", "<script>alert(1)</script>", "<!--<script>", "]]>"]
)


@example(prompt="\0", kind="\0", note="\0", name="\0", file="\0")
@settings(max_examples=25)
@given(prompt=hostile_text, kind=hostile_text, note=hostile_text, name=hostile_text, file=hostile_text)
def test_no_text_becomes_html(audits, prompt, kind, note, name, file):
    rows = [
        audits.row(0, prompt, audits.trace(1e-5, note=note), kind=kind, file=file),
        audits.row(1, "plain", audits.trace(scored=False, note=note), kind=None),
    ]
    folder = audits(rows, model={"name": name, name: {kind: note}})
    write_report(folder)
    plain = audits([row | {"prompt": "p", "kind": row["kind"] and "k", "file": row["file"] and "f"} for row in rows])
    write_report(plain)
    found, expected = (Tags((path / dataset.REPORT).read_text(encoding="utf-8")) for path in (folder, plain))
    assert found.open == []
    assert {tag for tag, _ in found.seen} <= {tag for tag, _ in expected.seen}
    assert [tag for tag, _ in found.seen].count("script") == 3
    names = {name for _, attributes in found.seen for name in attributes}
    assert not any(name.startswith("on") for name in names)


def test_a_file_outside_the_audit_is_not_shown(audits):
    folder = audits([audits.row(0, "p", audits.trace(1e-5), file="../outside.png")], pictures={"../outside.png": "red"})
    write_report(folder)
    assert "data:image" not in (folder / dataset.REPORT).read_text()
    (folder / "images").mkdir()
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    assert "cannot be read" in thumbnail(folder, "images/broken.png")


def test_shares_are_told_with_the_digits_that_matter():
    shares = [0, 1, 0.5, 0.01, 0.98975, 0.00012345, 0.999977, -0.003, 1e-7]
    assert [share(value) for value in shares] == [
        "0 %", "100 %", "50.0 %", "1.0 %", "99.0 %", "0.012 %", "99.9977 %", "-0.30 %", "0.000010 %"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture
def visit(browser):
    """Opens a page; whatever it complains of or asks for fails the test."""
    complaints, pages = [], []

    def open_page(folder, **options):
        page = browser.new_page(viewport={"width": 1280, "height": 800} | options.pop("viewport", {}), **options)
        page.set_default_timeout(15_000)
        address = (folder / dataset.REPORT).as_uri()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("data:", "blob:", address)) else None)
        page.goto(address)
        pages.append(page)
        return page

    yield open_page
    assert complaints == []
    for page in pages:
        assert page.title() == "Audit of base"
        page.close()


def cells(page, column):
    heads = page.locator(".rows .head .cell").all_inner_texts()
    place = [head.split(" ↑")[0].split(" ↓")[0] for head in heads].index(column) + 1
    return page.locator(f".rows .body .row .cell:nth-child({place})").all_inner_texts()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_graphs_are_drawn_when_they_come_near_and_nothing_is_too_wide(audit, visit, width, scheme):
    page = visit(audit, viewport={"width": width, "height": 700}, color_scheme=scheme)
    page.wait_for_selector(".rows .body .row")
    assert page.locator(".mg-svg").count() < 6
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".cards article").nth(5).scroll_into_view_if_needed()
    page.locator(".cards article").nth(5).locator(".mg-band").wait_for()
    page.click("details.more > summary")
    page.locator("details .graph").last.scroll_into_view_if_needed()
    page.locator("details .graph").last.locator(".mg-band").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(247, 248, 250)") == (scheme == "light")


def test_the_table_is_filtered_sorted_and_read(audit, visit):
    page = visit(audit)
    page.wait_for_selector(".rows .body .row")
    told = page.locator(".filters [role=status]")
    assert told.inner_text() == "60 of 60"
    assert cells(page, "image")[:3] == ["4", "20", "5"]
    assert cells(page, "as rare as")[:2] == ["< 1 in 8,000", "< 1 in 8,000"]
    page.check("input[type=checkbox]")
    assert cells(page, "image") == ["4", "20", "5", "41"]
    page.select_option("select >> nth=0", label="likely copy")
    assert cells(page, "image") == ["4", "20", "5", "41"]
    page.select_option("select >> nth=0", label="every verdict")
    page.uncheck("input[type=checkbox]")
    page.select_option("select >> nth=1", label="photo")
    assert told.inner_text() == "40 of 60"
    page.fill("input[type=search]", "PROMPT 2")
    # Prompts 2, 20, 22 and so on are photos, but those that three divides; prompt 2 has another text.
    assert {prompt.split()[2] for prompt in cells(page, "prompt")} == {"20", "22", "23", "25", "26", "28", "29"}
    page.fill("input[type=search]", "words 29")
    assert len(cells(page, "prompt")) == 2
    page.fill("input[type=search]", "no such prompt")
    assert cells(page, "image") == []
    page.fill("input[type=search]", "")
    page.select_option("select >> nth=1", label="every kind")
    page.click("button[title='Sort by image']")
    assert cells(page, "image")[:3] == ["0", "1", "2"]
    page.click("button[title='Sort by image']")
    assert cells(page, "image")[:3] == ["59", "58", "57"]
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "descending"
    page.click("button[title='Sort by trigger']")
    steps = cells(page, "trigger")
    assert steps[:4] == sorted(steps[:4], key=int)
    assert steps[4] == "-"
    page.click("button[title='Sort by prompt']")
    assert cells(page, "prompt")[0].startswith("<img src=x")
    page.locator(".rows .body .row").first.click()
    assert page.locator(".chosen b").text_content() == HOSTILE
    assert page.locator(".chosen a").get_attribute("href") == "images/000000/4.png"
    page.locator(".rows").focus()
    page.keyboard.press("ArrowDown")
    assert "image 5" in page.locator(".chosen").inner_text()
    assert page.locator(".rows [aria-selected=true]").count() == 1


def test_without_scripts_the_page_is_text(audit, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((audit / dataset.REPORT).as_uri())
    text = page.locator("main").inner_text()
    assert "4 of 60 scored images" in text
    assert "Image 1: likely copy" in text
    assert "The table needs scripts" in text
    page.context.close()


def test_a_hundred_thousand_rows_are_usable(audits, visit):
    trace, number = audits.trace(0.5), 100_500
    row = audits.row(0, "", trace) | {"trace": "{}"}
    words = ["cat", "dog", "house", "painting", "of", "the", "photograph", "river", "red", "light"]
    rng = np.random.default_rng(0)
    p_values = rng.random(number)
    texts = rng.integers(0, len(words), (number, 10))
    rows = [
        row | {"image": i, "prompt": f"{' '.join(words[w] for w in texts[i])} {i}", "p_value": p_values[i], "seed": i}
        for i in range(number)
    ]
    folder = audits(rows, part=50_000)
    found = write_report(folder)
    assert found["images"] == number
    assert "The table holds the 100,000 rarest of 100,500 images" in (folder / dataset.REPORT).read_text()
    assert (folder / dataset.REPORT).stat().st_size < 8e6
    page = visit(folder)
    page.wait_for_selector(".rows .body .row", timeout=10_000)
    assert float(page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")) < 5000
    assert page.locator(".rows .body .row").count() < 100
    spent = page.evaluate(
        """() => { const time = (run) => { const start = performance.now(); run(); return performance.now() - start };
          const search = document.querySelector("input[type=search]");
          const type = (text) => { search.value = text; search.dispatchEvent(new Event("input")) };
          return [time(() => type("cat river")), time(() => type("")),
            ...[...document.querySelectorAll(".rows .head button")].map((button) => time(() => button.click()))] }"""
    )
    assert max(spent) < 1500  # 0.1 s on a free machine
    page.evaluate("document.querySelector('.rows').scrollTop = 1e9")
    page.wait_for_selector(".rows .body .row[data-at='99999']")
    page.click("button[title='Sort by image']")  # the last that was sorted by, now the other way
    assert int(cells(page, "image")[0]) == np.sort(np.argsort(p_values)[:100_000])[-1]
