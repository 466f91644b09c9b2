"""Auditing a model with whole prompt lists: which of them does it answer with a training image?

``plan`` says which images are made, ``worker`` makes them, ``run`` brings them together on one machine and ``cluster`` on
many; ``dataset`` is the folder of results and ``store`` how they get there, ``report`` and ``compare`` show what came out.
Needs the extra ``audit``.
"""


class AuditError(Exception):
    """An audit that cannot begin or go on; the message says why and what to do."""
