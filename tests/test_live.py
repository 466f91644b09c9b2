"""The live graph on the WebUI's page: its route, without a host, and its panel, in a real browser on a page like a host's."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from memorization_guard import NoiseLevel, StabilityMonitor

pytest.importorskip("fastapi")
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.testclient import TestClient

ROOT = Path(__file__).parent.parent
HOSTILE = "<img src=x onerror=\"document.title='broken'\">"


def load():
    """The module alone: its package needs the host."""
    spec = importlib.util.spec_from_file_location("memorization_guard_live", ROOT / "extension" / "live.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


live = load()


def begin(run="a", **changes):
    band = {"mean": [2.0] * 20, "std": [0.1] * 20}
    outline = {"steps": 20, "bands": {"update": band}, "thresholds": {"gamma": 3}, "note": None, "reference_count": 50}
    told = {"kind": "begin", "run": run, "title": f"title of {run}", "p_value_floor": 0.000125}
    return {**told, **outline, **changes}


def step(number, run="a"):
    norms = {
        "guidance_norm": [None],
        "latent_norm": [30.0],
        "update_norm": [2.1],
        "denoised_norm": [20.0],
        "update_score": [1.0],
        "denoised_score": [0.0],
        "p_value": [0.3],
    }
    told = {"sigma": 20.0 - number, "state": ["stable"], "mitigated": [False], "judged_by": ["first"], "bands": ["update"]}
    return {"kind": "step", "run": run, "step": number, **norms, **told}


def end(run="a", steps=20, verdict="stable"):
    norms = {"update_norm": [2.1] * steps, "latent_norm": [30.0] * steps, "denoised_norm": [20.0] * steps}
    rare = {"p_value": 0.3, "p_value_floor": 0.000125, "judged_by": "first"}
    trace = {"verdict": verdict, "score": 1.5, "trigger_step": None, "steps": norms, **rare}
    return {"kind": "end", "run": run, "traces": [trace]}


def texts(events):
    return [(event["kind"], event["run"], event.get("step")) for event in map(json.loads, events)]


class Host:
    """An app in the form of Gradio's, and the tasks that a WebUI would have."""

    def __init__(self, auth=None):
        self.runs = live.LiveRuns()
        self.running = set()
        self.app = FastAPI()
        tokens = {"its token": "user"}

        @self.app.get("/user")
        def get_current_user(request: Request):
            return tokens.get(request.cookies.get("gradio's cookie"))

        @self.app.get("/login_check")
        def login_check(user=Depends(get_current_user)):  # noqa: B008
            if auth is not None and user is None:
                raise HTTPException(401, "Not authenticated")

        live.add_route(self.app, self.runs, self.running.__contains__)
        self.client = TestClient(self.app)

    def send(self, task, *events):
        for event in events:
            self.runs.send(task, event)

    def ask(self, **question):
        return self.client.get("/memorization-guard/live", params=question)


@pytest.fixture
def host():
    return Host()


# What is kept


def test_events_come_once_and_in_order(host):
    host.running.add("task(1)")
    host.send("task(1)", begin(), step(0))
    first = host.ask(task="task(1)").json()
    assert first == {"cursor": 2, "running": True, "events": [begin(), step(0)]}
    assert host.ask(task="task(1)", cursor=2).json() == {"cursor": 2, "running": True, "events": []}
    host.send("task(1)", step(1), begin("b"), step(0, "b"))
    host.send("task(2)", begin("c"))
    assert host.ask(task="task(1)", cursor=2).json()["events"] == [step(1), begin("b"), step(0, "b")]
    assert host.ask(task="task(1)").json()["cursor"] == 5
    host.running.clear()
    assert host.ask(task="task(2)").json() == {"cursor": 1, "running": False, "events": [begin("c")]}
    assert host.ask(task="task(3)", cursor=7).json() == {"cursor": 0, "running": False, "events": []}


