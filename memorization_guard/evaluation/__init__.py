"""How well memorized prompts are told from ordinary ones on a user's own model.

``lists`` reads the prompts and their training images, ``evaluate`` samples both lists as one audit, ``signals`` are the scores
that are compared, ``copies`` tells which images are copies, ``summary`` draws the figures together and ``statistics`` computes
them. Needs the extra ``audit``.
"""

from ..core.errors import GuardError


class EvaluationError(GuardError):
    """An evaluation that cannot begin or go on; the message says why and what to do."""
