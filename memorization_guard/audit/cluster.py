"""The workers of an audit on a Ray cluster: one a GPU, each with the model loaded once.

Workers send their rows to this process, and only this process writes to the audit's folder, so no file system is shared. A
batch counts once, when its rows have come back; until then it can be given to another worker.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.profile import StabilityProfile
from ..pipelines import ModelError
from . import AuditError
from .plan import Job
from .run import Batch, made
from .worker import Recipe, Worker

log = logging.getLogger(__name__)

#: Batches that a worker has at once: the one it samples and the next one, so that it does not wait for us.
AHEAD = 2
#: How often a batch may fail before the audit stops.
TRIES = 5
#: Seconds between two checks whether nodes have joined.
LOOK = 10.0


class _Actor:
    """The actor on a node: a :class:`Worker` that loads its model when first used, so that an error reaches the caller."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._worker: Worker | None = None

    def _loaded(self) -> Worker:
        self._worker = self._worker or Worker(self._recipe)
        return self._worker

    def describe(self) -> dict[str, Any]:
        return self._loaded().describe()

    def calibrate(self, prompts: Sequence[str], batch_size: int, seed: int) -> StabilityProfile:
        return self._loaded().calibrate(prompts, batch_size=batch_size, seed=seed)

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        self._loaded().trial(job, profile)

    def sample(self, jobs: Sequence[Job], profile: StabilityProfile, screens: bool) -> list[dict[str, Any]]:
        return made(self._loaded(), jobs, profile, screens=screens)


