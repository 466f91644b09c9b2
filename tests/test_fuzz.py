"""Mutated files of every kind that a user can hand over: each is read, or refused in one line, within bounds.

The ordinary run tries a few files of each kind, always the same. ``FUZZ_SECONDS=600 pytest tests/test_fuzz.py -s`` tries
new ones for so many seconds of each kind, and prints how many. A file that fails is kept and named, with the number that makes
it again.
"""

import json
import os
import random
import resource
import struct
import time

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")
pytest.importorskip("diffusers")

import pyarrow.parquet as pq  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from memorization_guard import GuardError, RunSettings, StabilityProfile, Trace, evidence, lab  # noqa: E402
from memorization_guard.audit import dataset  # noqa: E402
from memorization_guard.audit.summary import summarize  # noqa: E402
from memorization_guard.core.trace import Steps  # noqa: E402
from memorization_guard.files import parse_json  # noqa: E402
from memorization_guard.prompts import read_prompts  # noqa: E402
from memorization_guard.reports import graph  # noqa: E402

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
#: Files of each kind in the ordinary run, seconds that one may take on a busy machine, and KB by which memory may grow.
FILES, LONGEST, LARGEST = 40, 20, 1_000_000

VALUES = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -1e308, 5e-324, float("inf"), float("nan")),
    *("", "a", "\ud800", "\0", "\x1b[31m", "x" * 70_000, [], {}, [[]], [None], {"a": []}),
]


