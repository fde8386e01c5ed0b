"""However a file is divided, its pieces hold what the whole holds: each example once, with its line."""

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_dist.config.data import DomainConfig, SourceConfig
from qlora_dist.data import divide, formats
from qlora_dist.data.divide import borders, can_be_divided
from qlora_dist.data.formats import read_examples
from qlora_dist.data.sources import Piece, leaf_digest, plan_parts, read_piece


def read(path: Path, part_bytes: int) -> tuple[list[Any], int]:
    spans = list(pairwise(borders(path, part_bytes)))
    return [item for start, end in spans for item in read_examples(path, start, end)], len(spans)


cells = st.text(st.sampled_from('ab,"\n\té漢'), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(cells, cells), max_size=40), st.integers(1, 200), st.integers(8, 64), st.booleans(),
       st.sampled_from([(".csv", ","), (".tsv", "\t")]), st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_csv_is_divided_between_records_whatever_their_quotes(
    tmp_path_factory: Any, rows: Any, part: int, scanned: int, has_bom: bool, kind: tuple[str, str], line_end: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / f"a{kind[0]}"
    text = io.StringIO()
    csv.writer(text, delimiter=kind[1], lineterminator=line_end).writerows([("instruction", "response"), *rows])
    path.write_text(text.getvalue(), encoding="utf-8-sig" if has_bom else "utf-8", newline="")
    whole = list(read_examples(path, 0, path.stat().st_size))
    assert [(raw["instruction"], raw["response"]) for _, raw in whole] == rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divide, "SCANNED_BYTES", scanned)
        found, num = read(path, part)
    assert found == whole
    assert num > 1 or path.stat().st_size < 2 * part + 100


@settings(max_examples=60)
@given(st.text(st.sampled_from('ab,"\n\r\ufeff'), max_size=200), st.integers(1, 40), st.integers(8, 64))
@example("\ra\na", 1, 8)
@example("a,b\r\n\ufeffa,b\r\n" * 3, 1, 8)
def test_csv_of_stray_quotes_is_read_as_python_reads_it(
    tmp_path_factory: Any, rest: str, part: int, scanned: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("x,y\n" + rest, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divide, "SCANNED_BYTES", scanned)
        assert read(path, part)[0] == list(read_examples(path, 0, path.stat().st_size))


@pytest.mark.parametrize("line", ["Zeile {} über 漢字\n", "{} ohne Ende ü漢"])
def test_text_is_divided_between_documents_and_never_in_a_letter(tmp_path: Path, monkeypatch: Any, line: str) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(divide, "DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.txt"
    path.write_text("".join(line.format(i) for i in range(600)), encoding="utf-8-sig")
    whole = list(read_examples(path, 0, path.stat().st_size))
    found, num = read(path, 3000)
    assert found == whole
    assert num > 2
    assert "".join(document for _, document in whole) == path.read_text(encoding="utf-8-sig")


def test_parquet_is_divided_by_row_groups(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "answer": f"{i} " * 50} for i in range(3000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500, compression="none")
    found, num = read(path, 150_000)
    assert found == list(enumerate(rows, start=1))
    assert num == 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")
    assert read(path, 150_000)[1] == 1


def test_parts_of_every_format_give_the_same_examples_in_one_order(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "response": f'a "{i}",\nb ' * 20} for i in range(1500)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.DictWriter(file, ["instruction", "response"]).writerows([{k: k for k in rows[0]}, *rows])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=100, compression="none"
    )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DomainConfig(sources=[SourceConfig(path=str(tmp_path))], part_bytes=2**16)
    parts = plan_parts(config)
    assert len(parts) > 9
    assert len({leaf_digest(part) for part in parts}) == len(parts)
    pieces = [Piece.parse(text) for part in parts for text in part]
    assert [raw for piece in pieces for *_, raw in read_piece(piece, config.sources[0])] == rows * 3


def test_pieces_of_a_table_depend_on_its_columns(tmp_path: Path) -> None:
    digests = []
    for name in ("answer", "reply!"):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"question,{name}\n" + "q,a\n" * 30_000)
        digests.append(
            [
                leaf_digest(part)
                for part in plan_parts(DomainConfig(sources=[SourceConfig(path=str(path))], part_bytes=2**16))
            ]
        )
    assert len(digests[0]) == 2
    assert digests[0][1] != digests[1][1]


def test_a_large_file_that_is_one_piece_is_told_of(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 400))
    assert not can_be_divided(path)
    with caplog.at_level("WARNING"):
        assert len(plan_parts(DomainConfig(sources=[SourceConfig(path=str(path))], part_bytes=2**16))) == 1
    assert "read by one process" in caplog.text
