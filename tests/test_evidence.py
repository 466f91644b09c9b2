"""Evidence: a record is found with its image, and what was changed since is found out."""

import hashlib
import io
import json
import math
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from memorization_guard import NoiseLevel, RunSettings, StabilityMonitor, evidence
from memorization_guard.core.trace import STATEMENT
from memorization_guard.core.words import Words
from memorization_guard.fingerprint import content_hash
from memorization_guard.reports import graph
from memorization_guard.reports.words import summary

MADE_WITH = {"prompt": "a fox", "seed": 3, "guidance_scale": 7.5}


def traces(count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    monitor = StabilityMonitor(settings=RunSettings(prediction_type="epsilon", steps=3, latent_shape=(4, 8, 8)))
    for sigma in (12.0, 8.0, 4.0, 0.0):
        x, cond, uncond = torch.randn(3, count, 4, 8, 8, generator=generator)
        if sigma:
            monitor.predicted(x, sigma, cond, uncond)
        monitor.latent(x, NoiseLevel.from_model(sigma, "epsilon"), evaluated=True)
    return monitor.traces


def picture(seed=0, size=(9, 7)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recorded(pictures=None, found=None, **keywords):
    pictures = [picture()] if pictures is None else pictures
    hashes = [evidence.pixel_hash(image) for image in pictures]
    options = {"pixels": hashes, "settings": MADE_WITH, "settings_in": evidence.SETTINGS_KEY} | keywords
    return evidence.record(traces(len(pictures)) if found is None else found, **options)


def save(path, image, record, made_with=MADE_WITH):
    path.write_bytes(evidence.png(image, record, made_with))
    return path


def save_with(path, image, **chunks):
    """A PNG with text chunks, as another program writes it."""
    text = PngInfo()
    for name, value in chunks.items():
        text.add_text(name, value)
    image.save(path, pnginfo=text)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "image.png"


def found(path):
    result = evidence.verify(path)
    return result.pixels, result.settings, result.unaltered, result.belongs


def test_an_image_and_its_record_belong_together(file):
    (trace,) = traces()
    result = evidence.verify(save(file, picture(), recorded(found=[trace])))
    assert (result.pixels, result.settings, result.unaltered, result.belongs) == ("match", "match", True, "match")
    assert (result.image, result.batch, result.runs, result.found_in) == (0, 1, ("",), file)
    assert result.traces[0].to_dict()["steps"] == trace.to_dict()["steps"]
    assert recorded()["statement"] == STATEMENT


def test_the_words_that_call_a_copy_up_are_kept_and_told(file, call):
    (trace,) = traces()
    trace.words = Words(("<b>", "m\u00fcller\U0001f431", "\x1b[31m"), (0.001, 0.002, 0.003), "a fox by", 0.6)
    save(file, picture(), recorded(found=[trace]))
    assert evidence.verify(file).traces[0].words == trace.words
    told = call("verify", file).output
    assert 'called up by "<b>", "m\u00fcller\U0001f431", "\ufffd[31m"' in told
    altered = recorded(found=[trace])
    altered["traces"][0]["words"]["words"][0] = "fox"
    assert found(save(file, picture(), altered)) == ("match", "match", False, "differ")


def test_the_document_names_every_field(request):
    text = (request.config.rootpath / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert [name for name in recorded() if f'"{name}"' not in text] == []
    assert evidence.NO_SIGNATURE in text
    assert STATEMENT in text


def test_the_hashes_are_those_that_the_document_describes():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert evidence.pixel_hash(pixels) == hashlib.sha256(b"3x2 RGB " + bytes(range(18))).hexdigest()
    record = recorded()
    assert record["settings"] == hashlib.sha256(json.dumps(MADE_WITH, sort_keys=True).encode()).hexdigest()
    known = record.pop("content_hash")
    assert known == hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def test_one_pixel_that_changed_is_found_out(file):
    image, record = picture(), recorded()
    image.putpixel((8, 6), tuple(value ^ 1 for value in image.getpixel((8, 6))))
    assert found(save(file, image, record)) == ("differ", "match", True, "differ")


def test_the_same_pixels_in_another_shape_are_another_image():
    flat = np.zeros((4, 6, 3), dtype=np.uint8)
    assert evidence.pixel_hash(flat) != evidence.pixel_hash(flat.reshape(6, 4, 3))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["RGB", "RGBA", "P", "L"]), st.integers(0, 1000))
@settings(max_examples=40)
def test_a_hash_outlives_a_png_in_every_mode(width, height, mode, seed):
    image = picture(seed, (width, height)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert evidence.pixel_hash(Image.open(buffer)) == evidence.pixel_hash(image)
    assert evidence.pixel_hash(np.asarray(image.convert("RGB"))) == evidence.pixel_hash(image)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8)])