def mutated_json(data, rng):
    """``data`` with another value, another key or a missing one somewhere."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice([1, 1, 1, 3])):
        place = data
        while True:
            keys = list(range(len(place)) if isinstance(place, list) else place)
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
                if rng.random() < 0.15:
                    del place[key]
                else:
                    place[key] = rng.choice(VALUES)
                break
            place = place[key]
    text = json.dumps(data)
    if rng.random() < 0.1:
        depth = rng.choice([10, 100, 2000, 100_000])
        text = text.replace("null", "[" * depth + "]" * depth, 1)
    return text


def mutated_bytes(content, rng):
    """``content`` with bytes changed, cut off, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content[at] = rng.choice([0, 1, 0x22, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 1:
            del content[at : at + rng.choice([1, 4, 100, len(content)])]
        elif kind == 2:
            content[at:at] = content[max(0, at - 50) : at]
        elif kind == 3:
            content[at:at] = rng.choice([b"\0", b"\xff\xfe", b'"', b"\n", b",", b"[" * 2000, struct.pack("<Q", 2**62)])
        elif kind == 4 and at + 8 <= len(content):
            content[at : at + 8] = struct.pack("<d", rng.choice([0.0, -1.0, 1e308, float("inf"), float("nan")]))
    return bytes(content)


def trace(seed=0):
    numbers = np.linspace(10.0, 1.0, 5)
    steps = Steps(**{name: numbers for name in Steps.__dataclass_fields__ if name != "mitigated"}, mitigated=numbers > 9)
    settings = RunSettings(model="m", prediction_type="epsilon", steps=5, guidance_scale=7.5, latent_shape=(4, 8, 8))
    return Trace(verdict="stable", p_value=0.5, asked=0.1, steps=steps, settings=settings, note=None)


def a_list(suffix):
    rows = [{"prompt": f"a cat {n}", "seed": n, "kind": "x", "image": [f"{n}.png"]} for n in range(20)]

    def write(path, rng):
        path = path.with_suffix(suffix)
        if suffix == ".jsonl":
            lines = [mutated_json(row, rng) if rng.random() < 0.1 else json.dumps(row) for row in rows]
            path.write_bytes("\n".join(lines).encode())
        elif suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, compression=rng.choice(["zstd", "snappy", "none"]))
        elif suffix == ".csv":
            path.write_text("prompt,seed,kind\n" + "".join(f'"a cat, {n}",{n},x\n' for n in range(20)))
        else:
            path.write_text("".join(f"a cat {n}\n" for n in range(20)))
        if suffix != ".jsonl" or rng.random() < 0.3:
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        return path

    return write, read_prompts


def write_profile(path, rng):
    with safe_open(lab.PROFILE, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(lab.PROFILE)
    if rng.random() < 0.5:
        name = rng.choice(["settings", "left_out"])
        metadata[name] = mutated_json(json.loads(metadata[name]) or {"a": 1}, rng)
    else:
        name = rng.choice(sorted(tensors))
        changed = tensors[name].copy()
        changed.flat[rng.randrange(changed.size)] = rng.choice(
            [0, -1, 1e300 if changed.dtype == np.float64 else 3e38, np.inf, np.nan]
        )
        tensors[name] = rng.choice([changed, changed[:-1], changed[None], changed.astype(np.int64, casting="unsafe")])
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata=metadata)
    if rng.random() < 0.3:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    return path


def read_profile(path):
    profile = StabilityProfile.load(path)
    str(profile.check(RunSettings(sigmas=(14.0, 1.0), guidance_scale=3.0, steps=2, latent_shape=(4, 16, 16))))
    json.dumps(profile.settings.to_dict(), allow_nan=False)
    if profile.reference is not None:
        profile.reference.tail(1.0).p_value(np.ones(2))


def write_trace(path, rng):
    path.write_text(mutated_json(trace().to_dict(), rng))
    return path


def show(found):
    json.dumps(found.to_dict(), allow_nan=False)
    graph.svg(found)


def read_trace(path):
    try:
        found = Trace.from_dict(parse_json(path.read_text()))
    except ValueError:  # what reads a trace makes its own error of it
        return
    try:
        found.to_dict()
    except (ArithmeticError, ValueError):  # and tries this first
        return
    show(found)


def write_image(path, rng):
    picture = Image.new("RGB", (8, 8), "red")
    record = evidence.record(
        [trace()], pixels=[evidence.pixel_hash(picture)], settings={"a": 1}, settings_in=evidence.SETTINGS_KEY
    )
    if rng.random() < 0.5:
        path.with_suffix(evidence.SIDECAR).write_text(mutated_json(record, rng))
        path.write_bytes(evidence.png(picture, {}, None).replace(b"memorization_guard", b"memorization_other"))
        picture.save(path, "PNG")
    else:
        path.write_bytes(mutated_bytes(evidence.png(picture, record, {"a": 1}), rng))
    return path


def read_image(path):
    for found in evidence.verify(path).traces:
        try:
            show(found)
        except ArithmeticError:
            raise AssertionError("a trace was taken that cannot be shown") from None


def write_audit(path, rng):
    (path / dataset.RESULTS).mkdir(parents=True, exist_ok=True)
    manifest = {
        **{
            "format": dataset.FORMAT,
            "version": dataset.FORMAT_VERSION,
            "images": 4,
            "finished": "now",
            "model": {"name": "m"},
        },
        **{"settings": {"mode": "trace"}, "thresholds": {"false_positive_rate": 0.005, "method": "reference"}},
        **{"prompts": {"file": "a.txt"}, "profile": {"reference_prompts": 400}},
    }
    (path / dataset.MANIFEST).write_text(mutated_json(manifest, rng))
    row = {"image": 0, "row": 0, "prompt": "a", "seed": 0, "verdict": "stable", "steps": 5, "corrected_steps": 0}
    part = path / dataset.RESULTS / "part-000000.parquet"
    dataset.write_table(part, [row | {"p_value": 0.5, "screened_out": False, "trace": json.dumps(trace().to_dict())}])
    if rng.random() < 0.5:
        part.write_bytes(mutated_bytes(part.read_bytes(), rng))
    return path


KINDS = {
    **{suffix: a_list(suffix) for suffix in (".txt", ".jsonl", ".csv", ".parquet")},
    **{"profile": (write_profile, read_profile), "trace": (write_trace, read_trace)},
    **{"image": (write_image, read_image), "audit": (write_audit, summarize)},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused(kind, tmp_path):
    write, read = KINDS[kind]
    end, number, refused = time.monotonic() + SECONDS, 0, 0
    first = random.SystemRandom().randrange(2**32) if SECONDS else 0
    while number < FILES or time.monotonic() < end:
        rng = random.Random(f"{kind} {first + number}")
        path = write(tmp_path / f"{number}", rng)
        memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        said = ""
        try:
            read(path)
        except (GuardError, OSError) as error:
            said = str(error)
        except Exception as error:
            pytest.fail(f"{path}, number {first + number}: {type(error).__name__}: {error!s:.300}")
        assert len(said) < 2000, (path, first + number)
        assert time.perf_counter() - begun < LONGEST, (path, first + number)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < LARGEST, (path, first + number)
        refused += bool(said)
        if path.is_file():
            path.unlink()
        number += 1
    print(f"\n{kind}: {number} files from number {first} on, {refused} refused in a line")
