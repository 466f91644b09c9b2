"""How well detection and mitigation work on a user's own model: lists of prompts, copy scores, statistics, tables."""
