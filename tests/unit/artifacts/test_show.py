import json
import shutil
from pathlib import Path

import pytest

from qlora_dist.artifacts.show import main
from qlora_dist.artifacts.store import Manifest, Store


def make(store: Store, stage: str, label: str, inputs: dict[str, str] | None = None, **facts) -> str:
    manifest = Manifest(
        stage=stage, label=label, key="abc", version=1, recipe={}, inputs=inputs or {}, leaves={}, facts=facts
    )
    store.partial(manifest.id).mkdir(parents=True)
    (store.partial(manifest.id) / "a.bin").write_bytes(b"12")
    store.commit(manifest)
    return manifest.id


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    store = Store(tmp_path)
    base = make(store, "base", "tiny")
    parts = {f"legal-{i}": make(store, "adapter", f"legal-{i}", {"base": base}) for i in range(2)}
    told = [{"label": "legal-0", "weight": 0.25, "norm": 1.0}, {"label": "legal-1", "weight": 0.75, "norm": 2.0}]
    return store.folder(make(store, "merged", "all", parts, weights="tokens", parts=told))


def test_the_ancestry_is_a_tree_in_which_shared_ancestors_are_unfolded_once(merged: Path, capsys):
    assert main([str(merged)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("merged/all-abc weights tokens, parts {legal-0: 0.25, legal-1: 0.75}")
    assert [line.split()[1] for line in lines[1:] if "abc" in line][:1] == ["adapter/legal-0-abc"]
    assert sum("base/tiny-abc" in line for line in lines) == 2
    assert sum("(above)" in line for line in lines) == 1


def test_a_damaged_ancestor_is_named(merged: Path, capsys):
    (merged.parents[1] / "base" / "tiny-abc" / "a.bin").write_bytes(b"21")
    assert main([str(merged)]) == 0
    assert main([str(merged), "--verify"]) == 1
    assert "base/tiny-abc" in capsys.readouterr().err


def test_a_folder_that_is_no_artifact_is_one_line(tmp_path: Path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "is no finished artifact" in capsys.readouterr().err


def test_a_run_stands_for_what_it_ships(merged: Path, tmp_path: Path, capsys):
    nodes = [{"stage": "merged", "label": "failed"}, {"stage": "merged", "label": "all", "folder": str(merged)}]
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"nodes": nodes}))
    for folder in ("run", "run/adapter"):
        assert main([str(tmp_path / folder)]) == 0
        assert capsys.readouterr().out.startswith("merged/all-abc weights tokens")


@pytest.mark.parametrize("text", ['{"name": "my site"}', "[1]", '{"name"'])
def test_somebody_elses_manifest_is_no_damaged_artifact(tmp_path: Path, capsys, text: str):
    (tmp_path / "web" / "app").mkdir(parents=True)
    (tmp_path / "web" / "app" / "manifest.json").write_text(text)
    assert main([str(tmp_path / "web" / "app")]) == 1
    told = capsys.readouterr().err
    assert "is no artifact: its manifest.json is another program's" in told
    assert "Delete" not in told


def test_an_artifact_out_of_its_store_is_told_so(merged: Path, tmp_path: Path, capsys):
    shutil.copytree(merged, tmp_path / "elsewhere")
    assert main([str(tmp_path / "elsewhere")]) == 1
    told = capsys.readouterr().err
    assert "is in no store: its manifest.json is of merged/all-abc" in told
    assert "Delete" not in told


def test_a_torn_manifest_of_an_artifact_is_told_as_damage(merged: Path, capsys):
    torn = merged.with_name("all-0123456789ab")
    shutil.copytree(merged, torn)
    (torn / "manifest.json").write_text('{"stage"')
    assert main([str(torn)]) == 1
    assert "is damaged: manifest.json can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"x": 1}', '{"nodes": [1]}', '{"nodes"', "[]"])
def test_a_summary_that_is_no_runs_is_one_line(tmp_path: Path, capsys, text: str):
    (tmp_path / "summary.json").write_text(text)
    assert main([str(tmp_path)]) == 1
    assert "is no finished artifact" in capsys.readouterr().err
