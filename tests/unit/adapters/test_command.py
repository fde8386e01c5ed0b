"""`python -m qlora_dist.adapters.merge`: what it takes, refuses and prints."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from qlora_dist.adapters.command import main
from qlora_dist.adapters.unmerge import main as unmerge_main
from qlora_dist.model.adapter import read_provenance, write_provenance

from .conftest import dense, provenance


@pytest.fixture
def three(make_adapter, tmp_path):
    return [
        str(make_adapter(name, seed=i, known=provenance(trained_tokens=100 * i)))
        for i, name in enumerate(("a", "b", "c"), start=1)
    ]


def test_folders_globs_and_folders_of_folders_name_the_same_adapters(three, tmp_path, capsys):
    for i, arguments in enumerate((three, [str(tmp_path / "[abc]")], [str(tmp_path)])):
        out = tmp_path / "results" / str(i)
        assert main([*arguments, "--out", str(out)]) == 0
        parts = json.loads((out / "merge.json").read_text())["parts"]
        assert [p["label"] for p in parts] == ["a", "b", "c"]
        assert [p["weight"] for p in parts] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    printed = capsys.readouterr().out
    assert re.search(r"cosine ┃ 1 +┃ 2 +┃ 3 ", printed)
    assert "next: python -m qlora_dist.export" in printed


def test_a_run_names_its_trained_adapters(three, tmp_path):
    nodes = [{"stage": "adapter", "label": f"legal-{i}", "folder": f} for i, f in enumerate(three)]
    nodes += [{"stage": "adapter", "label": "failed"}, {"stage": "merged", "label": "all", "folder": three[0]}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"nodes": nodes}))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "merge.json").read_text())["parts"]
    assert [p["label"] for p in parts] == ["legal-0", "legal-1", "legal-2"]


def test_a_run_of_workers_names_what_each_came_to(three, tmp_path):
    nodes = [{"stage": "worker", "label": f"legal-{i}", "folder": f} for i, f in enumerate(three)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"nodes": nodes}))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("stage", ["winner", "halved"])
def test_a_swept_run_names_the_adapters_that_were_chosen(three, tmp_path, stage):
    nodes = [{"stage": "adapter", "label": f"legal-0.r{i}", "folder": f} for i, f in enumerate(three)]
    nodes += [{"stage": stage, "label": f"legal-{i}", "folder": three[i]} for i in range(2)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"nodes": nodes}))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "merge.json").read_text())["parts"]
    assert [(p["label"], p["trained_tokens"]) for p in parts] == [("legal-0", 100), ("legal-1", 200)]


def test_numbers_are_taken_as_the_weights(three, tmp_path):
    assert main([*three, "--weights", "0.5,0.75,-0.25", "--out", str(tmp_path / "out")]) == 0
    for module, found in dense(tmp_path / "out").items():
        parts = [dense(tmp_path / name)[module] for name in "abc"]
        wanted = 0.5 * parts[0] + 0.75 * parts[1] - 0.25 * parts[2]
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_weights_may_begin_with_a_negative_one(three, tmp_path):
    assert main([*three, "--weights", "-0.5,.75,0.75", "--out", str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "merge.json").read_text())["parts"]
    assert [p["weight"] for p in parts] == [-0.5, 0.75, 0.75]


def test_inverse_loss_reads_what_each_adapter_says_of_itself(three, tmp_path):
    for name, loss in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        write_provenance(tmp_path / name, replace(read_provenance(tmp_path / name), validation_loss=loss))
    assert main([*three, "--weights", "inverse_loss", "--out", str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "merge.json").read_text())["parts"]
    assert [p["weight"] for p in parts] == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "svdd"], "--method=svdd: expected a merge method. Did you mean svd?"),
        (["--method", "svd"], "Set --rank=16 or --energy=0.99"),
        (["--rank", "4"], "Set --method=svd"),
        (["--weights", "0.5,0.5"], "3 numbers"),
        (["--weights", "token"], "Did you mean tokens?"),
        (["--weights", "inverse_loss"], "validation_loss"),
        (["--weights", "inverse_loss"], "Set --weights=uniform."),
        (["--method", "regmean"], "or set merge.method in a run"),
        (["--method", "greedy_soup", "--base", "b"], "--base and --rows with it"),
        (["--method", "learned", "--learned-per", "layer", "--base", "b", "--rows", "r"], "expected adapter or module"),
        (["--weights", "nan,1,1"], "--weights=nan: expected finite numbers; a has nan"),
        (["--weights", "1,1,1e400"], "--weights=inf: expected finite numbers; c has inf"),
        (["--weights", "uniform", "--scale", "inf"], "--scale=inf: expected a finite number"),
        (["--density", "0"], "--density=0.0: expected a number above 0"),
        (["a_folder_that_is_not"], "holds no PEFT folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_repair(three, tmp_path, capsys, arguments, message):
    assert main([*three, *arguments, "--out", str(tmp_path / "out")]) in (1, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_no_weight(three, tmp_path, capsys):
    for name, loss in (("a", 1.0), ("b", float("nan")), ("c", 4.0)):
        write_provenance(tmp_path / name, replace(read_provenance(tmp_path / name), validation_loss=loss))
    assert main([*three, "--weights", "inverse_loss", "--out", str(tmp_path / "out")]) == 2
    assert "with what validation_loss they were trained; b " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/out"])
def test_a_place_where_nothing_can_be_made_is_one_line(three, tmp_path, capsys, place):
    (tmp_path / "file").write_text("mine")
    assert main([*three, "--out", str(tmp_path / place)]) == 1
    assert "out: can't be made in" in capsys.readouterr().err
    assert unmerge_main([str(tmp_path / "a"), "--part", "a", "--out", str(tmp_path / place)]) == 1
    assert "out: can't be made in" in capsys.readouterr().err


def test_an_existing_result_is_not_touched(three, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert main([*three, "--out", str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_the_same_adapter_twice_is_refused(three, tmp_path, capsys):
    assert main([three[0], three[0], "--out", str(tmp_path / "out")]) == 1
    assert "was given twice" in capsys.readouterr().err
