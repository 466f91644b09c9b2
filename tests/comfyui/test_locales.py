"""The words of the nodes in other languages, held against the nodes as ComfyUI knows them."""

import pytest

#: What the front end adds to a seed.
AFTER_SEED = {"control_after_generate"}
LANGUAGES = ("es", "fr", "ja", "ko", "ru", "zh")


@pytest.fixture(scope="module")
def nodes(server):
    """Our nodes as the page is told of them, by their ids."""
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("MemorizationGuard")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_its_words(server, nodes, language):
    found = server.get("/i18n")[language]
    translated = {name: node for name, node in found["nodeDefs"].items() if name.startswith("MemorizationGuard")}
    assert translated.keys() == nodes.keys()
    for name, node in nodes.items():
        words = translated[name]
        assert words.keys() <= {"display_name", "description", "inputs", "outputs"}
        inputs = {id for kind in ("required", "optional") for id in node["input"].get(kind, {})}
        if "seed" in inputs:
            inputs |= AFTER_SEED
        assert words.get("inputs", {}).keys() == inputs, name
        assert list(words.get("outputs", {})) == [str(number) for number in range(len(node["output"]))], name
        for id, entry in (*words.get("inputs", {}).items(), *words.get("outputs", {}).items()):
            assert entry.keys() == ({"name"} if id in AFTER_SEED else {"name", "tooltip"}), (name, id)
    assert found["settings"]["MemorizationGuard_DefaultMode"]["name"]


def test_nodes_are_found_by_other_words(nodes):
    # ComfyUI has a place for them since after 0.3.64.
    aliases = [node["search_aliases"] for node in nodes.values() if "search_aliases" in node]
    if not aliases:
        pytest.skip("this ComfyUI's nodes have no search aliases")
    assert all({"duplicate", "plagiarism", "overfit", "copyright"} <= set(words) for words in aliases[:2])
