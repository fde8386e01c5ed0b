"""Every format gives the same examples, and what can't be read is rejected, never lost."""

import csv
import gzip
import io
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_dist.data import formats
from qlora_dist.data.formats import UNREADABLE, read_examples
from qlora_dist.data.json_stream import JsonStream
from qlora_dist.data.record import Reject

ROWS = [{"instruction": f"Was ist §{i}?", "response": f"Absatz {i}\nZeile zwei, „zitiert“"} for i in range(300)]


def written(path: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    name = path.name
    if name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl.zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    elif name.endswith("wrapped.json"):
        path.write_text(json.dumps({"data": ROWS}, indent=1))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["instruction", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
        path.write_text(text.getvalue())
    return path


def read(path: Path) -> list[Any]:
    return list(read_examples(path, 0, path.stat().st_size))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "wrapped.json", "a.parquet", "a.csv"]
)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    assert [raw for _, raw in read(written(tmp_path / name))] == ROWS


def test_json_lines_under_the_name_json_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_text('{"text": "a"}\n{"text": broken}\n{"text": "c"}\n')
    found = read(path)
    assert [item[1]["text"] for item in found if not isinstance(item, Reject)] == ["a", "c"]
    assert [(r.line, r.reason) for r in found if isinstance(r, Reject)] == [(2, "broken JSON")]


def test_pieces_of_a_file_hold_each_line_once_with_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    raw = path.read_bytes()
    cuts = [0, *(raw.index(b"\n", at) + 1 for at in (1000, 9000, 20000)), len(raw)]
    found = [e for start, end in pairwise(cuts) for e in read_examples(path, start, end)]
    assert found == list(enumerate(ROWS, start=1))


def test_a_line_that_is_too_long_is_rejected_and_the_next_one_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "MAX_EXAMPLE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    long, short = read(path)
    assert (long.reason, long.line) == ("line too long", 1)
    assert short == (2, {"text": "short"})


@pytest.mark.parametrize("depth", [5000, 200_000])
def test_json_nested_too_deep_is_a_reject(tmp_path: Path, depth: int) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text('{"text": ' + "[" * depth + "]" * depth + '}\n{"text": "b"}\n')
    whole.write_text("[" * depth + "]" * depth)
    assert [getattr(item, "reason", "ok") for item in read(lines)] == ["broken JSON", "ok"]
    assert [item.reason for item in read(whole)] == [UNREADABLE]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_a_torn_file_ends_with_a_reject_that_names_it(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    found = read(path)
    assert found[-1].reason == UNREADABLE
    assert found[-1].file == str(path)


def test_rows_with_too_many_or_too_few_columns_are_rejected_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,1\nonly one\nthree,4,5\n")
    good, few, many = read(path)
    assert good == (2, {"text": "good", "label": "1"})
    assert [(r.line, r.reason) for r in (few, many)] == [(3, "wrong number of columns"), (4, "wrong number of columns")]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ";")])
def test_a_table_is_read_with_the_delimiter_that_its_header_shows(tmp_path: Path, name: str, delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(
        [["in,struc;tion", "response"], ["a,b;c\td|e", "x"]]
    )
    (tmp_path / name).write_text(text.getvalue(), encoding="utf-8-sig")
    assert read(tmp_path / name) == [(2, {"in,struc;tion": "a,b;c\td|e", "response": "x"})]


def test_a_row_that_is_no_utf8_is_rejected_by_line_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,note\nGrüße,x\n漢字,y\nAdiós,z\n".encode().replace("ü".encode(), b"\xfc"))
    bad, *good = read(tmp_path / "a.csv")
    assert (bad.reason, bad.line) == ("not UTF-8", 2)
    assert bad.detail == "byte 0xfc; write it as UTF-8, e.g. iconv -f LATIN1 -t UTF-8"
    assert good == [(3, {"text": "漢字", "note": "y"}), (4, {"text": "Adiós", "note": "z"})]
    path = written(tmp_path / "torn.csv")
    path.write_bytes(path.read_bytes()[:2000] + b"\xff\xfe\x00" * 50)
    *good, bad = read(path)
    assert [raw for _, raw in good] == ROWS[: len(good)]
    assert (bad.reason, bad.file) == ("not UTF-8", str(path))


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "it is UTF-16; write it as UTF-8, e.g. iconv -f UTF-16"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "it is UTF-16"),
        ("a.txt.gz", gzip.compress("words".encode("utf-16")), "it is UTF-16"),
        ("a.csv", b"text,id,text\na,1,b\n", "two columns are named 'text'"),
        ("a.csv", b"text,gr\xfc\xdfe\na,b\n", "its header is not UTF-8; write it as UTF-8"),
    ],
    ids=["csv of UTF-16", "jsonl of UTF-16", "gzipped text of UTF-16", "two columns of one name", "header of Latin-1"],
)
def test_a_file_that_would_be_read_wrong_is_refused_as_a_whole(
    tmp_path: Path, name: str, raw: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    [found] = read(tmp_path / name)
    assert (found.reason, found.place()) == (UNREADABLE, str(tmp_path / name))
    assert found.detail.startswith(says)


def test_an_array_under_the_name_of_json_lines_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[:2], indent=1))
    assert read(tmp_path / "a.jsonl")[0].detail == "an array of examples belongs in a file named .json"


def test_a_text_file_is_one_document_and_a_huge_one_is_several_that_add_up(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"line {i}\n" for i in range(500))
    path.write_text(text)
    assert read(path) == [(1, text)]
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 1000)
    found = read(path)
    assert len(found) > 3
    assert "".join(document for _, document in found) == text
    assert all(text.split("\n")[line - 1] == document.split("\n")[0] for line, document in found)


def test_a_text_file_that_is_no_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Gebühr".encode("latin-1"))
    assert [item.reason for item in read(path)] == ["not UTF-8"]


@pytest.mark.parametrize("indent", [None, 2])
def test_entries_of_a_wrapped_array_are_read_one_by_one_and_torn_ones_are_told(
    tmp_path: Path, indent: int | None
) -> None:
    text = json.dumps({"data": ROWS, "version": {"of": [1, 2]}, "n": 3}, indent=indent)
    assert list(JsonStream(io.StringIO(text), 200).entries()) == ROWS  # none larger than 200 characters is held
    path = tmp_path / "a.json"
    path.write_text(text)
    assert [raw for _, raw in read(path)] == ROWS
    for torn, says in ((text[:-1], "array"), (text[:-1] + "]", "array"), (text + "x", "end"), (text[:9000], "entry")):
        path.write_text(torn)
        *found, reject = read(path)
        assert found == list(enumerate(ROWS, start=1))[: len(found)]
        assert reject.reason == UNREADABLE
        assert says in reject.detail


def test_an_array_on_one_line_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{i} " + "x" * 1000} for i in range(20_000)]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_examples(path, 0, path.stat().st_size)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 4e6  # the file has 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_entries_of_json_are_the_same_however_it_is_read(monkeypatch: Any, block: int) -> None:
    monkeypatch.setattr("qlora_dist.data.json_stream.BLOCK_CHARS", block)
    values = [1, -2.5e10, 'a"]', {"b": [1, {"c": None}]}, [], True, 123456789]
    assert list(JsonStream(io.StringIO(json.dumps(values)), 1000).entries()) == values
    assert list(JsonStream(io.StringIO(" ".join(map(json.dumps, values[3:5]))), 1000).entries()) == values[3:5]
