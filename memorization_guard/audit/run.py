"""Runs an audit from its first image to its last, on one worker or many."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from ..core.profile import StabilityProfile
from ..core.trace import STATEMENT
from ..files import write_whole
from ..fingerprint import file_hash
from . import AuditError
from .dataset import FORMAT, FORMAT_VERSION, MANIFEST, PROFILE, REPORT, mapping, planned_images, read_manifest
from .dataset import parts as finished_parts
from .plan import LARGEST_PART, Job, Plan
from .store import Part, Store, clear, untidy
from .worker import Recipe, Worker

#: Seconds between two checks of the parts that other processes are working on.
PATIENCE = 2.0

#: So many batches are screened at once: of their runs only the first evaluation is made, and no image is decoded.
AT_ONCE = 8


@dataclass(frozen=True)
class Batch:
    """Images of one part that are sampled together; or screened, where only rows of those come back that need no sampling."""

    part: Part
    jobs: Sequence[Job]
    screens: bool = False


class Workers(Protocol):
    """What samples the images: :class:`Local` or ``cluster.Cluster``."""

    @property
    def count(self) -> int:
        """Number of workers."""

    def describe(self) -> dict[str, Any]:
        """As :meth:`Worker.describe`; only the device may differ between workers."""

    def calibrate(
        self, prompts: Sequence[str], *, batch_size: int, seed: int, state: Path, progress: bool
    ) -> StabilityProfile:
        """As :meth:`Worker.calibrate`."""

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        """As :meth:`Worker.trial`."""

    def sample(
        self, batches: Iterator[Batch | None], profile: StabilityProfile
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]] | None]:
        """Every batch with what :func:`made` makes of it, in any order. ``None``, as input and as output, means: nothing at
        the moment."""

    def close(self) -> None:
        """Called when the audit is over."""


class Local:
    """One worker in this process."""

    count = 1

    def __init__(self, recipe: Recipe) -> None:
        self._worker = Worker(recipe)

    def describe(self) -> dict[str, Any]:
        """As :class:`Workers` says."""
        return self._worker.describe()

    def calibrate(
        self, prompts: Sequence[str], *, batch_size: int, seed: int, state: Path, progress: bool
    ) -> StabilityProfile:
        """As :class:`Workers` says; goes on where an interrupted calibration stopped."""
        return self._worker.calibrate(prompts, batch_size=batch_size, seed=seed, state=state, progress=progress)

    def trial(self, job: Job, profile: StabilityProfile) -> None:
        """As :class:`Workers` says."""
        self._worker.trial(job, profile)

    def sample(
        self, batches: Iterator[Batch | None], profile: StabilityProfile
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]] | None]:
        """As :class:`Workers` says, one batch after the other."""
        for batch in batches:
            yield None if batch is None else (batch, made(self._worker, batch.jobs, profile, screens=batch.screens))

    def close(self) -> None:
        """Does nothing."""


def made(worker: Worker, jobs: Sequence[Job], profile: StabilityProfile, *, screens: bool) -> list[dict[str, Any]]:
    """What a worker makes of a batch."""
    return worker.screen(jobs, profile) if screens else worker.sample(jobs, profile)


def audit(
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    start: Callable[[], Workers],
    *,
    profile: Path | None = None,
    reference: Sequence[str] = (),
    reference_from: str = "",
    batch_size: int = 4,
    report: Callable[[Path], object] | None = None,
    progress: bool = True,
) -> bool:
    """Makes the images of an audit that are still missing. Several processes may work in one folder at the same time.

    Args:
        recipe: how images are made. plan: which images.
        folder: of the audit. If another process or an earlier call has begun an audit there, it must be the same one.
        start: makes the workers; called only if there is something to do.
        profile: stability profile of the model; if none is given, one is calibrated with ``reference`` prompts, which come
            from ``reference_from``.
        batch_size: images sampled at once; may differ when an audit goes on.
        report: writes ``report.html`` into the folder once all images are there.
        progress: whether to show a progress bar.

    Returns:
        Whether there was anything to do.

    Raises:
        AuditError: if the folder holds another audit, or the profile does not fit.
        PromptListError: if the list is no longer what ``plan`` has read; what was made so far is kept.
        OSError: if the disk is full; what was made so far is kept.
    """
    asked = _asked(recipe, plan, profile, reference, reference_from)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _goes_on(folder, manifest)
        _same(folder, manifest, asked)
        # A part may have been deleted so that it is made again.
        if manifest["finished"] and len(finished_parts(folder)) * manifest["part_size"] >= manifest["images"]:
            _tidy(folder, report)
            return False
    store = Store(folder)
    workers = start()
    try:
        # A second process waits here until the first has calibrated.
        with store.alone():
            manifest = _begun(store, workers, asked, profile, reference, plan, batch_size, progress)
        with _Parts(store, plan.parts(manifest["part_size"]), batch_size, screen=recipe.screen) as parts:
            _sample(workers, parts, StabilityProfile.load(folder / PROFILE), plan.images, progress)
    finally:
        workers.close()
    with store.alone():
        store.write_manifest(read_manifest(folder) | {"finished": _now()})
        if report is not None:
            report(folder)
    clear(folder)
    return True


def _sample(workers: Workers, parts: _Parts, profile: StabilityProfile, images: int, progress: bool) -> None:
    flagged = 0
    with tqdm(total=images, desc="auditing", unit="image", disable=not progress) as bar:
        for made in workers.sample(parts.batches(), profile):
            bar.update(parts.take_found())
            if made is None:
                time.sleep(PATIENCE)
                continue
            batch, rows = made
            batch.part.add(rows)
            parts.take_in(batch, rows)
            flagged += sum(row["trigger_step"] is not None for row in rows)
            bar.set_postfix(flagged=flagged, workers=workers.count, refresh=False)
            bar.update(len(rows))
        bar.update(parts.take_found())


def _tidy(folder: Path, report: Callable[[Path], object] | None) -> None:
    """Does what is left where a finished audit was killed after its last image."""
    if untidy(folder):
        with Store(folder).alone():
            pass  # entering deletes leftover files
        clear(folder)
    if report is not None and not (folder / REPORT).exists():
        report(folder)


class _Parts:
    """Hands out the missing images of every part, batch by batch."""

    def __init__(self, store: Store, parts: Iterator[list[Job]], batch_size: int, *, screen: bool) -> None:
        self._store, self._parts, self._batch_size, self._screen = store, parts, batch_size, screen
        self._found = 0
        self._claimed: list[Part] = []
        self._unscreened: dict[Part, int] = {}  # how many batches of a part are not screened yet
        self._suspicious: dict[Part, list[Job]] = {}  # of the same parts
        self._next: deque[Batch] = deque()  # suspicious images that fill a batch, or are the last of their part

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_error: object) -> None:
        """Leaves unfinished parts to other processes."""
        for part in self._claimed:
            part.release()

    def take_found(self) -> int:
        """Number of images that were found finished since the last call."""
        found, self._found = self._found, 0
        return found

    def take_in(self, batch: Batch, rows: Sequence[Mapping[str, Any]]) -> None:
        """What came of a batch: of one that was screened, the images without a row are to be sampled."""
        if not batch.screens:
            return
        part, settled = batch.part, {row["image"] for row in rows}
        self._unscreened[part] -= 1
        suspicious = self._suspicious[part]
        suspicious += [job for job in batch.jobs if job.image not in settled]
        while len(suspicious) >= self._batch_size or (suspicious and not self._unscreened[part]):
            self._next.append(Batch(part, suspicious[: self._batch_size]))
            del suspicious[: self._batch_size]
        if not self._unscreened[part]:
            del self._unscreened[part], self._suspicious[part]

    def batches(self) -> Iterator[Batch | None]:
        """``None`` while everything that is left waits for batches that are not back, or while other processes work on it:
        they may finish it, or die and leave it."""
        parts: Iterable[tuple[int, list[Job]]] = enumerate(self._parts)
        while True:
            elsewhere = []
            for number, jobs in parts:
                if self._store.done(number):
                    self._found += len(jobs)
                elif (part := self._store.claim(number, jobs)) is None:
                    elsewhere.append((number, jobs))
                else:
                    yield from self._of(part)
            while self._next or self._unscreened:
                yield self._next.popleft() if self._next else None
            if not elsewhere:
                return
            yield None
            parts = elsewhere

    def _of(self, part: Part) -> Iterator[Batch]:
        self._found += part.found
        self._claimed = [one for one in self._claimed if not one.finished] + [part]
        missing, size = part.missing, self._batch_size * (AT_ONCE if self._screen else 1)
        if self._screen and missing:
            self._unscreened[part], self._suspicious[part] = -(-len(missing) // size), []
        for start in range(0, len(missing), size):
            yield Batch(part, missing[start : start + size], self._screen)
            while self._next:
                yield self._next.popleft()


def _asked(recipe: Recipe, plan: Plan, profile: Path | None, reference: Sequence[str], reference_from: str) -> dict[str, Any]:
    """What was asked for, in the form of the manifest, as far as it is known without loading the model."""
    return {
        "model": {"name": Path(recipe.model).name, "files": recipe.files(), "loras": recipe.lora_files()},
        "prompts": {"file": plan.source.name, "sha256": plan.sha256, "rows": plan.rows, "column": plan.column},
        "settings": {
            "steps": recipe.steps,
            "guidance_scale": recipe.guidance,
            "height": recipe.height,
            "width": recipe.width,
            "seeds_per_prompt": plan.seeds_per_prompt,
            "seed": plan.seed,
            "mode": recipe.mode,
            "images": recipe.keep,
            "dtype": recipe.dtype,
            "screen": recipe.screen,
        },
        "thresholds": recipe.thresholds.to_dict(),
        "profile": {
            "from": reference_from if profile is None else profile.name,
            "sha256": None if profile is None else file_hash(profile),
            "reference_sha256": None if profile is not None else hashlib.sha256("\n".join(reference).encode()).hexdigest(),
        },
    }


def _goes_on(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuses a manifest that lacks what going on with the audit needs.

    Raises:
        AuditError: naming it.
    """
    devices = manifest.get("devices")
    whole = {
        "images": planned_images(manifest) is not None,
        "part_size": type(manifest.get("part_size")) is int and 0 < manifest["part_size"] <= LARGEST_PART,
        "devices": isinstance(devices, list) and all(isinstance(device, str) for device in devices),
        "finished": isinstance(manifest.get("finished"), (str, type(None))) and "finished" in manifest,
    }
    if damaged := [name for name, good in whole.items() if not good]:
        raise AuditError(f"{folder / MANIFEST} is damaged: {damaged[0]} is not as it was written. Name another folder")


