"""The graph in a real browser, and its node tests. Without node or Chromium they are skipped; in CI that is a failure."""

import functools
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HOSTILE = "<img src=x onerror=\"document.title='broken'\"> & </script>"
PAGE = """<!doctype html><meta charset="utf-8"><title>graph</title><link rel="icon" href="data:,">
<body style="margin:10px"><div id="box" style="width:640px;height:300px"></div><script type="module">
import * as graph from "/js/graph.js";
const fill = (value) => Array(20).fill(value);
const band = (mean, std) => ({mean: fill(mean), std: fill(std)});
const bands = {latent: band(30, 1), update: band(2, 0.1), denoised: band(20, 1)};
window.outline = {steps: 20, bands, thresholds: {gamma: 3}, mode: "mitigate", note: null, reference_count: 50,
  p_value_floor: 0.000125};
window.step = (step, changes) => ({step, sigma: 20 - step,
  latent_norm: [31, 30], update_norm: [2.1, 4], denoised_norm: [20, 20], guidance_norm: [1, 1],
  update_score: [1, 20], denoised_score: [0, 5], p_value: null,
  state: ["stable", step > 2 ? "likely copy" : "stable"], mitigated: [false, step > 2],
  judged_by: [null, null], bands: ["latent", "update", "denoised"], ...changes});
window.graph = graph;
window.box = document.getElementById("box");
window.chosen = [];
window.view = new graph.StabilityGraph(box, {onQuantity: (quantity) => chosen.push(quantity)});
view.quantity = "update";
window.run = graph.startRun(outline);
window.keys = [];
document.addEventListener("keydown", (event) => keys.push(event.key));
document.addEventListener("pointerdown", (event) => keys.push(event.target.tagName));
view.show(run);
</script>"""


