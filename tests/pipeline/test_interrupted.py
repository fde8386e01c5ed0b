"""The main job, interrupted in each way that people know: what runs is ended, and the next run goes on."""

import signal
import subprocess
import time

import pytest


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_the_next_run_goes_on(workplace):
    process = workplace.start(WANDB_MODE="offline")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "running tiny/tiny" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(lines) + rest
    assert "the same command goes on" in rest
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(workplace.folder) not in listed
    code, output = workplace.launch()
    assert code == 0, output
    assert "cached" in workplace.states().values()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_nodes_along_and_the_next_run_goes_on(workplace):
    process = workplace.start()
    for line in process.stdout:
        if "running tiny/tiny" in line:
            break
    process.kill()
    process.wait()
    for _ in range(100):
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if str(workplace.folder) not in listed:
            break
        time.sleep(0.1)
    assert str(workplace.folder) not in listed
    code, output = workplace.launch()
    assert code == 0, output


@pytest.mark.slow
def test_a_second_launch_at_the_same_time_is_refused_by_name(workplace):
    process = workplace.start()
    for line in process.stdout:
        if "running" in line:
            break
    code, output = workplace.launch()
    assert code == 1
    assert f"is being run by process {process.pid}" in output
    assert "name=<other>" in output
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
