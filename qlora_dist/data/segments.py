"""A record's tokens are cut into segments that fit a row, kept in scratch files until their rows are known.

N tokens of a record, S segments of a block of records.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from qlora_dist.data.encode import Encoded

PIECE = np.dtype([("length", "<i4"), ("record", "<i8"), ("trained_bytes", "<i8")])
"""What is known of a segment before it is packed."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that fits a row, which of them are targets, and the UTF-8 bytes of those."""

    tokens_N: np.ndarray
    trained_N: np.ndarray
    trained_bytes: int


def cut(encoded: Encoded, row_tokens: int, start_id: int, *, is_text: bool, overlap_tokens: int = 0) -> list[Segment]:
    """Cuts a record into segments of at most `row_tokens`, each token a target in one of them alone.

    Running text has `start_id` put before each segment, so that each of its tokens is predicted; a conversation has
    it from the second segment on, as its template opens the first. After that come, from the second on, the last
    `overlap_tokens` tokens of the segment before, as context. The first slot is never a target.
    """
    segments, at = [], 0
    while at < len(encoded.tokens_N):
        opened = is_text or at > 0
        context = min(overlap_tokens, at)
        end = at + row_tokens - opened - context
        part = slice(at - context, end)
        tokens_N, trained_N, bytes_N = encoded.tokens_N[part], encoded.trained_N[part].copy(), encoded.bytes_N[part]
        trained_N[:context] = False
        if opened:
            tokens_N = np.concatenate([np.array([start_id], dtype=tokens_N.dtype), tokens_N])
            trained_N, bytes_N = np.concatenate([[False], trained_N]), np.concatenate([[0], bytes_N])
        trained_N[0] = False
        segments.append(Segment(tokens_N, trained_N, int(bytes_N[trained_N].sum())))
        at = end
    return segments


class Scratch:
    """The segments of one block of records on disk: written once in order, then read in any order."""

    def __init__(self, name: Path, mode: str) -> None:
        self._paths = {part: name.with_name(f"{name.name}.{part}") for part in ("tokens", "trained", "pieces")}
        self._files = {part: path.open(mode) for part, path in self._paths.items()}

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def append(self, segment: Segment, record: int) -> None:
        """Adds a segment of record number `record`."""
        self._files["tokens"].write(segment.tokens_N.astype("<u4").tobytes())
        self._files["trained"].write(segment.trained_N.astype(bool).tobytes())
        piece = np.array((len(segment.tokens_N), record, segment.trained_bytes), dtype=PIECE)
        self._files["pieces"].write(piece.tobytes())

    def pieces(self) -> np.ndarray:
        """Returns what is known of each segment [S], 20 bytes a segment."""
        return np.fromfile(self._paths["pieces"], dtype=PIECE)

    def read(self, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and marks of the segment that starts at token `offset` of the block."""
        tokens = os.pread(self._files["tokens"].fileno(), 4 * length, 4 * offset)
        trained = os.pread(self._files["trained"].fileno(), length, offset)
        return np.frombuffer(tokens, dtype="<u4"), np.frombuffer(trained, dtype=bool)
