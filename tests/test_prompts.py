"""Prompt lists: both formats, and what is wrong with a bad one."""

import pytest

from memorization_guard.prompts import read_prompts, reference_prompts


def test_both_formats_are_read(tmp_path):
    text = tmp_path / "list.txt"
    text.write_bytes("\ufeffa cat\n\n  ein Hügel \r\nkot \u2028 x\n".encode())
    assert read_prompts(text) == ["a cat", "ein Hügel", "kot \u2028 x"]
    lines = tmp_path / "list.JSONL"
    lines.write_text('{"caption": "a cat"}\n\n{"prompt": "a dog", "seed": 3}\n', encoding="utf-8")
    assert read_prompts(lines) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a cat", "prompt lists are .txt"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.jsonl", b'{"caption": "a"}\n{"caption": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}', "line 1: no text under the key"),
        ("a.jsonl", b'["a"]', "line 1: no text under the key"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: no text under the key"),
    ],
)
def test_a_bad_list_says_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt list at .*gone\.txt"):
        read_prompts(tmp_path / "gone.txt")


def test_the_list_that_comes_with_us_is_64_different_prompts():
    prompts = reference_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert all(prompt == prompt.strip() and len(prompt.split()) >= 4 for prompt in prompts)
