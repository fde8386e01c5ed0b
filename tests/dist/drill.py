"""Lives that are killed: run inside a worker whose libraries are loaded, so that a life costs a fork, not a start."""

import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace

from qlora_dist.config.train import StrategyName
from qlora_dist.errors import Preempted
from qlora_dist.testing import rank_environment
from qlora_dist.train import train_adapter


def live(config, inputs, out, world_size, kill_after_s=None, signal_number=signal.SIGKILL, once_training=False):
    """Runs one life in `world_size` forked processes; kills it after some seconds. Returns the exit codes.

    With `once_training` the seconds count from the first step that was logged.
    """
    strategy = replace(config.strategy, world_size=world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_fork(replace(config, strategy=strategy), inputs, out, rank, port) for rank in range(world_size)]
    while once_training and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        for pid in ranks:
            os.kill(pid, signal_number)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def drill(config, inputs, out, kills, world_sizes, longest_s, seed=0):
    """Kills `kills` lives at random moments, then lets one live; returns (lives killed at work, last exit codes)."""
    import bitsandbytes  # noqa: F401 - loaded once, before the forks
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import qlora_dist.train.engine  # noqa: F401

    if config.strategy.name is StrategyName.deepspeed:
        from qlora_dist.train.strategies.deepspeed import import_deepspeed

        import_deepspeed()
    chance, killed = random.Random(seed), 0
    for number in range(kills):
        size = world_sizes[number % len(world_sizes)]
        codes = live(config, inputs, out, size, kill_after_s=chance.uniform(0.02, longest_s))
        killed += any(code == -signal.SIGKILL for code in codes)
    return killed, live(config, inputs, out, world_sizes[-1])


def _fork(config, inputs, out, rank, port):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(rank_environment(rank, config.strategy.world_size, port))
        train_adapter(config, inputs, out)
        code = 0
    except Preempted as stop:
        code = stop.exit_code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)
