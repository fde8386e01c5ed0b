"""One node's life: made once, continued after a kill, waited for, and never half-finished."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from qlora_dist.config.stages import TokenizerConfig
from qlora_dist.errors import DataError
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.run import manifest_of, ownership, run_and_report
from qlora_dist.pipeline.stages import STAGES, Stage


def plan_of(tmp_path: Path) -> Plan:
    tracking = {"name": "none", "project": "test"}
    return Plan(experiment="test", root=str(tmp_path), command="", config={"tracking": tracking})


@pytest.fixture
def node(tmp_path: Path, monkeypatch):
    """A plan of one node whose stage function each test sets with `node.does`."""
    plan = plan_of(tmp_path)
    (plan.folder / "logs").mkdir(parents=True)
    plan.add("tokenizer", "t", TokenizerConfig())

    class Case:
        made = plan.store.folder(plan.nodes[0].id)
        partial = plan.store.partial(plan.nodes[0].id)
        failed = plan.failure_path(plan.nodes[0])

        def does(self, function, resumes=False):
            stage = Stage("tokenizer", TokenizerConfig, "unused:unused", resumes=resumes)
            monkeypatch.setattr(Stage, "load", lambda _: function)
            monkeypatch.setitem(STAGES, "tokenizer", stage)

        def run(self) -> int:
            return run_and_report(plan, plan.nodes[0])

    return Case()


def test_a_node_leaves_its_files_facts_and_circumstances(node):
    def work(config, inputs, out):
        (out / "a.txt").write_text("hello")
        return {"count": 3}

    node.does(work)
    assert node.run() == 0
    manifest = json.loads((node.made / "manifest.json").read_text())
    assert manifest["facts"] == {"count": 3}
    assert manifest["files"]["a.txt"]["bytes"] == 5
    assert manifest["made"]["versions"]["torch"]


def test_a_finished_node_does_no_work_again(node):
    calls = []
    node.does(lambda config, inputs, out: calls.append(1) or {})
    assert node.run() == node.run() == 0
    assert calls == [1]


def test_an_error_of_the_user_is_one_line_and_nothing_is_finished(node, capsys):
    def work(config, inputs, out):
        (out / "half.txt").write_text("half")
        raise DataError("a.jsonl:3: not JSON. Mend that line.")

    node.does(work)
    assert node.run() == 1
    assert capsys.readouterr().err == "error: a.jsonl:3: not JSON. Mend that line.\n"
    assert not node.made.exists()
    assert json.loads(node.failed.read_text())["message"] == "a.jsonl:3: not JSON. Mend that line."


def test_a_fault_of_the_program_shows_its_traceback(node, capsys):
    node.does(lambda config, inputs, out: {}["absent"])
    assert node.run() == 1
    assert "Traceback" in capsys.readouterr().err
    assert "fault of the program" in json.loads(node.failed.read_text())["message"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full"), (errno.EROFS, "can't be written"), (errno.EACCES, "root=")]
)
def test_a_full_or_closed_disk_names_the_repair(node, number: int, message: str):
    def work(config, inputs, out):
        raise OSError(number, os.strerror(number), str(out / "a.txt"))

    node.does(work)
    assert node.run() == 1
    assert message in json.loads(node.failed.read_text())["message"]
    assert not node.made.exists()


def test_leftovers_of_a_killed_life_are_cleared_unless_the_stage_resumes(node):
    node.partial.mkdir(parents=True)
    (node.partial / "left.txt").write_text("left")
    seen = []

    def work(config, inputs, out):
        seen.append((out / "left.txt").exists())
        raise DataError("stop")

    node.does(work)
    node.run()
    (node.partial / "left.txt").write_text("left")
    node.does(work, resumes=True)
    node.run()
    assert seen == [False, True]


def test_success_removes_word_of_an_earlier_failure(node):
    node.does(lambda config, inputs, out: (_ for _ in ()).throw(DataError("x")))
    node.run()
    assert node.failed.exists()
    node.does(lambda config, inputs, out: {})
    assert node.run() == 0
    assert not node.failed.exists()


SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from qlora_dist.config.stages import TokenizerConfig
    from qlora_dist.pipeline import stages
    from qlora_dist.pipeline.plan import read_plan
    from qlora_dist.pipeline.run import manifest_of, ownership, run_and_report
    def work(config, inputs, out):
        (out / "who.txt").write_text(sys.argv[2])
        print("working", flush=True)
        time.sleep(float(sys.argv[3]))
        return {}
    stages.Stage.load = lambda self: work
    plan = read_plan(Path(sys.argv[1]))
    sys.exit(run_and_report(plan, plan.nodes[0]))
""")


def start(plan: Plan, who: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(plan.folder / "plan.json"), who, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def written_plan(tmp_path: Path) -> Plan:
    plan = plan_of(tmp_path)
    plan.add("tokenizer", "t", TokenizerConfig())
    (plan.folder / "logs").mkdir(parents=True)
    plan.write()
    return plan


def test_a_second_process_waits_for_the_first_and_finds_it_finished(tmp_path: Path):
    plan = written_plan(tmp_path)
    first = start(plan, "first", 2.0)
    assert first.stdout.readline() == "working\n"
    second = start(plan, "second", 0)
    assert first.wait(30) == second.wait(30) == 0
    assert (plan.store.folder(plan.nodes[0].id) / "who.txt").read_text() == "first"
    assert second.stdout.read() == ""


def test_a_second_process_takes_over_from_a_killed_one(tmp_path: Path):
    plan = written_plan(tmp_path)
    first = start(plan, "first", 60)
    assert first.stdout.readline() == "working\n"
    second = start(plan, "second", 0)
    time.sleep(1.5)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(30) == 0
    assert (plan.store.folder(plan.nodes[0].id) / "who.txt").read_text() == "second"


def test_another_rank_leaves_a_node_only_once_rank_0_has_committed_it(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    node = plan.add("tokenizer", "t", TokenizerConfig())
    entered, left = threading.Event(), threading.Event()

    def other_rank():
        with ownership(plan, node) as is_mine:
            assert is_mine
            entered.set()
        left.set()

    monkeypatch.setattr("qlora_dist.pipeline.run.rank", lambda: 1)
    thread = threading.Thread(target=other_rank)
    with plan.store.owned(node.id, f"{plan.experiment}: {node.name}"):
        thread.start()
        assert entered.wait(10)
        assert not left.wait(0.5)
        plan.store.commit(manifest_of(plan, node, {}, 0.0))
        assert left.wait(10)
    thread.join()
