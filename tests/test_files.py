"""Files that are written whole, and names that come out of data."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memorization_guard.files import path_inside, write_whole


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


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
