"""The WebUI half, loaded without a host."""

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def load_extension():
    """Gives a module of ``extension/`` by its name, loaded anew, as the script loads it."""
    numbers = itertools.count()

    def load(module):
        name = f"memorization_guard_pack_of_tests_{next(numbers)}"
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return importlib.import_module(f"{name}.extension.{module}")

    return load
