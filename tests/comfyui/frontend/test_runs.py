"""Which runs a node shows: the last ones, those of its own alone, each image of a batch, and outside of a subgraph too."""

import pytest

from .conftest import build, capture, label, points, queue, show, wait_end

MINE = "id => mg.box(id).innerText"


def choose(page, node, name, value):
    page.evaluate("([id, name, value]) => mg.set(mg.node(id), name, value)", [node, name, value])
    capture(page)


def test_mode_off_shows_that_nothing_is_watched_and_no_old_graph(page):
    ids = build(page)
    queue(page)
    assert points(page, ids["guard"]) == 30
    choose(page, ids["guard"], "mode", "off")
    queue(page)
    for _ in range(2):
        assert points(page, ids["guard"]) == 0
        assert "The mode is off: nothing is watched." in page.evaluate(MINE, ids["guard"])
        page.wait_for_timeout(1500)  # newer frontends write their drafts after a while
        show(page)


def test_a_guard_that_a_prompt_leaves_out_shows_no_old_graph(page):
    ids = build(page)
    queue(page)
    assert points(page, ids["guard"]) == 30
    page.evaluate(
        """([guard, sampler]) => {
          mg.node(guard).mode = 4;  // bypassed
          mg.set(mg.node(sampler), "steps", 5);
        }""",
        [ids["guard"], ids["samplers"][0]],
    )
    capture(page)
    queue(page)
    for _ in range(2):
        assert points(page, ids["guard"]) == 0
        assert "bypassed or muted: nothing is watched" in page.evaluate(MINE, ids["guard"])
        page.wait_for_timeout(1500)
        show(page)


def test_the_last_ten_runs_are_kept_and_can_be_stepped_through(page):
    ids = build(page, {"mode": "trace"})
    page.evaluate(
        """async ([sampler]) => {
          for (let steps = 3; steps < 15; steps++) {
            mg.set(mg.node(sampler), "steps", steps);
            await app.queuePrompt(0, 1);
          }
        }""",
        ids["samplers"],
    )
    page.wait_for_function("id => mg.kept(id).at(-1)?.traces[0].steps.sigma.length === 14", arg=ids["guard"])
    page.wait_for_function("id => mg.points(id) === 14", arg=ids["guard"])
    wait_end(page)
    assert len(page.evaluate("id => mg.kept(id)", ids["guard"])) == 10
    assert len(page.evaluate("id => mg.kept(id)", ids["report"])) == 1  # it shows those of its picture
    for _ in range(2):
        assert "run 10 of 10" in page.evaluate(MINE, ids["guard"])
        page.evaluate("id => mg.box(id).querySelector('[title=\"earlier run\"]').click()", ids["guard"])
        page.wait_for_function("id => mg.points(id) === 13", arg=ids["guard"])
        assert "run 9 of 10" in page.evaluate(MINE, ids["guard"])
        page.wait_for_timeout(1500)
        show(page)
        page.wait_for_function("id => mg.points(id) === 14", arg=ids["guard"])


def test_a_copy_begins_without_the_runs_of_what_it_was_copied_from(page):
    ids = build(page)
    queue(page)
    copies = page.evaluate(
        """id => {
          app.canvas.selectItems([mg.node(id)]);
          app.canvas.copyToClipboard();
          const before = new Set(app.graph.nodes);
          app.canvas.pasteFromClipboard();
          const clone = mg.node(id).clone();
          app.graph.add(clone);
          return app.graph.nodes.filter((node) => !before.has(node)).map((node) => String(node.id));
        }""",
        ids["guard"],
    )
    assert len(copies) == 2
    for copy in copies:
        assert page.evaluate("id => mg.kept(id)", copy) == []
        page.wait_for_function("id => mg.label(id).includes('is drawn while')", arg=copy)
    assert points(page, ids["guard"]) == 30
    assert len(page.evaluate("id => mg.kept(id)", ids["guard"])) == 1


