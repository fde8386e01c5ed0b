"""What lies in a run's folder also goes to its URL, where the root is one: plan, logs, words of failure, results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qlora_dist.artifacts.lock import held
from qlora_dist.artifacts.objects import Objects, is_url
from qlora_dist.artifacts.owner import owned
from qlora_dist.pipeline.plan import Node, Plan


def publish(plan: Plan, paths: Iterable[Path] | None = None) -> None:
    """Uploads files of the run's folder, all of them unless some are named; hidden ones and absent ones stay away."""
    if not is_url(plan.root):
        return
    files = plan.folder.rglob("*") if paths is None else paths
    names = [path.relative_to(plan.folder).as_posix() for path in files if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    Objects(plan.root).upload(plan.folder, shown, plan.experiment)


@contextmanager
def published(plan: Plan, nodes: Sequence[Node]) -> Iterator[None]:
    """Uploads log, progress and words of failure of some nodes when the `with` block ends."""
    try:
        yield
    finally:
        paths = [path(node) for node in nodes for path in (plan.log_path, plan.progress_path, plan.failure_path)]
        publish(plan, dict.fromkeys(paths))


@contextmanager
def claimed(plan: Plan, job: str) -> Iterator[None]:
    """Owns the run's folder, here and at its URL, inside the `with` block.

    Raises:
        OwnedError: if another launch of the same run is alive.
    """
    with ExitStack() as stack:
        stack.enter_context(owned(plan.folder, job))
        if is_url(plan.root):
            stack.enter_context(held(Objects(plan.root), f"{plan.experiment}/.launch", job))
        yield


def fetch_word(plan: Plan, node: Node) -> None:
    """Fetches the word that a failing node left on another machine, unless it lies here."""
    path = plan.failure_path(node)
    if is_url(plan.root) and not path.exists():
        word = Objects(plan.root).read(f"{plan.experiment}/logs/{path.name}")
        if word is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(word)
