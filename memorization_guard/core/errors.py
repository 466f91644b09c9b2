"""The base of every error whose message is for the user."""


class GuardError(Exception):
    """What the user can put right; the message says what is wrong and what to do."""
