"""One call of the host's ``process_images``: what the user chose, what was seen of each image, and where that is written."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..memorization_guard import (
    Mode,
    NoiseLevel,
    RunSettings,
    StabilityMonitor,
    StabilityProfile,
    StepEvent,
    Thresholds,
    Trace,
    evidence,
)
from ..memorization_guard.core.settings import HOST_CONSTANTS, MODES, Serves
from ..memorization_guard.files import write_whole
from ..memorization_guard.reports import graph
from ..memorization_guard.reports.words import summary
from .record import Record

if TYPE_CHECKING:
    from .live import LiveRuns

log = logging.getLogger(__name__)

_PUBLISHED = "the published method edits latents between solver steps, which only diffusers allows: it cannot be used here"

#: Of the scripts; also begins the name of every field that we write into an image's infotext.
TITLE = "Memorization Guard"

# Attributes of a processing object. The host copies it for each cell of a plot, so what is to differ is set on the copy.
SESSION = "memorization_guard_session"
CHOSEN = "memorization_guard_options"  # what the dropdown's script chose, instead of the accordion
LABEL = "memorization_guard_label"
CALIBRATING = "memorization_guard_calibrating"  # what the run serves for, of a reference
FAILED = "memorization_guard_failed"  # why a generation is not watched that should be


_NUMBERS = itertools.count()  # a task of the page may have several sessions: no two runs have one name

#: Gives the profile of a run's weights, by their fingerprint, or why there is none.
Automatic = Callable[[str | None], tuple[StabilityProfile | None, str | None]]


@dataclass(frozen=True)
class Options:
    """What a user can choose for the runs of one call."""

    mode: Mode = "trace"
    profile: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"the mode is {self.mode!r}; known: {', '.join(MODES)}")
        if self.thresholds.method == "published":
            raise ValueError(_PUBLISHED)

    @classmethod
    def of(cls, mode: str, profile: str | None, *values: float | str | None) -> Options:
        """From the values of the controls; ``values`` are those of ``HOST_CONSTANTS``, or ``None`` for a default.

        Raises:
            ValueError: if a value is not known or out of bounds.
        """
        if "published" in values:
            raise ValueError(_PUBLISHED)
        constants: dict[str, Any] = {
            each.name: value if "choices" in each.metadata else float(value)
            for each, value in zip(HOST_CONSTANTS, values, strict=False)
            if value is not None
        }
        return cls(cast(Mode, mode), None if profile in (None, "", "None") else profile, Thresholds(**constants))

    @classmethod
    def from_infotext(cls, fields: Mapping[str, str]) -> Options | None:
        """The choice that :meth:`infotext` wrote, from the fields of a pasted image; ``None`` where it is no image of ours."""
        if TITLE not in fields:
            return None
        try:
            constants = [fields.get(f"{TITLE} {each.name}") for each in HOST_CONSTANTS]
            return cls.of(fields[TITLE].partition(",")[0], fields.get(f"{TITLE} profile"), *constants)
        except ValueError:
            return None  # written by hand, or by another version

    def infotext(self) -> dict[str, Any]:
        """What brings the same choice back when an image's infotext is pasted."""
        fields: dict[str, Any] = {TITLE: self.mode}
        if self.profile is not None:
            fields[f"{TITLE} profile"] = self.profile
        for each in HOST_CONSTANTS:
            if (value := getattr(self.thresholds, each.name)) != each.default:
                fields[f"{TITLE} {each.name}"] = value
        return fields


def pasted_result(fields: Mapping[str, str]) -> str:
    """What a pasted image's infotext says was seen when it was made."""
    passes = []
    for part in ("", "hires "):
        if (verdict := fields.get(f"{TITLE} {part}verdict")) is not None:
            words = [f"{part}{verdict}"]
            words += [
                f"{name} {fields[key]}"
                for name in ("rarity", "words", "score", "trigger step")
                if (key := f"{TITLE} {part}{name}") in fields
            ]
            passes.append(", ".join(words))
    return "; ".join(passes)


class _ModeField(str):
    """The mode, as what reads all fields has it; called by the host for an image's infotext, what became of it there."""

    def __new__(cls, mode: str, became: Callable[..., str]) -> _ModeField:
        field = super().__new__(cls, mode)
        field._became = became
        return field

    _became: Callable[..., str]

    def __deepcopy__(self, memo: Any) -> _ModeField:
        return self

    def __call__(self, **scope: Any) -> str:
        return self._became(scope)


@dataclass
class Run:
    """One run of the sampler: of which batch, and whether it is the second pass of hires fix."""

    name: str
    batch: int
    hires: bool
    monitor: StabilityMonitor
    known: str | None  # what its traces would say before it begins
    traces: list[Trace] = field(default_factory=list)


