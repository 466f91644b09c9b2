"""The example workflows, run in ComfyUI from the files that its template browser shows; and what it serves beside them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memorization_guard import StabilityProfile, lab
from memorization_guard.automatic import WHOLE

FOLDER = Path(__file__).parents[2] / "example_workflows"
PACK = "memorization-guard"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")


def api_format(workflow, object_info):
    """The workflow in ComfyUI's API format, as the frontend's ``graphToPrompt`` makes it."""
    links = {link: [str(source), output] for link, source, output, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        linked = {each["name"]: links[each["link"]] for each in node["inputs"] if each.get("link") is not None}
        values = iter(node["widgets_values"])
        inputs = {}
        for kind in ("required", "optional"):
            for name in info["input_order"].get(kind, ()):
                type_, options = (*info["input"][kind][name], {})[:2]
                if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    inputs[name] = next(values)
                    if options.get("control_after_generate") or (type_ == "INT" and name in ("seed", "noise_seed")):
                        assert next(values) in ("fixed", "randomize", "increment", "decrement")
                if name in linked:
                    inputs[name] = linked[name]
        assert linked.keys() <= inputs.keys(), f"node {node['id']} ({node['type']})"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@pytest.fixture
def load(object_info):
    """``load(name)``: an example workflow in API format."""
    return lambda name: api_format(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), object_info)


def nodes(prompt, class_type):
    """Ids of the nodes of a class, in order."""
    return [name for name, node in prompt.items() if node["class_type"] == class_type]


def only(prompt, class_type):
    (name,) = nodes(prompt, class_type)
    return name


def traces(run, node):
    """The traces that a report showed, of its only run."""
    ((_, found),) = [entry.values() for entry in run.outputs(node)["memorization_guard"]]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_api_file_is_the_same_workflow(name, load):
    content = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert load(name) == {key: {k: node[k] for k in ("class_type", "inputs")} for key, node in content.items()}


def test_quick_start_finds_a_copy_and_leaves_out_the_words_that_call_it_up_on_request(server, load):
    prompt = load("quick_start")
    text = next(node["inputs"]["text"] for node in prompt.values() if node["inputs"].get("text"))
    guard, save = only(prompt, "MemorizationGuard"), only(prompt, "SaveImage")
    assert prompt[guard]["inputs"]["mode"] == "trace"

    run = server.queue(prompt)
    run.wait()
    (trace,) = traces(run, only(prompt, "MemorizationGuardReport"))
    assert trace["verdict"] == "likely copy"
    assert trace["trigger_step"] <= 2
    assert trace["note"] is None
    (image,) = run.images(save)
    assert lab.copy_score(image, text) > lab.COPY_THRESHOLD

    prompt[guard]["inputs"]["mode"] = "mitigate"
    run = server.queue(prompt)
    run.wait()
    (trace,) = traces(run, only(prompt, "MemorizationGuardReport"))
    assert any(trace["steps"]["mitigated"])
    assert set(trace["words"]["words"]) & set(text.split()[-2:])
    (image,) = run.images(save)
    assert lab.copy_score(image, text) < 0.75


def test_quick_starts_ordinary_prompt_is_stable(server, load):
    prompt = load("quick_start")
    prompt["2"]["inputs"]["text"] = lab.prompts("ordinary", "tuning")[1]
    content = (FOLDER / "quick_start.json").read_text(encoding="utf-8")
    assert prompt["2"]["inputs"]["text"] in content
    run = server.queue(prompt)
    run.wait()
    assert [trace["verdict"] for trace in traces(run, only(prompt, "MemorizationGuardReport"))] == ["stable"]


def test_side_by_side_differs_in_the_correction_alone_and_shows_a_copy_and_two_that_are_none(server, load):
    prompt = load("side_by_side")
    guards = [dict(prompt[name]["inputs"]) for name in nodes(prompt, "MemorizationGuard")]
    chosen = [(guard.pop("mode"), guard.pop("correction")) for guard in guards]
    assert chosen == [("trace", "keep"), ("mitigate", "steer"), ("mitigate", "keep")]
    samplers = [dict(prompt[name]["inputs"]) for name in nodes(prompt, "KSampler")]
    assert len({sampler.pop("model")[0] for sampler in samplers}) == 3
    for alike in (guards, samplers):
        assert all(inputs == alike[0] for inputs in alike)
    text = prompt[samplers[0]["positive"][0]]["inputs"]["text"]

    run = server.queue(prompt)
    run.wait()
    (plain,), *others = (run.images(name) for name in nodes(prompt, "SaveImage"))
    assert lab.copy_score(plain, text) > 0.75
    for (image,) in others:
        assert lab.copy_score(image, text) < 0.75
        assert lab.nearest_copy(image)[0] < 0.75
        assert np.asarray(image).std() > 10
    found = [trace for name in nodes(prompt, "MemorizationGuardReport") for trace in traces(run, name)]
    assert [trace["verdict"] for trace in found] == ["likely copy", "corrected", "corrected"]
    assert [any(trace["steps"]["mitigated"]) for trace in found] == [False, True, True]
    assert [one["words"]["left_out"] for one in found] == [False, False, True]
    assert len({tuple(one["words"]["words"]) for one in found}) == 1


def test_stability_profile_makes_the_labs_profile_anew(server, load):
    prompt = load("stability_profile")
    run = server.queue(prompt)
    run.wait(600)
    assert run.outputs(only(prompt, "PreviewAny"))["text"][0] == "Profile from 400 of 400 reference prompts."
    name = prompt[only(prompt, "MemorizationGuardSaveProfile")]["inputs"]["name"]
    made = StabilityProfile.load(server.folder / "models" / "stability_profiles" / f"{name}.safetensors")
    bundled = StabilityProfile.load(lab.MODEL / "profile-comfyui.safetensors")
    assert made.settings == bundled.settings
    assert made.count == bundled.count == 50
    assert made.reference.count == bundled.reference.count == 400
    np.testing.assert_allclose(made.reference.asked, bundled.reference.asked, rtol=1e-2)
    np.testing.assert_allclose(made.mean, bundled.mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made.std, bundled.std, rtol=2e-2, atol=1e-3)


def test_report_and_gate_hold_back_the_memorized_and_pass_the_ordinary(server, load):
    prompt = load("report_and_gate")
    gate, sampler = only(prompt, "MemorizationGuardGate"), only(prompt, "KSampler")
    save = only(prompt, "SaveImage")
    passed = next(name for name in nodes(prompt, "PreviewImage") if prompt[name]["inputs"]["images"] == [gate, 0])
    graphs = next(name for name in nodes(prompt, "PreviewImage") if name != passed)
    held_back, why = nodes(prompt, "PreviewAny")
    memorized = prompt[sampler]["inputs"]["positive"][0]
    (ordinary,) = (name for name in nodes(prompt, "CLIPTextEncode") if name != memorized and prompt[name]["inputs"]["text"])

    run = server.queue(prompt, {"extra_pnginfo": {}})
    run.wait()
    found = traces(run, only(prompt, "MemorizationGuardReport"))
    assert [trace["verdict"] for trace in found] == ["likely copy"] * 4
    images = run.images(save)
    text = prompt[memorized]["inputs"]["text"]
    assert min(lab.copy_score(image, text) for image in images) > 0.75
    for image in images:
        (record,) = json.loads(image.text["memorization_guard"]).values()
        assert record["runs"] == [f"sampler {sampler}"] * 4
        assert record["images"] == [0, 1, 2, 3]
    assert len(run.images(graphs)) == 4
    assert run.images(passed) == []
    assert run.outputs(held_back)["text"] == ["4"]
    assert run.outputs(why)["text"][0].startswith("0 of 4 images passed.\nImage 1 held back: likely copy, triggered at step ")

    prompt[sampler]["inputs"]["positive"] = [ordinary, 0]
    run = server.queue(prompt)
    run.wait()
    assert len(run.images(passed)) == 4
    assert run.outputs(held_back)["text"] == ["0"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_workflow_for_ones_own_checkpoint_lacks_nothing_but_the_checkpoint(name, server, load):
    with pytest.raises(RuntimeError, match=r"^/prompt: 400 ") as caught:
        server.queue(load(name))
    answer = json.loads(str(caught.value).split(" 400 ", 1)[1])
    (node,) = answer["node_errors"].values()
    ((kind, details),) = [(error["type"], error["details"]) for error in node["errors"]]
    assert kind == "value_not_in_list"
    assert details.startswith("ckpt_name")


@pytest.mark.parametrize(("name", "size"), [("sd15", 512), ("sdxl", 1024)])
def test_a_workflow_for_ones_own_checkpoint_makes_its_profile_and_judges(name, size, server, load):
    prompt = load(name)
    guard = prompt[only(prompt, "MemorizationGuard")]["inputs"]
    assert guard["clip"] == [only(prompt, "CheckpointLoaderSimple"), 1]
    assert "profile" not in guard
    latent = prompt[only(prompt, "EmptyLatentImage")]["inputs"]
    assert (latent["width"], latent["height"]) == (size, size)

    # The lab model stands in for the checkpoint: its outputs are in the same order.
    prompt[only(prompt, "CheckpointLoaderSimple")] = {"class_type": "MemorizationGuardLoadLabModel", "inputs": {}}
    latent.update(width=128, height=128)
    run = server.queue(prompt)
    run.wait(300)
    (trace,) = traces(run, only(prompt, "MemorizationGuardReport"))
    assert trace["verdict"] in ("stable", "likely copy")
    assert trace["note"] is None
    assert trace["reference_count"] == WHOLE
    assert len(run.images(only(prompt, "SaveImage"))) == 1


def test_the_template_browser_lists_them_with_their_thumbnails(server):
    assert sorted(server.get("/api/workflow_templates")[PACK]) == NAMES
    for name in NAMES:
        address = f"/api/workflow_templates/{PACK}/{name}"
        assert server.fetch(f"{address}.json") == (FOLDER / f"{name}.json").read_bytes()
        assert Image.open(io.BytesIO(server.fetch(f"{address}.jpg"))).format == "JPEG"


def test_every_node_has_a_help_page_and_every_input_and_output_a_tooltip(server, object_info):
    ours = {name: info for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK}"}
    assert len(ours) == 9
    for name, info in ours.items():
        page = server.fetch(f"/extensions/{PACK}/docs/{name}.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        assert info["description"]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert [key for key, spec in inputs.items() if not spec[1].get("tooltip")] == []
        assert [key for key in inputs if f"`{key}`" not in page] == []
        assert all(info["output_tooltips"]), name
        assert [key for key in info["output_name"] if f"`{key}`" not in page] == []
