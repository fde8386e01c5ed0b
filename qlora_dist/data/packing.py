"""Segments are packed into rows by best-fit decreasing, all segments of one length at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Rows = np.ndarray
"""Numbers of rows, [N]."""


def pack(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places segments in rows: the longest first, each in a row with the least room that still takes it.

    Best-fit decreasing (Johnson 1973) uses at most 11/9 of the least number of rows, and on natural lengths hardly
    more than the least. Segments of one length go together: the tightest row that takes one of them stays the
    tightest while it takes another, so whole groups of rows are filled at once, and time grows with the number of
    distinct lengths and rooms, not of segments.

    Args:
        lengths: tokens of each segment [N], 1 to `row_tokens`.
        row_tokens: slots of a row.

    Returns:
        The row of each segment [N], its first slot there [N], and the number of rows.
    """
    row_of = np.zeros(len(lengths), dtype=np.int64)
    start_of = np.zeros(len(lengths), dtype=np.int64)
    rooms = _Rooms(row_tokens)
    order = np.argsort(-lengths, kind="stable")
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(order)]):
        first, length = start, int(lengths[order[start]])
        while first < end:
            room, rows, per_row = rooms.take(length, end - first)
            segments = order[first : min(end, first + len(rows) * per_row)]
            first += len(segments)
            if per_row == 1:
                row_of[segments], start_of[segments] = rows, row_tokens - room
                rooms.put(room - length, rows)
                continue
            place = np.arange(len(segments))
            row_of[segments] = rows[place // per_row]
            start_of[segments] = row_tokens - room + place % per_row * length
            in_last = len(segments) - (len(rows) - 1) * per_row
            rooms.put(room - per_row * length, rows[:-1])
            rooms.put(room - in_last * length, rows[-1:])
    return row_of, start_of, rooms.num_rows


@dataclass(slots=True)
class _Rooms:
    """The rows that are not full, by the room that they have left; bit r of `present` says that some have room r."""

    row_tokens: int
    num_rows: int = 0
    present: int = 0
    stacks: dict[int, list[Rows]] = field(default_factory=dict)

    def take(self, length: int, num_segments: int) -> tuple[int, Rows, int]:
        """Returns the least room that takes `length`, as many rows of it as are wanted, and segments a row."""
        fitting = self.present >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else self.row_tokens
        per_row = room // length
        wanted = -(-num_segments // per_row)
        if fitting:
            return room, self._pop(room, wanted), per_row
        self.num_rows += wanted
        return room, np.arange(self.num_rows - wanted, self.num_rows), per_row

    def put(self, room: int, rows: Rows) -> None:
        """Takes back rows that have `room` left."""
        if room and len(rows):
            self.stacks.setdefault(room, []).append(rows)
            self.present |= 1 << room

    def _pop(self, room: int, wanted: int) -> Rows:
        """Returns some rows of a room: those put in last, at most `wanted`."""
        stack = self.stacks[room]
        rows = stack.pop()
        if len(rows) > wanted:
            stack.append(rows[:-wanted])
            rows = rows[-wanted:]
        if not stack:
            self.present &= ~(1 << room)
        return rows
