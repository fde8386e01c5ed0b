"""Artifacts at a URL, in memory and on a local S3: staged here, locked there, finished by a manifest written last."""

import dataclasses
import json
import uuid
from pathlib import Path

import pytest

from qlora_dist.artifacts import lock as locks
from qlora_dist.artifacts.lock import Lock
from qlora_dist.artifacts.objects import Objects, is_url, require_writable
from qlora_dist.artifacts.owner import OwnedError
from qlora_dist.artifacts.remote import RemoteStore, open_store, resolve_root, staging_folder
from qlora_dist.artifacts.store import MANIFEST, Manifest, Store
from qlora_dist.errors import ArtifactError, ConfigError

ID = "rows/legal-0-abc"


@pytest.fixture(params=["memory", "s3"])
def url(request) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://bucket/{uuid.uuid4().hex}/artifacts"
    return f"memory://{uuid.uuid4().hex}/artifacts"


def machine(tmp_path: Path, url: str, name: str) -> RemoteStore:
    return RemoteStore(tmp_path / name, url)


def manifest(facts: str = "") -> Manifest:
    return Manifest(
        stage="rows", label="legal-0", key="abc", version=1, recipe={}, inputs={}, leaves={}, facts={"by": facts}
    )


def make(store: RemoteStore, text: str = "12345") -> Path:
    with store.owned(ID, "job"):
        fill(store, text)
        return store.commit(manifest(text))


def fill(store: RemoteStore, text: str) -> None:
    (store.partial(ID) / "deep").mkdir(parents=True, exist_ok=True)
    (store.partial(ID) / "rows.bin").write_text(text)
    (store.partial(ID) / "deep" / "more.bin").write_text("67")


def test_what_one_machine_made_another_fetches_and_checks(tmp_path: Path, url: str):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    assert not there.has(ID)
    assert there.finished([ID, "rows/other-abc"]) == set()
    make(here)
    assert there.finished([ID, "rows/other-abc"]) == {ID}
    assert there.is_finished(ID)
    folder = there.inputs({"rows": ID})["rows"]
    assert folder == tmp_path / "there" / ID
    assert (folder / "rows.bin").read_text() == "12345"
    assert (folder / "deep" / "more.bin").read_text() == "67"
    Store(tmp_path / "there").verify(ID)
    assert there.manifest(ID) == Store(tmp_path / "here").manifest(ID)


def test_only_the_manifest_finishes_an_artifact(tmp_path: Path, url: str, monkeypatch):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")

    def die(*_: object) -> bool:
        raise SystemExit

    monkeypatch.setattr(
        Objects, "create", lambda self, name, value: die() if MANIFEST in name else create(self, name, value)
    )
    with pytest.raises(SystemExit):
        make(here)
    assert here.objects.walk(ID)
    assert not there.has(ID)
    assert not here.has(ID), "what is only staged is not finished"
    with pytest.raises(ArtifactError, match="is not finished"):
        there.inputs({"rows": ID})
    monkeypatch.setattr(Objects, "create", create)
    make(here, "again")
    assert (there.fetch(ID) / "rows.bin").read_text() == "again"


create = Objects.create


def test_bytes_that_changed_at_the_url_are_an_error_that_names_the_file(tmp_path: Path, url: str):
    make(machine(tmp_path, url, "here"))
    there = machine(tmp_path, url, "there")
    [name] = [name for name in there.objects.walk(ID) if name.endswith("rows.bin")]
    there.objects.write(f"{ID}/{name}", b"54321")
    with pytest.raises(ArtifactError, match=r"rows\.bin are not those that were written"):
        there.fetch(ID)
    assert not (tmp_path / "there" / ID).exists()


def test_a_stale_copy_here_is_replaced_by_what_was_finished(tmp_path: Path, url: str):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    make(there, "there")
    here.folder(ID).mkdir(parents=True)
    (here.folder(ID) / "rows.bin").write_text("here")
    (here.folder(ID) / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest())))
    assert (here.fetch(ID) / "rows.bin").read_text() == "there"


def test_a_living_owner_elsewhere_is_named_and_waited_for(tmp_path: Path, url: str):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    with here.owned(ID, "first"):
        assert there.living_owner(ID)["job"] == "first"
        with pytest.raises(OwnedError, match="first"), there.owned(ID, "second"):
            pass
    assert there.living_owner(ID) is None
    with there.owned(ID, "second"):
        pass


