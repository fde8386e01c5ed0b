"""The processes of one training: joined at the start, with a limit on how long one waits for another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist

from qlora_dist.errors import PeerLost, TrainError
from qlora_dist.runtime import device, log, rank, world_size

_LOST = re.compile(r"gloo|nccl|timed? ?out|connection|socket|peer|store|collective|rendezvous|barrier", re.IGNORECASE)
"""What torch says, in plain RuntimeErrors, where another process is gone; anything else is this one's own fault."""

_groups: dict[str, Any] = {}
"""`host`, the group of gloo in which ranks meet and send objects, since NCCL's barriers name nobody who is missing;
and `limit_s`, how long they wait for each other."""


def backends() -> str:
    """Returns torch's name for what tensors travel by: NCCL between GPUs, gloo between hosts."""
    return "cuda:nccl,cpu:gloo" if device().type == "cuda" else "gloo"


@contextmanager
def joined(expected: int, timeout_s: float) -> Iterator[None]:
    """Joins the `expected` processes of this training, and parts from them at the end.

    Raises:
        TrainError: if another number of them was started, or some did not come, naming them.
    """
    if world_size() != expected:
        repair = f"Start it under torchrun with {expected} processes, or set strategy.world_size={world_size()}."
        raise TrainError(f"strategy.world_size={expected}, but {world_size()} processes were started. {repair}")
    if expected == 1:
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    limit = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backends(), timeout=limit)
        _groups.update(host=dist.new_group(backend="gloo", timeout=limit), limit_s=timeout_s)
    except RuntimeError as error:
        repair = "Look at the log of rank 0's machine, and whether the others reach it."
        raise PeerLost(f"Rank {rank()} did not find the others: {str(error).splitlines()[0]}. {repair}") from error
    try:
        meet("start", timeout_s)
        yield
    finally:
        _groups.clear()
        dist.destroy_process_group()


def meet(where: str, timeout_s: float) -> None:
    """Waits until every rank is here.

    Raises:
        TrainError: after `timeout_s`, naming the ranks that are missing.
    """
    if not dist.is_initialized():
        return
    try:
        dist.monitored_barrier(_groups["host"], timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        repair = "Look at those ranks' logs; raise strategy.timeout_s if they are only slow."
        raise PeerLost(f"Rank {rank()} waited {timeout_s:g} s at {where}: {error}. {repair}") from error


def same_on_all_ranks(value: Any) -> Any:
    """Returns rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, group=_groups["host"], device=torch.device("cpu"))
    return held[0]


def note_place(step: int, is_waiting: bool) -> None:
    """Leaves word, for the others, of the step this rank is at, and whether it computes or waits for them."""
    if dist.is_initialized():
        _store().set(f"place/{rank()}", f"{step} {'waiting' if is_waiting else 'computing'}")


@contextmanager
def naming_who_is_missing(step: int) -> Iterator[None]:
    """Turns a collective that failed into an error that says where every rank was last seen.

    What went wrong on this rank itself is raised as it is, for it is what the user must see. Shortly before the limit
    it is told in the log: where NCCL waits, torch ends the process at the limit, and nothing can be raised.

    Raises:
        PeerLost: naming the ranks that are not waiting at this step.
        TrainError: if this rank's memory doesn't suffice.
    """
    note_place(step, is_waiting=False)
    teller = Timer(0.9 * _groups.get("limit_s", 0.0), _tell_places, [step])
    teller.daemon = True
    if dist.is_initialized():
        teller.start()
    try:
        yield
    except torch.OutOfMemoryError as error:
        repair = "Lower train.micro_batch_tokens, or set train.activation_checkpointing=on"
        raise TrainError(f"Step {step + 1}: {str(error).splitlines()[0]} {repair}.") from error
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        note_place(step, is_waiting=True)
        reason = str(error).splitlines()[0]
        repair = "Look at the log of the first one that failed. Run the same command to continue from the checkpoint."
        raise PeerLost(f"Step {step + 1}: {_who_is_missing(step)}; {reason}. {repair}") from error
    finally:
        teller.cancel()


def _tell_places(step: int) -> None:
    log.warning("Step %d has taken %.0f s: %s", step + 1, 0.9 * _groups.get("limit_s", 0.0), _who_is_missing(step))


def _who_is_missing(step: int) -> str:
    places = {r: _place_of(r) for r in range(world_size())}
    missing = [r for r, place in places.items() if place != f"{step} waiting"]
    seen = ", ".join(f"rank {r} {place}" for r, place in places.items())
    who = f"rank {', '.join(map(str, missing))}" if missing else "each other"
    return f"waiting for {who} ({seen})"


def _place_of(other: int) -> str:
    try:
        return str(_store().get(f"place/{other}").decode()) if _store().check([f"place/{other}"]) else "not started"
    except RuntimeError:
        return "unknown: rank 0 is gone"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