class Session:
    """The runs of one call of ``process_images``, and what is told of them.

    Args:
        options: what the user chose.
        profile: the profile that they named, loaded.
        automatic: gives the profile of the weights of a run, or why there is none, where they want one that made itself.
        live: where the page looks for a graph. task: the page's name for the generation, if it came from one.
        label: what the page calls these runs, where one task has several calls. first: number of the first image in the task.
        serves: as for :class:`StabilityMonitor`.
    """

    def __init__(
        self,
        options: Options,
        profile: StabilityProfile | None,
        *,
        live: LiveRuns,
        task: str | None,
        label: str = "",
        first: int = 1,
        serves: Serves | None = None,
        automatic: Automatic | None = None,
    ) -> None:
        self.options = options
        self._automatic = automatic
        self._serves = serves
        self.runs: list[Run] = []
        self._profile = profile
        self._live = live
        self._task = task
        self._label = label
        self._first = first
        #: What the user was told below the images.
        self.said: list[str] = []
        #: The image that the host is about to save, as (batch, number in it).
        self.saving: tuple[int, int] | None = None
        self._saved: tuple[Any, Record] | None = None

    def new_monitor(self, p: Any, settings: RunSettings, level: Callable[[float], NoiseLevel]) -> StabilityMonitor:
        """Begins a run of ``p``'s sampler; ``level`` gives the noise level that the host's number for one means."""
        batch, hires = int(getattr(p, "iteration", 0)), bool(getattr(p, "is_hr_pass", False))
        name = f"run {next(_NUMBERS)}"
        options = self.options
        profile, missing = (self._profile, None) if self._automatic is None else self._automatic(settings.model_hash)
        monitor = StabilityMonitor(
            profile,
            options.thresholds,
            options.mode,
            # Without a page nobody looks, and no step needs to be sent anywhere.
            (lambda event: self._send_step(name, event)) if self._task is not None else None,
            settings=settings,
            level=level,
            serves=self._serves,
            missing=missing,
        )
        outline = monitor.outline()
        self.runs.append(Run(name, batch, hires, monitor, outline["note"]))
        if outline["note"] is not None and not monitor.judges:
            self.say(p, f"hires pass: {outline['note']}" if hires else outline["note"])
        first = self._first + batch * p.batch_size
        images = f"image {first}" if p.batch_size == 1 else f"images {first}-{first + p.batch_size - 1}"
        self._send("begin", name, title=self._title(images, hires), first=first, **outline)
        return monitor

    def end_run(self, p: Any) -> None:
        """The run that began last has ended; what kept it from being judged is said."""
        run = self.runs[-1]
        run.traces = run.monitor.traces
        notes = [trace.note for trace in run.traces] or [f"not watched: {run.monitor.error or 'the run ended at once'}"]
        for note in notes:
            # A reference that is needed for its beginning only is stopped there, as it should.
            if note is not None and note != run.known and not (self._serves == "first" and run.monitor.error is None):
                self.say(p, f"hires pass: {note}" if run.hires else note)
        self._send("end", run.name, traces=[trace.to_dict() for trace in run.traces])

    def say(self, p: Any, message: str) -> None:
        """Tells the user below the image, and once."""
        if message not in self.said:
            self.said.append(message)
            log.warning("%s: %s", TITLE, message)
            p.comment(f"{TITLE}: {message}")

    def runs_of(self, batch: int, index: int) -> list[tuple[Run, Trace]]:
        """The runs that made image ``index`` of a batch, first pass first."""
        return [(run, run.traces[index]) for run in self.runs if run.batch == batch and index < len(run.traces)]

    def withholds(self, batch: int, index: int) -> bool:
        """Whether nothing is to be handed on of image ``index`` of a batch."""
        triggered = any(trace.trigger_step is not None for _, trace in self.runs_of(batch, index))
        return self.options.mode == "stop" and triggered

    def write_infotext(self, p: Any) -> None:
        """Has the host write what is known of each image into its infotext."""
        fields = self.options.infotext()
        fields[TITLE] = _ModeField(self.options.mode, self._mode)
        for hires in (False, True):
            for name in ("verdict", "rarity", "words", "score", "trigger step"):
                key = f"{TITLE} {'hires ' if hires else ''}{name}"
                fields[key] = lambda _name=name, _hires=hires, **scope: self._field(_name, _hires, scope)
        p.extra_generation_params.update(fields)

    def _scoped(self, scope: Mapping[str, Any]) -> list[tuple[Run, Trace]]:
        """The runs of the image that the host's ``create_infotext`` is about, by its own variables."""
        p, index = scope["p"], scope["index"]
        # While a batch is made the host counts within it, and afterwards over all.
        inside = scope.get("all_prompts") is getattr(p, "prompts", None)
        return self.runs_of(*(p.iteration, index) if inside else divmod(index, p.batch_size))

    def _mode(self, scope: Mapping[str, Any]) -> str:
        """The mode, and whether it came to nothing: who reads *mitigate* is to know that the image was protected."""
        if scope.get("use_main_prompt"):  # a grid of several images
            judged = _judged([trace for run in self.runs for trace in run.traces])
        else:
            judged = _judged([trace for _, trace in self._scoped(scope)])
        return self.options.mode if judged or self.options.mode == "trace" else f"{self.options.mode}, not judged"

    def judged(self, batch: int, index: int) -> bool:
        """Whether image ``index`` of a batch was judged in every run that made it."""
        return _judged([trace for _, trace in self.runs_of(batch, index)])

    def _field(self, name: str, hires: bool, scope: Mapping[str, Any]) -> str | None:
        if scope.get("use_main_prompt"):
            return None  # a grid of several images
        trace = next((trace for run, trace in self._scoped(scope) if run.hires == hires), None)
        if trace is None:
            return None
        if name == "verdict":
            return trace.verdict
        if name == "rarity":
            # The host puts quotes around a value with a comma, and takes them off again when it is pasted.
            return trace.rarity
        if name == "words":
            return None if trace.words is None else ", ".join(trace.words.words)
        if name == "score":
            return None if trace.score is None else f"{trace.score:.2f}"
        return None if trace.trigger_step is None else str(trace.trigger_step)

    def report(self, p: Any) -> list[list[dict[str, Any]]]:
        """For every image the traces of its runs, JSON-ready."""
        return [self._written(*divmod(number, p.batch_size)) for number in range(len(p.all_prompts))]

    def _written(self, batch: int, index: int) -> list[dict[str, Any]]:
        return [{"hires": run.hires, "trace": trace.to_dict()} for run, trace in self.runs_of(batch, index)]

    def graphs(self, batch: int, index: int) -> list[Any]:
        """The stability graphs of an image as pictures, one a run."""
        return [graph.image(trace) for _, trace in self.runs_of(batch, index)]

    def before_save(self, params: Any, in_image: bool) -> None:
        """Gives the image that the host is about to save its evidence record.

        Args:
            params: the host's ``ImageSaveParams``.
            in_image: whether the record may stand in the image itself, where that is a PNG.
        """
        self._saved = None
        if self.saving is None:
            return  # a mask, a grid, or an image of before
        found = self.runs_of(*self.saving)
        self.saving = None
        if not found:
            return
        record = Record(self, params, [(trace, self._title("", run.hires)) for run, trace in found])
        self._saved = params, record
        if in_image and Path(params.filename).suffix.lower() == ".png":
            params.pnginfo[evidence.KEY] = record

    def save_trace(self, params: Any) -> None:
        """Writes the evidence record of the image that was saved with ``params`` beside it, whole or not at all."""
        if self._saved is None or self._saved[0] is not params:
            return
        content = str(self._saved[1])
        self._saved = None
        if not content:
            return
        try:
            write_whole(Path(params.filename).with_suffix(evidence.SIDECAR), content)
        except OSError as error:
            log.warning("Memorization Guard could not save the trace of %s: %s", params.filename, error)

    def tell_images(self, p: Any, processed: Any) -> None:
        """Tells the page which images of the gallery the runs made, by what the host shows below them."""
        first = processed.index_of_first_image
        for run in self.runs:
            begin = first + run.batch * p.batch_size
            infotexts = processed.infotexts[begin : begin + p.batch_size]
            self._send("images", run.name, infotexts=infotexts + processed.infotexts[:first])  # a grid is of all runs

    def tell_verdicts(self, p: Any) -> None:
        """Says below the images which of them are suspicious."""
        for number in range(len(p.all_prompts)):
            for run, trace in self.runs_of(*divmod(number, p.batch_size)):
                if trace.trigger_step is not None:
                    told = summary(trace, self._title(f"image {self._first + number}", run.hires)).partition("\n")[0]
                    p.comment(f"{TITLE}: {told}")

    def _title(self, images: str, hires: bool) -> str:
        return " ".join(filter(None, (images, "hires" if hires else "", self._label)))

    def _send_step(self, name: str, event: StepEvent) -> None:
        self._send("step", name, **event.to_dict())

    def _send(self, kind: str, name: str, **data: Any) -> None:
        if self._task is None:
            return
        try:
            self._live.send(self._task, {"kind": kind, "run": name, **data})
        except Exception:
            log.warning("Memorization Guard could not show the graph of this run.", exc_info=True)


def _judged(traces: list[Trace]) -> bool:
    return bool(traces) and all(trace.verdict != "unscored" for trace in traces)
