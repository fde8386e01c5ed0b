"""A folder where workers meet: they hand in what they made in a round, and one of them averages it for all.

It lies on storage that all of them reach, and is all that they share: no process knows another's address, so they may
be jobs of any launcher. In it are `round-0003/` (the start of what follows the third round: an adapter, the momentum
and `round.json`), `handed-in/0004/<worker>/`, and `present/<worker>/`, owned while the worker lives. All of it is
written aside and renamed, so whoever dies leaves nothing half there.
"""

from __future__ import annotations

import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_dist.adapters.outer import ROUND_FILE, START, average_round
from qlora_dist.artifacts.owner import HOST, OWNER, OwnedError, living_owner, owned
from qlora_dist.config.stages import WorkerConfig
from qlora_dist.errors import Preempted
from qlora_dist.model.adapter import read_provenance, write_provenance
from qlora_dist.model.peft_folder import WEIGHTS_FILE
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import Facts, log, write_json
from qlora_dist.train.meeting import Answer

FAILED = "failed"


class MeetingFolder:
    """One worker's view of the folder; it is a `train.meeting.Meeting`.

    Args:
        config: of this worker.
        num_steps: how many steps each worker takes in all.
    """

    def __init__(self, config: WorkerConfig, num_steps: Mapping[str, int]) -> None:
        self.config, self.folder, self.label = config, Path(config.meeting), config.label
        self.ends = ends_of_rounds(num_steps, config.rounds.every_steps)
        self.missed: list[int] = []
        self._waits_since: float | None = None

    @property
    def _mine(self) -> list[int]:
        return self.ends[self.label]

    def is_due(self, step: int) -> bool:
        """Says whether the workers meet after `step` steps: at each end of a round but the last."""
        return step in self._mine[:-1]

    def hand_in(self, step: int, write: Callable[[Path], None]) -> None:
        """Leaves what this worker made; at step 0, where nothing was trained, the start that all of them share."""
        number = self._mine.index(step)
        target = self._handed_in(number) / self.label if number else self.round_folder(0)
        if number <= self.latest() or target.exists():
            return
        aside = self.folder / f".{self.label}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        write_provenance(aside, replace(read_provenance(aside), trained_tokens=self.tokens_after(number)))
        if not number:
            write_json(aside / ROUND_FILE, {"round": 0, "weights": {}, "absent": [], "moved": 0.0})
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.rename(target)
        except OSError:  # another worker's start came first
            shutil.rmtree(aside)

    def ask(self, step: int) -> Answer | None:
        """Returns the average of the round that ends at `step`, or the newest one if it closed without this worker."""
        number = self._mine.index(step)
        if number > self.latest():
            self._try_to_close(number)
        if number > self.latest():
            return None
        self._waits_since = None
        return Answer(self.round_folder(number), step) if self._can_follow(number) else self._late(number)

    def catch_up(self, step: int) -> Answer | None:
        """Returns the newest average if the round that `step` is in closed without this worker."""
        number = bisect_right(self._mine, step)
        return self._late(number) if number <= self.latest() and not self._can_follow(number) else None

    def makes_room(self) -> bool:
        """Says whether a worker has not run yet, or stopped to be run again, and was waited for long enough.

        One that was killed has no claim to a place: whether it comes again is its launcher's business.
        """
        number = self.latest() + 1
        idle = [label for label in self._absent(number) if self._is_idle(label)]
        now = time.monotonic()
        self._waits_since = None if not idle else self._waits_since or now
        if self._waits_since is None or now - self._waits_since < self.config.patience_s:
            return False
        log.info("round %d: %s not running; making room", number, ", ".join(idle))
        return True

    def latest(self) -> int:
        """Returns the number of the last round that was closed, 0 for the shared start, -1 where there is none."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.glob("round-*")), default=-1)

    def round_folder(self, number: int) -> Path:
        """Returns where the average of a round lies."""
        return self.folder / f"round-{number:04}"

    def tokens_after(self, number: int) -> int:
        """Returns what the start of a round and this worker in it were trained on, in tokens."""
        if not number:
            return 0
        before = read_provenance(self.round_folder(number - 1)).trained_tokens
        steps = self._mine[number] - self._mine[number - 1]
        return before + steps * self.config.train.tokens_per_step

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Shows the others, inside the block, that this worker lives; and afterwards how it ended."""
        place = self.folder / "present" / self.label
        with owned(place, self.label):
            (place / FAILED).unlink(missing_ok=True)
            try:
                yield
            except Preempted:
                raise
            except BaseException:
                (place / FAILED).touch()
                raise

    def facts(self) -> Facts:
        """Returns what the manifest says of the meetings."""
        return {"num_rounds": len(self._mine) - 1, "rounds_missed": sorted(set(self.missed))}

    def _handed_in(self, number: int) -> Path:
        return self.folder / "handed-in" / f"{number:04}"

    def _can_follow(self, number: int) -> bool:
        """Says whether a round's average is still there, with this worker's part in it."""
        return (self.round_folder(number) / WEIGHTS_FILE).exists() and self._was_in(number)

    def _was_in(self, number: int) -> bool:
        told = read_json(self.round_folder(number) / ROUND_FILE, "a round writes it")
        return number == 0 or self.label in told["weights"]

    def _late(self, number: int) -> Answer:
        latest = self.latest()
        self.missed += [n for n in range(number, latest + 1) if not self._was_in(n)]
        log.warning("the others closed round %d and went on; %s joins them after round %d", number, self.label, latest)
        return Answer(self.round_folder(latest), self._mine[latest])

    def _absent(self, number: int) -> list[str]:
        return [label for label in self.config.rounds.workers if not (self._handed_in(number) / label).exists()]

    def _is_alive(self, label: str) -> bool:
        return living_owner(self.folder / "present" / label) is not None

    def _is_idle(self, label: str) -> bool:
        place = self.folder / "present" / label
        return not (place / OWNER).exists() and not (place / FAILED).exists()

    def _try_to_close(self, number: int) -> None:
        """Averages a round if all are there, or those who are not gave no sign of life for long enough."""
        absent = self._absent(number)
        if absent and (self._age(number) < self.config.wait_s or any(self._is_alive(label) for label in absent)):
            return
        try:
            with owned(self.folder / "closing", self.label):
                if number > self.latest():
                    self._close(number)
        except OwnedError:
            return  # another worker closes it

    def _age(self, number: int) -> float:
        """Returns the seconds since the first worker handed in."""
        times = [path.stat().st_mtime for path in self._handed_in(number).iterdir()]
        return HOST.now(self.folder) - min(times)

    def _close(self, number: int) -> None:
        there = self._handed_in(number)
        came = {label: there / label for label in self.config.rounds.workers if (there / label).exists()}
        aside = self.folder / ".round.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        facts = average_round(self.config.rounds, {START: self.round_folder(number - 1), **came}, aside)
        aside.rename(self.round_folder(number))
        log.info("round %d closed with %s; moved %.4g", number, ", ".join(came), facts["moved"])
        self._forget(number)

    def _forget(self, number: int) -> None:
        """Removes what no worker goes on from any more; what was said of each round stays."""
        for old in (self.folder / "handed-in").iterdir():
            if int(old.name) < number:
                shutil.rmtree(old, ignore_errors=True)
        for older in range(number - 1):
            for path in self.round_folder(older).glob("*.safetensors"):
                path.unlink()


def ends_of_rounds(num_steps: Mapping[str, int], every_steps: int) -> dict[str, list[int]]:
    """Returns after how many steps each worker's rounds end, from 0 on.

    All workers meet equally often: the one with the most steps after `every_steps` at most, the others after
    proportionally fewer, so that each has taken its own budget in the end.
    """
    wanted = -(-max(num_steps.values()) // every_steps)
    rounds = min(wanted, *num_steps.values()) if len(num_steps) > 1 else wanted
    return {label: [_half_up(steps * j, rounds) for j in range(rounds + 1)] for label, steps in num_steps.items()}


def _half_up(dividend: int, divisor: int) -> int:
    return (2 * dividend + divisor) // (2 * divisor)
