"""Files that are written whole, and names that come out of data."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memorization_guard.files import MAX_DEPTH, parse_json, path_inside, read_whole, shown_name, write_whole


def test_a_name_is_a_file_in_the_folder(tmp_path):
    assert path_inside(tmp_path, "images/000001/7.png") == tmp_path.resolve() / "images/000001/7.png"
    assert path_inside(tmp_path, "ein Hügel\u3000猫.png").name == "ein Hügel\u3000猫.png"


@pytest.mark.parametrize("name", ["", "\0", "a\0.png", "a\nb", "\x7f", "\ud800.png"])
def test_no_file_has_such_a_name(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", "link/x"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="lies outside"):
        path_inside(tmp_path / "folder", name)


def test_a_link_to_itself_is_no_file(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ValueError, OSError)):
        path_inside(tmp_path, "loop").read_bytes()


@example("\0")
@given(st.text(max_size=30))
def test_any_text_is_a_path_inside_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        path = path_inside(folder, name)
    except ValueError:
        return
    assert path.is_relative_to(folder.resolve())
    os.path.lexists(path)


def test_a_file_is_read_whole_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2**20)
    assert read_whole(path, 2**20) == b"x" * 2**20
    with open(path, "ab") as stream:
        stream.truncate(60 << 30)  # takes no space
    with pytest.raises(ValueError, match="file is larger than 1 MB"):
        read_whole(path, 2**20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deep"),
        ("9" * 5000, "not JSON: a number has too many digits"),
        (b'"\xff"', "not JSON: .*utf-8"),
        ("{", "not JSON: Expecting"),
        ("[" + "1," * 100 + "1]", "larger than 0 MB"),
    ],
)
def test_json_that_was_made_to_do_harm_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, 200 if "1,1," in str(text) else 2**20)
    assert "\n" not in str(caught.value)


def test_json_as_deep_as_the_limit_is_read():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("null") is None


def test_a_name_of_other_bytes_is_shown_and_written(tmp_path):
    name = os.fsdecode("l\xe4ngs.txt".encode("latin-1"))
    assert shown_name(tmp_path / name) == "l\ufffdngs.txt"
    assert write_whole(tmp_path / name, f"<p>{name}</p>").read_bytes() == b"<p>l?ngs.txt</p>"


@pytest.mark.parametrize("name", ["n" * 255, "\U0001f600" * 63])
def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path, name):
    assert write_whole(tmp_path / name, "text").read_text() == "text"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
