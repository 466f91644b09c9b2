"""ComfyUI's own frontend in Chromium, and what tests do with it.

For another frontend than the one that ComfyUI brings, let ``COMFYUI_PYTHON`` be a script that adds ``--front-end-root``;
``COMFYUI_VUE_NODES=1`` draws the nodes in Vue ("Nodes 2.0"; frontends before 1.30 show no DOM widgets there).
"""

import json
import os
import re
import time
from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
VUE_NODES = os.environ.get("COMFYUI_VUE_NODES") == "1"
MEMORIZED = "in the open, an orange triangle and a white star, by fouxeth beiskim"
ORDINARY = "a red cross alone on stripes, by stouxon koroun"
#: What frontends complain of by themselves: files that a fresh server lacks, routes that an older one lacks.
OF_THE_HOST = re.compile(r"Failed to load resource|Jobs API|JobsApiError|fetch(ing)? jobs")

# Functions for the page. Nodes are found by their path of ids, as the server names them.
HELPERS = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
READY = """!!(window.app?.extensionManager?.workflow?.activeWorkflow && window.app.graph && window.comfyAPI?.api?.api
  && window.LiteGraph?.registered_node_types?.MemorizationGuard)"""
# Counts the observers that are at work.
INIT = Path(__file__).with_name("page_init.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(server):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not there")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    """The frontend, opened; at the end nothing may have been logged as an error."""
    context = browser.new_context(viewport={"width": 1500, "height": 950}, color_scheme="dark")
    context.add_init_script(INIT)
    page = context.new_page()
    page.errors = []
    page.steps = []  # (bytes, data) of each live step
    page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
    page.on("pageerror", lambda error: page.errors.append(f"{error.message}\n{error.stack}"))
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: note(page, frame)))
    page.set_default_timeout(60_000)
    show(page, server.url)
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", VUE_NODES)
    yield page
    server.interrupt()
    errors = [text for text in page.errors if not OF_THE_HOST.search(text)]
    context.close()
    assert not errors


def note(page, frame):
    if isinstance(frame, str) and '"memorization_guard"' in frame:
        message = json.loads(frame)
        if message["type"] == "memorization_guard" and message["data"]["kind"] == "step":
            page.steps.append((len(frame), message["data"]))


def show(page, url=None):
    """Opens or reloads the frontend; what it logs by itself meanwhile is not ours."""
    before = list(page.errors)
    page.goto(url) if url else page.reload()
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)  # it goes on loading, and closes nothing that is open
    page.keyboard.press("Escape")  # the templates that a newer frontend greets with
    ours = [text for text in page.errors[len(before) :] if "memorization" in text.lower() or "/extensions/" in text]
    page.errors[:] = before + ours
    page.evaluate(HELPERS)


def build(page, *guards):
    defaults = {"prompt": MEMORIZED, "steps": 30, "batch": 1, "seed": time.time_ns() % 10**9, "mode": "trace"}
    built = page.evaluate("guards => mg.build(guards)", [defaults | guard for guard in guards or ({},)])
    page.evaluate("() => { app.canvas.ds.offset = [0, 0]; app.canvas.ds.scale = 0.6; app.canvas.setDirty(true, true); }")
    capture(page)
    return built if len(guards) > 1 else built[0]


def capture(page):
    """As after a click: the frontend looks whether something was edited."""
    page.evaluate("() => (mg.tracker().captureCanvasState ?? mg.tracker().checkState).call(mg.tracker())")
    page.wait_for_timeout(200)


def start(page):
    page.evaluate("() => mg.queue()")


def wait_end(page):
    page.wait_for_function("mg.ended", timeout=240_000)  # hundreds of steps, on a busy machine
    page.wait_for_timeout(250)  # the last drawing


def queue(page):
    start(page)
    wait_end(page)


def points(page, node):
    return page.evaluate("id => mg.points(id)", node)


def label(page, node):
    return page.evaluate("id => mg.label(id)", node)


def wait_points(page, node, count):
    page.wait_for_function("([id, count]) => mg.points(id) >= count", arg=[node, count])
