"""The ComfyUI half: nodes, and what puts ComfyUI's sampling in the core's terms. Imported by ComfyUI alone."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .explain import ExplainPrompt
from .guard import MemorizationGuard
from .lab import LoadLabModel
from .profiles import CalibrateStabilityProfile, LoadStabilityProfile, SaveStabilityProfile
from .report import MemorizationGate, StabilityReport
from .screen import ScreenPrompts


class MemorizationGuardExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            MemorizationGuard,
            ExplainPrompt,
            ScreenPrompts,
            LoadStabilityProfile,
            SaveStabilityProfile,
            CalibrateStabilityProfile,
            StabilityReport,
            MemorizationGate,
            LoadLabModel,
        ]
