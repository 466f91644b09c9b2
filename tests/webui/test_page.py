"""The live graph in the page of the real hosts, in headless Chromium."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from memorization_guard import lab
from memorization_guard.automatic import AUTO

CHROMIUM = "/usr/bin/chromium"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LIVE = "/memorization-guard/live"
PANEL = "#{}_gallery_container + div section"
STEPS = 100  # so that there is something to see in between
REFERENCES = lab.prompts("reference")[:12]
ENABLED = "#memorization_guard_{}_accordion_enabled-visible-checkbox:checked"
LONG = {"webui": {"steps": 150, "width": 384, "height": 384}, "forge": {"steps": 150}, "reforge": {"steps": 150}}


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not there")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1400, "height": 1200})
    context.set_default_timeout(60_000)
    yield context
    context.close()


class Page:
    """A page of the host, and what it asks for the graph."""

    def __init__(self, context, host, url=None):
        if not any((host.data / "models/stability_profiles" / AUTO).glob("*.safetensors")):
            host.make("trace", AUTO)  # the page's choice: it is there when the page begins
        self.usual = {name: host.usual[name] for name in ("width", "height")}
        self.page = context.new_page()
        self.asked = []
        self.complaints = []
        self.page.on("request", lambda request: self.asked.append(request.url) if LIVE in request.url else None)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url or host.url)

    def ready(self):
        self.page.wait_for_selector("#txt2img_generate")
        self.page.wait_for_timeout(1000)
        return self

    def choose(self, tab="txt2img", guard=True, steps=STEPS, prompt="", **numbers):
        """Small images with many steps; ``numbers`` are the host's inputs by their element ids."""
        for name, value in {"steps": steps, **self.usual, **numbers}.items():
            self.page.evaluate(
                """([id, value]) => {
                  const input = document.querySelector(`#${id} input[type=number]`);
                  input.value = value;
                  input.dispatchEvent(new Event("input", {bubbles: true}));
                }""",
                [f"{tab}_{name}", value],
            )
        self.page.fill(f"#{tab}_prompt textarea", prompt)
        if guard:
            self.page.check(f"#memorization_guard_{tab}_accordion_enabled-visible-checkbox")
        return self

    def control(self, name, tab="txt2img", kind="accordion"):
        """An input of ours; the WebUI gives some ids twice."""
        return self.page.locator(f"#memorization_guard_{tab}_{kind}_{name}").first

    def open(self, tab="txt2img"):
        """Opens the accordion, to set something in it."""
        self.control("enabled", tab).locator(".label-wrap").first.click()
        self.control("mode", tab).wait_for()
        return self

    def profiles(self, tab="txt2img", choose=None):
        """The list of profiles."""
        self.control("profile", tab).locator("input").click()
        options = self.page.locator(f"#memorization_guard_{tab}_accordion_profile :is(li, [role=option])")
        options.first.wait_for()
        names = [text.removeprefix("✓").strip() for text in options.all_inner_texts()]
        if choose is None:
            self.page.keyboard.press("Escape")
        else:
            options.nth(names.index(choose)).click()
        return names

    def script(self, name):
        self.page.click("#script_list input")
        self.page.click(f"#script_list [role=option]:has-text('{name}'), #script_list li:has-text('{name}')")
        return self

    def buttons(self):
        """The panel's buttons, and which of them is pressed."""
        buttons = self.page.locator(f"{PANEL.format('txt2img')} header button")
        pressed = [button.get_attribute("aria-pressed") == "true" for button in buttons.all()]
        return buttons.all_inner_texts(), pressed.index(True)

    def generate(self, tab="txt2img"):
        self.page.click(f"#{tab}_generate")
        self.page.wait_for_selector(".progressDiv", state="attached")

    def points(self, tab="txt2img"):
        """Points of the graph's first curve, of the update norm; 0 where there is no graph."""
        other = self.page.locator(f"{PANEL.format(tab)} [data-mg-quantity=update][aria-pressed=false]")
        if other.count():
            other.click()
        curves = self.page.locator(f"{PANEL.format(tab)} .mg-scene .mg-run")
        points = curves.first.get_attribute("points", timeout=5000) if curves.count() else None
        return len(points.split()) if points else 0

    def see(self, more_than, tab="txt2img"):
        """Waits until the graph shows more than so many steps; how many it shows."""
        deadline = time.monotonic() + 60
        while (points := self.points(tab)) <= more_than:
            assert time.monotonic() < deadline, f"the graph stays at {points} points; {self.complaints[-5:]}"
            self.page.wait_for_timeout(50)
        return points

    def is_generating(self):
        return self.page.locator(".progressDiv").count() > 0

    def see_end(self, tab="txt2img"):
        """Waits for the end of the generation; how many steps the graph showed meanwhile."""
        seen = []
        while self.is_generating():
            seen.append(self.points(tab))
            self.page.wait_for_timeout(50)
        self.page.wait_for_timeout(1500)
        return sorted(set(seen))

    def is_quiet(self):
        before = len(self.asked)
        self.page.wait_for_timeout(2000)
        return len(self.asked) == before


