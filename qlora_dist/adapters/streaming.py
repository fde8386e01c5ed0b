"""Merging module by module: memory holds a few modules, whatever the number of adapters and of modules."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from qlora_dist.adapters.collect import base_copies
from qlora_dist.adapters.rules import ModuleFacts, Rule
from qlora_dist.model.peft_folder import Factors, PeftFolder, PeftWriter
from qlora_dist.model.threads import one_thread_each
from qlora_dist.runtime import Progress

Merged = Iterable[tuple[str, tuple[Factors, ModuleFacts]]]
"""Modules by name, each with its update and what is said of it."""


def write_modules(adapters: Sequence[PeftFolder], merged: Merged, out: Path) -> dict[str, ModuleFacts]:
    """Writes the modules of a merge of `adapters` to a PEFT folder, and returns what is said of each."""
    owner = next((a for a in adapters if a.saved_modules), None)
    progress = Progress(len(adapters[0].modules), "module")
    described = {}
    with PeftWriter(out, adapters[0], owner, base_copies(adapters)) as writer:
        for module, (factors, described[module]) in merged:
            writer.add(module, factors)
            progress.update(len(described))
        writer.add_saved()
    return described


def merge_in_order(
    adapters: Sequence[PeftFolder], rule: Rule, workers: int = 0, modules: Sequence[str] | None = None
) -> Iterator[tuple[str, tuple[Factors, ModuleFacts]]]:
    """Yields what `rule` makes of each module, in the file's order.

    Memory holds `workers` + 1 modules at a time, whatever the number of modules.

    Args:
        adapters: the parts.
        rule: makes one module's update.
        workers: threads, each of which works ahead by one module; 0 is one a core.
        modules: which modules; None is all.
    """
    workers = workers or os.cpu_count() or 1

    def work(module: str) -> tuple[Factors, ModuleFacts]:
        return rule(module, [a.factors(module) for a in adapters])

    waiting: deque[tuple[str, Future[tuple[Factors, ModuleFacts]]]] = deque()
    with one_thread_each(workers) as pool:
        for module in adapters[0].modules if modules is None else modules:
            if len(waiting) > workers:
                name, done = waiting.popleft()
                yield name, done.result()
            waiting.append((module, pool.submit(work, module)))
        for name, done in waiting:
            yield name, done.result()
