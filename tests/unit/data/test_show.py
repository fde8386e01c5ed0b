"""A person sees what is trained: rows of a run, and a source before any run."""

import shutil
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
        "3 x unknown fields: first [faq] :smile:.csv:2 (found antwort, frage, id, license)" in capsys.readouterr().out
    )
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


def test_a_source_that_is_not_there_is_one_line(capsys: Any) -> None:
    assert main(["nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("source.sources[0].path=nowhere.jsonl: expected a file")