@pytest.fixture
def page(context, host):
    page = Page(context, host).ready()
    yield page
    assert [text for text in page.complaints if "emorization" in text] == []


def test_the_graph_grows_and_stays(page):
    assert page.asked == []
    page.choose().generate()
    seen = page.see_end()
    assert len(seen) > 4
    assert seen == sorted(seen)
    assert page.points() == STEPS
    assert page.is_quiet()
    assert page.page.locator(PANEL.format("txt2img")).is_visible()
    assert page.page.locator(".mg-status").inner_text() == ""
    assert page.page.locator(".mg-badge").inner_text() in ("stable", "likely copy")


def test_the_script_of_the_dropdown_draws_as_well(page):
    page.choose(guard=False).script("Memorization Guard").generate()
    page.see(3)
    page.see_end()
    assert page.points() == STEPS


def test_an_image_without_a_guard_has_no_graph(page):
    page.choose(steps=5).generate()
    page.see(4)
    page.see_end()
    page.page.uncheck("#memorization_guard_txt2img_accordion_enabled-visible-checkbox")
    page.generate()
    page.see_end()
    assert page.page.locator(PANEL.format("txt2img")).count() == 0
    assert page.is_quiet()


def test_batches_have_a_button_each(page):
    page.choose(steps=10, batch_count=2).generate()
    page.see_end()
    assert page.buttons() == (["image 1", "image 2"], 1)


def test_it_follows_the_selection_of_the_gallery_whose_first_picture_is_a_grid(page):
    page.choose(steps=10, batch_count=3).generate()
    page.see_end()
    shown = [page.buttons()[1]]
    for number in (1, 3, 0, 2):
        page.page.locator("#txt2img_gallery .thumbnail-small").nth(number).click()
        page.page.wait_for_timeout(1000)
        shown.append(page.buttons()[1])
    assert shown == [2, 0, 2, 2, 1]


def test_every_cell_of_a_plot_stays(page):
    page.choose(steps=5, guard=False).script("X/Y/Z plot")
    page.page.click("#script_txt2img_xyz_plot_x_type input")
    of_mode = "#script_txt2img_xyz_plot_x_type :is(li, [role=option]):has-text('[Memorization Guard] Mode')"
    page.page.click(of_mode)
    page.page.click("#xyz_grid_fill_x_tool_button")  # off, trace, mitigate, stop
    page.page.check("#script_txt2img_xyz_plot_include_lone_images input")
    page.page.wait_for_timeout(1000)
    page.generate()
    page.see_end()
    assert page.buttons()[0] == ["image 1 cell 2", "image 1 cell 3", "image 1 cell 4"]
    page.page.locator("#txt2img_gallery .thumbnail-small").nth(3).click()
    page.page.wait_for_timeout(1000)
    assert page.buttons()[1] == 1


@pytest.mark.parametrize("where", ["img2img", "inpaint"])
def test_an_image_that_is_sent_takes_the_guard_along(page, host, where):
    host.calibrate("sent & used", REFERENCES)
    page.choose(steps=5).open()
    page.control("mode").locator("input[value=mitigate]").check()
    assert "sent & used" in page.profiles(choose="sent & used")
    page.generate()
    page.see_end()
    text = page.page.locator("#html_info_txt2img").first.inner_text()
    assert "Memorization Guard: mitigate" in text
    page.page.click(f"#txt2img_send_to_{where}")
    page.page.wait_for_selector(ENABLED.format("img2img"), state="attached")
    assert page.control("mode", "img2img").locator("input:checked").get_attribute("value") == "mitigate"
    assert page.control("profile", "img2img").locator("input").input_value() == "sent & used"
    # So does an infotext, in place of what is set.
    page.page.click("#tabs button:text-matches('^txt2img', 'i')")
    page.page.uncheck("#memorization_guard_txt2img_accordion_enabled-visible-checkbox")
    page.page.fill("#txt2img_prompt textarea", text.replace("mitigate", "stop"))
    page.page.click("#paste")
    page.page.wait_for_selector(ENABLED.format("txt2img"), state="attached")
    assert page.control("mode").locator("input:checked").get_attribute("value") == "stop"
    assert page.control("profile").locator("input").input_value() == "sent & used"


def test_what_is_said_of_a_profile_holds_whatever_else_is_set(page, host):
    host.calibrate("described", REFERENCES)
    page.choose(width=256).open().profiles(choose="described")
    about = page.control("about_profile")
    about.get_by_text("from 12 reference prompts").wait_for()
    said = about.inner_text()
    assert "whatever the sampler, the schedule, the steps, the CFG and the size" in said
    assert "transferred" not in said
    page.choose(width=128, steps=7, cfg_scale=3)
    page.page.wait_for_timeout(1000)
    assert about.inner_text() == said


