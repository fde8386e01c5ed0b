import os
import signal
import sys
import time
from pathlib import Path

import pytest

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.errors import ConfigError
from qlora_dist.launch.base import End, Job, Machine, State
from qlora_dist.launch.lives import Lives
from qlora_dist.launch.local import LocalLauncher

MACHINE = Machine(cores=2, memory_bytes=1000, gpus=0)


def job(tmp_path: Path, name: str, code: str = "pass", after: tuple[str, ...] = (), **needs: int) -> Job:
    return Job(name=name, argv=[sys.executable, "-c", code], log=tmp_path / f"{name}.log", after=list(after), **needs)


def finish(launcher: LocalLauncher, seconds: float = 30) -> dict[str, State]:
    end = time.monotonic() + seconds
    while True:
        states = dict(launcher.poll())
        if all(state.has_ended for state in states.values()):
            return states
        assert time.monotonic() < end, states
        time.sleep(0.02)


def test_jobs_run_after_what_they_need_and_leave_logs(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    mark = tmp_path / "mark"
    launcher.submit(job(tmp_path, "a", f"import time; time.sleep(.3); open({str(mark)!r}, 'w'); print('hello')"))
    launcher.submit(job(tmp_path, "b", f"open({str(mark)!r})", after=("a",)))
    assert finish(launcher) == {"a": State.done, "b": State.done}
    assert (tmp_path / "a.log").read_text() == "hello\n"


def test_more_processes_than_gpus_are_refused(tmp_path: Path):
    launcher = LocalLauncher(Machine(cores=2, memory_bytes=1000, gpus=2))
    launcher.check([job(tmp_path, "data", processes=1), job(tmp_path, "two", processes=2, gpus=2)])
    with pytest.raises(ConfigError, match=r"strategy.world_size=4: expected at most 2, the GPUs.*world_size=2"):
        launcher.check([job(tmp_path, "four", processes=4, gpus=2)])
    LocalLauncher(MACHINE).check([job(tmp_path, "cpus", processes=4)])


def test_a_failing_job_fails_only_what_depends_on_it(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    launcher.submit(job(tmp_path, "bad", "raise SystemExit(3)"))
    launcher.submit(job(tmp_path, "child", after=("bad",)))
    launcher.submit(job(tmp_path, "grandchild", after=("child",)))
    launcher.submit(job(tmp_path, "other"))
    states = finish(launcher)
    assert states == {
        "bad": State.failed,
        "child": State.skipped,
        "grandchild": State.skipped,
        "other": State.done,
    }


def test_a_finished_dependency_need_not_be_submitted(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    launcher.submit(job(tmp_path, "b", after=("cached before",)))
    assert finish(launcher) == {"b": State.done}


@pytest.mark.parametrize(("needs", "most"), [({"cores": 1}, 2), ({"cores": 2}, 1), ({"memory_bytes": 600}, 1)])
def test_as_many_run_at_once_as_fit(tmp_path: Path, needs: dict[str, int], most: int):
    launcher = LocalLauncher(MACHINE)
    for name in "abcd":
        launcher.submit(job(tmp_path, name, "import time; time.sleep(.3)", **needs))
    seen = 0
    while not all(state.has_ended for state in launcher.poll().values()):
        seen = max(seen, sum(state is State.running for state in launcher.poll().values()))
        time.sleep(0.02)
    assert seen == most


def test_max_parallel_limits_what_the_machine_would_allow(tmp_path: Path):
    launcher = LocalLauncher(MACHINE, LauncherConfig(max_parallel=1))
    for name in "ab":
        launcher.submit(job(tmp_path, name, "import time; time.sleep(.2)"))
    assert sorted(state.name for state in launcher.poll().values()) == ["running", "waiting"]
    finish(launcher)


def test_a_job_larger_than_the_machine_runs_alone(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    launcher.submit(job(tmp_path, "large", memory_bytes=10**15, cores=64))
    assert finish(launcher) == {"large": State.done}


def test_cancel_ends_the_children_of_a_job_too(tmp_path: Path):
    pid_file = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    launcher = LocalLauncher(MACHINE)
    launcher.submit(job(tmp_path, "a", code))
    launcher.submit(job(tmp_path, "b", after=("a",)))
    launcher.poll()
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.05)
    launcher.cancel()
    assert set(launcher.poll().values()) == {State.cancelled}
    time.sleep(0.2)
    assert not _alive(int(pid_file.read_text()))


def test_cancel_kills_a_job_that_ignores_sigterm(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("qlora_dist.launch.local.GRACE_S", 0.3)
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    launcher = LocalLauncher(MACHINE)
    launcher.submit(job(tmp_path, "deaf", code))
    launcher.poll()
    while not ready.exists():
        time.sleep(0.05)
    launcher.cancel()
    assert launcher.poll() == {"deaf": State.cancelled}


def test_a_job_that_stopped_with_a_checkpoint_is_run_again(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    lives = tmp_path / "lives"
    code = f"""
import sys
open({str(lives)!r}, "a").write("x")
sys.exit(75 if len(open({str(lives)!r}).read()) < 3 else 0)
"""
    launcher.submit(job(tmp_path, "a", code))
    assert finish(launcher) == {"a": State.done}
    assert lives.read_text() == "xxx"


def test_what_a_job_left_beside_its_log_counts_before_its_exit_code(tmp_path: Path):
    launcher = LocalLauncher(MACHINE)
    mark, word = tmp_path / "mark", tmp_path / "a.failed.json"
    code = f"""
import os, sys
if not os.path.exists({str(mark)!r}):
    open({str(mark)!r}, "w").close()
    open({str(word)!r}, "w").write('{{"exit_code": 75}}')
    sys.exit(1)
"""
    again = job(tmp_path, "a", code)
    again.words = [word]
    launcher.submit(again)
    assert finish(launcher) == {"a": State.done}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


def lives_of(tmp_path: Path, code: str, *, word: str = "", config: LauncherConfig | None = None, **needs: int):
    """Runs a job to its end, and returns its state and the number of its lives."""
    lives = tmp_path / "lives"
    count = f"import os, signal, time; open({str(lives)!r}, 'a').write('x'); n = len(open({str(lives)!r}).read())\n"
    leave = f"open({str(tmp_path / 'word')!r}, 'w').write({word!r})\n" if word else ""
    once = job(tmp_path, "adapter/a", count + leave + code, **needs)
    once.log, once.words = tmp_path / "a.log", [tmp_path / "word"]
    launcher = LocalLauncher(MACHINE, config or LauncherConfig(retries=2, retry_wait_s=0.01))
    launcher.submit(once)
    return finish(launcher)["adapter/a"], len(lives.read_text())


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_job_that_was_killed_is_run_again_as_often_as_the_config_says(tmp_path: Path):
    assert lives_of(tmp_path, KILLED) == (State.failed, 3)


def test_a_job_that_was_killed_once_ends_well(tmp_path: Path):
    assert lives_of(tmp_path, f"n == 1 and {KILLED}") == (State.done, 2)


@pytest.mark.parametrize("word", ["", '{"exit_code": 1}'])
def test_an_error_of_its_own_is_never_retried(tmp_path: Path, word: str):
    assert lives_of(tmp_path, "raise SystemExit(1)", word=word) == (State.failed, 1)


def test_the_error_of_one_process_counts_before_what_the_others_say_of_its_loss(tmp_path: Path):
    failed = job(tmp_path, "a")
    failed.words = [tmp_path / "own", tmp_path / "peers"]
    failed.words[1].write_text('{"exit_code": 76}')
    assert (failed.end(1), failed.exit_code(1)) == (End.lost, 76)
    failed.words[0].write_text('{"exit_code": 1}')
    assert (failed.end(1), failed.exit_code(1)) == (End.failed, 1)


def test_a_lost_peer_is_no_error_of_its_own(tmp_path: Path):
    assert lives_of(tmp_path, "raise SystemExit(1)", word='{"exit_code": 76}') == (State.failed, 3)


def test_the_wait_before_a_retry_doubles(tmp_path: Path):
    now = [0.0]
    lives = Lives(LauncherConfig(retries=3, retry_wait_s=10), now=lambda: now[0])
    for wait in (10, 20, 40):
        assert lives.after(job(tmp_path, "a"), -9) is State.waiting
        now[0] += wait - 1
        assert not lives.is_rested("a")
        now[0] += 1
        assert lives.is_rested("a")
    assert lives.after(job(tmp_path, "a"), -9) is State.failed


def test_a_job_that_takes_too_long_is_ended_retried_and_named(tmp_path: Path):
    config = LauncherConfig(retries=1, retry_wait_s=0.01, timeout_s={"adapter": 0.3})
    assert lives_of(tmp_path, "time.sleep(60)", config=config) == (State.failed, 2)
    assert "launcher.timeout_s.adapter=0.3 seconds" in (tmp_path / "word").read_text()