def test_other_arrays_have_no_hash(pixels):
    with pytest.raises(ValueError, match="uint8"):
        evidence.pixel_hash(pixels)


def test_settings_that_changed_are_found_out_and_missing_ones_said(file):
    assert found(save(file, picture(), recorded(), MADE_WITH | {"seed": 4})) == ("match", "differ", True, "differ")
    assert found(save(file, picture(), recorded(), None)) == ("match", "unknown", True, "match")
    assert found(save(file, picture(), recorded(settings=None))) == ("match", "unknown", True, "match")


@pytest.mark.parametrize(
    ("recorded_settings", "written"),
    [
        ({"b": 1, "a": [0.1, None]}, '{"a": [0.1, null], "b": 1}'),
        ("a fox\nSteps: 20, Sampler: Euler", "a fox\nSteps: 20, Sampler: Euler"),
        ("äöü 猫", "äöü 猫"),
        ('{"json": 1}', '{"json": 1}'),
        ({"is_changed": float("nan")}, '{"is_changed": NaN}'),
    ],
)
def test_settings_are_compared_as_text_and_as_json_in_the_chunk_that_the_record_names(file, recorded_settings, written):
    record = json.dumps(recorded(settings=recorded_settings, settings_in="parameters"))
    save_with(file, picture(), memorization_guard=record, parameters=written)
    assert found(file) == ("match", "match", True, "match")
    save_with(file, picture(), memorization_guard=record, parameters=written + " ,")
    assert found(file) == ("match", "differ", True, "differ")


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["traces"][0].update(verdict="stable"),
        lambda r: r["traces"][0]["steps"]["update_norm"].__setitem__(0, 1.0),
        lambda r: r.update(statement="proof"),
        lambda r: r.update(settings=content_hash("others")),
        lambda r: r.pop("content_hash"),
    ],
)
def test_a_record_that_was_edited_is_found_out(file, change):
    record = recorded()
    change(record)
    result = evidence.verify(save(file, picture(), record))
    assert (result.unaltered, result.belongs) == (False, "differ")


def test_each_image_of_a_batch_finds_its_own_traces(tmp_path):
    images, both = [picture(0), picture(1)], [*traces(2), *traces(2, seed=1), *traces(1, seed=2)]
    record = recorded(images, both, images=[0, 1, 0, 1, None], runs=["first", "first", "second", "second", "tile"])
    for number, image in enumerate(images):
        result = evidence.verify(save(tmp_path / f"{number}.png", image, record))
        assert (result.image, result.batch, result.belongs) == (number, 2, "match")
        assert (result.runs, result.images) == (("first", "second", "tile"), (number, number, None))
        assert [trace.steps.update_norm[0] for trace in result.traces] == pytest.approx(
            [both[place].steps.update_norm[0] for place in (number, 2 + number, 4)], rel=1e-6
        )
    result = evidence.verify(save(tmp_path / "other.png", picture(2), record))
    assert (result.image, result.batch, result.belongs, len(result.traces)) == (None, 2, "differ", 5)


def test_where_two_images_of_a_batch_are_the_same_the_traces_of_all_are_told(file):
    images = [picture(0), picture(0), picture(1)]
    result = evidence.verify(save(file, images[0], recorded(images)))
    assert (result.image, result.batch, result.belongs, result.images) == (None, 3, "match", (0, 1, 2))


def test_traces_are_one_an_image_where_their_number_says_so():
    assert recorded([picture(0), picture(1)])["images"] == [0, 1]
    assert recorded([picture()], traces(2))["images"] == [None, None]
    assert recorded(found=traces(2), pixels=None)["images"] == [None, None]


def test_of_several_records_that_of_the_image_counts(file):
    ours, others, latent = recorded(), recorded([picture(1)], traces(seed=1)), recorded(pixels=None)

    def verified(**records):
        chunks = {evidence.KEY: json.dumps(records), evidence.SETTINGS_KEY: json.dumps(MADE_WITH)}
        return evidence.verify(save_with(file, picture(), **chunks))

    result = verified(a=others, b=ours, c=latent)
    assert (result.belongs, len(result.traces), result.image) == ("match", 1, 0)
    assert verified(a=others, c=latent).pixels == "unknown"
    assert verified(a=others).belongs == "differ"
    assert len(verified(a=ours, b=ours).traces) == 2
    others["runs"] = ["edited"]
    assert verified(a=others, b=ours).belongs == "differ"


