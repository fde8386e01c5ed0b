"""`launcher.max_parallel` over all arrays of a plan together, though Slurm itself limits each array alone."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_dist.launch.slurm.arrays import Array, Wait


def hold_to(most: int, arrays: Sequence[Array]) -> None:
    """No more than `most` tasks of all arrays ever run at once, by widths and further waits (0: any number).

    There are `most` permits. An array takes some and runs as many tasks at once; who takes one of them later waits
    until it has ended (`afterany`), and so have all that had the permit before: an array whose needs failed is
    cancelled, and does not wait for them. An array takes the permits that it need not wait for if they are half of what
    it could use, else as many as it could use.

    Args:
        most: the number of permits.
        arrays: each after those that it waits for; they are changed in place.
    """
    holders: list[list[str]] = [[] for _ in range(most)]
    ended: dict[str, set[str]] = {}
    order = [array.name for array in arrays]
    for array in arrays if most else ():
        before = ended[array.name] = _ended_before(array, ended)
        free = [permit for permit in range(most) if before.issuperset(holders[permit])]
        wanted = min(most, len(array.tasks))
        if 2 * len(free) < wanted:
            held = [permit for permit in range(most) if permit not in free]
            free += sorted(held, key=lambda permit: order.index(holders[permit][-1]))  # the next to be free
        taken = free[:wanted]
        array.width = len(taken)
        late = {holder for permit in taken for holder in holders[permit]} - before
        array.waits += [Wait("afterany", holder) for holder in sorted(late)]
        before |= late
        for permit in taken:
            holders[permit].append(array.name)


def _ended_before(array: Array, ended: dict[str, set[str]]) -> set[str]:
    """Returns the arrays of which nothing runs any more once a task of this one does."""
    found: set[str] = set()
    for wait in array.waits:
        if not wait.tasks and wait.kind != "aftercorr":
            found.add(wait.array)
        if wait.kind != "afterany":  # some task of it ended well, so it did begin
            found |= ended[wait.array]
    return found