def test_a_page_that_comes_late_gets_an_ended_run_without_its_steps():
    runs = live.LiveRuns()
    for event in (begin(), step(0), step(1)):
        runs.send("t", event)
    runs.send("t", end())
    runs.send("t", begin("b"))
    assert texts(runs.since("t", 0)[0]) == [("begin", "a", None), ("end", "a", None), ("begin", "b", None)]
    assert texts(runs.since("t", 2)[0]) == [("end", "a", None), ("begin", "b", None)]


def test_a_run_that_begins_again_is_another():
    runs = live.LiveRuns()
    for event in (begin(), step(0), begin(), step(5)):
        runs.send("t", event)
    assert texts(runs.since("t", 0)[0]) == [("begin", "a", None), ("step", "a", 5)]


def test_an_event_is_kept_as_it_was_and_has_to_be_json():
    runs = live.LiveRuns()
    event = begin()
    runs.send("t", event)
    event["steps"] = 7
    assert json.loads(runs.since("t", 0)[0][0])["steps"] == 20
    with pytest.raises(ValueError, match="JSON"):
        runs.send("t", begin(steps=float("nan")))
    with pytest.raises(TypeError):
        runs.send("t", begin(steps=torch.ones(1)))
    runs.send(None, begin())
    assert runs.since("t", 0)[1] == 1


def test_it_does_not_grow_without_end():
    runs = live.LiveRuns()
    for task in range(20):
        runs.send(f"t{task}", begin())
    runs.send("t12", step(0))
    runs.send("t20", begin())
    assert [task for task in range(21) if runs.since(f"t{task}", 0)[0]] == [12, *range(14, 21)]
    for run in range(120):
        runs.send("t", begin(str(run)))
        runs.send("t", end(str(run)))
    assert [run for kind, run, _ in texts(runs.since("t", 0)[0]) if kind == "end"] == [str(run) for run in range(20, 120)]
    assert not runs.since("t20", 0)[0]  # all tasks together have no more
    for number in range(3000):
        runs.send("t", step(number))
    assert len(runs.since("t", 240)[0]) == 2001
    runs.send("t", end())
    assert texts(runs.since("t", 0)[0])[-1] == ("end", "a", None)


def test_images_are_numbered_over_the_calls_of_a_task():
    runs = live.LiveRuns()
    assert [runs.number("t", 4), runs.number("u", 1), runs.number("t", 2), runs.number("t", 1)] == [1, 1, 5, 7]
    assert [runs.number(None, 4), runs.number(None, 4)] == [1, 1]  # an API's client has no page to number for


def test_nothing_is_lost_between_two_threads():
    runs, got, cursor = live.LiveRuns(), [], 0
    runs.send("t", begin())
    sender = threading.Thread(target=lambda: [runs.send("t", step(number)) for number in range(1500)])
    sender.start()
    while sender.is_alive() or len(got) < 1501:
        events, cursor = runs.since("t", cursor)
        got += events
    assert texts(got) == [("begin", "a", None), *(("step", "a", number) for number in range(1500))]


# The route


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"task": ""},
        {"task": "t" * 101},
        {"cursor": 1},
        *({"task": "t", "cursor": c} for c in ("-1", "abc", "1.5", "", "NaN")),
    ],
    ids=str,
)
def test_a_bad_question_is_refused(host, question):
    assert host.ask(**question).status_code == 422


def test_an_odd_question_has_an_answer(host):
    for task in ("../..", "\0", "\U0001f600", HOSTILE, "a&b=c d"):
        assert host.ask(task=task, cursor=10**30).json() == {"cursor": 0, "running": False, "events": []}
    assert host.client.post("/memorization-guard/live").status_code == 405
    assert host.ask(task="t").headers["cache-control"] == "no-store"
    assert host.ask(task="t").headers["content-type"] == "application/json"


def test_where_the_answer_is_that_it_has_ended_nothing_is_left_out():
    runs, app = live.LiveRuns(), Host().app
    app.router.routes = [route for route in app.routes if route.path != live.ROUTE]

    def ends_just_now(task):
        runs.send(task, end())
        return False

    live.add_route(app, runs, ends_just_now)
    answer = TestClient(app).get(live.ROUTE, params={"task": "t"}).json()
    assert (answer["running"], len(answer["events"])) == (False, 1)


