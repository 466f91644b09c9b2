"""What whoever reads, uses or carries on the repository relies on: links, commands, messages, hooks."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "js" / "docs").glob("*.md")])
#: Inline code and blocks of it, where brackets are no links.
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def named(page):
    return page.relative_to(ROOT).as_posix()


@cache
def anchors(page):
    """What a link into a Markdown file may name, as forges make it from headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = []
    for heading in re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(ROOT) and file.exists()
        if not inside or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            broken.append(target)
    assert broken == []


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == SITE_ALONE


#: Pages that only the site of the documents needs.
SITE_ALONE = {"index.md", "changelog.md"}


def commands():
    """Every command line in the documents that is ours: page, words."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||;", line):
                    yield page, part.partition(" #")[0].strip()
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8")):
            yield page, code


def ours(start):
    found = [(page, line) for page, line in commands() if re.match(start, line)]
    assert found
    return sorted({(named(page), line) for page, line in found})


@pytest.mark.parametrize(("page", "line"), ours(r"memorization-guard [\w-]"))
def test_commands_have_the_options_that_are_written(page, line):
    pytest.importorskip("typer")
    from typer.main import get_command

    from memorization_guard.cli.app import app

    command = get_command(app)
    words = shlex.split(line)[1:]
    if not words[0].startswith("-"):
        assert words[0] in command.commands, f"{page}: {line}"
        command = command.commands[words[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known, f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), ours(r"python (benchmarks/|-m memorization_guard)"))
def test_scripts_have_the_options_that_are_written(page, line):
    words = shlex.split(line)[1:]
    name = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    script = next((file for file in (ROOT / f"{name}.py", ROOT / name / "__main__.py") if file.exists()), None)
    assert script is not None, f"{page}: {line}"
    # Options are written out for argparse, some in a script beside it, and are a function's arguments for Typer.
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    beside = {script.parent / f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom)}
    for file in filter(Path.exists, beside):
        nodes += ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    known = {node.value for node in nodes if isinstance(node, ast.Constant)}
    known |= {f"--{node.arg.replace('_', '-')}" for node in nodes if isinstance(node, ast.arg)}
    assert {word for word in words[1:] if re.match(r"--[a-z]", word)} <= known, f"{page}: {line}"


@cache
def messages():
    """Every text that the code can say, with a gap where a name or number goes in."""
    found = []
    for folder in ("memorization_guard", "nodes", "extension"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
    found += [file.read_text(encoding="utf-8") for file in (ROOT / "js").glob("*.js")]
    return [re.sub(r"%[sd]", "\0", text) for text in found]


def test_the_messages_that_are_explained_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(told) > 40
    unknown = []
    for message in told:
        for part in filter(None, (part.strip(" ,.:;()'") for part in re.split(r"\.\.\.", message))):
            if not any(part in said for said in messages()):
                unknown.append((message, part))
    assert not unknown, unknown


def test_hooks_run_what_the_gate_runs():
    yaml = pytest.importorskip("yaml")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"] if hook["entry"] not in gate] == []


def test_the_forge_runs_the_gate_and_its_forms_ask_for_the_version():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml"))
    assert len(forms) == 3
    for form in forms:
        body = yaml.safe_load(form.read_text(encoding="utf-8"))["body"]
        assert any(field.get("id") == "version" and field["validations"]["required"] for field in body), form.name
