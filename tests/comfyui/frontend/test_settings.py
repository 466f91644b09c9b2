"""ComfyUI's settings of ours: each acts on new nodes, and the words are those of the page's language."""

import os
from pathlib import Path

import pytest

from .conftest import show

CHOOSE = "([id, value]) => app.extensionManager.setting.set(id, value)"
MODE, HEIGHT, LANGUAGE = "MemorizationGuard.DefaultMode", "MemorizationGuard.GraphHeight", "Comfy.Locale"
NEW = """() => {
  const node = mg.add("MemorizationGuard", [100, 100]);
  return {id: node.id, height: node.size[1], mode: node.widgets.find((each) => each.name === "mode").value};
}"""


@pytest.fixture
def chosen(page):
    """Sets a setting, and puts it back at the end."""
    before = {}

    def choose(name, value):
        before.setdefault(name, page.evaluate("id => app.extensionManager.setting.get(id)", name))
        page.evaluate(CHOOSE, [name, value])

    yield choose
    for name, value in before.items():
        page.evaluate(CHOOSE, [name, value])


def picture(page, name):
    if folder := os.environ.get("COMFYUI_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_new_guards_begin_with_the_mode_that_was_chosen_and_others_keep_theirs(page, chosen):
    first = page.evaluate(NEW)
    assert first["mode"] == "trace"
    chosen(MODE, "mitigate")
    assert page.evaluate(NEW)["mode"] == "mitigate"
    # Nodes of a workflow that is loaded, and copies, have values of their own.
    saved = page.evaluate("() => app.graph.serialize()")
    page.evaluate("saved => app.loadGraphData(saved)", saved)
    assert page.evaluate("id => mg.node(id).widgets.find((each) => each.name === 'mode').value", first["id"]) == "trace"
    clone = "id => mg.node(id).clone().widgets.find((each) => each.name === 'mode').value"
    assert page.evaluate(clone, first["id"]) == "trace"


def test_new_graphs_have_the_height_that_was_chosen(page, chosen):
    usual = page.evaluate(NEW)
    chosen(HEIGHT, 430)
    tall = page.evaluate(NEW)
    assert tall["height"] == pytest.approx(usual["height"] + 200, abs=2)
    page.wait_for_timeout(500)
    height = page.evaluate("id => mg.box(id).getBoundingClientRect().height / app.canvas.ds.scale", tall["id"])
    assert height == pytest.approx(430, abs=40)


def test_advanced_inputs_are_folded_until_somebody_wants_them(page):
    node = page.evaluate(NEW)
    shown = """id => {
      const node = mg.node(id);
      return node.widgets.filter((each) => each.options?.advanced && node.isWidgetVisible(each)).length;
    }"""
    assert page.evaluate(shown, node["id"]) == 0
    page.evaluate("id => mg.node(id).toggleAdvanced()", node["id"])
    assert page.evaluate(shown, node["id"]) == 4


def test_the_settings_are_in_the_hosts_dialog(page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.locator(".p-dialog, [role=dialog]").last
    dialog.get_by_text("Memorization Guard", exact=True).first.click()
    dialog.get_by_text("Mode of new guards").wait_for()
    dialog.get_by_text("Height of the graph in new nodes").wait_for()
    picture(page, "settings")


WORDS = {
    "zh": ("解释提示词", "文本", "新守护节点的模式"),
    "ja": ("プロンプトを説明", "テキスト", "新しいガードのモード"),
    "ru": ("Объяснить запрос", "текст", "Режим новых нод наблюдения"),
}


@pytest.mark.parametrize("language", WORDS)
def test_nodes_and_settings_speak_the_language_of_the_page(page, chosen, language):
    title, text, setting = WORDS[language]
    chosen(LANGUAGE, language)
    page.wait_for_timeout(1000)
    show(page)
    node = page.evaluate(
        """() => {
          app.graph.clear();
          for (const [i, type] of ["MemorizationGuard", "MemorizationGuardReport", "MemorizationGuardGate"].entries())
            mg.add(type, [60 + 420 * i, 100]);
          const node = mg.add("MemorizationGuardExplainPrompt", [60, 560]);
          app.canvas.ds.reset();
          return {title: node.title, widgets: node.widgets.map((each) => each.label ?? each.name),
            inputs: node.inputs.map((each) => each.label ?? each.localized_name ?? each.name)};
        }"""
    )
    assert node["title"] == title
    assert text in node["widgets"] + node["inputs"]
    page.wait_for_timeout(800)
    picture(page, f"nodes-{language}")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.locator(".p-dialog, [role=dialog]").last
    dialog.get_by_text("Memorization Guard", exact=True).first.click()
    dialog.get_by_text(setting).wait_for()
    picture(page, f"settings-{language}")
