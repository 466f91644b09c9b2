"""Training folders as trainers keep them, and whatever may be wrong with one."""

import csv
import io
import json
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from memorization_guard.audit.training import TrainingError, read_training
from memorization_guard.prompts import read_prompts


def picture(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def _captions(found):
    return {image.name: image.caption for image in found.images}


# --- formats ----------------------------------------------------------------------------------------------------------


def test_kohya_folders_with_repeats(folder):
    for number, (name, caption) in enumerate(
        [("10_cat/a.png", "a cat"), ("10_cat/b.jpg", "a dog"), ("2_x y/c.webp", "a cat")]
    ):
        picture(folder / name, number).with_suffix((".txt", ".caption", ".txt")[number]).write_text(f"\n {caption} \nmore\n")
    picture(folder / "2_x y/d.png")
    found = read_training(folder)
    assert _captions(found) == {
        "10_cat/a.png": "a cat",
        "10_cat/b.jpg": "a dog",
        "2_x y/c.webp": "a cat",
        "2_x y/d.png": "x y",
    }
    assert [image.repeats for image in found.images] == [10, 10, 2, 2]
    assert found.captions == {"a cat": [0, 2], "a dog": [1], "x y": [3]}
    assert found.formats == ("caption files", "folder names")
    assert found.images[1].open().size == (20, 16)
    notes = " ".join(found.notes())
    assert "1 image without a caption file in a folder with a repeat count" in notes
    assert "1 image with the caption of another one" in notes
    assert "repeated 2 to 10 times: an epoch shows 24" in notes


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("split", ["", "train"])
def test_hugging_faces_image_folder(folder, kind, split):
    rows = [{"file_name": "a.png", "text": "a cat, red"}, {"file_name": "deep/b.png", "text": "ein Hündchen"}]
    for number, row in enumerate(rows):
        picture(folder / split / row["file_name"], number)
    if kind == "jsonl":
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(folder / split / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    found = read_training(folder)
    before = f"{split}/" if split else ""
    assert _captions(found) == {f"{before}a.png": "a cat, red", f"{before}deep/b.png": "ein Hündchen"}
    assert found.formats == ("metadata",)


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_webdataset_shards(folder):
    _tar(folder / "s0.tar", {"000.txt": b"a cat", "000.png": _png(0), "001.png": _png(1), "001.json": b'{"caption": "a dog"}'})
    _tar(folder / "s1.tar", {"x/000.json": b'{"text": "other"}', "x/000.txt": b"a cat", "x/000.png": _png(2), "x/9.cls": b"3"})
    found = read_training(folder)
    assert _captions(found) == {"s0.tar/000.png": "a cat", "s0.tar/001.png": "a dog", "s1.tar/x/000.png": "a cat"}
    for number, image in enumerate(found.images):
        assert np.array_equal(np.asarray(image.open()), np.asarray(Image.open(io.BytesIO(_png(number)))))
    assert found.formats == ("webdataset",)


def test_long_member_names_and_many_members(folder):
    members = {f"{'d' * 90}/{'e' * 90}/{number:04d}.{end}": content for number in range(300)
               for end, content in (("png", _png(number)), ("txt", f"caption {number}".encode()))}  # fmt: skip
    found = read_training(_tar(folder / "s.tar", members).parent)
    assert [image.caption for image in found.images] == [f"caption {number}" for number in range(300)]
    assert np.array_equal(np.asarray(found.images[299].open()), np.asarray(Image.open(io.BytesIO(_png(299)))))


def test_the_captions_make_a_prompt_list(folder, tmp_path):
    for number, caption in enumerate(['"quoted", \u2028 <b>', "zwei\tTabs", "a cat", "a cat"]):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "list.jsonl").write_text(read_training(folder).prompt_list(), encoding="utf-8")
    assert read_prompts(tmp_path / "list.jsonl") == ['"quoted",', "zwei\tTabs", "a cat"]


def test_trigger_words_and_tags_are_told(folder):
    for number in range(20):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"sks style, tag{number}, 1girl, outdoors{number}, sky")
    notes = " ".join(read_training(folder).notes())
    assert "In nearly every caption: sks, style, 1girl, sky." in notes
    assert "lists of tags" in notes


def test_hidden_files_and_others_are_passed_over(folder):
    picture(folder / "a.png").with_suffix(".txt").write_text("a cat")
    picture(folder / ".cache/x.png")
    (folder / "._a.png").write_bytes(b"of macOS")
    (folder / "a.npz").write_bytes(b"latents")
    assert _captions(read_training(folder)) == {"a.png": "a cat"}


def test_an_image_without_a_caption_is_compared_and_named(folder):
    picture(folder / "a.png").with_suffix(".txt").write_text("a cat")
    picture(folder / "b.png").with_suffix(".txt").write_text("  \n")
    found = read_training(folder)
    assert len(found.images) == 2
    assert found.captions == {"a cat": [0]}
    assert "1 image without a caption, such as b.png" in found.notes()[0]


def test_a_changed_folder_has_another_key(folder):
    text = picture(folder / "a.png").with_suffix(".txt")
    text.write_text("a cat")
    first = read_training(folder).key
    assert read_training(folder).key == first
    text.write_text("a dog")
    second = read_training(folder).key
    picture(folder / "a.png", 1, (24, 16))
    assert len({first, second, read_training(folder).key}) == 3


# --- what is wrong with a folder --------------------------------------------------------------------------------------


