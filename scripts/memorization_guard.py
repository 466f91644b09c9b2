"""Where the WebUI, Forge and reForge look for scripts. The code is in ``extension/``."""

import importlib.util
import sys
from pathlib import Path

# The folder's packages have names that others use too (extension, nodes): they are loaded as parts of one package, under a
# name that is nobody else's. What was loaded before a "Reload UI" may be of an older version.
NAME = "memorization_guard_pack"
ROOT = Path(__file__).resolve().parents[1]

for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
    del sys.modules[name]
spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
found = importlib.import_module(f"{NAME}.extension.scripts")

# In this order: over the API, where both have one title, the first is taken for a script that is always on.
MemorizationGuardAccordion = found.MemorizationGuardAccordion
MemorizationGuardScript = found.MemorizationGuardScript
found.register()
