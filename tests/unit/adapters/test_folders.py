"""Which folders a merge is told of, by which labels: none is lost, whatever its name."""

from __future__ import annotations

import json

import pytest

from qlora_dist.adapters.command import main
from qlora_dist.adapters.folders import find_folders
from qlora_dist.config.data import DomainConfig
from qlora_dist.config.run import RunConfig
from qlora_dist.errors import ConfigError

from .conftest import dense


def labels_of(out):
    return [part["label"] for part in json.loads((out / "merge.json").read_text())["parts"]]


def test_labels_grow_by_parents_until_they_differ(make_adapter, tmp_path):
    for name in ("x/legal", "y/legal", "y/code"):
        (tmp_path / name).mkdir(parents=True)
    folders = [make_adapter(f"{name}/adapter", seed=i) for i, name in enumerate(("x/legal", "y/legal", "y/code"))]
    assert list(find_folders([*map(str, folders)])) == ["x/legal/adapter", "y/legal/adapter", "code/adapter"]
    assert main([*map(str, folders), "--weights", "1,2,3", "--out", str(tmp_path / "out")]) == 0
    parts = [dense(folder) for folder in folders]
    for module, found in dense(tmp_path / "out").items():
        wanted = sum(i * part[module] for i, part in enumerate(parts, 1))
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_label_may_be_the_name_of_another_input(make_adapter, tmp_path):
    names = ["base", "rows-legal", "merged_part-1"]
    folders = [str(make_adapter(name, seed=i)) for i, name in enumerate(names)]
    assert main([*folders, "--weights", "uniform", "--out", str(tmp_path / "out")]) == 0
    assert labels_of(tmp_path / "out") == names


@pytest.mark.parametrize("name", ["rows", "merged_part"])
def test_a_run_has_no_domain_whose_labels_are_names_of_other_inputs(name):
    with pytest.raises(ConfigError, match=f"domain.{name}={name}: expected a name .* other than"):
        RunConfig(name="a", domain={name: DomainConfig()}).check("")


def test_a_folder_with_brackets_in_its_path_is_no_pattern(make_adapter, tmp_path, capsys):
    (tmp_path / "old [v1]").mkdir()
    for i, name in enumerate(("p", "q[red]")):
        make_adapter(f"old [v1]/{name}", seed=i)
    assert main([str(tmp_path / "old [v1]"), "--weights", "uniform", "--out", str(tmp_path / "out[bold]")]) == 0
    assert labels_of(tmp_path / "out[bold]") == ["p", "q[red]"]
    printed = capsys.readouterr().out
    assert "2 q[red]" in printed
    assert f"{tmp_path}/out[bold]" in printed


@pytest.mark.parametrize("summary", ['{"x": 1}', '{"nodes": [1]}', '{"nodes"', "[]"])
def test_a_summary_that_is_no_runs_doesnt_hide_the_adapters_beside_it(make_adapter, tmp_path, capsys, summary):
    (tmp_path / "mine").mkdir()
    make_adapter("mine/a")
    (tmp_path / "mine" / "summary.json").write_text(summary)
    assert main([str(tmp_path / "mine"), "--weights", "uniform", "--out", str(tmp_path / "out")]) == 0
    assert labels_of(tmp_path / "out") == ["a"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "summary.json").write_text(summary)
    assert main([str(tmp_path / "bare"), "--weights", "uniform", "--out", str(tmp_path / "other")]) == 1
    assert "holds no PEFT folder" in capsys.readouterr().err


def test_the_next_command_names_the_base_that_the_config_names(make_adapter, tmp_path, capsys):
    folder = make_adapter("a", revision="1" * 40)
    assert main([str(folder), "--weights", "uniform", "--out", str(tmp_path / "out")]) == 0
    assert f"--base /models/base --revision {'1' * 40} --to hf" in capsys.readouterr().out