def test_with_a_login_only_who_is_logged_in_gets_an_answer():
    host = Host(auth={"user": "password"})
    host.send("t", begin())
    answer = host.ask(task="t")
    assert (answer.status_code, "events" in answer.text) == (401, False)
    host.client.cookies.set("gradio's cookie", "another token")
    assert host.ask(task="t").status_code == 401
    host.client.cookies.set("gradio's cookie", "its token")
    assert host.ask(task="t").json()["events"] == [begin()]


def test_an_app_gets_the_route_once_and_without_gradio_never(host):
    live.add_route(host.app, live.LiveRuns(), lambda task: True)
    assert [route.path for route in host.app.routes].count(live.ROUTE) == 1
    app = FastAPI()
    live.add_route(app, live.LiveRuns(), lambda task: True)
    assert TestClient(app).get(live.ROUTE, params={"task": "t"}).status_code == 404


# The page

# What a host's page does, as far as the panel has to do with it.
PAGE = """<!doctype html><meta charset="utf-8"><title>page</title><link rel="icon" href="data:,">
<body><div id="results"><div id="txt2img_gallery_container">gallery</div><div id="after">buttons</div></div>
<div id="results2"><div id="img2img_gallery_container">gallery</div></div>
<script>
const callbacks = [];
window.updates = 0;
window.gradioApp = () => document;
window.onUiUpdate = (callback) => callbacks.push(callback);
new MutationObserver(() => { updates++; for (const callback of callbacks) callback([]) })
  .observe(document, {childList: true, subtree: true});
window.begin = (tab, task) => {
  localStorage.setItem(`${tab}_task_id`, task);
  const bar = document.createElement("div"), gallery = document.getElementById(`${tab}_gallery_container`);
  bar.className = "progressDiv";
  gallery.before(bar);
};
window.finish = (tab) => {
  document.getElementById(`${tab}_gallery_container`).previousElementSibling.remove();
  localStorage.removeItem(`${tab}_task_id`);
};
</script><script type="module" src="file=guard/javascript/memorization_guard.mjs?17.5"></script>"""


@pytest.fixture
def served(host):
    """The host's page, below a path; ``asked`` has the status of every answer so far, ``status`` is the next one's."""
    host.asked, host.status = [], 200

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, kind, body = 200, "text/html", PAGE
            path = self.path.removeprefix("/below/").partition("?")[0]
            if path.startswith("file=guard/"):
                kind, body = "text/javascript", (ROOT / path.removeprefix("file=guard/")).read_text("utf-8")
            elif path.startswith("memorization-guard/"):
                answer = host.client.get(self.path.removeprefix("/below"))
                status, kind, body = host.status, "application/json", answer.text
                host.asked.append(status)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host.url = f"http://127.0.0.1:{server.server_port}/below/"
    yield host
    server.shutdown()
    server.server_close()


@pytest.fixture
def context(browser, served):
    context = browser.new_context(viewport={"width": 800, "height": 900})
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def page(context, served):
    """The page, some time after it was loaded; whatever it complains of fails the test, but what the server refused."""
    page = context.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served.url)
    page.wait_for_timeout(300)
    yield page
    assert [complaint for complaint in complaints if served.status == 200 or "Failed to load" not in complaint] == []
    assert page.title() == "page"


def start(page, host, task, tab="txt2img"):
    host.running.add(task)
    page.evaluate("([tab, task]) => begin(tab, task)", [tab, task])


def finish(page, host, task, tab="txt2img"):
    host.running.discard(task)
    page.evaluate("tab => finish(tab)", tab)


def see_steps(page, count, where="#results"):
    """Waits until the graph shows ``count`` steps."""
    page.wait_for_function(
        """([where, count]) => {
          const panel = document.querySelector(`${where} > [id$=gallery_container] + div`)?.shadowRoot;
          return panel?.querySelector(".mg-cursor")?.ariaValueNow === String(count - 1);
        }""",
        arg=[where, count],
    )