def _same(folder: Path, manifest: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuses to go on with an audit that is not the one asked for.

    Raises:
        AuditError: naming what differs.
    """
    for section, values in asked.items():
        known = mapping(manifest.get(section))
        for name, value in values.items():
            # The model may be on another machine, and then has no files here.
            if (section, name) == ("model", "files") and not value:
                continue
            # The hash of a calibrated profile cannot be asked for.
            if (section, name) == ("profile", "sha256") and value is None:
                continue
            if known.get(name) != value:
                said = "" if isinstance(value, (dict, list)) else f" (it has {known.get(name)!r}, you ask for {value!r})"
                raise AuditError(
                    f"{folder} holds an audit with other {section}: {name.replace('_', ' ')}{said}. Name another folder, or "
                    "use the same options as before"
                )


def _begun(
    store: Store,
    workers: Workers,
    asked: dict[str, Any],
    profile: Path | None,
    reference: Sequence[str],
    plan: Plan,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """The manifest: the one in the folder, if its weights are the same, or a new one, together with its profile."""
    loaded = workers.describe()
    about = {name: loaded[name] for name in ("pipeline", "components", "files", "loras", "scheduler", "dtype")}
    if (store.folder / MANIFEST).exists():
        manifest = read_manifest(store.folder)
        # Another process may have begun the audit while this one loaded the model.
        _same(store.folder, manifest, asked)
        _same(store.folder, manifest, {"model": about})
        if loaded["device"] not in manifest["devices"]:
            manifest["devices"].append(loaded["device"])
            store.write_manifest(manifest)
        return manifest
    target = store.folder / PROFILE
    if profile is not None:
        stability = StabilityProfile.load(profile)
        # Before there is a manifest: an audit with a profile that does not fit could only be deleted.
        workers.trial(next(plan.parts(1))[0], stability)
        write_whole(target, profile.read_bytes())
    else:
        state = store.work / "calibration.json"
        stability = workers.calibrate(reference, batch_size=batch_size, seed=plan.seed, state=state, progress=progress)
        stability.save(target)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "statement": STATEMENT,
        "created": _now(),
        "finished": None,
        **asked,
        "model": asked["model"] | about,
        "profile": asked["profile"]
        | {
            "file": PROFILE,
            "sha256": file_hash(target),
            "reference_runs": stability.count,
            "reference_prompts": stability.reference_prompts,
        },
        "images": plan.images,
        "part_size": plan.part_size,
        "devices": [loaded["device"]],
        "versions": loaded["versions"],
    }
    store.write_manifest(manifest)
    return manifest


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
