"""Prompt lists: every format, and what is wrong with a bad one."""

import json
import resource
import subprocess
import sys
import time
import tracemalloc
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorization_guard.core.calibration import WHOLE_RUNS
from memorization_guard.prompts import ListedPrompt, read_prompts, reference_prompts, stream_prompts


def test_text_and_json_lines_are_read(tmp_path):
    text = tmp_path / "list.txt"
    text.write_bytes("\ufeffa cat\n\n  ein Hügel \r\nkot \u2028 x\n".encode())
    assert read_prompts(text) == ["a cat", "ein Hügel", "kot \u2028 x"]
    lines = tmp_path / "list.JSONL"
    lines.write_text(
        '{"caption": "a cat"}\n\n{"prompt": "a dog", "seed": 3, "group": "b"}\n{"TEXT": "x", "kind": "verbatim", '
        '"image": ["1.png", "2.png"]}\n',
        encoding="utf-8",
    )
    assert list(stream_prompts(lines)) == [
        ListedPrompt("a cat", 1),
        ListedPrompt("a dog", 3, kind="b", seed=3),
        ListedPrompt("x", 4, kind="verbatim", images=("1.png", "2.png")),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_are_read(tmp_path, separator):
    table = tmp_path / "list.csv"
    rows = [["id", "Prompt", "seed"], ["1", '"a cat, asleep; or not\nat all"', "7"], ["2", "", ""], ["3", "a dog", ""]]
    table.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8-sig")
    assert [(p.text, p.seed) for p in stream_prompts(table)] == [("a cat, asleep; or not\nat all", 7), ("a dog", None)]
    assert [p.text for p in stream_prompts(table, "id")] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="has no column 'PROMPT'; it has 'id', 'Prompt', 'seed'"):
        list(stream_prompts(table, "PROMPT"))


def test_parquet_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"TEXT": ["a cat", None, "a dog"], "seed": [1, 2, None], "vector": [[1.0], [2.0], [3.0]]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert list(stream_prompts(tmp_path / "list.parquet")) == [ListedPrompt("a cat", 1, seed=1), ListedPrompt("a dog", 3)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_prompts(tmp_path / "bad.parquet")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0")), max_size=8))
def test_every_format_gives_the_same_prompts(tmp_path_factory, texts):
    import csv

    folder = tmp_path_factory.mktemp("lists")
    wanted = [text.strip() for text in texts if text.strip()]
    with open(folder / "a.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["n", "prompt"], *enumerate(texts)])
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in wanted), encoding="utf-8")
    assert [p.text for p in stream_prompts(folder / "a.csv")] == wanted
    assert [p.text for p in stream_prompts(folder / "a.jsonl")] == wanted


def test_a_long_list_is_streamed(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a prompt of some length, so that a hundred thousand of them are megabytes\n" * 100_000)
    tracemalloc.start()
    assert sum(1 for _ in stream_prompts(path)) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"a cat", "prompt lists are .txt"),
        ("a.txt", b"\xff\xfe\x00", "line 1, is not UTF-8"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.jsonl", b'{"caption": "a"}\n{"caption": ', "line 2: not JSON"),
        ("a.jsonl", b'{"words": "a"}', "line 1: no text under the key"),
        ("a.jsonl", b'["a"]', "line 1: no text under the key"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: no text under the key"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: the prompt holds half a character"),
        ("a.jsonl", b'{"prompt": "a", "seed": -1}', "line 1: the seed is -1"),
        ("a.jsonl", b'{"prompt": "a", "seed": "x"}', "line 1: the seed is 'x'"),
        ("a.csv", b"a cat\na dog", "has no column 'caption' or 'prompt' or 'text'; it has 'a cat'"),
        ("a.csv", b"prompt\n\xff", "not UTF-8"),
        ("a.csv", b"", "has no column"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "field larger than field limit"),
        ("a.jsonl", b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: the JSON is nested too deep"),
        ("a.jsonl", b'{"prompt": "a", "x": ' + b"[" * 400 + b"]" * 400 + b"}", "line 1: the JSON is nested too deep"),
        ("a.jsonl", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "line 1: not JSON: a number has too many digits"),
        ("a.jsonl", b'{"prompt": "a", "kind": "\\ud800"}', "line 1: the prompt holds half a character"),
        ("a.csv", b"prompt\n" + b"," * 2**20, "a row that is longer than 1 MB"),
        ("a.csv", b"prompt\n" + b'"\n",' * 300_000, "a row that is longer than 1 MB"),
    ],
)
def test_a_bad_list_says_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_line_without_end_is_not_read_to_its_end(tmp_path, name):
    with open(tmp_path / name, "wb") as stream:
        stream.write(b"prompt\n")
        stream.truncate(60 << 30)  # takes no space
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"longer than 1 MB|line 1: not JSON"):
        read_prompts(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_list_that_is_needed_at_once_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("memorization_guard.prompts.MAX_LIST", 2**20)
    (tmp_path / "a.txt").write_text("a cat\n" * 20_000)
    with pytest.raises(ValueError, match="is too long: more than 1 MB of prompts"):
        read_prompts(tmp_path / "a.txt")
    assert sum(1 for _ in stream_prompts(tmp_path / "a.txt")) == 20_000


def test_a_parquet_file_that_grows_without_bounds_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import numpy as np
    import pyarrow.parquet as pq

    def repeated(text, rows):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))

    one = pa.array(["x" * 2**27])
    words = pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), repeated("x" * 100_000, 20_000).dictionary_decode())
    bombs = {
        "text": pa.table({"prompt": repeated("x" * 100_000, 20_000)}),
        "rows": pa.table({"prompt": repeated("a cat", 10_000_000)}),
        "one": pa.table({"prompt": one}),
        "images": pa.table({"prompt": ["a cat"], "image": words}),
    }
    path = tmp_path / "bomb.parquet"
    for name, table in bombs.items():
        pq.write_table(table, path, compression="zstd", use_dictionary=name != "one")
        assert path.stat().st_size < 400_000, name
        before, begun = pa.total_allocated_bytes(), time.perf_counter()
        with pytest.raises(ValueError, match="far larger in memory than on the disk"):
            list(stream_prompts(path))
        assert pa.total_allocated_bytes() - before < 2**27, name
        assert time.perf_counter() - begun < 10, name


