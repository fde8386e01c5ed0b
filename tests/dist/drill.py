"""Lives that are killed: run inside a worker whose libraries are loaded, so that a life costs a fork, not a start."""

import hashlib
import os
import random
import shutil
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

    With `once_training` the seconds count from the first step that this life logs.
    """
    strategy = replace(config.strategy, world_size=world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logged = _size(out / "metrics.jsonl")
    ranks = [_fork(replace(config, strategy=strategy), inputs, out, rank, port) for rank in range(world_size)]
    while once_training and _size(out / "metrics.jsonl") <= logged and not all(map(_has_ended, ranks)):
        time.sleep(0.005)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        for pid in ranks:
            os.kill(pid, signal_number)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def drill(config, inputs, out, kills, world_sizes, longest_s, seed=0):
    """Kills `kills` lives at random moments, then lets one live; returns the adapters' digests and the last exit codes.

    Every other life is killed after its first step, the others at any moment from the fork on. A training that ends
    before it is killed is begun anew, and its digest kept: the kills are as many on a fast machine as on a slow one.
    """
    import bitsandbytes  # noqa: F401 - loaded once, before the forks
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import qlora_dist.train.engine  # noqa: F401

    if config.strategy.name is StrategyName.deepspeed:
        from qlora_dist.train.strategies.deepspeed import import_deepspeed

        import_deepspeed()
    chance, killed, ends = random.Random(seed), 0, set()
    while killed < kills:
        size = world_sizes[killed % len(world_sizes)]
        codes = live(
            config, inputs, out, size, kill_after_s=chance.uniform(0.0, longest_s), once_training=killed % 2 == 1
        )
        if -signal.SIGKILL in codes:
            killed += 1
            continue
        assert set(codes) == {0}, codes
        ends.add(digest(out))
        longest_s *= 0.7
        shutil.rmtree(out)
        out.mkdir()
    codes = live(config, inputs, out, world_sizes[-1])
    return ends | {digest(out)}, codes


def digest(out):
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


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
