from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.artifacts.store import Manifest
from qlora_dist.config.evaluate import TrackingConfig, TrackingName
from qlora_dist.config.stages import AdapterConfig, ScoresConfig, WinnerConfig
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig
from qlora_dist.errors import ConfigError
from qlora_dist.evaluate.documents import Document, write_documents
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.run import run_node
from qlora_dist.pipeline.tracked import tracked
from qlora_dist.runtime import JsonlSink, Made, log_image, log_made, log_metrics, log_table, sinks, write_json
from qlora_dist.tracking import open_tracker
from qlora_dist.tracking.picture import matrix_picture, square_picture


def run_of(folder: Path, name: TrackingName = TrackingName.offline) -> Any:
    return open_tracker(
        TrackingConfig(name=name),
        name="adapter-legal-0",
        run_id="adapter-legal-0-abc123",
        group="legal",
        job_type="adapter",
        recipe={"lora": {"lora_rank": 8}},
        folder=folder,
    )


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def payloads(path: Path) -> Iterator[bytes]:
    """Reads a W&B transaction log: LevelDB's log format (blocks of 32 KiB, records in parts) after 7 bytes of header.

    A torn end, as a kill leaves it, ends the reading.
    """
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(data) for data in payloads(path)]


def history(path: Path) -> list[dict[str, Any]]:
    rows = [r.history for r in records(path) if r.WhichOneof("record_type") == "history"]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]


def test_offline_run_holds_id_group_type_recipe_and_every_step(tmp_path: Path) -> None:
    with run_of(tmp_path) as sink:
        for step in (1, 2, 3):
            sink.log(step, {"loss": 4.0 / step})
    (path,) = segments(tmp_path)
    run = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.job_type) == ("adapter-legal-0-abc123", "legal", "adapter")
    assert run.display_name == "adapter-legal-0"
    assert {u.key: json.loads(u.value_json) for u in run.config.update}["lora"] == {"lora_rank": 8}
    assert [(h["step"], h["loss"]) for h in history(path)] == [(1, 4.0), (2, 2.0), (3, 4.0 / 3)]


def test_killed_run_keeps_what_it_logged_and_a_requeue_goes_on_under_the_same_id(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from test_tracking import run_of\n"
        "with run_of(Path(sys.argv[1])) as sink:\n"
        "    for step in range(1, 6): sink.log(step, {'loss': 1.0})\n"
        "    print('logged', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "logged\n"
        deadline = time.monotonic() + 30
        while not (segments(tmp_path) and len(history(segments(tmp_path)[0])) == 5) and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(child.pid, signal.SIGKILL)
    with run_of(tmp_path) as sink:
        sink.log(6, {"loss": 0.5})
    steps = [[h["step"] for h in history(path)] for path in segments(tmp_path)]
    assert sorted(steps) == [[1, 2, 3, 4, 5], [6]]
    ids = {r.run.run_id for path in segments(tmp_path) for r in records(path) if r.WhichOneof("record_type") == "run"}
    assert ids == {"adapter-legal-0-abc123"}


def test_run_that_fails_is_marked_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), run_of(tmp_path) as sink:
        sink.log(1, {"loss": 1.0})
        raise ValueError("boom")
    ends = [r.exit.exit_code for r in records(segments(tmp_path)[0]) if r.WhichOneof("record_type") == "exit"]
    assert ends == [1]


def test_tracker_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with run_of(tmp_path) as sink:
        sink.log(1, {"loss": 1.0})
    assert capfd.readouterr() == ("", "")


def test_none_and_other_ranks_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_of(tmp_path, TrackingName.none) as sink:
        assert sink is None
    monkeypatch.setenv("RANK", "1")
    with run_of(tmp_path) as sink:
        assert sink is None
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_is_logged_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with run_of(tmp_path, TrackingName.wandb) as sink:
        sink.log(1, {"loss": 1.0})
    assert "WANDB_API_KEY isn't set" in caplog.text
    assert len(segments(tmp_path)) == 1


def test_unreachable_server_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("qlora_dist.tracking.weights_and_biases.INIT_TIMEOUT_S", 2.0)
    with run_of(tmp_path, TrackingName.wandb) as sink:
        sink.log(1, {"loss": 1.0})
    assert "can't be reached" in caplog.text
    assert [h["step"] for h in history(segments(tmp_path)[0])] == [1]


def test_config_and_planning_do_not_import_wandb() -> None:
    code = "import sys, qlora_dist.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensorboard_holds_every_step_and_the_config_and_joins_a_requeue(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install -e .[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2), (3,)):
        with run_of(tmp_path, TrackingName.tensorboard) as sink:
            for step in steps:
                sink.log(step, {"loss": 4.0 / step, "learning_rate": 0.1})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "adapter-legal-0-abc123")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    assert len(events.Scalars("learning_rate")) == 3
    assert b"lora_rank" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_that_is_not_installed_is_named_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"qlora_dist\[tensorboard\]"), run_of(tmp_path, TrackingName.tensorboard):
        pass


