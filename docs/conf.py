"""Makes a site of the documents: ``sphinx-build -W docs site``. They are plain Markdown and can be read without it."""

import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from memorization_guard import __version__

project = "Memorization Guard"
copyright = "The Memorization Guard developers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # index.md includes it
html_theme = "furo"
html_title = project

# A link to a heading is checked like a link to a page.
myst_heading_anchors = 4

# A name in a docstring that is nobody's is an error.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|npt|PIL|collections|typing|os|pathlib|optional|default)(\..*)?")]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True


def own_name(app: Sphinx, env: BuildEnvironment, node: Any, text: nodes.Element) -> nodes.Element | None:
    """Finds a name of the package that is written without its module, or with the module that it comes from."""
    target = node["reftarget"]
    name = target.rpartition(".")[2]
    python = env.get_domain("py")
    found = [full for full in python.objects if f".{full}".endswith(f".{target}")]
    found = found or [full for full in python.objects if full.rpartition(".")[2] == name]
    if len(found) == 1 and node.get("refdoc"):
        entry = python.objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, found[0])
    # What is internal has no page, but has to exist.
    ours = [module for path, module in sys.modules.items() if path.partition(".")[0] == "memorization_guard"]
    return text if any(hasattr(module, name) for module in ours) else None


_written: dict[str, list[str]] = {}


def before_napoleon(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property"):
        _written[name] = [*lines]


def after_napoleon(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon for the type of an attribute; ours are sentences."""
    lines[:] = _written.pop(name, lines)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", own_name)
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
