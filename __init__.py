"""Memorization Guard as a ComfyUI custom node pack; importable outside ComfyUI, where it does nothing."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> object:
    """Where ComfyUI asks for the nodes."""
    from .nodes import MemorizationGuardExtension

    return MemorizationGuardExtension()
