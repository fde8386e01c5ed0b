"""Segments are packed into rows by best-fit decreasing, in time that grows with the number of segments alone."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places segments in rows: the longest first, each in the row with the least room that still takes it.

    Args:
        lengths: tokens of each segment, 1 to `row_tokens`.
        row_tokens: slots of a row.

    Returns:
        The row and the first slot of each segment, and the number of rows.
    """
    rows_with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    row_of = np.zeros(len(lengths), dtype=np.int64)
    start_of = np.zeros(len(lengths), dtype=np.int64)
    num_rows = 0
    open_rooms = 0  # bit r is set when some row has room r
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = row_tokens, num_rows
            num_rows += 1
        row_of[i], start_of[i] = row, row_tokens - room
        if room > length:
            rows_with_room[room - length].append(row)
            open_rooms |= 1 << (room - length)
    return row_of, start_of, num_rows
