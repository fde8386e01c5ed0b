"""A real Ray of several raylets on one machine, shut off from the network, gone when its `with` block ends.

Ray listens on all interfaces whatever address it is told, so every process runs in a network namespace that has only
loopback (which takes root). Node i has the address 127.0.0.<i + 1>: Ray tells nodes apart by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
"""The command of this environment, which needn't be on PATH."""
PORT = 6379
DASHBOARD_PORT = 8265
LIGHT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_AUTH_MODE": "disabled"}
START_S = 120.0
STORE_BYTES = 80 << 20


class RayCluster:
    """A head without CPUs of its own and some nodes, each a session of processes that can be killed as one."""

    def __init__(
        self,
        *,
        dashboard: bool = False,
        client_port: int = 0,
        private: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Says what the cluster is to be; of `private`, a folder, each node sees one of its own, empty at first."""
        self._dashboard, self._client_port = dashboard, client_port
        self._private, self._more = private, dict(environment or {})
        # Short, since the paths of sockets below it end at 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
        self._holder: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """What a driver is told."""
        return f"127.0.0.1:{PORT}"

    @property
    def nodes(self) -> list[str]:
        """The names of what runs: the head, then the nodes."""
        return list(self._nodes)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process inside needs to know."""
        return os.environ | LIGHT | {"RAY_TMPDIR": str(self.folder), "GLOO_SOCKET_IFNAME": "lo"} | self._more

    def __enter__(self) -> RayCluster:
        try:
            self.hold_namespace()
            extra = [f"--ray-client-server-port={self._client_port}"] if self._client_port else []
            head = ["--head", "--node-ip-address=127.0.0.1", f"--port={PORT}", "--num-cpus=0"]
            board = [f"--include-dashboard={str(self._dashboard).lower()}", "--dashboard-host=127.0.0.1"]
            self._launch("head", [*head, *board, *extra])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._nodes):
            self.kill_node(name)
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, number: int, num_cpus: int = 2, **resources: float) -> str:
        """Starts node `number` (1, 2 …) and waits until it is up; returns its name.

        One after the other: nodes that start at once in one session folder take the same socket.
        """
        place = [f"--address={self.address}", f"--node-ip-address=127.0.0.{number + 1}", "--include-log-monitor=false"]
        more = [f"--resources={json.dumps(resources)}"] if resources else []
        name = f"n{number}"
        self._launch(name, [*place, f"--num-cpus={num_cpus}", *more])
        return name

    def kill_node(self, name: str) -> None:
        """Kills a node's raylet, its agents, its workers and all that they started, as a loss of power does."""
        process = self._nodes.pop(name)
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
            for member in (psutil.Process(process.pid), *family):
                with contextlib.suppress(psutil.Error):
                    member.kill()
        self._kill_session(process.pid)
        process.wait()

    def private_of(self, name: str) -> Path:
        """Returns the folder that a node sees at `private`, as it is seen from outside."""
        return Path(f"/proc/{self._nodes[name].pid}/root{self._private}")

    def command(self, argv: Sequence[str]) -> list[str]:
        """Returns the command line that runs `argv` inside."""
        assert self._holder is not None
        return ["nsenter", f"--target={self._holder.pid}", "--net", *argv]

    def start(self, argv: Sequence[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Starts a command inside, in a session of its own."""
        return subprocess.Popen(
            self.command(argv),
            cwd=cwd,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def hold_namespace(self) -> None:
        """Starts the process that keeps the namespace, with loopback up."""
        ready = self.folder / "ready"
        script = f"ip link set lo up && : > {ready} && exec sleep infinity"
        self._holder = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdin=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while not ready.exists():
            assert self._holder.poll() is None and time.monotonic() < end, "no network namespace (wants root)"
            time.sleep(0.02)

    def _launch(self, name: str, options: Sequence[str]) -> None:
        log = self.folder / f"{name}.log"
        argv = [RAY, "start", "--block", "--disable-usage-stats", f"--object-store-memory={STORE_BYTES}", *options]
        if self._private and name != "head":
            mount = f"mount -t tmpfs tmpfs {shlex.quote(str(self._private))} && exec {shlex.join(argv)}"
            argv = ["unshare", "--mount", "sh", "-c", mount]
        environment: Mapping[str, str] = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        with log.open("wb") as file:
            self._nodes[name] = subprocess.Popen(
                self.command(argv),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        end = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            ended = self._nodes[name].poll() is not None
            assert not ended and time.monotonic() < end, f"{name} is not up:\n{log.read_text()[-2000:]}"
            time.sleep(0.1)

    @staticmethod
    def _kill_session(leader: int) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == leader:
                    os.kill(process.pid, signal.SIGKILL)
