import json
from pathlib import Path

import pytest

from qlora_dist.artifacts.store import MANIFEST, Manifest, Store
from qlora_dist.errors import ArtifactError


def manifest(label: str = "legal-0") -> Manifest:
    return Manifest(stage="rows", label=label, key="abc", version=1, recipe={"row_tokens": 8}, inputs={}, leaves={})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def made(store: Store) -> Path:
    partial = store.partial("rows/legal-0-abc")
    (partial / "deep").mkdir(parents=True)
    (partial / "rows.bin").write_bytes(b"12345")
    (partial / "deep" / "more.bin").write_bytes(b"67")
    (partial / ".owner.json").write_text("{}")
    return store.commit(manifest())


def test_a_committed_artifact_is_whole_and_its_partial_folder_is_gone(store: Store, made: Path):
    assert store.is_finished("rows/legal-0-abc")
    assert not store.partial("rows/legal-0-abc").exists()
    assert sorted(p.name for p in made.iterdir()) == ["deep", MANIFEST, "rows.bin"]
    store.verify("rows/legal-0-abc")


def test_the_manifest_holds_size_and_digest_of_every_file(store: Store, made: Path):
    files = store.manifest("rows/legal-0-abc").files
    assert {name: entry["bytes"] for name, entry in files.items()} == {"rows.bin": 5, "deep/more.bin": 2}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())


def test_what_is_not_committed_is_not_finished(store: Store):
    partial = store.partial("rows/legal-0-abc")
    partial.mkdir(parents=True)
    (partial / "rows.bin").write_bytes(b"12345")
    assert not store.is_finished("rows/legal-0-abc")


@pytest.mark.parametrize("damage", ["truncate", "delete", "no_manifest", "torn_manifest", "foreign_manifest"])
def test_damage_is_an_error_that_names_folder_and_repair(store: Store, made: Path, damage: str):
    if damage == "truncate":
        (made / "rows.bin").write_bytes(b"1")
    elif damage == "delete":
        (made / "deep" / "more.bin").unlink()
    elif damage == "no_manifest":
        (made / MANIFEST).unlink()
    elif damage == "torn_manifest":
        (made / MANIFEST).write_text((made / MANIFEST).read_text()[:40])
    else:
        values = json.loads((made / MANIFEST).read_text())
        (made / MANIFEST).write_text(json.dumps(values | {"label": "code-1"}))
    with pytest.raises(ArtifactError, match=r"legal-0-abc is damaged.*Delete that folder"):
        store.is_finished("rows/legal-0-abc")


def test_verify_finds_changed_bytes_of_the_same_size(store: Store, made: Path):
    (made / "rows.bin").write_bytes(b"54321")
    assert store.is_finished("rows/legal-0-abc")
    with pytest.raises(ArtifactError, match=r"rows\.bin"):
        store.verify("rows/legal-0-abc")


def test_the_second_of_two_commits_of_one_recipe_keeps_the_first(store: Store, made: Path):
    partial = store.partial("rows/legal-0-abc")
    partial.mkdir()
    (partial / "rows.bin").write_bytes(b"other")
    store.commit(manifest())
    assert (made / "rows.bin").read_bytes() == b"12345"
    assert not partial.exists()


def test_inputs_must_be_finished(store: Store, made: Path):
    assert store.inputs({"rows": "rows/legal-0-abc"}) == {"rows": made}
    with pytest.raises(ArtifactError, match="is not finished"):
        store.inputs({"rows": "rows/legal-1-abc"})
