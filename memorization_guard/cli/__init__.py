"""The command ``memorization-guard``: one file a command. ``app`` puts them together."""

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError:
    sys.exit('memorization-guard: the command line needs more packages: pip install "memorization-guard[diffusers]"')

from .app import main

__all__ = ["main"]
