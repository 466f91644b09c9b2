"""The runs that a guard saw, and which of them stand behind a node's image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..memorization_guard import Mode, StabilityMonitor, Trace
from ..memorization_guard.fingerprint import content_hash

#: At most so many texts of a prompt are looked at, each of at most so many characters.
TEXTS, LONGEST = 64, 10_000

#: Gives a node of a prompt by its id, or ``None`` where the prompt has none of that id.
GetNode = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Run:
    """One run of a sampler: the node that ran it, in which prompt, and out of what (see :func:`lineage`)."""

    name: str
    sampler_node: str
    prompt_id: str
    made_from: str | None
    monitor: StabilityMonitor

    @cached_property
    def traces(self) -> list[Trace]:
        """One trace an image, to be read when the run is over; a run in which nothing was seen leaves none."""
        return self.monitor.traces


@dataclass
class TraceLog:
    """The runs that a guard saw: what its TRACE output carries.

    It is filled while the sampler runs, after the guard's own node is done. ComfyUI keeps it as long as the guard's node is
    cached, so it also holds runs of earlier prompts; cached results of samplers may still come from those.
    """

    mode: Mode
    _runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)

    def begin(self, monitor: StabilityMonitor) -> Run:
        """Enters the run that is about to begin."""
        prompt_id, node, index = _executing()
        # Some nodes sample many times in one execution (tiles, detailers). Those runs belong together, and replace what the
        # same node did in an earlier prompt.
        runs = self._begun(prompt_id, node, index)
        self._runs.pop((node, index), None)  # they stand behind those of other nodes that began meanwhile
        prompt = _running_prompt(prompt_id)
        made_from = lineage(prompt.get, node)[1] if prompt is not None else None
        run = Run(_name(prompt_id, node, index, len(runs)), node, prompt_id, made_from, monitor)
        self._runs[node, index] = [*runs, run]
        return run

    def next_name(self) -> str:
        """The name of the run that would begin now."""
        prompt_id, node, index = _executing()
        return _name(prompt_id, node, index, len(self._begun(prompt_id, node, index)))

    def _begun(self, prompt_id: str, node: str, index: int) -> list[Run]:
        """The runs of one execution of a node so far."""
        return [run for run in self._runs.get((node, index), []) if run.prompt_id == prompt_id]

    def runs(self) -> list[Run]:
        """The runs in order."""
        return [run for runs in self._runs.values() for run in runs]

    def runs_behind(self, get_node: GetNode, nodes: Iterable[str]) -> list[Run]:
        """The runs that ``nodes`` and all nodes before them depend on, in the prompt that ``get_node`` reads.

        A run of an earlier prompt counts if its sampler's node depends on the same inputs as it did then. Otherwise its id now
        names another node, or the node samples another model.
        """
        context = get_executing_context()
        before = set().union(*(lineage(get_node, node)[0] for node in nodes))
        found = []
        for run in self.runs():
            if run.sampler_node in before:
                now = context is not None and run.prompt_id == context.prompt_id
                if now or (run.made_from is not None and run.made_from == lineage(get_node, run.sampler_node)[1]):
                    found.append(run)
        return found


def _executing() -> tuple[str, str, int]:
    """The prompt that is running, its node, and the number of the list that the node is mapped over."""
    context = get_executing_context()
    return (context.prompt_id, context.node_id, context.list_index or 0) if context else ("", "", 0)


def _name(prompt_id: str, node: str, index: int, number: int) -> str:
    return f"{prompt_id}:{node}:{index}:{number}"


def lineage(get_node: GetNode, node: str) -> tuple[set[str], str]:
    """A node and all before it in a prompt, and a hash of their types, inputs and links."""
    found: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found or (content := get_node(current)) is None:
            continue
        found[current] = (content["class_type"], content["inputs"])
        waiting += [str(link[0]) for link in content["inputs"].values() if isinstance(link, list) and len(link) == 2]
    return set(found), content_hash(found)


def texts_behind() -> list[str]:
    """The texts in what the node that is running depends on, as the prompt was queued; the longest first."""
    prompt_id, node, _ = _executing()
    prompt = _running_prompt(prompt_id)
    if prompt is None:
        return []
    before = lineage(prompt.get, node)[0] or prompt.keys()  # what other nodes expand into has no place in it
    values = {value for one in before for value in prompt[one]["inputs"].values() if isinstance(value, str)}
    texts = [value for value in values if value.strip() and len(value) <= LONGEST]
    return sorted(texts, key=lambda text: (-len(text), text))[:TEXTS]


def _running_prompt(prompt_id: str) -> Mapping[str, Any] | None:
    """The prompt as it was queued; nodes that other nodes expand into are not in it."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    items = queue.currently_running.values() if queue is not None else ()
    return next((item[2] for item in items if item[1] == prompt_id), None)
