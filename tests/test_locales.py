"""The words of the ComfyUI nodes and settings and of the WebUI in other languages; tests/comfyui has the real nodes."""

import ast
import configparser
import json
import re
from pathlib import Path

import pytest

from memorization_guard.core.calibration import MIN_RUNS
from memorization_guard.core.settings import HOST_CONSTANTS

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


# The WebUI


WEBUI = sorted((ROOT / "localizations").glob("*.json"))


def texts_of_the_webui():
    """What its controls say, as the page has it."""
    found = {field.metadata["about"] for field in HOST_CONSTANTS}
    found |= {field.name.replace("_", " ").capitalize() for field in HOST_CONSTANTS}
    for node in ast.walk(ast.parse((ROOT / "extension" / "controls.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_ABOUT":
            modes = [value.value for value in node.value.values]
            found |= {f"{'; '.join(some)}." for some in (modes, modes[:3])}  # the dropdown's, and the accordion's
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub("<.*?>", "", node.value))
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else str(MIN_RUNS) for part in node.values))
    return found


def test_the_languages_of_the_webui_have_the_same_entries_and_translate_what_is_said():
    assert [path.stem for path in WEBUI] == ["es_ES", "fr_FR", "ja_JP", "ko_KR", "ru_RU", "zh_CN"]
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in WEBUI)
    said = texts_of_the_webui()
    assert set(first) <= said
    assert all(other.keys() == first.keys() for other in others)
    assert all(text.strip() == text != "" for one in (first, *others) for text in one.values())


def test_the_webui_knows_the_extension_by_the_projects_name():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "metadata.ini", encoding="utf-8")
    assert dict(metadata["Extension"]) == {"name": "memorization-guard"}
