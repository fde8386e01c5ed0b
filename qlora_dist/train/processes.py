"""The processes of one training: joined at the start, with a limit on how long one waits for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qlora_dist.errors import TrainError
from qlora_dist.runtime import device, rank, world_size


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
    backend = "cuda:nccl,cpu:gloo" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        meet("start", timeout_s)
        yield
    finally:
        dist.destroy_process_group()


def meet(where: str, timeout_s: float) -> None:
    """Waits until every rank is here.

    Raises:
        TrainError: after `timeout_s`, naming the ranks that are missing.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD if device().type == "cpu" else None
    try:
        dist.monitored_barrier(group, timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        repair = "Look at those ranks' logs; raise strategy.timeout_s if they are only slow."
        raise TrainError(f"Rank {rank()} waited {timeout_s:g} s at {where}: {error}. {repair}") from error
