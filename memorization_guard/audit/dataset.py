"""The folder of an audit: results as Parquet, a manifest, images, and the files with which an interrupted audit goes on.

DIR/
    manifest.json        what was audited and how; a folder without it is no audit
    profile.safetensors  the stability profile
    results/             part-000000.parquet, ...: a row for each image
    images/              000000/00000007.png, ...: a folder for each part
    report.html
    .work/               journals and locks of unfinished parts; deleted once the audit is finished
    .lock                held while an audit begins and ends
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..core.reference import p_value_floor as floor_of
from ..core.settings import VERDICTS
from ..core.trace import Trace
from ..files import parse_json, read_whole, write_whole
from ..parquet import open_parquet
from . import AuditError

FORMAT = "memorization-guard.audit"
FORMAT_VERSION = 4

#: Rows, and bytes of a row group in memory, of the largest part that is read; ours have 1,024 rows.
MAX_ROWS, MAX_PART = 1_000_000, 512 * 2**20

MANIFEST = "manifest.json"
PROFILE = "profile.safetensors"
RESULTS = "results"
IMAGES = "images"
#: Folder of what an audit with a training folder needs besides; see ``copies.py``.
TRAINING = "training"
REPORT = "report.html"

_SETTINGS = pa.struct(
    [
        ("model", pa.string()),
        ("model_hash", pa.string()),
        ("prediction_type", pa.string()),
        ("sampler", pa.string()),
        ("scheduler", pa.string()),
        ("steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("latent_shape", pa.list_(pa.int32())),
        ("sigmas", pa.list_(pa.float64())),
        ("end_sigma", pa.float64()),
    ]
)

#: A row for each image. ``image`` counts the images of the audit from 0, ``row`` the prompts of the list; ``screened_out``
#: says that the image was judged by its first evaluation and not sampled; ``file`` is the saved image, relative to the folder;
#: ``words`` are those that call the copy up, and ``prompt_without_words`` is the prompt without them, both null where none
#: were told; ``settings`` are the trace's, and ``trace`` is its JSON form (``docs/trace.md``).
SCHEMA = pa.schema(
    [
        pa.field("image", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("screened_out", pa.bool_(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("joint_score", pa.float64()),
        pa.field("p_value", pa.float64()),
        pa.field("detail", pa.float64()),
        pa.field("uncalibrated_score", pa.float64()),
        pa.field("trigger_step", pa.int32()),
        pa.field("nonfinite_step", pa.int32()),
        pa.field("steps", pa.int32(), nullable=False),
        pa.field("corrected_steps", pa.int32(), nullable=False),
        pa.field("note", pa.string()),
        pa.field("words", pa.list_(pa.string())),
        pa.field("prompt_without_words", pa.string()),
        pa.field("file", pa.string()),
        pa.field("settings", _SETTINGS),
        pa.field("trace", pa.string(), nullable=False),
    ]
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an audit.

    Raises:
        FileNotFoundError: if the folder holds none.
        AuditError: if it cannot be read, or is of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no audit: it holds no {MANIFEST}")
    try:
        manifest = parse_json(read_whole(path))
        known = manifest["format"] == FORMAT
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"{path} cannot be read as the manifest of an audit: {error}") from None
    if not known or version != FORMAT_VERSION:
        raise AuditError(f"{path} has format {manifest['format']!r:.60}, version {version!r:.20}: update Memorization Guard")
    return manifest


def mapping(value: object) -> dict[str, Any]:
    """A section of a manifest; empty if it is missing."""
    return value if isinstance(value, dict) else {}


def counted(number: int, noun: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def planned_images(manifest: Mapping[str, Any]) -> int | None:
    """Number of images that the finished audit will have; ``None`` where the manifest does not tell."""
    return _count(manifest.get("images"))


def _count(value: object) -> int | None:
    """A number of a manifest that counts something; ``None`` where it cannot be one."""
    return value if type(value) is int and 0 < value < 2**63 else None


def is_finished(manifest: Mapping[str, Any], images: int) -> bool:
    """Whether an audit that holds ``images`` images was finished and still has all of them."""
    return bool(manifest.get("finished")) and images >= (planned_images(manifest) or 0)


def screens(manifest: Mapping[str, Any]) -> bool:
    """Whether an audit samples only those images whose first evaluation is suspicious."""
    return mapping(manifest.get("settings")).get("screen") is True


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Writes rows with the columns of ``schema`` as Parquet, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())


def parts(folder: Path) -> list[Path]:
    """The finished parts of an audit, in order."""
    return sorted((folder / RESULTS).glob("part-*.parquet"))


def scan(folder: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of the finished parts, in order. Some thousand are read at a time, so that memory does not grow with the audit.

    Raises:
        AuditError: if a part is damaged.
    """
    for path in parts(folder):
        with _opened(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                # A damaged part is found out here, and not where one of its values is used.
                batch.validate(full=True)
                for name in batch.schema.names:
                    if batch[name].null_count and not SCHEMA.field(name).nullable:
                        raise pa.ArrowInvalid(f"a row has no {name}")
                if (
                    "verdict" in batch.schema.names
                    and not pc.all(pc.is_in(batch["verdict"], pa.array(VERDICTS)), min_count=0).as_py()
                ):
                    raise pa.ArrowInvalid("a row has a verdict that is none")
                yield batch


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A part, for reading; refuses one that has not the columns of :data:`SCHEMA`, or is far larger in memory than ours are.

    Raises:
        AuditError: if it is damaged, also if this turns out in the block.
    """
    try:
        with open_parquet(path) as file:
            rows = file.metadata.num_rows
            if rows > MAX_ROWS or any(
                file.metadata.row_group(number).total_byte_size > MAX_PART for number in range(file.num_row_groups)
            ):
                raise pa.ArrowInvalid("it is larger than any part")
            for field in SCHEMA:
                number = file.schema_arrow.get_field_index(field.name)
                kind = file.schema_arrow.field(number).type if number >= 0 else "missing"
                if kind != field.type:
                    raise pa.ArrowInvalid(f"the column {field.name} is {kind}, not {field.type}")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path} cannot be read: {error}; delete it and call the audit again to make it again") from None


def read_traces(folder: Path, images: Iterable[int]) -> dict[int, Trace]:
    """The traces of some images of an audit, without those that cannot be read. Reads only the row groups that hold them.

    Raises:
        AuditError: if a part is damaged.
    """
    wanted, found = set(images), {}
    for path in parts(folder):
        with _opened(path) as file:
            for group in range(file.num_row_groups):
                # Not by the statistics of the column: of damaged ones pyarrow may end the process.
                images_of = file.iter_batches(row_groups=[group], columns=["image"])
                if not any(pc.is_in(batch["image"], pa.array(sorted(wanted), pa.int64())).true_count for batch in images_of):
                    continue
                for batch in file.iter_batches(64, row_groups=[group], columns=["image", "trace"]):
                    inside = pc.is_in(batch["image"], pa.array(sorted(wanted), pa.int64()))
                    if not inside.true_count:
                        continue
                    for row in batch.filter(inside).to_pylist():
                        try:
                            found[row["image"]] = Trace.from_dict(parse_json(row["trace"]))
                        except ValueError:
                            continue
    return found


def reference_prompts(manifest: Mapping[str, Any]) -> int | None:
    """How many prompts the images of an audit were held against; ``None`` where it does not say."""
    return _count(mapping(manifest.get("profile")).get("reference_prompts"))


def p_value_floor(manifest: Mapping[str, Any]) -> float | None:
    """The smallest p-value that those can carry."""
    count = reference_prompts(manifest)
    return None if count is None else floor_of(count)


def facts(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What was audited, as text: sections of names and values. Unknown fields of a manifest are in the section ``other``."""
    known = ("model", "prompts", "settings", "thresholds", "profile", "devices", "versions")
    hidden = ("format", "version", "statement", "images")
    sections: dict[str, dict[str, str]] = {}
    for name in (*known, *(name for name in manifest if name not in (*known, *hidden))):
        if name in manifest:
            section = name if name in known else "other"
            sections.setdefault(section, {}).update(_flat("" if section == name else name, manifest[name]))
    return {name: section for name, section in sections.items() if section}


def _flat(name: str, value: object) -> dict[str, str]:
    if isinstance(value, dict):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        parts = {str(number + 1): part for number, part in enumerate(value)}
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value)  # type: ignore[call-overload]
        return {name.replace("_", " "): "-" if shown is None else str(shown)}
    return {key: shown for part in parts for key, shown in _flat(f"{name} {part}".strip(), parts[part]).items()}
