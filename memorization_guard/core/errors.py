"""What all errors for the user have in common."""


class GuardError(Exception):
    """An error whose message is for the user: it says what is wrong and what to do."""
