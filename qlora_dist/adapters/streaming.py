"""Merging module by module: memory holds a few modules, whatever the number of adapters and of modules."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from qlora_dist.adapters.rules import ModuleFacts, Rule
from qlora_dist.model.peft_folder import Factors, PeftFolder, PeftWriter
from qlora_dist.model.threads import one_thread_each
from qlora_dist.runtime import Progress


def merge_modules(adapters: Sequence[PeftFolder], rule: Rule, out: Path, workers: int = 0) -> dict[str, ModuleFacts]:
    """Writes what `rule` makes of each module, and returns what it says of each.

    Memory holds `workers` + 1 modules at a time, whatever the number of modules.
    """
    owner = next((a for a in adapters if a.saved_modules), None)
    progress = Progress(len(adapters[0].modules), "module")
    described = {}
    with PeftWriter(out, adapters[0], owner) as writer:
        for module, (factors, described[module]) in _in_order(adapters, rule, workers or os.cpu_count() or 1):
            writer.add(module, factors)
            progress.update(len(described))
        writer.add_saved()
    return described


def _in_order(
    adapters: Sequence[PeftFolder], rule: Rule, workers: int
) -> Iterator[tuple[str, tuple[Factors, ModuleFacts]]]:
    """Yields merged modules in the file's order, while `workers` threads work ahead by one module each."""

    def work(module: str) -> tuple[Factors, ModuleFacts]:
        return rule(module, [a.factors(module) for a in adapters])

    waiting: deque[tuple[str, Future[tuple[Factors, ModuleFacts]]]] = deque()
    with one_thread_each(workers) as pool:
        for module in adapters[0].modules:
            if len(waiting) > workers:
                name, done = waiting.popleft()
                yield name, done.result()
            waiting.append((module, pool.submit(work, module)))
        for name, done in waiting:
            yield name, done.result()
