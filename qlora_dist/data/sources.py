"""A source names files, a hub dataset or an installed corpus; here it becomes parts, each with a digest."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.config.data import DomainConfig, SourceConfig
from qlora_dist.data import installed
from qlora_dist.data.formats import COMPRESSED, READERS, suffix
from qlora_dist.errors import DataError, bad_value, nearest

INSTALLED, HUB = "installed:", "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REMEMBERED_BYTES = 32 * 2**20
"""Pieces of files above this size have their digest remembered between plans."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one part reads of one source: bytes `start` to `end` of a file, a hub dataset or an installed corpus.

    In plans it is a string, `<number of the source>:<path>@<start>-<end>`.
    """

    source: int
    path: str
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.path}@{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str) -> Piece:
        """Reads a piece back from its string."""
        head, _, span = text.rpartition("@")
        source, _, path = head.partition(":")
        start, _, end = span.partition("-")
        return cls(int(source), path, int(start), int(end))

    @property
    def is_file(self) -> bool:
        """Says whether it is a file of this machine."""
        return not self.path.startswith((INSTALLED, HUB))


def plan_parts(domain: DomainConfig) -> list[list[str]]:
    """Divides a domain's sources into parts of about `part_bytes`, in the order of the sources and of their paths.

    The order of all examples is the same however many parts there are. Large JSON-lines files are divided at line
    ends; any other file belongs to one part.

    Raises:
        ConfigError: for a source that names nothing that could be read.
        DataError: for a source that is empty.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for number, source in enumerate(domain.sources):
        for piece in _pieces(number, source, domain.part_bytes):
            if size and size + piece.end - piece.start > domain.part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(str(piece))
            size += piece.end - piece.start
    return parts


def leaf_digest(files: Sequence[str]) -> str:
    """Returns a digest of the bytes that a part reads, whatever its files are called.

    Hub datasets are known by id, subset, split and revision; installed corpora by the texts themselves (licences) or
    by the Python version they come with.
    """
    digests = [_digest(Piece.parse(text)) for text in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def files_of(source: SourceConfig) -> list[Path]:
    """Returns the files of a local source, sorted by path; unknown file types in a folder or glob are left out.

    Raises:
        ConfigError: if nothing readable is there.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        found = [p for p in Path(path).rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
    elif glob.has_magic(path) and not os.path.exists(path):
        found = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
    else:
        found = [Path(path)] if os.path.isfile(path) else []
    readable = sorted({p.resolve() for p in found if suffix(p) in READERS})
    if not readable:
        names = " ".join(READERS)
        what = f"no file of a known type ({names}, .gz or .zst of these)" if found else "no such file or folder"
        raise bad_value("path", source.path, "a file, a folder, a glob or a hub id (owner/name)", f"Found: {what}.")
    return readable


def _pieces(number: int, source: SourceConfig, part_bytes: int) -> Iterator[Piece]:
    if source.path.startswith(INSTALLED):
        name = source.path.removeprefix(INSTALLED)
        if name not in installed.CORPORA:
            raise bad_value("path", source.path, "an installed corpus", nearest(name, installed.CORPORA))
        yield Piece(number, source.path)
    elif HUB_ID.fullmatch(source.path) and not os.path.exists(source.path) and not suffix(Path(source.path)) in READERS:
        yield Piece(number, f"{HUB}{source.path}")
    else:
        files = files_of(source)
        if not any(file.stat().st_size for file in files):
            raise DataError(f"{source.path}: empty. A source needs at least one record in it.")
        for file in files:
            yield from _file_pieces(number, file, part_bytes)


def _file_pieces(number: int, file: Path, part_bytes: int) -> Iterator[Piece]:
    size = file.stat().st_size
    if suffix(file) != ".jsonl" or file.suffix in COMPRESSED or size <= part_bytes:
        yield Piece(number, str(file), 0, size)
        return
    start = 0
    with file.open("rb") as lines:
        while start < size:
            lines.seek(min(start + part_bytes, size))
            while (block := lines.readline(2**20)) and not block.endswith(b"\n"):
                pass
            end = lines.tell()
            yield Piece(number, str(file), start, end)
            start = end


def _digest(piece: Piece) -> str:
    if piece.path.startswith(INSTALLED):
        return f"{piece.source} {piece.path} {installed.corpus_digest(piece.path.removeprefix(INSTALLED))}"
    if piece.path.startswith(HUB):
        return f"{piece.source} {piece.path}"
    if piece.end - piece.start < REMEMBERED_BYTES:
        return f"{piece.source} {suffix(Path(piece.path))} {_file_digest(piece)}"
    return f"{piece.source} {suffix(Path(piece.path))} {_remembered_digest(piece)}"


def _file_digest(piece: Piece) -> str:
    digest = hashlib.sha256()
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        left = piece.end - piece.start
        while left and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _remembered_digest(piece: Piece) -> str:
    """Reads a piece once for as long as the file's size and time of change stay; a lost cache costs time only."""
    stat = os.stat(piece.path)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qlora_dist" / "digests"
    name = hashlib.sha256(f"{piece}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    try:
        return str(json.loads((cache / name).read_text()))
    except (OSError, ValueError):
        digest = _file_digest(piece)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f"{name}.{os.getpid()}"
        aside.write_text(json.dumps(digest))
        aside.replace(cache / name)
    except OSError:
        pass
    return digest


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)