def test_a_parquet_footer_that_promises_too_much_is_refused_before_there_is_room_for_it(tmp_path):
    """Some hundred bytes that tell of a million columns, of a footer of gigabytes, or of columns up to the limit."""
    pytest.importorskip("pyarrow")

    def integer(number):
        """A number as Thrift's compact form writes it."""
        digits = bytearray()
        while number > 127:
            digits.append(number & 127 | 128)
            number >>= 7
        return bytes([*digits, number])

    def many(number):
        return b"\xfc" + integer(number)

    def field(kind, number):
        return kind + integer(2 * number)

    root = b"\x48\x04root" + field(b"\x15", 1) + b"\0"
    leaf = field(b"\x15", 6) + field(b"\x25", 0) + b"\x18\x06prompt\0"
    start = field(b"\x15", 1) + b"\x19\x2c" + root + leaf + field(b"\x16", 1)
    column = field(b"\x26", 0) + b"\0"
    footers = {
        "schema": field(b"\x15", 1) + b"\x19" + many(1_000_000) + bytes(400),
        "groups": start + b"\x19" + many(1_000_000) + bytes(400),
        "columns": start + b"\x19\x1c\x19" + many(1_000_000) + bytes(400),
        "real columns": start + b"\x19\x1c\x19" + many(10_001) + column * 10_001 + field(b"\x16", 1) * 2 + b"\0\0",
    }
    path = tmp_path / "list.parquet"
    for name, footer in footers.items():
        path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises(ValueError, match=r"cannot be read as Parquet: .*limit"):
            read_prompts(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, name  # KB; 680 MB without the limit
        assert time.perf_counter() - begun < 5, name
    path.write_bytes(b"PAR1" + bytes(50) + (2**31).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="its footer says that it has 2147483648 bytes"):
        read_prompts(path)


def test_no_byte_of_a_parquet_file_ends_the_process(tmp_path):
    """pyarrow's own view of a column does, over a single byte of its statistics."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"prompt": ["a cat"]}), path, compression="none", store_schema=False)
    every = (
        "import pathlib, sys\n"
        "from memorization_guard.prompts import read_prompts\n"
        "path, refused = pathlib.Path(sys.argv[1]), 0\n"
        "content = path.read_bytes()\n"
        "for at in range(len(content)):\n"
        "    for value in (0, 2, 3, 9, 0x19, 0x25, 0xFF):\n"
        "        path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])\n"
        "        try:\n"
        "            read_prompts(path)\n"
        "        except ValueError:\n"
        "            refused += 1\n"
        "print(refused)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", every, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert found.returncode == 0, found.stderr[-500:]
    assert int(found.stdout) > 300


def test_a_parquet_file_with_damaged_pages_or_texts_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a cat"] * 50}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_prompts(path)
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"]).buffers())
    pq.write_table(pa.table({"prompt": text}), path)
    with pytest.raises(ValueError, match=r"cannot be read as Parquet: .*utf-8"):
        read_prompts(path)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt list at .*gone\.txt"):
        read_prompts(tmp_path / "gone.txt")


def test_the_list_that_comes_with_us_is_400_different_prompts():
    prompts = reference_prompts()
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts) == 400
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    assert read_prompts(resources.files("memorization_guard").joinpath("reference_prompts.txt")) == prompts


def test_the_first_of_the_list_that_comes_with_us_are_a_mix_of_all():
    prompts = reference_prompts()
    longest = max(len(prompt.split()) for prompt in prompts)
    assert 50 <= longest <= 60  # a CLIP text encoder reads 75 tokens

    kinds = {
        "short": lambda prompt: len(prompt.split()) <= 3,
        "long": lambda prompt: len(prompt.split()) >= 30,
        "tags": lambda prompt: prompt.count(",") >= 5,
        "photograph": lambda prompt: "photo" in prompt,
        "painting": lambda prompt: "painting" in prompt,
        "plain": lambda prompt: "background" in prompt or "solid" in prompt,
    }
    for name, is_one in kinds.items():
        share, of_the_first = (sum(map(is_one, part)) / len(part) for part in (prompts, prompts[:WHOLE_RUNS]))
        assert share > 0.03, name
        assert of_the_first == pytest.approx(share, abs=0.06), name