class Cluster:
    """The workers of ``run.Workers`` on a Ray cluster.

    When a worker dies, alone or with its node, its batches are given to other workers, and a new worker is started where there
    is room. Nodes that join get workers. A worker that cannot load the model, or loads a different one than the first worker,
    is left out.

    Args:
        recipe: how images are made; the model must lie at the same path on every node.
        address: of the cluster; ``"auto"`` for the one that this machine belongs to, ``"local"`` to start one.
        workers: how many; if not given, one for each GPU, or without GPUs one for each node.

    Raises:
        AuditError: if there is no such cluster.
    """

    def __init__(self, recipe: Recipe, *, address: str, workers: int | None = None) -> None:
        # Ray would send usage statistics.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
        try:
            _knock(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise AuditError(f"there is no Ray cluster at {address} ({error}): start one with 'ray start --head'") from None
        self._recipe, self._wanted = ray.put(recipe), workers
        self._starting: dict[Any, Any] = {}  # answer that a new worker owes -> worker
        self._ready: list[Any] = []
        self._left_out = self._stillborn = 0
        self._yardstick: dict[str, Any] | None = None
        self._looked = -LOOK
        self._grow()

    @property
    def count(self) -> int:
        """Workers that have loaded the model."""
        return len(self._ready)

    def describe(self) -> dict[str, Any]:
        """As ``run.Workers`` says; the answer of the first worker that has loaded the model."""
        while self._yardstick is None:
            self._welcome()
        return self._yardstick

    def calibrate(
        self, prompts: Sequence[str], *, batch_size: int, seed: int, state: Path, progress: bool
    ) -> StabilityProfile:
        """As ``run.Workers`` says, on one worker; begun again if that worker dies."""
        return self._on_one(lambda actor: actor.calibrate.remote(list(prompts), batch_size, seed))

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        """As ``run.Workers`` says."""
        self._on_one(lambda actor: actor.trial.remote(job, profile))

    def sample(
        self, batches: Iterator[Batch | None], profile: StabilityProfile
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]] | None]:
        """As ``run.Workers`` says, in the order in which the rows come back.

        Raises:
            AuditError: if the profile does not fit, or a batch fails :data:`TRIES` times.
            ModelError: if no worker can load the model.
        """
        shared = self._ray.put(profile)
        failed: deque[Batch] = deque()
        tries: Counter[int] = Counter()  # by a batch's first image
        flying: dict[Any, tuple[Any, Batch]] = {}
        more = True
        while more or failed or flying:
            self._grow()
            load = Counter(actor for actor, _ in flying.values())
            # First one batch for every worker, then a second.
            for actor in [actor for level in range(AHEAD) for actor in self._ready if load[actor] <= level]:
                if failed:
                    batch: Batch | None = failed.popleft()
                else:
                    try:
                        batch = next(batches)
                    except StopIteration:
                        more = False
                        break
                if batch is None:
                    break
                flying[actor.sample.remote(batch.jobs, shared, batch.screens)] = actor, batch
            if not flying and not self._ready:
                self._welcome()
                continue
            if not flying:
                if more:  # other processes work on everything that is left
                    yield None
                    self._settle_arrived()
                continue
            self._ray.wait([*flying, *self._starting], num_returns=1, timeout=LOOK, fetch_local=False)
            self._settle_arrived()
            for answer in self._ray.wait(list(flying), num_returns=len(flying), timeout=0, fetch_local=False)[0]:
                actor, batch = flying.pop(answer)
                try:
                    yield batch, self._ray.get(answer)
                    continue
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, AuditError):
                        raise error.cause from None
                    reason: Exception = error.cause
                except self._ray.exceptions.RayError as error:
                    reason = error
                self._lost(actor, reason)
                failed.append(batch)
                tries[batch.jobs[0].image] += 1
                if tries[batch.jobs[0].image] == TRIES:
                    images = f"images {batch.jobs[0].image} to {batch.jobs[-1].image}"
                    raise AuditError(f"{images} failed {TRIES} times, at last with: {_line(reason)}")

    def _on_one(self, ask: Callable[[Any], Any]) -> Any:
        for _ in range(TRIES):
            while not self._ready:
                self._welcome()
            actor = self._ready[0]
            try:
                return self._ray.get(ask(actor))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                self._lost(actor, error)
        raise AuditError(f"{TRIES} workers were lost one after the other: see Ray's logs")

    def _grow(self) -> None:
        """Starts workers to replace lost ones, and on nodes that have joined."""
        if (now := time.monotonic()) - self._looked < LOOK:
            return
        self._looked = now
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in self._ray.nodes())
        wanted = (self._wanted or gpus or nodes) - self._left_out
        start = self._ray.remote(_Actor).options(num_gpus=1 if gpus else 0, num_cpus=1, scheduling_strategy="SPREAD")
        for _ in range(len(self._starting) + len(self._ready), wanted):
            actor: Any = start.remote(self._recipe)
            self._starting[actor.describe.remote()] = actor

    def _welcome(self) -> None:
        """Waits some seconds for workers that load the model."""
        self._grow()
        if not self._starting:
            log.warning("The cluster has no room for a worker: waiting for a node.")
            time.sleep(LOOK)
            return
        self._ray.wait(list(self._starting), num_returns=1, timeout=LOOK)
        self._settle_arrived()

    def _settle_arrived(self) -> None:
        if self._starting:
            for answer in self._ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)[0]:
                self._settle(answer)

    def _settle(self, answer: Any) -> None:
        """Takes in whether a worker has loaded the model."""
        actor = self._starting.pop(answer)
        try:
            found = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            return self._leave_out(actor, str(error.cause))
        except self._ray.exceptions.RayError as error:
            self._stillborn += 1
            if self._stillborn >= TRIES and not self._ready:
                raise ModelError(
                    f"workers die while they load the model, of too little memory perhaps: {_line(error)}"
                ) from None
            return log.warning("A worker was lost while it loaded the model: %s", _line(error))
        first = self._yardstick = self._yardstick or found
        for name in ("pipeline", "components", "loras", "scheduler", "dtype", "versions"):
            if found[name] != first[name]:
                return self._leave_out(actor, f"its {name} differ: {found[name]}, the first worker's {first[name]}")
        self._stillborn = 0
        return self._ready.append(actor)

    def _leave_out(self, actor: Any, reason: str) -> None:
        """Gives up a worker and does not replace it, since a new worker on its node would fail in the same way."""
        self._ray.kill(actor)
        self._left_out += 1
        if not self._starting and not self._ready:
            raise ModelError(reason)
        log.warning("A worker is left out: %s", reason)

    def _lost(self, actor: Any, error: Exception) -> None:
        if actor in self._ready:  # its other batches may fail too
            log.warning("A worker was lost, and its work is given to others: %s", _line(error))
            self._ready.remove(actor)
            self._looked = -LOOK
            # It may only be unreachable, or its device may be unusable after the error.
            self._ray.kill(actor)

    def close(self) -> None:
        """Stops the workers and leaves the cluster."""
        for actor in [*self._ready, *self._starting.values()]:
            self._ray.kill(actor)
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Fails at once if nothing answers at ``HOST:PORT``; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
