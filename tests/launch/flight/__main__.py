"""Flies many flights: `python -m tests.launch.flight ray 0 20000`; exits with 1 if any went wrong."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.launch.flight.flight import Flight, fly_ray


def flights_on(cluster: str) -> Callable[[int], Flight]:
    """Returns how to fly one seed on a simulated cluster."""
    if cluster == "slurm":
        from tests.launch.flight.slurm_flight import fly_slurm

        return fly_slurm
    return fly_ray


def main(cluster: str, first: str, last: str) -> int:
    """Flies the seeds from `first` to before `last`, prints those that went wrong and what there was in all."""
    fly = flights_on(cluster)
    started, counts = time.process_time(), Counter[str]()
    for seed in range(int(first), int(last)):
        flight = fly(seed)
        counts["flights"] += 1
        counts["that needed the command again"] += bool(flight.second)
        counts["faults"] += len(flight.happened)
        counts["wrong"] += bool(flight.wrong)
        if flight.wrong:
            print(flight, flush=True)
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{cluster}, seeds {first} to {last}: {shown}; {time.process_time() - started:.0f} s of CPU")
    return int(bool(counts["wrong"]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
