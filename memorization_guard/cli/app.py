"""The command ``memorization-guard`` with its subcommands.

An error that the user can put right ends in one line on standard error and exit code 2; ``verify`` also has exit codes for its
answers. diffusers is imported when a command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .. import __version__
from .audit import audit
from .calibrate import calibrate
from .check import check
from .compare import compare
from .curve import curve
from .demo import demo
from .errors import one_line_errors
from .evaluate import evaluate
from .options import with_sampling_options
from .report import report
from .trace import trace
from .verify import verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tells while an image is being sampled whether a model reproduces a training image.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"memorization-guard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What the command takes before the name of a subcommand."""


for command in (demo, check, calibrate, trace, evaluate, audit, report, compare, curve, verify):
    app.command()(one_line_errors()(with_sampling_options(command)))


def main() -> None:
    """Entry point of the console command."""
    # Nothing is fetched by what loads models; in a process of our own no library it calls can do so either.
    os.environ["HF_HUB_OFFLINE"] = "1"
    app(prog_name="memorization-guard")
