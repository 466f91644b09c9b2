"""``python -m memorization_guard`` is the console command ``memorization-guard``."""

from .cli import main

main()
