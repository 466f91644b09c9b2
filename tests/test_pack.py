"""The repository as a ComfyUI pack: example workflows, help pages and registry metadata. Needs no ComfyUI."""

import ast
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from memorization_guard import __version__, lab

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))
HELP = REPOSITORY / "js" / "docs"
SOURCES = {file.stem: file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "nodes").glob("*.py"))}
#: The source of each of our nodes, by its id; of those that judge prompts, with that of the inputs that they share.
NODES = {
    found.group(1): part + (SOURCES["judging"] if "inputs=inputs(" in part else "")
    for source in SOURCES.values()
    for part in re.split(r"^class ", source, flags=re.MULTILINE)
    if (found := re.search(r'node_id="(\w+)"', part))
}
CORE = {
    "CLIPTextEncode",
    "CheckpointLoaderSimple",
    "EmptyLatentImage",
    "KSampler",
    "PreviewAny",
    "PreviewImage",
    "SaveImage",
    "VAEDecode",
}
NOTES = {"MarkdownNote"}
NAMES = {"quick_start", "side_by_side", "stability_profile", "report_and_gate", "sd15", "sdxl"}


def test_the_workflows_are_all_there():
    assert {path.stem for path in WORKFLOWS} == NAMES
    assert {path.stem for path in (REPOSITORY / "example_workflows" / "api").glob("*.json")} == NAMES
    assert len(NODES) == 9


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return read(request.param)


def test_a_workflow_names_only_our_nodes_and_comfyuis_own(workflow):
    used = {node["type"] for node in workflow["nodes"]}
    assert used <= NODES.keys() | CORE | NOTES
    assert used & NODES.keys()
    assert used & NOTES


def test_a_workflow_carries_nothing_of_the_machine_it_was_made_on(workflow):
    for node in workflow["nodes"]:
        for model in node["properties"].pop("models", ()):
            # As in ComfyUI's own templates: the page offers it to somebody who lacks the file.
            assert model["url"].startswith("https://huggingface.co/")
            assert f"/{model['name']}" in model["url"]
            assert model["name"] in node["widgets_values"]
            assert model["directory"] == "checkpoints"
    text = json.dumps(workflow)
    assert not re.search(
        r"stability_(runs|state|quantity|explanation)|/tmp/|/work/|/home/|\\\\\\\\|https?://|127\.0\.0\.1", text
    )
    assert all(node["mode"] == 0 for node in workflow["nodes"])


def test_nodes_say_which_pack_they_are_from(workflow):
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            pack = ("memorization-guard", __version__) if node["type"] in NODES else ("comfy-core", "0.3.64")
            assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == pack


def test_a_workflow_opens_with_its_note_in_sight_and_large_enough_to_be_read(workflow):
    view = workflow["extra"]["ds"]
    # Below 0.6 ComfyUI draws no text. Front ends of 2026 fit every template into the window instead.
    assert view["scale"] >= 0.7
    (note,) = (node for node in workflow["nodes"] if node["type"] in NOTES)
    (x, y), (width, height) = (
        [view["scale"] * (a + b) for a, b in zip(note["pos"], view["offset"], strict=True)],
        [view["scale"] * side for side in note["size"]],
    )
    # Between the host's bars, of a small window.
    assert x >= 60
    assert y >= 80
    assert x + width <= 1200
    assert y + height <= 700


def test_quick_start_is_the_first_where_names_are_sorted():
    assert min(NAMES) == "quick_start"


def test_a_checkpoint_is_offered_where_one_is_needed():
    for name in ("sd15", "sdxl"):
        nodes = read(REPOSITORY / "example_workflows" / f"{name}.json")["nodes"]
        (loader,) = (node for node in nodes if node["type"] == "CheckpointLoaderSimple")
        assert len(loader["properties"]["models"]) == 1


