"""Memorization Guard as a ComfyUI custom node pack; importable outside ComfyUI, where it does nothing."""
