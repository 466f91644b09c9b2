"""A module as any extension may have it."""

DECOY = True
