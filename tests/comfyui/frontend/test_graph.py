"""The graph on its nodes, in ComfyUI's own frontend in Chromium."""

import json
import re
from pathlib import Path

import pytest

from .conftest import ORDINARY, build, capture, label, points, queue, show, start, wait_end, wait_points


def test_graph_grows_while_sampling(page):
    ids = build(page, {"steps": 200, "batch": 2})
    page.evaluate("id => void mg.watchDraws(id)", ids["guard"])
    start(page)
    seen = []
    while not page.evaluate("mg.ended"):
        seen.append(points(page, ids["guard"]))
        page.wait_for_timeout(100)
    wait_end(page)
    assert len({count for count in seen if 0 < count < 200}) >= 5
    assert seen == sorted(seen)
    assert page.evaluate("id => mg.curves(id)", ids["guard"]) == [200, 200]
    draws = page.evaluate("mg.draws")
    assert max(sum(at <= each < at + 1000 for each in draws) for at in draws) <= 21
    assert [data["step"] for _, data in page.steps] == list(range(200))
    assert {data["node"] for _, data in page.steps} == {ids["guard"]}
    assert max(size for size, _ in page.steps) < 1500


def test_summary_survives_reload_and_cache(page):
    ids = build(page)
    queue(page)
    for node in (ids["guard"], ids["report"]):
        told = r"Image 1: likely copy, triggered at step \d+, .*rarer than 1 in 8,000 ordinary images"
        assert re.search(told, label(page, node))
        assert points(page, node) == 30
    before = label(page, ids["guard"])
    assert "so far" not in before
    page.wait_for_timeout(1500)  # newer frontends write their drafts after a while
    show(page)
    page.wait_for_function("id => mg.points(id) === 30", arg=ids["guard"])
    assert label(page, ids["guard"]) == before
    assert "run of" in page.evaluate("id => mg.box(id).innerText", ids["guard"])
    steps = len(page.steps)
    queue(page)
    assert len(page.steps) == steps  # all of it came from the cache
    assert label(page, ids["guard"]) == label(page, ids["report"]) == before
    assert page.evaluate("id => JSON.stringify(mg.kept(id)).length", ids["guard"]) < 6000


def test_quick_start(page):
    place = Path(__file__).parents[3] / "example_workflows" / "quick_start.json"
    page.evaluate("state => app.loadGraphData(state, true, true, null)", json.loads(place.read_text(encoding="utf-8")))
    queue(page)
    guard, report = page.evaluate(
        """() => ["MemorizationGuard", "MemorizationGuardReport"].map(
          (type) => String(app.graph.nodes.find((each) => each.type === type).id))"""
    )
    for node in (guard, report):
        page.wait_for_function("id => mg.points(id) > 1", arg=node)
        assert "S_mem" in label(page, node)


def test_two_browser_tabs_do_not_mix(page, server, browser):
    ids = build(page)
    with browser.new_context() as context:
        other = context.new_page()
        other.errors = []
        show(other, server.url)
        twin = build(other)
        assert twin == ids
        queue(page)
        assert points(page, ids["guard"]) == points(page, ids["report"]) == 30
        assert points(other, ids["guard"]) == points(other, ids["report"]) == 0


def test_reload_in_the_middle_of_a_run(page):
    ids = build(page, {"steps": 400, "batch": 2})
    start(page)
    wait_points(page, ids["guard"], 3)
    show(page)
    wait_end(page)
    assert page.evaluate("id => mg.curves(id)", ids["guard"]) == [400, 400]


def test_nothing_but_a_message_where_the_cache_left_nothing(page):
    ids = build(page, {"seed": 4})
    queue(page)
    build(page, {"seed": 4})  # new nodes of the same ids, as in a workflow that is opened again from an image
    assert "is drawn while" in label(page, ids["guard"])
    queue(page)
    assert "cache" in label(page, ids["guard"]) or points(page, ids["guard"]) == 30
    assert points(page, ids["report"]) == 30


def test_run_is_no_edit(page):
    ids = build(page)
    queue(page)
    capture(page)  # of the host's own: the order of the nodes, the preview's widget
    page.evaluate("([sampler]) => mg.set(mg.node(sampler), 'steps', 12)", ids["samplers"])
    capture(page)
    before = page.evaluate("() => mg.tracker().undoQueue.length")
    queue(page)
    capture(page)
    assert points(page, ids["guard"]) == 12
    assert page.evaluate("() => mg.tracker().undoQueue.length") == before
    page.evaluate("() => mg.tracker().undo()")
    steps = "([sampler]) => mg.node(sampler)?.widgets.find((each) => each.name === 'steps').value === 30"
    page.wait_for_function(steps, arg=ids["samplers"])
    page.wait_for_function("id => mg.points(id) === 12", arg=ids["guard"])  # the edit is undone, what was seen is not
    assert points(page, ids["report"]) == 12