def is_quiet(page, host):
    """Whether nothing is asked any more."""
    page.wait_for_timeout(700)
    before = len(host.asked)
    page.wait_for_timeout(1000)
    return len(host.asked) == before


def buttons(page):
    page.wait_for_timeout(500)
    pressed = page.eval_on_selector_all("header button", "all => all.map(e => e.ariaPressed === 'true')")
    return page.locator("header button").all_inner_texts(), pressed


def test_nothing_is_asked_where_nothing_runs(page, served):
    page.evaluate("for (let i = 0; i < 50; i++) document.body.append(document.createElement('p'))")
    assert is_quiet(page, served)
    assert served.asked == []
    assert page.locator("section").count() == 0


def test_the_graph_grows_and_stays_until_the_next_task(page, served):
    start(page, served, "task(a)")
    served.send("task(a)", begin(), step(0), step(1))
    see_steps(page, 2)
    assert page.locator(".mg-status").inner_text() == "step 2 of 20"
    assert page.evaluate("document.getElementById('after').previousSibling.shadowRoot !== null")
    served.send("task(a)", step(2), step(3))
    see_steps(page, 4)
    served.send("task(a)", end())
    finish(page, served, "task(a)")
    see_steps(page, 20)
    assert is_quiet(page, served)
    assert page.locator(".mg-badge").inner_text() == "stable"
    assert page.locator("header").inner_text() == "Memorization Guard"
    start(page, served, "task(b)")
    page.wait_for_selector("section", state="detached")
    finish(page, served, "task(b)")
    assert is_quiet(page, served)
    assert page.locator("section").count() == 0