def test_an_owner_that_fell_silent_is_passed_over_and_can_not_finish(tmp_path: Path, url: str, monkeypatch):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    with here.owned(ID, "slow"):
        fill(here, "slow")
        monkeypatch.setattr(locks, "SILENT_S", -1.0)
        monkeypatch.setattr("qlora_dist.artifacts.lock.Lock.__init__.__defaults__", (-1.0,))
        make(there, "quick")
        monkeypatch.undo()
        here.commit(manifest("slow"))
    assert here.manifest(ID).facts == {"by": "quick"}
    assert (here.fetch(ID) / "rows.bin").read_text() == "quick"
    assert len({name.partition("/")[0] for name in here.objects.walk(ID)} - {MANIFEST}) == 1, "the slow one's are gone"


def test_one_of_two_that_pass_over_the_same_silent_owner_gets_the_lock(url: str):
    objects = Objects(url)
    Lock(objects, "x", "dead").take()
    first, second = Lock(objects, "x", "first", silent_s=-1), Lock(objects, "x", "second", silent_s=-1)
    last = locks.last_owner(objects, "x")
    first.take()
    with pytest.MonkeyPatch.context() as patch:  # the second looked before the first took it
        patch.setattr(locks, "last_owner", lambda *_: last)
        with pytest.raises(OwnedError):
            second.take()
    assert first.is_mine()
    assert not second.is_mine()


def test_the_next_life_of_a_stage_that_resumes_goes_on_elsewhere(tmp_path: Path, url: str):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    with here.owned(ID, "first", resumes=True):
        (here.partial(ID) / "checkpoints" / "step-1").mkdir(parents=True)
        (here.partial(ID) / "checkpoints" / "step-1" / "state.json").write_text("1")
        (here.partial(ID) / ".hidden").write_text("stays")
    with there.owned(ID, "second", resumes=True):
        assert (there.partial(ID) / "checkpoints" / "step-1" / "state.json").read_text() == "1"
        assert not (there.partial(ID) / ".hidden").exists()
        fill(there, "whole")
        there.commit(manifest())
    assert not there.objects.walk(f"{ID}.partial"), "nothing of the lives before is kept"
    assert here.is_finished(ID)


def test_a_life_that_ended_here_is_gone_on_with_from_here(tmp_path: Path, url: str):
    here = machine(tmp_path, url, "here")
    with here.owned(ID, "first", resumes=True):
        (here.partial(ID) / "step").write_text("1")
    (here.partial(ID) / "step").write_text("2")  # written after the last copy to the URL
    with here.owned(ID, "second", resumes=True):
        assert (here.partial(ID) / "step").read_text() == "2"


def test_a_copy_is_refreshed_and_what_is_gone_here_is_gone_there(tmp_path: Path, url: str):
    here, there = machine(tmp_path, url, "here"), machine(tmp_path, url, "there")
    for step in ("1", "2"):
        with here.owned(ID, "first", resumes=True):
            for old in here.partial(ID).glob("step-*"):
                old.unlink()
            (here.partial(ID) / f"step-{step}").write_text(step)
    with there.owned(ID, "second", resumes=True):
        assert [path.name for path in there.partial(ID).glob("step-*")] == ["step-2"]


def test_a_root_is_a_url_or_a_folder(tmp_path: Path):
    assert is_url("s3://bucket/runs")
    assert not is_url("runs")
    assert resolve_root("memory://a/runs/") == "memory://a/runs"
    assert resolve_root(f"file://{tmp_path}") == str(tmp_path)
    assert type(open_store(str(tmp_path), tmp_path)) is Store
    assert staging_folder("s3://a/runs", str(tmp_path)) != staging_folder("s3://b/runs", str(tmp_path))


@pytest.mark.parametrize(("root", "said"), [("nope://x/runs", "nope:// is not known"), ("gs://x/runs", "pip install")])
def test_a_url_that_nobody_can_open_is_an_error_that_names_the_repair(root: str, said: str):
    with pytest.raises(ConfigError, match=said):
        require_writable(root)


def test_of_two_that_create_the_same_file_at_once_the_store_tells_one_that_it_did(url: str, monkeypatch):
    objects = Objects(url)
    monkeypatch.setattr(Objects, "exists", lambda *_: False)  # both looked before either wrote
    assert objects.create("x/lock", b"first")
    assert not objects.create("x/lock", b"second")
    assert objects.read("x/lock") == b"first"
