"""The words of the ComfyUI nodes and settings in other languages; tests/comfyui/test_locales.py has the real nodes."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "locales"
LANGUAGES = ("es", "fr", "ja", "ko", "ru", "zh")
FILES = ("main", "nodeDefs", "settings")


def texts(content):
    for value in content.values():
        if isinstance(value, dict):
            yield from texts(value)
        else:
            yield value


def keys(content, path=()):
    for key, value in content.items():
        yield from keys(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


def read(language, name):
    return json.loads((FOLDER / language / f"{name}.json").read_text(encoding="utf-8"))


def test_the_languages_are_all_there():
    assert sorted(path.name for path in FOLDER.iterdir()) == list(LANGUAGES)


@pytest.mark.parametrize("name", FILES)
def test_every_language_has_the_same_entries(name):
    first, *others = (sorted(keys(read(language, name))) for language in LANGUAGES)
    assert first
    assert all(other == first for other in others)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty_or_has_signs_that_the_host_reads_as_its_own(language):
    for name in FILES:
        for text in texts(read(language, name)):
            assert text.strip() == text != ""
            # vue-i18n: placeholders, links and plurals.
            assert not re.search(r"[{}@|$]", text), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_choices_that_tooltips_explain_are_those_of_the_nodes(language):
    inputs = read(language, "nodeDefs")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "nodes").glob("*.py"))
    source += (ROOT / "memorization_guard" / "core" / "settings.py").read_text(encoding="utf-8")
    explained = {
        ("MemorizationGuard", "mode"): ("off", "trace", "mitigate", "stop", "stop and end prompt"),
        ("MemorizationGuard", "correction"): ("keep", "steer"),
        ("MemorizationGuardCalibrate", "prompts"): ("built-in list", "text below"),
        ("MemorizationGuardGate", "when_empty"): ("block", "placeholder"),
        ("MemorizationGuardGate", "pass_corrected"): ("without the words", "all"),
    }
    for (node, name), choices in explained.items():
        tooltip = inputs[node]["inputs"][name]["tooltip"]
        for choice in choices:
            assert f'"{choice}"' in source
            assert re.search(rf"(?<![\w-]){re.escape(choice)}\s?[:\uff1a]", tooltip), (choice, tooltip)


def test_settings_are_those_of_the_page():
    page = (ROOT / "js" / "settings.js").read_text(encoding="utf-8")
    ids = re.findall(r'^const \w+ = "(MemorizationGuard\.\w+)";$', page, re.MULTILINE)
    assert sorted(read("zh", "settings")) == sorted(name.replace(".", "_") for name in ids)
    assert list(read("zh", "main")["settingsCategories"]) == re.findall(r'GROUP = \["Memorization Guard", "(.+)"\]', page)