def absent(what):
    """Skips, with the reason; in CI nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and in CI it has to be")
    pytest.skip(what)


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser, address):
    """A page with an empty live run, showing the update norm; what it complains of or asks of another host fails the test."""
    page = browser.new_page(viewport={"width": 900, "height": 500})
    page.set_default_timeout(10_000)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:")) else None)
    page.goto(address)
    page.wait_for_selector(".mg-empty")
    yield page
    assert complaints == []
    assert page.title() == "graph"
    page.close()


def add(page, start, stop):
    page.evaluate("([a, b]) => { for (let i = a; i < b; i++) graph.addStep(run, step(i)); view.show(run) }", [start, stop])
    page.wait_for_timeout(150)


def lengths(page):
    return page.eval_on_selector_all(".mg-scene .mg-run", "all => all.map(e => e.getAttribute('points').split(' ').length)")


def color(page, selector, what="backgroundColor"):
    return page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}")


def test_node():
    node = shutil.which("node")
    if node is None:
        absent("node is not installed")
    files = sorted(str(file) for file in ROOT.glob("tests/js/*.test.mjs"))  # Node 22 takes no folder
    result = subprocess.run([node, "--test", *files], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr


def test_the_evidence_is_what_is_shown_first(page):
    page.evaluate("box.replaceChildren(); window.view = new graph.StabilityGraph(box); view.show(run)")
    page.wait_for_timeout(150)
    assert page.evaluate("view.quantity") == "evidence"
    assert page.locator(".mg-threshold").count() == 1
    rare = "{p_value: [0.6, 0.0001], judged_by: ['first', 'asked'], state: ['stable', 'corrected'], mitigated: [false, true]}"
    page.evaluate(f"for (const i of [0, 1, 2]) graph.addStep(run, step(i, {rare})); view.show(run)")
    page.wait_for_timeout(150)
    assert page.locator("circle.mg-mark-plain").count() == page.locator("polygon.mg-mark-outlined").count() == 1
    assert page.locator(".mg-scene .mg-corrected").count() == 3
    assert page.locator(".mg-legend > span").all_inner_texts() == [
        "judged at the first evaluation",
        "judged by what the network was asked",
        "corrected",
    ]
    page.locator(".mg-cursor").focus()
    assert page.locator(".mg-cursor").get_attribute("aria-valuetext") == (
        "step 2; image 1: most; image 2: rarer than 1 in 8,000, corrected"
    )
    assert page.locator(".mg-values circle").count() == 2


def test_the_words_stand_under_the_graph(page):
    page.evaluate(
        """() => view.show(graph.runOf([{verdict: "corrected", p_value: 0.001, steps: {sigma: [1]},
            words: {words: ["<b>wosol</b>", "dethax"], left_out: true}}]))"""
    )
    page.wait_for_timeout(150)
    assert page.locator(".mg-words").inner_text() == 'called up by "<b>wosol</b>", "dethax", left out'


def test_the_curves_grow_under_a_band_that_is_there_from_the_first_step_on(page):
    assert lengths(page) == []
    add(page, 0, 5)
    assert page.locator(".mg-band").bounding_box()["width"] > 500
    assert lengths(page) == [5, 5]
    add(page, 5, 12)
    assert lengths(page) == [12, 12]
    assert page.locator(".mg-corrected").count() == 9
    assert page.locator(".mg-legend > span").all_inner_texts() == ["trigger", "corrected", "50 ordinary runs, ± 3 sd"]
    assert page.locator(".mg-label-trigger").text_content() == "2"
    assert page.locator(".mg-status").inner_text() == "step 12 of 20"
    assert page.locator(".mg-badge").all_inner_texts() == ["1 stable", "2 likely copy"]


def test_how_rare_a_run_is_stands_beside_its_verdict(page):
    page.evaluate("for (const i of [0, 1]) graph.addStep(run, step(i, {p_value: [0.7, 0.0005 * (2 - i)]})); view.show(run)")
    page.wait_for_timeout(150)
    assert page.locator(".mg-verdict").all_inner_texts() == ["1 stable\nmost", "2 stable\n1 in 2,000"]
    page.evaluate(
        """() => { const rare = {verdict: "likely copy", score: 12, p_value: 0.0004, trigger_step: 0, bands: outline.bands,
            steps: {sigma: [2, 1], update_norm: [4, 4]}};
          view.show(graph.runOf([rare])) }"""
    )
    page.wait_for_timeout(150)
    assert page.locator(".mg-verdict").all_inner_texts() == ["likely copy\n1 in 2,500"]
    assert "S_mem 12.0, as far as 1 in 2,500 ordinary images" in page.locator(".mg-verdict").get_attribute("title")


def test_what_is_heard_of_it(page):
    svg, live = page.locator(".mg-svg"), page.locator(".mg-live")
    assert live.text_content() == "Sampling, 20 steps planned."
    add(page, 0, 2)
    assert svg.get_attribute("role") == "img"
    assert "update norm. Sampling, step 2 of 20" in svg.get_attribute("aria-label")
    assert live.text_content() == "Sampling, 20 steps planned."
    add(page, 2, 6)
    told = live.text_content()
    assert "Image 2: likely copy, triggered at step 3" in told
    add(page, 6, 9)
    assert live.text_content() == told
    page.evaluate("graph.finishRun(run, []); view.show(run)")
    page.wait_for_timeout(100)
    assert live.text_content().startswith("Image 1: stable")


def test_the_keyboard_reaches_the_quantity_and_every_step(page):
    add(page, 0, 12)
    heights = page.eval_on_selector(".mg-scene .mg-run", "e => e.getAttribute('points')")
    for _ in range(4):  # past the two images and the evidence
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(120)
    assert page.evaluate("chosen") == ["latent", "update"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(120)
    assert page.evaluate("view.quantity") == "latent"
    assert page.locator("[aria-pressed=true]").all_inner_texts() == ["latent"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.eval_on_selector(".mg-scene .mg-run", "e => e.getAttribute('points')") != heights
    page.keyboard.press("Tab")
    readout, cursor = page.locator(".mg-readout"), page.locator(".mg-cursor")
    assert readout.inner_text().startswith("step 11, sigma 9")
    for key, expected in (("ArrowLeft", 10), ("ArrowRight", 11), ("Home", 0), ("ArrowLeft", 0), ("End", 19)):
        page.keyboard.press(key)
        assert readout.inner_text().startswith(f"step {expected}")
        assert cursor.get_attribute("aria-valuenow") == str(expected)
    page.keyboard.press("Home")
    assert cursor.get_attribute("aria-valuetext") == "step 0; image 1: 31; image 2: 30; ordinary runs: 27.1 to 33.1"
    page.keyboard.press("Escape")
    assert readout.is_hidden()
    page.keyboard.press("x")
    page.keyboard.press("Escape")
    assert [key for key in page.evaluate("keys") if key not in ("Tab", "Shift")] == ["x", "Escape"]


def test_an_image_of_a_batch_is_shown_alone_on_request(page):
    add(page, 0, 6)
    page.locator(".mg-image").nth(1).evaluate("entry => { window.entry = entry; entry.click() }")
    add(page, 6, 12)
    assert lengths(page) == [12]
    assert page.locator(".mg-item").all_text_contents() == ["2"]
    assert page.evaluate("entry.isConnected && entry.getAttribute('aria-pressed') === 'true'")
    page.hover(".mg-cursor")
    assert page.locator(".mg-readout-name").all_inner_texts() == ["2", "ordinary"]


def test_the_pointer_reads_every_image_and_drags_no_node_by_a_button(page):
    add(page, 0, 12)
    box = page.locator(".mg-cursor").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.29, box["y"] + 60)
    text = page.locator(".mg-readout").inner_text()
    assert text.startswith("step 5, sigma 15")
    assert "2.1\n" in text
    assert "4\n" in text
    assert "20.0 sd, corrected" in text
    assert "1.72 to 2.32" in text
    inside = page.locator(".mg-readout").bounding_box()
    assert inside["x"] + inside["width"] <= box["x"] + box["width"]
    page.mouse.move(5, 5)
    assert page.locator(".mg-readout").is_hidden()
    page.click("text=image")
    assert page.evaluate("keys") == []


def test_the_readout_of_a_large_batch_fits_a_node(page):
    page.evaluate(
        """() => { box.style.cssText = "width:300px;height:220px";
          const eight = (list) => list.concat(list, list, list);
          for (let i = 0; i < 12; i++) {
            const lists = Object.entries(step(i)).map(([name, value]) => [name, Array.isArray(value) ? eight(value) : value]);
            graph.addStep(run, Object.fromEntries(lists));
          }
          view.show(run) }"""
    )
    page.wait_for_timeout(200)
    page.hover(".mg-cursor")
    readout, view = page.locator(".mg-readout").bounding_box(), page.locator(".mg-view").bounding_box()
    assert page.locator(".mg-readout-name").count() == 9
    assert readout["x"] >= view["x"]
    assert readout["y"] >= view["y"]
    assert readout["x"] + readout["width"] <= view["x"] + view["width"]
    assert readout["y"] + readout["height"] <= view["y"] + view["height"]


def test_light_and_dark_follow_the_reader_and_what_the_host_says(page):
    add(page, 0, 3)
    light = color(page, ".mg-view"), color(page, ".mg-band", "fill"), color(page, ".mg-scene .mg-run", "stroke")
    page.emulate_media(color_scheme="dark")
    dark = color(page, ".mg-view"), color(page, ".mg-band", "fill"), color(page, ".mg-scene .mg-run", "stroke")
    assert all(a != b for a, b in zip(light, dark, strict=True))
    for script, expected in (
        ("document.documentElement.dataset.theme = 'light'", light),
        ("document.body.classList.add('dark-theme')", dark),
        ("document.body.className = 'dark'", dark),
        ("box.dataset.theme = 'light'; view.show(run)", light),
    ):
        page.evaluate(script)
        page.wait_for_timeout(100)
        assert color(page, ".mg-view") == expected[0], script


def test_text_from_a_run_stays_text(page):
    page.evaluate("note => view.show(graph.addStep(graph.startRun({...outline, bands: {}, note}), step(0)))", HOSTILE)
    page.wait_for_timeout(150)
    assert page.locator(".mg-note").inner_text() == HOSTILE
    assert HOSTILE in page.locator(".mg-live").text_content()
    assert page.locator("img").count() == 0
    page.evaluate("text => view.clear(text)", HOSTILE)
    page.wait_for_timeout(150)
    assert page.locator(".mg-empty").inner_text() == HOSTILE
    assert page.locator("img").count() == 0


def test_an_uncalibrated_run_has_lines_and_no_band(page):
    page.evaluate(
        """() => { const run = graph.startRun({...outline, bands: {}});
          for (const i of [0, 1]) graph.addStep(run, step(i, {state: []}));
          view.show(run) }"""
    )
    page.wait_for_timeout(150)
    assert page.locator(".mg-band").count() == 0
    assert lengths(page) == [2, 2]
    assert page.locator(".mg-note").inner_text() == "no profile: not scored"


@pytest.mark.parametrize(("width", "height"), [(260, 160), (300, 200), (900, 260)])
def test_it_fits_its_container_whatever_its_size(page, width, height):
    add(page, 0, 12)
    page.evaluate("([w, h]) => { box.style.width = w + 'px'; box.style.height = h + 'px' }", [width, height])
    page.wait_for_timeout(200)
    assert page.evaluate("[box.scrollWidth, box.scrollHeight]") == [width, height]
    outer = page.locator(".mg-view").bounding_box()
    for selector in (".mg-svg", ".mg-choices", ".mg-verdicts", ".mg-legend"):
        inner = page.locator(selector).bounding_box()
        assert inner["x"] >= outer["x"], selector
        assert inner["x"] + inner["width"] <= outer["x"] + outer["width"], selector
    assert page.locator(".mg-svg").bounding_box()["height"] >= 90
    sizes = page.eval_on_selector_all(".mg-view *", "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 11


def test_it_redraws_at_most_twenty_times_a_second_and_ends_with_the_last_step(page):
    times = page.evaluate(
        """async () => {
          const times = [];
          const watcher = new MutationObserver(() => times.push(performance.now()));
          watcher.observe(document.querySelector(".mg-scene"), {childList: true});
          for (let i = 0; i < 20; i++) for (let k = 0; k < 10; k++) {
            graph.addStep(run, step(i)); view.show(run); await new Promise((done) => setTimeout(done, 5));
          }
          await new Promise((done) => setTimeout(done, 200));
          return times;
        }"""
    )
    assert len(times) > 5
    # A step more than 20, since what is seen is the end of a redraw, and one may take longer than the next.
    assert all(later - earlier > 1000 for earlier, later in zip(times, times[21:], strict=False))
    assert len(times) <= 2 + (times[-1] - times[0]) / 50
    assert lengths(page) == [20, 20]


def test_it_leaves_nothing_behind_but_its_style_and_works_in_a_shadow_root(page):
    page.evaluate("view.show(run); view.destroy(); view.show(run)")
    page.wait_for_timeout(150)
    assert page.evaluate("box.childElementCount") == 0
    assert page.locator("style").count() == 1
    page.evaluate(
        """() => { const root = box.attachShadow({mode: "open"}), inner = document.createElement("div");
          root.append(inner);
          new graph.StabilityGraph(inner).show(run); document.body.className = "dark" }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("box.shadowRoot.getElementById('mg-graph-style') !== null")
    assert color(page, "#box .mg-view") == "rgb(22, 27, 34)"


