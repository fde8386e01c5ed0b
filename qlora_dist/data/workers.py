"""Pieces of work are spread over the cores that a stage was given; what comes back does not depend on how many."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from qlora_dist.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
CORES_VARIABLE = "OMP_NUM_THREADS"
"""Launchers set it to the cores of a job."""


def num_cores() -> int:
    """Returns how many cores this stage may use: as many as its launcher says, else all that the process may."""
    told = os.environ.get(CORES_VARIABLE, "")
    return max(1, int(told)) if told.isdigit() else len(os.sched_getaffinity(0))


class Workers:
    """Processes that work side by side, started when there is a second piece of work; with one core, this process.

    They are spawned, not forked: a fork would copy locked locks of the threads that tokenizers start.
    """

    def __init__(self, num: int | None = None) -> None:
        self._num = num or num_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yields the result of each task, in the order of the tasks; what is raised there is raised here.

        Raises:
            DataError: if a process is killed, as the kernel does where memory runs out.
        """
        if self._num == 1 or len(tasks) < 2:
            yield from map(function, tasks)
            return
        if not self._pool:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num, context, _begin)
        try:
            yield from self._pool.map(function, tasks)
        except BrokenProcessPool as error:
            repair = f"Give the job more memory, or fewer cores by {CORES_VARIABLE}"
            raise DataError(f"A process of this stage was killed, most likely for want of memory. {repair}.") from error


def _begin() -> None:
    """Readies a worker: it ends when its parent does, however that ends."""
    from qlora_dist.runtime import quiet_libraries

    logging.basicConfig(level=logging.WARNING)
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