def test_each_image_of_a_batch_has_its_verdict_and_can_be_seen_alone(page):
    ids = build(page, {"batch": 3})
    queue(page)
    entries = "id => [...mg.box(id).querySelectorAll('.mg-verdict')].map((each) => each.innerText)"
    told = page.evaluate(entries, ids["guard"])
    assert [text.split("\n")[0] for text in told] == ["1 likely copy", "2 likely copy", "3 likely copy"]
    assert all("1 in " in text for text in told)
    assert page.evaluate("id => mg.curves(id)", ids["guard"]) == [30, 30, 30]
    click = "id => mg.box(id).querySelectorAll('.mg-verdict')[1].click()"
    page.evaluate(click, ids["guard"])
    page.wait_for_function("id => mg.curves(id).length === 1", arg=ids["guard"])
    numbers = "id => [...mg.box(id).querySelectorAll('.mg-item')].map((each) => each.textContent)"
    assert page.evaluate(numbers, ids["guard"]) == ["2"]
    assert page.evaluate(entries, ids["guard"]) == told
    page.evaluate(click, ids["guard"])
    page.wait_for_function("id => mg.curves(id).length === 3", arg=ids["guard"])
    assert "Image 2: likely copy" in label(page, ids["guard"])


BADGES = """id => mg.node(id).badges.map((each) => (typeof each === "function" ? each() : each).text).filter(Boolean)"""


@pytest.mark.parametrize(("mode", "said"), [("trace", "likely copy"), ("mitigate", "likely copy, corrected")])
def test_a_subgraph_says_what_the_guard_in_it_saw(page, mode, said):
    ids = build(page, {"mode": mode})
    outer = page.evaluate(
        "id => String(app.graph.convertToSubgraph(new Set([mg.node(id)])).node.id)",
        ids["guard"],
    )
    queue(page)
    inner = page.evaluate("outer => `${outer}:${mg.node(outer).subgraph.nodes[0].id}`", outer)
    assert f"Memorization Guard: {said}" in page.evaluate(BADGES, outer)
    page.wait_for_timeout(1500)
    show(page)
    assert f"Memorization Guard: {said}" in page.evaluate(BADGES, outer)

    copy = page.evaluate(
        """id => {
          app.canvas.selectItems([mg.node(id)]);
          app.canvas.copyToClipboard();
          const before = new Set(app.graph.nodes);
          app.canvas.pasteFromClipboard();
          return String(app.graph.nodes.find((node) => !before.has(node)).id);
        }""",
        outer,
    )
    assert not any("Memorization Guard" in text for text in page.evaluate(BADGES, copy))
    kept = "id => mg.node(id).subgraph.nodes[0].properties.stability_runs ?? []"
    assert page.evaluate(kept, copy) == []
    assert len(page.evaluate("id => mg.kept(id)", inner)) == 1
    assert f"Memorization Guard: {said}" in page.evaluate(BADGES, outer)


def test_a_group_node_says_what_the_guard_in_it_saw(page):
    ids = build(page)
    page.evaluate(
        """([guard, sampler]) => {
          app.canvas.selectItems([mg.node(guard), mg.node(sampler)]);
          void app.extensionManager.command.execute("Comfy.GroupNode.ConvertSelectedNodesToGroupNode");
        }""",
        [ids["guard"], ids["samplers"][0]],
    )
    page.wait_for_selector("[role=dialog] input")
    page.keyboard.type("grouped")
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'workflow>grouped')")
    outer = page.evaluate("() => String(app.graph.nodes.find((node) => node.type === 'workflow>grouped').id)")
    queue(page)
    assert "Memorization Guard: likely copy" in page.evaluate(BADGES, outer)
    # This frontend looks for a subgraph wherever an id has a colon, and complains of group nodes.
    page.errors[:] = [text for text in page.errors if "/extensions/" in text]
