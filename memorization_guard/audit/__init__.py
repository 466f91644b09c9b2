"""Audits a model with whole prompt lists: which of them does it answer with a training image?

``plan`` says which images are made, ``worker`` makes them, ``run`` brings them together on one machine and ``cluster`` on
many. ``dataset`` is the folder of results and ``store`` how they get there; ``summary`` and ``comparison`` are what came out.
Needs the extra ``audit``.
"""

from typing import Literal

from ..core.errors import GuardError

#: Which images are kept; flagged images are those that triggered.
Keep = Literal["none", "flagged", "all"]


class AuditError(GuardError):
    """An audit that cannot begin or go on."""
