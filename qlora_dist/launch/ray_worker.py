"""What runs on a node of a Ray cluster: one command line, as a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from qlora_dist.pipeline.__main__ import LAUNCHER_VARIABLE

if TYPE_CHECKING:
    from qlora_dist.launch.ray import Command

GRACE_S = 30.0


class Worker:
    """Runs one command. As an actor it is asked to stop while it runs; as a task it is interrupted."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def place(self) -> tuple[str, int]:
        """Returns this node's address and a port that is free there."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def run(self, command: Command) -> tuple[int, dict[str, bytes]]:
        """Runs a command to its end; returns its exit code and what its nodes left word of here.

        The command's Python is this node's own. It ends itself, with a checkpoint, when this worker is gone.
        """
        log = command.job.log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | command.environment
        environment |= {LAUNCHER_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command.argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        if self._is_stopped:
            self.stop()
        try:
            code = self._process.wait()
        except KeyboardInterrupt:  # how Ray cancels a task
            self.stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            self.end()
            code = self._process.wait()
        return code, {str(word): word.read_bytes() for word in command.job.words if word.exists()}

    def stop(self) -> None:
        """Asks the command to end."""
        self._is_stopped = True
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Ends the command at once."""
        self._is_stopped = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def run_alone(command: Command) -> tuple[int, dict[str, bytes]]:
    """Runs a command as a task: see `Worker.run`."""
    return Worker().run(command)
