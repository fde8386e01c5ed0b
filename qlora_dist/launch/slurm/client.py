"""Slurm's own commands, each with a limit on how long it may take: without a controller they hang."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import current_thread, main_thread

from qlora_dist.errors import LaunchError

FIELDS = "%F|%K|%T|%M|%N|%r"
"""Array, task, state, time, nodes, reason. Text, not --json: its form has changed between versions, this never has."""
LEFT = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"}
SILENT = ("Unable to contact", "Socket timed out", "Connection refused", "Zero Bytes were", "not connected")
"""What the commands say of a controller that is away, or goes away while they ask."""
NO_ANSWER = "Slurm's controller does not answer"


class SilentError(LaunchError):
    """The controller did not answer in time; it may later."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of an array as Slurm sees it."""

    array: str
    index: int
    state: str
    time: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def is_waiting(self) -> bool:
        """Says that it has not begun, or is to begin again."""
        return self.state in LEFT or (self.state == "PREEMPTED" and not self.nodes)

    @property
    def is_running(self) -> bool:
        """Says that it has nodes."""
        return self.state in RUNNING

    @property
    def has_ended(self) -> bool:
        """Says that Slurm does nothing more with it."""
        return not (self.is_waiting or self.is_running)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets an interrupt wait for the end of what is inside: half a submission would be watched and closed by nobody."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def ask(argv: Sequence[str], timeout_s: float) -> str:
    """Runs one of Slurm's commands, in a session of its own, which no interrupt reaches; returns what it says.

    Raises:
        SilentError: if it gives no answer in time.
        LaunchError: if it isn't there, or refuses, with what it said.
    """
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, start_new_session=True
        )
    except FileNotFoundError as error:
        repair = "Run this on a login node of the cluster, or set launcher=local."
        raise LaunchError(f"{argv[0]} is not on PATH. {repair}") from error
    except subprocess.TimeoutExpired as error:
        repair = "Is it up (scontrol ping)? Raise launcher.slurm.answer_s if it is only slow."
        raise SilentError(f"{NO_ANSWER} ({argv[0]}, {timeout_s:g} s). {repair}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        if any(words in said for words in SILENT):
            raise SilentError(f"{NO_ANSWER} ({argv[0]}: {said}). Is it up (scontrol ping)?")
        raise LaunchError(f"{argv[0]} refused: {said}")
    return done.stdout


def queue(ids: Iterable[str], timeout_s: float) -> dict[tuple[str, int], Task]:
    """Returns the tasks of some arrays that the controller knows, waiting, running or ended a while ago.

    Raises:
        LaunchError: as `ask`.
    """
    named = f"--jobs={','.join(ids)}"
    try:
        said = ask(["squeue", "--noheader", "--array", "--states=all", f"--format={FIELDS}", named], timeout_s)
    except SilentError:
        raise
    except LaunchError as error:
        if "Invalid job id" in str(error):  # all of them ended so long ago that they are forgotten
            return {}
        raise
    return {(task.array, task.index): task for line in said.splitlines() if (task := parse_task(line))}


def parse_task(line: str) -> Task | None:
    """Reads one line of squeue; None for what is no task of an array."""
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) != 6 or not cells[1].isdigit():
        return None
    array, index, state, time, nodes, reason = cells
    return Task(array, int(index), state, time, nodes, "" if reason == "None" else reason)


def history(ids: Iterable[str], timeout_s: float) -> dict[tuple[str, int], Task]:
    """Returns what the site's accounting remembers of some arrays; nothing where there is no accounting."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Elapsed,NodeList,Reason"]
    try:
        said = ask([*command, f"--jobs={','.join(ids)}"], timeout_s)
    except LaunchError:
        return {}
    return {(task.array, task.index): task for line in said.splitlines() for task in parse_record(line)}


def parse_record(line: str) -> list[Task]:
    """Reads one line of sacct: `123_4|CANCELLED by 0|00:00:03|n1|None`; `123_[0,2-5%2]` are tasks that never began."""
    cells = line.split("|")
    array, _, index = cells[0].partition("_")
    if len(cells) != 5 or not re.fullmatch(r"\d+|\[[-\d,]+(%\d+)?\]", index):
        return []
    state, reason = cells[1].split()[0], "" if cells[4] == "None" else cells[4]
    time, nodes = re.sub(r"^(00:)?0?(?=\d)", "", cells[2]), cells[3].replace("None assigned", "")
    return [Task(array, each, state, time, nodes, reason) for each in _indices(index.strip("[]").partition("%")[0])]


def _indices(told: str) -> Iterator[int]:
    for span in told.split(","):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)