def _refused(folder, message):
    with pytest.raises(TrainingError, match=message) as caught:
        read_training(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_one_without_images_or_captions(folder):
    with pytest.raises(FileNotFoundError, match="there is no training folder at"):
        read_training(folder / "gone")
    _refused(folder, "holds no image")
    picture(folder / "a.png")
    _refused(folder, "holds 1 image and no caption: put a .txt beside each image")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "../secret.png", "text": "x"}', r"metadata\.jsonl, line 2: '\.\./secret\.png' lies outside"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "lies outside"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "cannot be the name of a file"),
        ('{"file_name": "a\\ud800.png", "text": "x"}', "half a character|cannot be the name"),
        ('{"file_name": "gone.png", "text": "x"}', "line 2: there is no image 'gone.png'"),
        ('{"file_name": "a.png", "text": "again"}', "line 2: 'a.png' has a caption already"),
        ('{"file_name": "metadata.jsonl", "text": "x"}', "is no image"),
        ('{"file_name": ["a.png", "b.png"], "text": "x"}', "no image under the key 'file_name'"),
        ('{"text": "x"}', "line 2: no image under the key 'file_name'"),
        ('{"file_name": "b.png"}', "line 2: no text under the key"),
        ('{"file_name": "b.png", "text": ""}', "line 2: no text under the key"),
        ('{"file_name": ' + "[" * 5000 + "]" * 5000 + "}", "line 2: the JSON is nested too deep"),
        ('{"file_name": "' + "x" * 2**21 + '"}', "line 2, is longer than 1 MB"),
        ("not json", "line 2: not JSON"),
    ],
)
def test_bad_metadata(folder, row, message):
    picture(folder.parent / "secret.png")
    for name in ("a.png", "b.png"):
        picture(folder / name)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n' + row + "\n")
    _refused(folder, message)


def test_metadata_of_a_hidden_image(folder):
    picture(folder / ".a.png")
    picture(folder / "b.png")
    (folder / "metadata.jsonl").write_text('{"file_name": ".a.png", "text": "a cat"}\n')
    _refused(folder, r"\.a\.png has a caption in the metadata, and is hidden")


@pytest.mark.parametrize("where", ["outside", "nowhere"])
@pytest.mark.parametrize("what", ["a.png", "a.txt", "s.tar", "metadata.jsonl", "sub.tar"])
def test_links_out_of_the_folder(folder, tmp_path, what, where):
    picture(folder / "b.png").with_suffix(".txt").write_text("a dog")
    if what == "a.txt":
        picture(folder / "a.png")
    target = tmp_path / "elsewhere"
    if where == "outside":
        target.mkdir() if what == "sub.tar" else target.write_text("x")
    os.symlink(target, folder / what)
    _refused(folder, f"{re.escape(what)} is a link that leads {'out of the folder' if where == 'outside' else 'nowhere'}")


def test_captions_that_are_no_text_or_too_long(folder):
    text = picture(folder / "a.png").with_suffix(".txt")
    text.write_bytes("Hündchen".encode("latin-1"))
    _refused(folder, "a.txt is not UTF-8 text: save it as UTF-8")
    text.write_bytes(b"x" * (2**20 + 1))
    _refused(folder, "a.txt is larger than 1 MB")


def _bomb(side):
    """A PNG that says it has ``side`` squared pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "cannot be read as an image"), (_bomb(60000), "exceeds limit"), (_png()[:-40], "cannot")],
)
def test_broken_and_giant_images_are_named(folder, content, message):
    (folder / "a.png").write_bytes(content)
    (folder / "a.txt").write_text("a cat")
    _tar(folder / "s.tar", {"0.png": content, "0.txt": b"a dog"})
    for image in read_training(folder).images:
        with pytest.raises(TrainingError, match=f"training image {image.name} .*{message}") as caught:
            image.open()
        assert "\n" not in str(caught.value)


def test_bad_shards(folder):
    whole = _tar(
        folder / "s.tar", {f"{n}.{end}": _png(n) if end == "png" else b"a cat" for n in range(9) for end in ("png", "txt")}
    )
    content = whole.read_bytes()
    for damaged, message in [
        (b"no tar" * 1000, "s.tar cannot be read as a tar file"),
        *((content[:size], "s.tar cannot be read as a tar file") for size in range(512, 2 * len(content) // 3, 1024)),
        (content[:2560] + b"\xff" * 512 + content[3072:], "s.tar cannot be read as a tar file: damaged at byte 2,560"),
        (content[:2048] + b"\xff" * 512 + content[2560:], "s.tar/0.txt is not UTF-8"),
        (b"", "s.tar cannot be read as a tar file"),
    ]:
        whole.write_bytes(damaged)
        _refused(folder, message)
    _tar(whole, {"a.txt": b"a cat"})
    _refused(folder, "s.tar holds no image")
    _tar(whole, {"a.png": _png(), "a.jpg": _png()})
    _refused(folder, "there is another image of that name")
    _tar(whole, {"a.png": _png(), "a.json": b"[" * 5000 + b"]" * 5000})
    _refused(folder, r"s.tar/a.json: the JSON is nested too deep")
    _tar(whole, {"a.png": _png(), "a.txt": b"x" * (2**20 + 1)})
    _refused(folder, "a.txt is larger than 1 MB")
    whole.rename(folder / "s.tar.gz")
    _refused(folder, "s.tar.gz is compressed")


def test_a_shards_header_is_not_read_without_a_limit(folder):
    """A PAX header of gigabytes, in a file with a hole."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**33
    with open(folder / "s.tar", "wb") as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(2**33 + 4096)
    _refused(folder, "s.tar cannot be read as a tar file: a header is too large")


def test_members_that_are_no_files_are_passed_over(folder):
    with tarfile.open(folder / "s.tar", "w") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in {"../../a.png": _png(), "../../a.txt": b"a cat"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (image,) = read_training(folder).images
    assert image.caption == "a cat"
    assert image.open().size == (16, 16)
