"""Waiting for what other processes do."""

import subprocess
import time
from collections.abc import Callable


def listed() -> str:
    """Returns the command lines of all processes."""
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def wait_for(holds: Callable[[], object], longest_s: float = 300) -> None:
    """Returns once something holds."""
    ends = time.monotonic() + longest_s
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