def test_a_profile_is_in_the_lists_of_both_tabs_once_it_is_made(page):
    page.choose(steps=5, guard=False).script("Memorization Guard")
    page.control("mode", kind="script").locator("input[value=calibrate]").check()
    page.page.locator(".label-wrap:visible:has-text('Calibrate')").click()
    page.control("reference_prompts", kind="script").locator("textarea").fill("\n".join(REFERENCES))
    page.control("profile_name", kind="script").locator(":is(input, textarea)").fill("made in the page")
    assert "made in the page" not in page.open().profiles()
    page.generate()
    page.see_end()
    assert "made in the page" in page.profiles()
    page.page.click("#tabs button:text-matches('^img2img', 'i')")
    assert "made in the page" in page.open("img2img").profiles("img2img")


def test_a_page_that_is_loaded_again_in_the_middle_goes_on(page, host):
    page.choose(**LONG[host.kind]).generate()
    before = page.see(10)
    page.page.reload()
    page.ready()
    assert page.see(before) < 150
    page.page.click("#txt2img_restore_progress")
    page.see_end()
    assert page.points() == 150
    assert page.is_quiet()


def test_two_pages_of_a_browser_draw_each_its_own(page, context, host):
    other = Page(context, host).ready()
    page.choose(**LONG[host.kind]).generate()
    page.see(2)
    other.choose(steps=40).generate()
    other.page.wait_for_timeout(1000)
    assert other.points() == 0  # it waits for the first one
    page.see_end()
    other.see(39)
    other.see_end()
    assert (page.points(), other.points()) == (150, 40)
    assert page.is_quiet()
    assert other.is_quiet()


def test_img2img_has_a_graph_of_its_own(page, tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (128, 128), "red").save(file)
    page.choose(steps=10).generate()
    page.see_end()
    page.page.click("#tabs button:text-matches('^img2img', 'i')")
    page.page.set_input_files("#img2img_image input[type=file]", file)
    page.page.wait_for_timeout(1500)
    page.choose("img2img").generate("img2img")
    page.see(2, "img2img")
    page.see_end("img2img")
    # At the usual denoising strength three quarters of the steps are taken.
    assert STEPS / 2 < page.points("img2img") < STEPS
    page.page.click("#tabs button:text-matches('^txt2img', 'i')")
    assert page.points() == 10


def test_a_task_that_is_broken_off_ends(page, host):
    page.choose(**LONG[host.kind]).generate()
    page.see(5)
    page.page.click("#txt2img_interrupt")
    page.see_end()
    assert 5 < page.points() < 150
    assert page.is_quiet()
    assert page.page.locator(".mg-status").inner_text() == ""


@contextlib.contextmanager
def proxy(url, path):
    """What ``--subpath`` is for: another server, which has the host below ``path``. Gives its address."""
    upstream = url.removeprefix("http://").rstrip("/").split(":")

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(client):
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            method, target, rest = head.split(b" ", 2)
            if not target.startswith(path.encode()):
                client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            # A connection a request, so that only its beginning has to be read.
            head = b" ".join((method, target.removeprefix(path.encode().rstrip(b"/")), rest))
            head = head.replace(b"Connection: keep-alive", b"Connection: close", 1)
            with socket.create_connection((upstream[0], int(upstream[1]))) as server:
                server.sendall(head)
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join()

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=["webui", "forge"])
def guarded(request, tmp_path):
    """A host that asks for a login and knows that it stands below a path."""
    start = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py"))).start
    with start(request.param, tmp_path, "--gradio-auth", "user:word", "--subpath", "below") as host:
        yield host


def test_with_a_login_and_below_a_path(context, guarded):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{guarded.url}{LIVE}?task=t")
    assert refused.value.code == 401
    with proxy(guarded.url, "/below/") as url:
        page = Page(context, guarded, url)
        assert page.page.evaluate(f"fetch('.{LIVE}?task=t').then(answer => answer.status)") == 401
        page.page.get_by_label("username").fill("user")
        page.page.get_by_label("password").fill("word")
        page.page.click("button:has-text('Login')")
        page.ready()
        assert page.page.evaluate(f"fetch('.{LIVE}?task=t').then(answer => answer.json())") == {
            "cursor": 0,
            "running": False,
            "events": [],
        }
        page.choose().generate()
        page.see(3)
        page.see_end()
        assert page.points() == STEPS
        assert all(asked.startswith(url) for asked in page.asked)


@pytest.mark.parametrize("question", ["", "task=", "task=t&cursor=-1", "task=t&cursor=abc"])
def test_a_bad_question_is_refused(host, question):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{host.url}{LIVE}?{question}")
    assert refused.value.code == 422
    assert json.loads(refused.value.read())["detail"]