def test_saved_image_holds_no_earlier_run(page, server):
    ids = build(page)
    queue(page)
    assert len(page.evaluate("id => mg.kept(id)", ids["guard"])) == 1
    page.evaluate("([sampler]) => mg.set(mg.node(sampler), 'seed', 1 + Math.floor(1e9 * Math.random()))", ids["samplers"])
    queue(page)
    prompt = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])["prompt"]
    nodes = prompt[3]["extra_pnginfo"]["workflow"]["nodes"]
    assert any(node["type"] == "MemorizationGuard" for node in nodes)
    assert not any("stability_runs" in node["properties"] for node in nodes)
    assert len(page.evaluate("id => mg.kept(id)", ids["report"])) == 1


def test_two_samplers_on_one_guard(page):
    ids = build(page, {"samplers": 2})
    queue(page)
    assert "run 2 of 2" in page.evaluate("id => mg.box(id).innerText", ids["guard"])
    assert points(page, ids["guard"]) == 40
    page.evaluate("id => mg.box(id).firstChild.querySelector('button').click()", ids["guard"])
    page.wait_for_function("id => mg.points(id) === 30", arg=ids["guard"])
    page.evaluate("id => mg.node(id).onConfigure(mg.node(id).serialize())", ids["guard"])
    assert len(page.evaluate("id => mg.kept(id)", ids["guard"])) == 2


def test_two_guards_do_not_mix(page):
    first, second = build(page, {"steps": 30}, {"steps": 50, "prompt": ORDINARY})
    queue(page)
    assert [points(page, each[kind]) for each in (first, second) for kind in ("guard", "report")] == [30, 30, 50, 50]
    assert len({data["run"] for _, data in page.steps}) == 2
    assert page.evaluate("id => mg.kept(id).length", first["guard"]) == 1


def test_inside_a_subgraph(page):
    ids = build(page)
    outer = page.evaluate(
        """([guard, sampler]) => {
          const items = new Set([mg.node(guard), mg.node(sampler)]);
          return String(app.graph.convertToSubgraph(items).node.id);
        }""",
        [ids["guard"], ids["samplers"][0]],
    )
    inner = page.evaluate("outer => mg.node(outer).subgraph.nodes.find((each) => each.type === 'MemorizationGuard').id", outer)
    queue(page)
    assert {data["node"] for _, data in page.steps} == {f"{outer}:{inner}"}
    assert len(page.evaluate("id => mg.kept(id)", f"{outer}:{inner}")) == 1
    page.evaluate("outer => app.canvas.setGraph(mg.node(outer).subgraph)", outer)
    page.wait_for_function("id => mg.points(id) === 30", arg=f"{outer}:{inner}")
    assert points(page, ids["report"]) in (0, 30)  # not on show now


def test_interrupted_run_says_so(page):
    ids = build(page, {"steps": 500})
    start(page)
    wait_points(page, ids["guard"], 5)
    page.evaluate("() => mg.api.interrupt()")
    wait_end(page)
    assert re.search(r"after \d+ of 500 steps", page.evaluate("id => mg.box(id).innerText", ids["guard"]))
    assert "Sampling" not in label(page, ids["guard"])
    assert 5 <= points(page, ids["guard"]) < 500


def test_nodes_say_what_they_did(page):
    save = page.evaluate(
        """(prompts) => {
          app.graph.clear();
          const lab = mg.add("MemorizationGuardLoadLabModel", [40, 60]);
          const calibrate = mg.add("MemorizationGuardCalibrate", [440, 60], {
            prompts: "text below", text: prompts, steps: 2, width: 128, height: 128, batch_size: 8,
          });
          mg.link(lab, 0, calibrate, "model");
          mg.link(lab, 1, calibrate, "clip");
          const save = mg.add("MemorizationGuardSaveProfile", [900, 60], {name: "said", overwrite: true});
          mg.link(calibrate, 0, save, "profile");
          return [calibrate, save].map((node) => String(node.id));
        }""",
        "\n".join([ORDINARY] * 8),
    )
    queue(page)
    said = [
        page.evaluate("id => mg.node(id).widgets.find((widget) => widget.name === 'said').element.textContent", node)
        for node in save
    ]
    assert said[0] == "Profile from 8 of 8 reference prompts."
    assert said[1].startswith("Saved ")


