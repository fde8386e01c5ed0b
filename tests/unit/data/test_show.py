"""A person sees what is trained: rows of a run, and a source before any run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.data import SplitConfig
from qlora_dist.data.show import main

from .conftest import Corpus, sentence

Make = Callable[..., Corpus]
EXAMPLES = [{"instruction": f"Question {i}?", "response": f"Answer {i}. {sentence(i, 4)}"} for i in range(6)]


@pytest.fixture
def rows(corpus: Make, tokenizer: Path, tmp_path: Path) -> Path:
    made = corpus(EXAMPLES, split=SplitConfig(validation_share=0, test_share=0)).records().splits()
    made.rows(tokenizer, row_tokens=256)
    shutil.move(made.folder / "rows-train--1", tmp_path / "artifacts" / "rows" / "law-0-abc")
    shutil.copytree(tokenizer, tmp_path / "artifacts" / "tokenizer" / "model-def")
    return tmp_path / "artifacts" / "rows" / "law-0-abc"


def test_trained_tokens_stand_out_and_prompts_do_not(rows: Path, capsys: Any) -> None:
    assert main([str(rows), "--num", "9"]) == 0
    shown = capsys.readouterr().out
    for example in EXAMPLES:
        assert f"### Instruction:\n{example['instruction']}\n\n### Response:\n«{example['response']}</s>»" in shown
    assert "000.jsonl:1, " in shown
    assert "slots of padding" in shown


def test_the_tokenizer_that_made_the_rows_is_asked_for_when_it_is_not_beside_them(
    rows: Path, tokenizer: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.rmtree(tmp_path / "artifacts" / "tokenizer")
    assert main([str(rows)]) == 1
    assert "--tokenizer" in capsys.readouterr().err
    assert main([str(rows), "--tokenizer", str(tokenizer), "--row", "0"]) == 0
    assert main([str(rows), "--tokenizer", str(tokenizer), "--row", "999"]) == 1


def test_a_source_is_shown_with_its_kinds_before_any_run(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q?", "answer": "A."}\n{"text": "words"}\n{broken\n')
    for arguments in ([str(path)], [str(path), "--tokenizer", str(tokenizer)]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "a.jsonl:1, kind instruction" in shown
        assert "### Response:\n«A.</s>»" in shown
        assert "1 instruction, 1 text; 1 rejected" in shown
        assert "  1 x broken JSON: first a.jsonl:3 (" in shown


def test_columns_are_told_by_kind_and_can_be_mapped(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "[faq] :smile:.csv"
    path.write_text("id,frage,antwort,license\n1,Wann?,Bald.,CC0\n2,Wo?,Hier.,CC0\n3,,leer,\n")
    assert main([str(path)]) == 0
    assert (
        "3 x unknown fields: first [faq] :smile:.csv:2 (found antwort, frage, id, license)\n"
        "    An example needs messages; or chosen, rejected; or instruction, response; or text, label; or text. "
        "Name its columns: --field instruction=COLUMN ...\n"
    ) in capsys.readouterr().out
    mapped = ["--field", "instruction=frage", "--field", "response=antwort"]
    assert main([str(path), *mapped]) == 0
    shown = capsys.readouterr().out
    assert "Wann?\n\n### Response:\n«Bald.</s>»" in shown
    assert "2 instruction; 1 rejected" in shown
    told = "instruction from 'frage', response from 'antwort', licence from 'license'; not used: id"
    assert f"  instruction: {told}\n" in shown
    assert "1 x empty field: first [faq] :smile:.csv:4 (instruction)" in shown
    assert main([str(path), *mapped, "--kind", "text"]) == 0
    assert "no record; 3 rejected" in capsys.readouterr().out
    for wrong, says in (("response", "NAME=COLUMN"), ("answer=x", "names of fields")):
        assert main([str(path), "--field", wrong]) == 2
        assert says in capsys.readouterr().err


def test_running_text_is_shown_in_passages(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text("first passage\n\nsecond passage\n")
    assert main([str(tmp_path / "a.txt"), "--passage-chars", "5"]) == 0
    assert "«first passage»" in (shown := capsys.readouterr().out)
    assert "2 text; 0 rejected" in shown


def test_long_records_are_shown_by_their_beginning_and_end(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text("begin " + "x" * 100_000 + " end")
    assert main([str(tmp_path / "a.txt")]) == 0
    shown = capsys.readouterr().out
    assert "«begin xxx" in shown
    assert "xxx … 96,010 characters … xxx" in shown
    assert "xxx end»" in shown
    assert len(shown) < 5000


def test_names_that_are_no_unicode_are_shown_as_escapes_on_any_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "漢", "\\ud800": 1}\n{"\\ud800": 1}\n')
    command = [sys.executable, "-m", "qlora_dist.data.show", str(tmp_path / "a.jsonl")]
    told = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=told, capture_output=True, encoding="ascii", check=True).stdout
    assert r"\xab\u6f22\xbb" in shown
    assert r"not used: \ud800" in shown
    assert r"(found \ud800)" in shown


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nowhere.jsonl",
            "expected a file, a folder, a glob or a hub id (owner/name). Nothing there. (Looked in {tmp})",
        ),
        ("faq.jsnl", "Nothing there. Did you mean faq.jsonl?"),
        ("date/faq.jsonl", "Nothing there. {tmp}/date is no folder."),
        ("*.csv", "Nothing there. (Looked in {tmp})"),
        ("faq.jsonl", "empty. A source needs at least one record."),
        ("some/set", "expected the commit sha of a hub dataset"),
    ],
)
def test_a_source_that_is_not_there_is_one_line_that_says_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, says: str
) -> None:
    (tmp_path / "faq.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert main([name]) > 0
    told = capsys.readouterr().err
    assert told.startswith("source.")
    assert says.format(tmp=tmp_path) in told
    assert told.count("\n") == 1
