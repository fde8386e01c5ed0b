import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_dist.artifacts.owner import OWNER, SILENT_S, OwnedError, living_owner, owned

HOLD = """
import sys, time
from pathlib import Path
from qlora_dist.artifacts.owner import owned
with owned(Path(sys.argv[1]), "holder"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_owned_by_a_live_process_is_refused_and_its_owner_named(tmp_path: Path, holder):
    with pytest.raises(OwnedError, match=f"process {holder.pid} on {socket.gethostname()}"), owned(tmp_path, "second"):
        pass


def test_a_folder_of_a_killed_process_is_taken_over(tmp_path: Path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path, "second"):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_folder_is_free_again_after_the_block(tmp_path: Path):
    with owned(tmp_path, "first"):
        assert living_owner(tmp_path) is not None
    assert living_owner(tmp_path) is None
    with owned(tmp_path, "second"):
        pass


def test_another_process_with_the_same_pid_is_not_the_owner(tmp_path: Path):
    mine = {"job": "x", "host": socket.gethostname(), "pid": os.getpid(), "started": 1.0}
    (tmp_path / OWNER).write_text(json.dumps(mine))
    assert living_owner(tmp_path) is None


def test_an_owner_on_another_host_is_alive_while_its_heart_beats(tmp_path: Path):
    (tmp_path / OWNER).write_text(json.dumps({"job": "x", "host": "elsewhere", "pid": 1, "started": 1.0}))
    assert living_owner(tmp_path) is not None
    long_ago = time.time() - SILENT_S - 1
    os.utime(tmp_path / OWNER, (long_ago, long_ago))
    assert living_owner(tmp_path) is None


def test_a_torn_owner_file_owns_nothing(tmp_path: Path):
    (tmp_path / OWNER).write_text("{")
    with owned(tmp_path, "first"):
        pass


RACE = """
import sys, time
from pathlib import Path
from qlora_dist.artifacts.owner import OwnedError, owned
start = float(sys.argv[2])
time.sleep(max(0, start - time.time()))
try:
    with owned(Path(sys.argv[1]), "racer"):
        time.sleep(1)
        print("won")
except OwnedError:
    print("lost")
"""


def test_of_many_racers_for_a_dead_owners_folder_one_wins(tmp_path: Path):
    dead = {"job": "x", "host": socket.gethostname(), "pid": 2**22 + 1, "started": 1.0}
    (tmp_path / OWNER).write_text(json.dumps(dead))
    start = str(time.time() + 1.5)
    command = [sys.executable, "-c", RACE, str(tmp_path), start]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    answers = [racer.communicate()[0].strip() for racer in racers]
    assert answers.count("won") == 1
    assert answers.count("lost") == 4
