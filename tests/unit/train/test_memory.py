"""The peak that a run tells is its own, and what it may still use is what its control groups leave it."""

import subprocess
import sys

import psutil
import pytest
import torch

from qlora_dist.runtime import peak_resident_bytes
from qlora_dist.train import memory

CHILD = "from qlora_dist.runtime import peak_resident_bytes; print(peak_resident_bytes())"


def test_a_process_does_not_tell_the_peak_of_the_one_that_started_it():
    held = bytearray(300_000_000)
    for place in range(0, len(held), 4096):
        held[place] = 1
    child = int(subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True).stdout)
    assert peak_resident_bytes() > 300_000_000 > 2 * child


def write_group(folder, names, limit, used, droppable):
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {droppable}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is asked there")
@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_control_groups_leave(version, tmp_path, monkeypatch):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    names[2] = ("memory.max", "memory.current", "inactive_file")
    top, place = (tmp_path / "memory", "4:cpu,memory") if version == 1 else (tmp_path, "0:")
    (tmp_path / "own").write_text(f"7:pids:/\n{place}:/slurm/job/step\n")
    write_group(top / "slurm/job", names[version], 10_000_000, 4_000_000, 1_000_000)
    write_group(top / "slurm/job/step", names[version], "max", 3_000_000, 0)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert memory.free_memory_bytes() == 7_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory_bytes() == 3_500_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is asked there")
def test_free_memory_without_control_groups_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "absent")
    assert memory.free_memory_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
