"""The command ``memorization-guard``."""

from .main import main

__all__ = ["main"]