def test_tables_reach_the_tracker_that_takes_them(tmp_path: Path) -> None:
    with run_of(tmp_path) as sink, sinks(sink, JsonlSink(tmp_path / "metrics.jsonl")):
        log_table("scores", ["model", "value"], [["base", 3.1], ["merged", 2.4]])
    (path,) = segments(tmp_path)
    where = next(row["scores.path"] for row in history(path) if "scores.path" in row)
    table = json.loads((path.parent / "files" / where).read_text(encoding="utf-8"))
    assert (table["columns"], table["data"]) == (["model", "value"], [["base", 3.1], ["merged", 2.4]])


def made_of(folder: Path, stage: str, label: str, facts: dict[str, Any] | None = None) -> Made:
    manifest = folder / stage / f"{label}-abc123" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"stage": stage, "label": label}), encoding="utf-8")
    return Made(stage=stage, label=label, key="abc123", manifest=manifest, facts=facts or {})


def test_artifacts_are_linked_by_lineage_to_the_run_that_made_them_and_to_those_that_read_them(tmp_path: Path) -> None:
    rows, base = (made_of(tmp_path, *name) for name in (("rows", "legal-0"), ("base", "tiny")))
    adapter = made_of(tmp_path, "adapter", "legal-0", {"validation_loss": 2.5})
    with run_of(tmp_path) as sink, sinks(sink):
        log_made(adapter, [rows, base])
    (path,) = segments(tmp_path)
    logged = [r for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    artifacts = {r.artifact.name: r.artifact for r in logged}
    assert {name: (a.type, a.use_after_commit) for name, a in artifacts.items()} == {
        "rows-legal-0": ("rows", True),
        "base-tiny": ("base", True),
        "adapter-legal-0": ("adapter", False),
    }
    assert {a.run_id for a in artifacts.values()} == {"adapter-legal-0-abc123"}
    assert all("abc123" in a.aliases for a in artifacts.values())
    (entry,) = artifacts["adapter-legal-0"].manifest.contents
    assert (entry.path, Path(entry.local_path)) == ("manifest.json", adapter.manifest)
    assert json.loads(artifacts["rows-legal-0"].metadata)["key"] == "abc123"
    summary = {u.key: u.value_json for r in records(path) for u in r.summary.update}
    assert json.loads(summary["validation_loss"]) == 2.5


def test_same_artifact_has_the_same_digest_for_its_maker_and_its_reader(tmp_path: Path) -> None:
    rows, base = (made_of(tmp_path, *name) for name in (("rows", "legal-0"), ("base", "tiny")))
    with run_of(tmp_path) as sink, sinks(sink):
        log_made(rows, [])
        log_made(base, [rows])
    (path,) = segments(tmp_path)
    logged = [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    assert [a.use_after_commit for a in logged if a.name == "rows-legal-0"] == [False, True]
    assert len({a.digest for a in logged if a.name == "rows-legal-0"}) == 1


def test_tables_and_images_of_what_was_found_are_logged(tmp_path: Path) -> None:
    facts = {
        "parts": [{"label": "legal-0", "weight": 0.5}, {"label": "legal-1", "weight": 0.5}],
        "cosines": [[1.0, 0.3], [0.3, 1.0]],
        "certificate": [{"check": "moved", "passed": True, "found": "224 of 224"}],
    }
    merged = made_of(tmp_path, "merged", "all", facts)
    with run_of(tmp_path) as sink, sinks(sink):
        log_made(merged, [])
        log_image("calibration/legal", square_picture({"base": [(0.2, 0.1), (0.8, 0.9)]}, "legal"))
    (path,) = segments(tmp_path)
    rows = {key: value for row in history(path) for key, value in row.items()}
    assert {"parts.path", "certificate.path", "cosines.path", "calibration/legal.path"} <= set(rows)
    from PIL import Image

    for name in ("cosines", "calibration/legal"):
        with Image.open(path.parent / "files" / rows[f"{name}.path"]) as image:
            assert image.size == (rows[f"{name}.width"], rows[f"{name}.height"])
            assert len(image.convert("RGB").getcolors(100_000) or []) > 3
    table = json.loads((path.parent / "files" / rows["certificate.path"]).read_text(encoding="utf-8"))
    assert table["data"] == [["moved", True, "224 of 224"]]


def test_silent_server_is_asked_once_and_not_by_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("qlora_dist.tracking.weights_and_biases.INIT_TIMEOUT_S", 3.0)
    took = []
    for _ in range(2):
        started = time.monotonic()
        with run_of(tmp_path, TrackingName.wandb) as sink:
            sink.log(1, {"loss": 1.0})
        took.append(time.monotonic() - started)
    assert (tmp_path / "wandb" / "unreachable").exists()
    assert took[1] < took[0] - 1.5
    assert len(segments(tmp_path)) == 2


def test_tensorboard_takes_tables_images_and_lineage(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install -e .[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with run_of(tmp_path, TrackingName.tensorboard) as sink, sinks(sink):
        log_table("scores", ["model", "value"], [["a|b", 3.1]])
        log_image("cosines", matrix_picture([[1.0, -0.5], [-0.5, 1.0]], ["a", "b"]))
        log_made(made_of(tmp_path, "adapter", "legal-0"), [made_of(tmp_path, "rows", "legal-0")])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "adapter-legal-0-abc123")).Reload()
    told = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert told["scores/text_summary"] == "| model | value |\n| --- | --- |\n| a\\|b | 3.1 |"
    assert "| rows | legal-0 | abc123 | read |" in told["lineage/text_summary"]
    (image,) = events.Images("cosines")
    assert image.width == image.height + 48


def trial_plan(root: Path, ranks: tuple[int, ...]) -> tuple[Plan, Node]:
    """A plan whose trials are trained and measured, each in a run of its own, and the node that chooses one."""
    told = {"tracking": {"name": "offline", "project": "p"}}
    plan = Plan(experiment="sweep", root=str(root), command="", config=told)
    trials = [TrialConfig(name=f"r{rank}", lora=LoraConfig(lora_rank=rank)) for rank in ranks]
    inputs = {"scores-base": plan.add("validated", "legal-base", ScoresConfig(name="base"))}
    documents = {"base": 2.0} | {f"r{rank}": 2.0 - rank / 100 for rank in ranks}
    for trial in trials:
        adapter = plan.add("adapter", f"legal-0.{trial.name}", AdapterConfig(lora=trial.lora), subject="legal-0")
        inputs[f"adapter-{trial.name}"] = adapter
        scored = ScoresConfig(name="legal-0")
        inputs[f"scores-{trial.name}"] = plan.add("validated", adapter.label, scored, inputs={"adapter": adapter})
        with tracked(plan, adapter, lane=trial.name):
            log_metrics(1, {"loss": 3.0}, lane=trial.name)
    facts = {"num_steps": 9}
    for name, node in inputs.items():
        folder = plan.store.folder(node.id)
        folder.mkdir(parents=True)
        if node.stage == "validated":
            level = documents[name.removeprefix("scores-")]
            common = {"split": "validation", "tokens": 10, "bytes": 100}
            kinds = (("legal", 100 * level), ("general", 200.0))
            rows = [Document(domain=d, record=d, cluster=d, nll_bits=bits, **common) for d, bits in kinds]
            write_documents(rows, folder)
        values = {name: getattr(node, name) for name in ("stage", "key", "recipe", "inputs")}
        manifest = Manifest(
            **values, label=node.subject or node.label, version=1, leaves={}, execution=node.config, facts=facts
        )
        write_json(folder / "manifest.json", {f: getattr(manifest, f) for f in Manifest.__dataclass_fields__})
    return plan, plan.add("winner", "legal-0", WinnerConfig(domain="legal", trials=trials), inputs=inputs)


def test_a_trial_is_one_run_whose_columns_are_its_config_and_what_it_came_to(tmp_path: Path) -> None:
    plan, winner = trial_plan(tmp_path, (4, 8))
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    run_node(plan, winner)
    runs: dict[str, list[Path]] = {}
    for path in segments(plan.folder):
        run = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
        if run.job_type == "adapter":
            assert run.run_group == "sweep"
            config = {u.key: json.loads(u.value_json) for u in run.config.update}
            runs.setdefault(f"r{config['lora']['lora_rank']}", []).append(path)
    assert sorted(runs) == ["r4", "r8"], "no run but one a trial"
    for name, level in (("r4", 1.96), ("r8", 1.92)):
        ids = {r.run.run_id for p in runs[name] for r in records(p) if r.WhichOneof("record_type") == "run"}
        assert len(ids) == 1
        logged = [row for path in sorted(runs[name], key=lambda p: p.stat().st_mtime_ns) for row in history(path)]
        assert [(row["step"], row.get("loss")) for row in logged] == [(1, 3.0), (9, None)]
        assert logged[1]["validation_bits_per_byte"] == pytest.approx(level)
        assert logged[1]["forgetting"] == pytest.approx(0.0)
        assert logged[1]["is_chosen"] == (name == "r8")
