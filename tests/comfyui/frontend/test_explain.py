"""What is told of a prompt on the node Explain Prompt, in ComfyUI's own frontend in Chromium."""

import os

import pytest

from .conftest import MEMORIZED, ORDINARY, capture, queue, show, start, wait_end

#: What would be more than text on a page; with it, the prompt is hardly memorized any more.
HOSTILE = f"<img src=x onerror=\"document.title='broken'\"> {MEMORIZED} </script><b>&amp;"
TEXT = "id => mg.told(id).innerText"
MARKED = "id => [...mg.told(id).querySelectorAll('mark')].map((each) => each.textContent)"
NOTHING = "Queue the workflow"


def explainer(page, text, **inputs):
    """The id of an Explain Prompt behind the lab model."""
    made = page.evaluate("([text, inputs]) => mg.explainer(text, inputs)", [text, inputs])
    page.evaluate("() => { app.canvas.ds.offset = [0, 0]; app.canvas.ds.scale = 1; app.canvas.setDirty(true, true); }")
    capture(page)
    return made


def photograph(page, name):
    """Keeps what is on the page where COMFYUI_SCREENSHOTS names a folder, to be looked at."""
    if folder := os.environ.get("COMFYUI_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_words_are_marked_and_the_rest_is_told(page, theme):
    page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
    node = explainer(page, MEMORIZED)
    assert NOTHING in page.evaluate(TEXT, node)
    queue(page)
    told = page.evaluate(TEXT, node)
    assert told.startswith("likely memorized: rarer than 1 in 8,000 ordinary images\n")
    assert MEMORIZED in told
    marked = page.evaluate(MARKED, node)
    assert set(marked) & set(MEMORIZED.split()[-2:])
    for word in marked:
        assert f"{word}: " in told
    without = told.rsplit("Without them, an ordinary prompt:\n", 1)[1].strip()
    assert not set(marked) & set(without.split())
    # Not by colour alone, and as legible as the text around it.
    for style in page.evaluate(
        """id => [...mg.told(id).querySelectorAll("mark")].map((each) => {
          const style = getComputedStyle(each);
          return {line: style.textDecorationLine, colour: style.color, around: getComputedStyle(each.parentElement).color};
        })""",
        node,
    ):
        assert style["line"] == "underline"
        assert style["colour"] == style["around"]
    assert page.evaluate("id => mg.told(id).scrollWidth <= mg.told(id).clientWidth", node)
    photograph(page, f"explain-{theme}")
    page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_an_ordinary_prompt_has_no_marks(page):
    node = explainer(page, ORDINARY)
    queue(page)
    assert page.evaluate(TEXT, node).startswith("ordinary: as far as ")
    assert page.evaluate(MARKED, node) == []
    photograph(page, "explain-ordinary")


def test_text_stays_text(page):
    node = explainer(page, HOSTILE, false_positive_rate=0.5)
    queue(page)
    assert "<img src=x onerror" in page.evaluate(TEXT, node)
    assert "</script><b>&amp;" in page.evaluate(TEXT, node)
    assert page.evaluate("id => mg.told(id).querySelectorAll('img, script, b').length", node) == 0
    assert page.title() != "broken"
    photograph(page, "explain-hostile")


def test_what_was_told_survives_reload_and_cache_and_is_no_edit(page):
    node = explainer(page, MEMORIZED)
    queue(page)
    capture(page)
    told, marked = page.evaluate(TEXT, node), page.evaluate(MARKED, node)
    assert marked
    undo = page.evaluate("() => mg.tracker().undoQueue.length")
    queue(page)  # from the cache
    capture(page)
    assert page.evaluate(TEXT, node) == told
    assert page.evaluate("() => mg.tracker().undoQueue.length") == undo
    page.wait_for_timeout(1500)  # newer frontends write their drafts after a while
    show(page)
    page.wait_for_function("id => mg.told(id)?.querySelector('mark')", arg=node)
    assert page.evaluate(TEXT, node) == told
    assert page.evaluate(MARKED, node) == marked


def test_what_fails_is_said_in_the_place_of_what_was_told_before(page):
    node = explainer(page, MEMORIZED)
    queue(page)
    page.evaluate("id => mg.set(mg.node(id), 'text', ' ')", node)
    start(page)
    wait_end(page)
    page.wait_for_function("id => mg.told(id).innerText.includes('there is no prompt to explain')", arg=node)
    page.keyboard.press("Escape")
    page.errors.clear()  # the frontend notes the failed prompt itself


def test_it_says_how_far_a_profile_is_that_is_made_first_and_can_be_cancelled(page, automatic_profiles):
    node = explainer(page, MEMORIZED)
    page.evaluate(
        """id => {
          const node = mg.node(id);
          node.disconnectInput(node.inputs.findIndex(({name}) => name === "profile"));
          mg.link(mg.add("EmptyLatentImage", [40, 260], {width: 128, height: 128}), 0, node, "latent");
        }""",
        node,
    )
    making = "id => /^Making the profile of this model, once: [1-9][0-9]* of 100 prompts/.test(mg.told(id).innerText)"
    start(page)
    page.wait_for_function(making, arg=node)
    page.evaluate("() => mg.api.interrupt()")
    wait_end(page)
    page.wait_for_function("([id, text]) => mg.told(id).innerText.startsWith(text)", arg=[node, NOTHING])
    start(page)
    page.wait_for_function(making, arg=node)
    page.wait_for_function("id => mg.told(id).querySelector('mark')", arg=node, timeout=180_000)
    assert set(page.evaluate(MARKED, node)) & set(MEMORIZED.split()[-2:])


def test_a_copy_begins_empty_and_the_prompt_that_is_queued_holds_nothing_of_it(page, server):
    node = explainer(page, MEMORIZED)
    queue(page)
    copy = page.evaluate("id => { const copy = mg.node(id).clone(); app.graph.add(copy); return String(copy.id); }", node)
    assert NOTHING in page.evaluate(TEXT, copy)
    page.evaluate("id => app.graph.remove(mg.node(id))", copy)
    page.evaluate("id => mg.set(mg.node(id), 'text', 'a red cross')", node)
    queue(page)
    prompt = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])["prompt"]
    assert prompt[2][node]["inputs"].keys() == {"model", "clip", "profile", "text", "false_positive_rate"}
    assert "stability_explanation" not in str([each["properties"] for each in prompt[3]["extra_pnginfo"]["workflow"]["nodes"]])


@pytest.mark.parametrize("width", [260, 900])
def test_it_fits_a_node_of_any_width(page, width):
    node = explainer(page, f"{MEMORIZED}, {'a-very-long-word' * 12}", false_positive_rate=0.5)
    page.evaluate("([id, width]) => mg.node(id).setSize([width, 520])", [node, width])
    queue(page)
    page.wait_for_timeout(300)
    assert page.evaluate(MARKED, node)
    assert page.evaluate("id => mg.told(id).scrollWidth <= mg.told(id).clientWidth", node)
    photograph(page, f"explain-{width}")
