"""Workers that train together apart, each a process of its own: run inside a process whose libraries are loaded."""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from qlora_dist.adapters.outer import outer_step
from qlora_dist.errors import Preempted


def together(config, inputs, outs, kill="", after="metrics.jsonl", dies=False):
    """Runs a worker for each label of `outs`; returns the exit code of each one's last life.

    The worker `kill` is killed once the path `after` is there, in its own folder or that of the meeting. It is run
    again, unless it `dies`.
    """
    _load()
    running = {label: _start(config, inputs, label, out) for label, out in outs.items()}
    if kill:
        while not (outs[kill] / after).exists() and not (Path(config.meeting) / after).exists():
            time.sleep(0.01)
        os.kill(running[kill], signal.SIGKILL)
        assert _end(running.pop(kill)) == -signal.SIGKILL
        if not dies:
            running[kill] = _start(config, inputs, kill, outs[kill])
    return {label: _end(pid) for label, pid in running.items()}


def one_at_a_time(config, inputs, outs):
    """Runs the workers in turn, each until it makes room; returns how many lives each one had."""
    _load()
    lives = dict.fromkeys(outs, 0)
    waiting = list(outs)
    while waiting:
        label = waiting.pop(0)
        lives[label] += 1
        code = _end(_start(config, inputs, label, outs[label]))
        assert code in (0, Preempted.exit_code), (label, code)
        waiting += [label] if code else []
    return lives


def lanes(config, inputs, labels):
    """Trains the same as lanes in one process, averaged in memory; returns the factors by name."""
    from qlora_dist.pipeline.meeting import ends_of_rounds
    from qlora_dist.train.engine import Engine
    from qlora_dist.train.lanes import Lane
    from qlora_dist.train.strategies.ddp import ReplicatedBase
    from qlora_dist.train.training import Training

    trainings = {label: Training.open(config, inputs[label], Path()) for label in labels}
    made = [Lane(n, config.lora, config.train, config.seed, t.rows, t.budget) for n, t in trainings.items()]
    base = trainings[labels[0]].base
    engine = Engine.build(config.model, base, made, ReplicatedBase())
    ends = ends_of_rounds({lane.name: lane.budget.num_steps for lane in made}, config.rounds.every_steps)[labels[0]]
    start = {name: value.clone() for name, value in made[0].state().items()}
    momenta = {name: torch.zeros_like(value) for name, value in start.items()}
    for first, last in pairwise(ends):
        for step in range(first, last):
            engine.stepper.take(dict.fromkeys(range(len(made)), step))
        for name, shared in start.items():
            values = [lane.state()[name] for lane in made]
            weights = [1 / len(made)] * len(made)
            start[name], momenta[name] = outer_step(shared, values, weights, momenta[name], config.rounds.outer)
            for value in values:
                value.copy_(start[name])
    return start


def _load():
    import bitsandbytes  # noqa: F401 - loaded once, before the forks
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import qlora_dist.pipeline.meeting
    import qlora_dist.train.engine  # noqa: F401


def _start(config, inputs, label, out):
    pid = os.fork()
    if pid:
        return pid
    from qlora_dist.pipeline.rounds import train_worker

    code = 1
    try:
        facts = train_worker(replace(config, label=label), inputs[label], out)
        (out / "facts.json").write_text(json.dumps(facts))
        code = 0
    except Preempted as stop:
        code = stop.exit_code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


def _end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