def test_links_lead_from_an_output_to_an_input(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert kind in (nodes[source]["outputs"][output]["type"], "*")


def test_nodes_do_not_overlap_and_stand_in_their_groups(workflow):
    title = 30
    boxes = {
        node["id"]: (
            node["pos"][0],
            node["pos"][1] - title,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in workflow["nodes"]
    }
    places = list(boxes.items())
    for i, (one, a) in enumerate(places):
        for other, b in places[i + 1 :]:
            apart = a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
            assert apart, f"nodes {one} and {other} overlap"
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    assert groups
    for node in workflow["nodes"]:
        a = boxes[node["id"]]
        inside = [g for g in groups if g[0] <= a[0] and g[1] <= a[1] and a[2] <= g[2] and a[3] <= g[3]]
        touched = [g for g in groups if not (a[2] < g[0] or g[2] < a[0] or a[3] < g[1] or g[3] < a[1])]
        assert inside == touched, f"node {node['id']} stands across the edge of a group"
        assert len(inside) == (node["type"] not in NOTES), f"node {node['id']} is in {len(inside)} groups"


def test_no_prompt_of_the_evaluation_split_is_used(workflow):
    held_out = {text for group in ("exact", "template", "rare", "ordinary") for text in lab.prompts(group)}
    texts = {
        line.strip()
        for node in workflow["nodes"]
        for value in node.get("widgets_values") or []
        if isinstance(value, str)
        for line in re.split(r"[\n`]", value)
    }
    assert not texts & held_out


def test_the_lab_is_calibrated_on_its_reference_prompts():
    calibrate = next(
        node
        for node in read(REPOSITORY / "example_workflows/api/stability_profile.json").values()
        if node["class_type"] == "MemorizationGuardCalibrate"
    )["inputs"]
    assert calibrate["text"].splitlines() == lab.prompts("reference")
    settings = {"prompts": "text below", "negative": "", "seed": 0, "steps": 30, "cfg": 7.5, "sampler_name": "euler"}
    settings |= {"scheduler": "normal", "width": 128, "height": 128, "batch_size": 8}
    assert {name: calibrate[name] for name in settings} == settings


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_workflow_has_a_thumbnail(name):
    file = REPOSITORY / "example_workflows" / f"{name}.jpg"
    assert file.stat().st_size < 60_000
    with Image.open(file) as image:
        assert image.format == "JPEG"
        assert 400 <= image.width <= 600
        assert 300 <= image.height <= 450
        assert not image.getexif()


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_a_node_has_a_help_page_that_names_all_of_its_inputs(node_id):
    page = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    name = re.search(r'display_name="(.+)"', NODES[node_id])[1]
    assert page.startswith(f"# {name}\n")
    inputs = re.findall(r'\.Input\(\s*"(\w+)"', NODES[node_id])
    assert [name for name in inputs if f"`{name}`" not in page] == []
    if node_id != "MemorizationGuardLoadLabModel":
        assert inputs


@pytest.mark.parametrize("newer", [False, True])
def test_search_aliases_are_given_to_a_comfyui_that_has_them(newer):
    class Schema:
        if newer:

            def __init__(self, node_id, search_aliases=None): ...

        else:

            def __init__(self, node_id): ...

    source = ast.parse((REPOSITORY / "nodes" / "guard.py").read_text(encoding="utf-8"))
    (function,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "also_found_as")
    names = {"inspect": inspect, "io": SimpleNamespace(Schema=Schema)}
    exec(compile(ast.Module([function], []), "guard.py", "exec"), names)
    assert names["also_found_as"]("a", "b") == ({"search_aliases": ["a", "b"]} if newer else {})


def test_nodes_are_found_by_what_people_search_for():
    for node_id in ("MemorizationGuard", "MemorizationGuardExplainPrompt", "MemorizationGuardReport", "MemorizationGuardGate"):
        (words,) = re.findall(r"\*\*also_found_as\((.*)\)", NODES[node_id])
        assert {"duplicate", "plagiarism", "overfit", "copyright"} <= set(re.findall(r'"([\w ]+)"', words))


def test_there_is_no_help_page_without_a_node():
    assert {file.stem for file in HELP.glob("*.md")} == NODES.keys()


def test_help_pages_show_in_the_panel():
    # The panel shows Markdown without HTML, and relative links would lead into the server.
    for file in HELP.glob("*.md"):
        assert not re.search(r"\]\((?!https://)|<[a-z]+[ >]", file.read_text(encoding="utf-8")), file.name


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


# What https://docs.comfy.org/registry/specifications asks for.


def test_the_project_can_be_named_in_the_registry(project):
    name = project["project"]["name"]
    assert re.fullmatch(r"[A-Za-z](?:[-_.]?[A-Za-z0-9])*", name)
    assert len(name) < 100
    assert "comfyui" not in name.lower()
    assert project["project"]["description"]
    licence = project["project"]["license"]
    assert licence.keys() in ({"file"}, {"text"})
    assert "file" not in licence or (REPOSITORY / licence["file"]).is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_registrys_own_section_is_complete(project):
    if "comfy" not in project["tool"]:
        pytest.skip("pyproject.toml has no [tool.comfy] so far: the pack cannot be published in the registry")
    comfy = project["tool"]["comfy"]
    assert comfy["DisplayName"]
    for picture in ("Icon", "Banner"):
        assert comfy.get(picture, "https://").startswith("https://")
    assert re.fullmatch(r"[<>=~!\d., ]+", comfy.get("requires-comfyui", ">=0.3"))
    # Whoever publishes fills in both (docs/development.md), or the registry refuses the pack.
    publisher, addresses = comfy["PublisherId"], project["project"].get("urls", {})
    assert re.fullmatch(r"[\w-]*", publisher)
    assert bool(publisher) == ("Repository" in addresses)
    assert all(address.startswith("https://") for address in addresses.values())
    if "version" in project["project"].get("dynamic", ()):
        # The registry's tool runs no Python: it looks for the line in this file.
        text = (REPOSITORY / comfy["version"]["path"]).read_text(encoding="utf-8")
        assert re.search(r'^(?:__version__|VERSION) = "(.+)"$', text, flags=re.MULTILINE).group(1) == __version__
    else:
        assert project["project"]["version"] == __version__