@pytest.mark.parametrize(
    ("suffix", "options", "expected"),
    [
        (".jpg", {"quality": 90}, "unknown"),
        (".webp", {"quality": 80}, "unknown"),
        (".webp", {"lossless": True}, "match"),
        (".png", {}, "match"),
    ],
)
def test_a_record_beside_an_image_is_found_and_lossy_pixels_are_not_held_against_it(tmp_path, suffix, options, expected):
    picture().save(tmp_path / f"image{suffix}", **options)
    (tmp_path / "image.stability.json").write_text(json.dumps(recorded()), encoding="utf-8")
    result = evidence.verify(tmp_path / f"image{suffix}")
    assert (result.pixels, result.settings, result.belongs) == (expected, "unknown", expected)
    assert (result.image, result.found_in) == (0, tmp_path / "image.stability.json")


def test_an_image_that_carries_a_record_is_not_asked_for_another(file):
    save(file, picture(), recorded())
    file.with_suffix(".stability.json").write_text("nonsense", encoding="utf-8")
    assert evidence.verify(file).belongs == "match"


INFINITE = traces()[0].to_dict() | {"settings": {"guidance_scale": math.inf}}
IMPOSSIBLE = traces()[0].to_dict() | {"settings": {"latent_shape": [10**400]}}


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "carries no trace"),
        ("{", "not JSON"),
        (nested(100_000), "nested too deep"),
        ("{}", "carries no trace"),
        ("[]", "no evidence record"),
        ('{"3": [{"sampler_node": "4", "traces": []}]}', "no evidence record"),
        ('{"format": "memorization-guard.evidence", "version": 2}', "version 2, this version of Memorization Guard reads 1"),
        ('{"format": "memorization-guard.evidence", "version": 1}', "incomplete or damaged"),
        (json.dumps(recorded() | {"runs": []}), "incomplete or damaged"),
        (json.dumps(recorded() | {"traces": [], "images": [], "runs": []}), "incomplete or damaged"),
        (json.dumps(recorded() | {"pixels": [1]}), "incomplete or damaged"),
        (json.dumps(recorded() | {"images": [1]}), "no trace of this image"),
        (json.dumps(recorded() | {"traces": [{}]}), "not a trace"),
        (json.dumps(recorded() | {"traces": [IMPOSSIBLE]}), "cannot be read"),
        (json.dumps(recorded() | {"traces": [INFINITE]}), "guidance_scale is inf"),
        (json.dumps(recorded() | {"traces": [traces()[0].to_dict() | {"trigger_step": True}]}), "trigger_step is True"),
        (json.dumps(recorded() | {"traces": [INFINITE | {"settings": {"model": ["a"]}}]}), r"model is \['a'\]"),
        (json.dumps(recorded() | {"traces": [traces()[0].to_dict() | {"asked": math.inf}]}), "asked is inf"),
        (
            json.dumps(recorded() | {"traces": [traces()[0].to_dict() | {"reference_count": math.inf}]}),
            "reference_count is inf",
        ),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(file, text, message):
    save_with(file, picture(), memorization_guard=text)
    with pytest.raises(ValueError, match=message) as caught:
        evidence.verify(file)
    assert "\n" not in str(caught.value)


def test_what_is_no_image_or_has_no_record_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no image at"):
        evidence.verify(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("nonsense")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as an image"):
        evidence.verify(tmp_path / "text.png")
    picture().save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"carries no trace, and there is no plain\.stability\.json beside it"):
        evidence.verify(tmp_path / "plain.png")
    whole = evidence.png(picture(size=(90, 90)), recorded())
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as an image"):
        evidence.verify(tmp_path / "cut.png")
    # An EPS would have Ghostscript started.
    picture().save(tmp_path / "image.eps")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        evidence.verify(tmp_path / "image.eps")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="decompression bomb"):
        evidence.verify(tmp_path / "plain.png")


def test_no_file_is_read_that_would_fill_the_memory(file, call):
    """A file, a record beside one, and pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def refused(*words):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = call("verify", file)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
        assert all(word in result.stderr for word in words)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000

    picture().save(file)
    with open(file.with_suffix(".stability.json"), "wb") as stream:
        stream.truncate(60 << 30)  # takes no space
    refused("image.stability.json is larger than 32 MB")
    size = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    refused("decompression bomb")
    with open(file, "r+b") as stream:
        stream.truncate(60 << 30)
    refused("image.png is larger than 256 MB")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=300)
def test_whatever_stands_in_a_record_is_shown_or_refused(tmp_path_factory, data):
    """Somebody puts anything in place of any part, and makes the hash fit."""
    record = recorded()
    place = record
    while True:
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    record["content_hash"] = content_hash({name: value for name, value in record.items() if name != "content_hash"})
    file = save_with(tmp_path_factory.getbasetemp() / "fuzz.png", picture(), memorization_guard=json.dumps(record))
    try:
        result = evidence.verify(file)
    except ValueError:
        return
    for trace in result.traces:
        assert summary(trace)
        assert graph.svg(trace)
        assert graph.image(trace).size
        json.dumps(trace.to_dict(), allow_nan=False)
    assert Path(result.found_in) == file