def test_note_is_readable(page):
    ids = build(page, {"steps": 20, "mode": "mitigate"})
    unplug = "id => { const node = mg.node(id); node.disconnectInput(node.inputs.findIndex(({name}) => name === 'profile')); }"
    page.evaluate(unplug, ids["guard"])
    queue(page)
    note = page.locator(".mg-note").first
    assert note.text_content().startswith("There is no profile: nothing is judged, and mode mitigate does nothing.")
    assert note.evaluate("(element) => element.scrollHeight <= element.clientHeight + 1")
    assert points(page, ids["guard"]) == 20


def test_other_workflow_is_left_alone(page):
    """A run goes on while a copy of its workflow, whose nodes have the same ids, is on show."""
    ids = build(page, {"steps": 400, "batch": 2})
    start(page)
    wait_points(page, ids["guard"], 3)
    first = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    state = page.evaluate("() => JSON.parse(JSON.stringify(mg.tracker().activeState))")
    page.evaluate("state => app.loadGraphData(state, true, true, null)", state)
    assert page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path") != first
    for _ in range(5):
        assert points(page, ids["guard"]) == 0
        page.wait_for_timeout(200)
    assert not page.evaluate("mg.ended")
    back = """async path => {
      const { workflow } = app.extensionManager;
      const target = workflow.openWorkflows.find((each) => each.path === path);
      await app.loadGraphData(JSON.parse(JSON.stringify(target.activeState)), true, true, target);
    }"""
    second = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    page.evaluate(back, first)
    wait_points(page, ids["guard"], 3)
    assert points(page, ids["guard"]) < 400
    page.evaluate(back, second)
    wait_end(page)
    assert points(page, ids["guard"]) == points(page, ids["report"]) == 0
    page.evaluate(back, first)
    page.wait_for_function("id => mg.points(id) === 400", arg=ids["guard"])
    assert points(page, ids["report"]) == 400


def test_copies_and_deleted_nodes(page):
    ids = build(page, {"steps": 300})
    before = page.evaluate("() => window.watching.size")
    page.evaluate(
        """id => {
      for (let i = 0; i < 5; i++) {
        const copy = mg.node(id).clone();
        app.graph.add(copy);
        app.graph.remove(copy);
        mg.node(id).clone();
        LiteGraph.createNode("MemorizationGuard");
      }
    }""",
        ids["guard"],
    )
    assert page.evaluate("() => window.watching.size") == before
    start(page)
    wait_points(page, ids["guard"], 3)
    copy = page.evaluate(
        "id => { const copy = mg.node(id).clone(); app.graph.add(copy); return String(copy.id); }", ids["guard"]
    )
    assert points(page, copy) == 0
    page.evaluate("id => app.graph.remove(mg.node(id))", ids["guard"])
    wait_end(page)
    assert points(page, copy) == 0
    assert points(page, ids["report"]) == 300


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_follows_the_theme(page, theme):
    ids = build(page)
    page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
    page.wait_for_function(
        "([id, theme]) => mg.box(id).querySelector('.mg-view').dataset.mgTheme === theme", arg=[ids["guard"], theme]
    )
    page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_a_workflow_of_before_a_choice_was_there_is_valid(page):
    """The graph's own value, the last of the widgets', would be taken for the choice's."""
    place = Path(__file__).parents[3] / "example_workflows" / "quick_start.json"
    state = json.loads(place.read_text(encoding="utf-8"))
    (guard,) = (node for node in state["nodes"] if node["type"] == "MemorizationGuard")
    assert guard["widgets_values"] == ["trace", 0.005, -1, 3, "keep", ""]
    guard["widgets_values"] = ["trace", 0.005, -1, 3, ""]
    guard["properties"]["stability_quantity"] = "update"  # whose curve has a point each step
    guard["inputs"] = [each for each in guard["inputs"] if each["name"] != "correction"]
    (sampler,) = (node for node in state["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][0] = 77  # what ran already comes from the cache, and draws nothing
    page.evaluate("state => app.loadGraphData(state, true, true, null)", state)
    values = "id => app.graph.getNodeById(id).widgets.slice(0, 5).map((each) => each.value)"
    assert page.evaluate(values, guard["id"]) == ["trace", 0.005, -1, 3, "keep"]
    queue(page)
    assert points(page, str(guard["id"])) == 30