def test_an_unknown_quantity_is_refused(page):
    assert page.evaluate("(() => { try { view.quantity = 'speed' } catch (e) { return e.message } })()") == (
        "no quantity speed; there are evidence, latent, update, denoised"
    )


@pytest.fixture
def report(tmp_path):
    """A report of two prompts, with texts that try to be more than text, as a file."""
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    np = pytest.importorskip("numpy")
    from memorization_guard import Trace
    from memorization_guard.core.trace import Steps
    from memorization_guard.reports.html import Comparison, html_report

    def trace(note, corrected):
        count = 20
        band = {"mean": np.full(count, 2.0), "std": np.full(count, 0.1)}
        steps = Steps(
            latent_norm=np.full(count, 3.0),
            update_norm=np.linspace(2, 4, count),
            update_score=np.linspace(0, 20, count),
            mitigated=corrected & (np.arange(count) > 5),
            **{name: np.ones(count) for name in ("sigma", "denoised_norm", "denoised_score")},
        )
        bands = {"latent": band, "update": band, "denoised": band}
        rare = {"p_value": 0.0005, "judged_by": "asked"}
        return Trace(verdict="likely copy", trigger_step=3, note=note, steps=steps, bands=bands, **rare)

    comparisons = [
        Comparison(
            prompt=prompt,
            group="exact",
            training_image=Image.new("RGB", (64, 64), "red"),
            plain_image=Image.new("RGB", (64, 64), "red"),
            plain_trace=trace(HOSTILE, False),
            mitigated_image=Image.new("RGB", (64, 64), "blue"),
            mitigated_trace=trace("<!-- <script> --> \u2028", True),
            plain_copy=0.9,
            mitigated_copy=0.1,
        )
        for prompt in (HOSTILE, "a-word-that-is-much-too-long-for-a-phone" * 4)
    ]
    file = tmp_path / "report.html"
    text = html_report(comparisons, title="report", introduction=HOSTILE, copy_threshold=0.75)
    file.write_text(text, encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_report_draws_its_graphs_and_is_readable_at_any_width(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("data:", report)) else None)
    page.goto(report)
    page.wait_for_selector(".mg-corrected")
    assert page.locator(".mg-svg").count() == page.locator(".mg-threshold").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h2").first.inner_text().endswith(HOSTILE)
    assert page.locator(".mg-note").first.inner_text() == HOSTILE
    assert page.title() == "report"
    assert complaints == []
    page.close()


def test_the_report_says_in_words_what_it_draws(browser, report):
    drawn = browser.new_page()
    drawn.goto(report)
    drawn.wait_for_selector(".mg-mark-solid")
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(report)
    said = plain.locator("[data-trace]").all_text_contents()
    assert said[1].startswith("Image 1: likely copy, triggered at step 3, S_mem 20.0, as far as 1 in 2,000 ordinary images,")
    assert drawn.locator(".mg-live").all_text_contents() == said
    plain.context.close()
    drawn.close()
