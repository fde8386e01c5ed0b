"""A real Slurm of several slurmds on one machine, gone when its `with` block ends: see the script beside this."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("slurm-cluster")


class SlurmCluster:
    """A controller and nodes n1, n2 …; inside the `with` block the environment names it.

    It `remembers`, in an accounting database, what its controller has forgotten, where the packages for it are there.
    """

    def __init__(self, folder: Path, *, nodes: int, cpus: int) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.remembers = all(shutil.which(tool, path=path) for tool in ("slurmdbd", "mariadbd"))
        self._folder = folder
        self._size = ["--nodes", str(nodes), "--cpus", str(cpus), "--port", str(_free_ports(nodes))]
        self._size += ["--accounting"] if self.remembers else []

    def __enter__(self) -> SlurmCluster:
        self._do("start", *self._size)
        os.environ["SLURM_CONF"] = str(self._folder / "slurm.conf")
        return self

    def __exit__(self, *_: object) -> None:
        self._do("stop")
        del os.environ["SLURM_CONF"]

    def crash(self, node: str) -> None:
        """Kills a node's slurmd and all that runs there, as a loss of power does."""
        self._do("crash", node)

    def boot(self, node: str) -> None:
        """Starts a node's slurmd again."""
        self._do("boot", node)

    def stop_controller(self) -> None:
        """Ends slurmctld; jobs run on."""
        self._do("stop-controller")

    def start_controller(self) -> None:
        """Starts slurmctld again, with what it knew."""
        self._do("start-controller")

    def forget(self) -> None:
        """Starts the controller anew: it knows no job of before, as after a while."""
        self._do("forget")

    def _do(self, *words: str) -> None:
        subprocess.run([SCRIPT, words[0], "--dir", self._folder, *words[1:]], check=True, stdout=subprocess.DEVNULL)


def _free_ports(nodes: int) -> int:
    """Returns the controller's port: it, two ports before it and one a node after it are free: several may run."""
    while True:
        port = random.randint(18000, 32000)  # below those that the system gives away
        try:
            for each in range(port - 2, port + nodes + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port


def said(*argv: str) -> str:
    """Returns what one of Slurm's commands says."""
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300).stdout


def queue() -> str:
    """Returns the tasks that wait or run."""
    return said("squeue", "--noheader", "--array")


def running(stage: str) -> list[tuple[str, list[str]]]:
    """Returns the name of each task of a stage that runs, with its nodes."""
    lines = said("squeue", "-h", "-r", "-t", "running", "-o", "%j|%F_%K|%N").splitlines()
    cells = [line.split("|") for line in lines]
    found = [(task, nodes) for name, task, nodes in cells if f":{stage}" in name]
    return [(task, said("scontrol", "show", "hostnames", nodes).split()) for task, nodes in found]
