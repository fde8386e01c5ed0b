"""Several nodes in one process: each an artifact of its own, and none takes another along."""

import json
from pathlib import Path

import pytest

from qlora_dist.config.stages import RowsConfig, TokenizerConfig
from qlora_dist.errors import DataError, Preempted
from qlora_dist.pipeline.group import run_nodes
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.stages import STAGES, Stage
from qlora_dist.runtime import log_metrics


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    tracking = {"name": "none", "project": "test"}
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={"tracking": tracking})
    (plan.folder / "logs").mkdir(parents=True)
    for label in "abc":
        plan.add("tokenizer", label, TokenizerConfig(path=label), group="all")
    return plan


def install(monkeypatch, function, joint=None) -> None:
    stage = Stage("tokenizer", TokenizerConfig, "unused:unused", joint="unused:unused" if joint else "")
    monkeypatch.setattr(Stage, "load", lambda _: function)
    monkeypatch.setattr(Stage, "load_joint", lambda _: joint)
    monkeypatch.setitem(STAGES, "tokenizer", stage)


def finished(plan: Plan) -> list[str]:
    return [node.label for node in plan.nodes if plan.store.is_finished(node.id)]


def test_a_node_that_fails_takes_no_other_along(plan, monkeypatch):
    def work(config, inputs, out):
        if config.path == "b":
            raise DataError("b is bad")
        return {}

    install(monkeypatch, work)
    assert run_nodes(plan, plan.nodes) == 1
    assert finished(plan) == ["a", "c"]
    assert json.loads(plan.failure_path(plan.node("tokenizer/b")).read_text())["message"] == "b is bad"


def test_a_node_whose_input_failed_is_skipped(plan, monkeypatch, capsys):
    plan.add("rows", "d", RowsConfig(), inputs={"tokenizer": plan.node("tokenizer/b")})
    install(monkeypatch, lambda config, inputs, out: {} if config.path != "b" else 1 / 0)
    assert run_nodes(plan, plan.nodes) == 1
    assert "skipped: rows/d" in capsys.readouterr().err
    assert not plan.failure_path(plan.node("rows/d")).exists()


def test_a_stop_begins_no_further_node(plan, monkeypatch):
    def work(config, inputs, out):
        if config.path == "b":
            raise Preempted("stopped")
        return {}

    install(monkeypatch, work)
    assert run_nodes(plan, plan.nodes) == 75
    assert finished(plan) == ["a"]


def test_a_joint_function_makes_what_is_left_and_each_comes_out_on_its_own(plan, monkeypatch):
    install(monkeypatch, lambda config, inputs, out: {})
    run_nodes(plan, [plan.node("tokenizer/a")] * 2)  # finished before, by itself
    seen = {}

    def joint(configs, inputs, outs):
        seen.update({label: config.path for label, config in configs.items()})
        for label, out in outs.items():
            (out / "made.txt").write_text(label)
            log_metrics(1, {"loss": 1.0}, lane=label)
        return {"b": {"loss": 1.0}, "c": DataError("c diverged")}

    install(monkeypatch, None, joint)
    assert run_nodes(plan, plan.nodes) == 1
    assert seen == {"b": "b", "c": "c"}
    assert finished(plan) == ["a", "b"]
    assert plan.store.manifest(plan.node("tokenizer/b").id).facts == {"loss": 1.0}
    assert (plan.store.folder(plan.node("tokenizer/b").id) / "made.txt").read_text() == "b"
    assert json.loads(plan.failure_path(plan.node("tokenizer/c")).read_text())["message"] == "c diverged"


def test_what_a_joint_function_raises_is_left_for_every_node(plan, monkeypatch):
    def joint(configs, inputs, outs):
        raise Preempted("stopped after step 3")

    install(monkeypatch, None, joint)
    assert run_nodes(plan, plan.nodes) == 75
    assert all(json.loads(plan.failure_path(node).read_text())["exit_code"] == 75 for node in plan.nodes)