def test_what_the_monitor_tells_is_drawn(page, served):
    told = {"run": "1", "title": "image 1"}
    monitor = StabilityMonitor(on_step=lambda event: served.send("t", {"kind": "step", **told, **event.to_dict()}))
    start(page, served, "t")
    served.send("t", {"kind": "begin", **told, **monitor.outline()})
    latents = torch.randn(6, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for number in range(5):
        monitor.predicted(latents[number], 5.0 - number, latents[5])
        monitor.latent(latents[number], NoiseLevel.from_sigma(5.0 - number), evaluated=True)
    monitor.latent(latents[5], NoiseLevel.from_sigma(0.0), evaluated=False)
    see_steps(page, 5)
    served.send("t", {"kind": "end", **told, "traces": [trace.to_dict() for trace in monitor.traces]})
    finish(page, served, "t")
    page.wait_for_function(
        "document.querySelector('#results > div + div').shadowRoot.querySelector('.mg-status').textContent === ''"
    )
    assert page.locator(".mg-empty").inner_text() == "not judged: how unusual the prompt is is not known"
    page.click("text=update")
    page.wait_for_timeout(200)
    assert page.locator(".mg-scene .mg-run").count() == 2


def test_the_page_waits_for_a_server_that_hears_of_the_task_later(page, served):
    page.evaluate("begin('txt2img', 'task(a)')")
    page.wait_for_timeout(1500)
    served.send("task(a)", begin(), step(0), step(1))
    see_steps(page, 2)
    page.evaluate("finish('txt2img')")
    assert is_quiet(page, served)


def test_a_page_that_is_loaded_in_the_middle_draws_the_whole_run(page, served):
    start(page, served, "task(a)")
    served.send("task(a)", begin(), *(step(number) for number in range(7)))
    see_steps(page, 7)
    page.reload()
    see_steps(page, 7)
    served.send("task(a)", step(7))
    see_steps(page, 8)
    served.send("task(a)", end())
    served.running.clear()
    see_steps(page, 20)
    assert is_quiet(page, served)
    # The host leaves the id where it is, and offers to show the task's progress again.
    page.reload()
    see_steps(page, 20)
    assert is_quiet(page, served)
    asked = len(served.asked)
    start(page, served, "task(a)")
    see_steps(page, 20)
    finish(page, served, "task(a)")
    assert is_quiet(page, served)
    assert len(served.asked) > asked


def test_an_id_that_nobody_knows_any_more_is_asked_for_once(page, served):
    page.evaluate("localStorage.setItem('txt2img_task_id', 'task(old)')")
    page.reload()
    assert is_quiet(page, served)
    assert len(served.asked) == 1
    assert page.locator("section").count() == 0


def test_pages_of_one_browser_draw_each_its_own_task(page, context, served):
    other = context.new_page()
    other.goto(served.url)
    other.wait_for_timeout(300)
    start(page, served, "task(a)")
    start(other, served, "task(b)")
    served.send("task(a)", begin(), *(step(number) for number in range(3)))
    served.send("task(b)", begin(), *(step(number) for number in range(6)))
    see_steps(page, 3)
    see_steps(other, 6)
    finish(other, served, "task(b)")
    served.send("task(a)", step(3))
    see_steps(page, 4)
    finish(page, served, "task(a)")
    see_steps(other, 6)
    assert is_quiet(page, served)


def test_each_tab_has_a_panel_of_its_own(page, served):
    start(page, served, "task(a)")
    start(page, served, "task(b)", "img2img")
    served.send("task(a)", begin(), *(step(number) for number in range(3)))
    served.send("task(b)", begin(), *(step(number) for number in range(6)))
    see_steps(page, 3)
    see_steps(page, 6, "#results2")
    page.click("#results2 >> text=latent")
    finish(page, served, "task(b)", "img2img")
    start(page, served, "task(c)", "img2img")
    served.send("task(c)", begin(), step(0), step(1))
    see_steps(page, 2, "#results2")
    assert page.locator("main [aria-pressed=true]").all_inner_texts() == ["evidence", "latent"]
    finish(page, served, "task(a)")
    finish(page, served, "task(c)", "img2img")
    assert is_quiet(page, served)


def test_a_task_of_several_runs_has_a_button_for_each(page, served):
    start(page, served, "t")
    served.send("t", begin(), step(0), step(1), end())
    assert page.locator("header button:visible").count() == 0
    served.send("t", begin("b", title=HOSTILE), step(0, "b"), step(1, "b"), step(2, "b"))
    see_steps(page, 3)
    assert buttons(page) == (["title of a", HOSTILE], [False, True])
    page.get_by_text("title of a").focus()
    page.keyboard.press("Enter")
    see_steps(page, 20)
    served.send("t", end("b"), begin("c"), step(0, "c"), step(1, "c"))
    assert buttons(page) == (["title of a", HOSTILE, "title of c"], [True, False, False])
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.textContent") == "title of a"
    see_steps(page, 20)
    for run in range(102):
        served.send("t", begin(str(run)))
    names, pressed = buttons(page)
    assert names == [f"title of {run}" for run in range(2, 102)]
    assert pressed == [False] * 99 + [True]
    assert page.locator("main").bounding_box()["height"] > 150  # they leave room for the graph
    finish(page, served, "t")
    assert is_quiet(page, served)


def test_it_follows_the_selection_of_the_gallery(page, served):
    def select(index):
        page.evaluate(
            """index => document.querySelectorAll(".thumbnail-small").forEach(
                (e, i) => e.classList.toggle("selected", i === index))""",
            index,
        )
        page.wait_for_timeout(200)
        return buttons(page)[1].index(True)

    start(page, served, "t")
    pair = end("b")
    pair["traces"] *= 2
    for event in (begin(first=1), end(), begin("b", first=2), pair):
        served.send("t", event)
    assert buttons(page)[1] == [False, True]
    page.evaluate(
        """() => {
          const gallery = document.getElementById("txt2img_gallery_container");
          gallery.innerHTML = '<div class="thumbnail-small selected"></div>' + '<div class="thumbnail-small"></div>'.repeat(4);
          const told = {infotexts: ["grid", "<b>1</b>", "two", "three", "of another extension"]};
          const info = document.createElement("div");
          info.id = "generation_info_txt2img";
          info.append(document.createElement("textarea"));
          info.firstChild.value = JSON.stringify(told);
          document.body.append(info);
        }"""
    )
    # The page hears of the images after it has them.
    served.send("t", {"kind": "images", "run": "a", "infotexts": ["<b>1</b>", "grid"]})
    served.send("t", {"kind": "images", "run": "b", "infotexts": ["two", "three", "grid"]})
    assert buttons(page)[1] == [False, True]  # a grid is of all runs
    assert page.locator(".mg-item").all_text_contents() == ["2, 3"]
    assert [select(index) for index in (1, 2, 0, 4)] == [0, 1, 1, 1]
    faint = "all => all.map(e => e.getAttribute('opacity'))"
    assert select(3) == 1
    assert page.eval_on_selector_all(".mg-scene .mg-mark-plain", faint) == ["0.3", None]
    page.get_by_text("title of a").click()  # holds until another image is selected
    page.evaluate("document.getElementById('txt2img_gallery_container').append(document.createElement('p'))")
    assert buttons(page)[1] == [True, False]
    assert select(2) == 1
    finish(page, served, "t")
    assert is_quiet(page, served)


def test_the_lists_of_profiles_are_brought_up_to_date_at_the_beginning_and_after_a_calibration(page, served):
    page.evaluate(
        """() => {
          window.pressed = [];
          for (const id of
            ["txt2img_script_profile", "txt2img_accordion_profile", "img2img_script_profile", "img2img_other"]) {
            const button = document.createElement("button");
            button.id = `memorization_guard_${id}_refresh`;
            button.onclick = () => pressed.push(id);
            document.body.append(button);
          }
        }"""
    )
    lists = ["txt2img_script_profile", "txt2img_accordion_profile", "img2img_script_profile"]
    page.click("#after")
    page.click("#after")
    assert page.evaluate("pressed") == lists
    start(page, served, "t")
    served.send("t", {"kind": "profiles", "run": "calibration"})
    finish(page, served, "t")
    assert is_quiet(page, served)
    assert page.evaluate("pressed") == lists * 2
    assert page.locator("section").count() == 0


def test_a_run_that_was_broken_off_is_not_under_way_for_ever(page, served):
    start(page, served, "t")
    served.send("t", begin(), step(0), step(1))
    see_steps(page, 2)
    finish(page, served, "t")
    assert is_quiet(page, served)
    assert page.locator(".mg-status").inner_text() == ""
    see_steps(page, 2)


def test_it_asks_less_often_while_there_is_no_answer_and_gives_up(page, served):
    served.status = 500
    page.clock.install()
    start(page, served, "t")
    served.send("t", begin(), step(0), step(1))
    for _ in range(4):
        page.clock.run_for(1000)
        page.wait_for_timeout(100)
    assert 2 <= len(served.asked) <= 4
    served.asked.clear()
    served.status = 200
    page.clock.run_for(10_000)
    page.wait_for_timeout(300)
    see_steps(page, 2)
    assert set(served.asked) == {200}
    served.status = 500
    for _ in range(100):
        page.clock.run_for(1000)
        page.wait_for_timeout(20)
    assert served.asked.count(500) == 6
    see_steps(page, 2)


def test_it_follows_the_theme(page, served):
    start(page, served, "t")
    served.send("t", begin(), step(0), step(1))
    see_steps(page, 2)
    page.emulate_media(color_scheme="dark")
    grounds = []
    for theme in ("", "dark", ""):
        page.evaluate("theme => document.body.className = theme", theme)
        page.wait_for_timeout(200)
        grounds.append(page.eval_on_selector(".mg-view", "e => getComputedStyle(e).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 27, 34)", "rgb(255, 255, 255)"]


def test_its_drawing_is_no_change_of_the_page(page, served):
    start(page, served, "t")
    served.send("t", begin(), step(0), step(1))
    see_steps(page, 2)
    before = page.evaluate("updates")
    served.send("t", begin("b"), step(0, "b"), *(step(number, "b") for number in range(10)))
    see_steps(page, 10)
    assert page.evaluate("updates") == before
