"""A source names files, a hub dataset or an installed corpus; here it becomes parts, each with a digest."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.config.data import DomainConfig, SourceConfig
from qlora_dist.data import installed
from qlora_dist.data.formats import COMPRESSED, READERS, read_examples, suffix
from qlora_dist.data.record import Reject
from qlora_dist.errors import DataError, bad_value, nearest
from qlora_dist.runtime import log

INSTALLED, HUB = "installed:", "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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


def plan_parts(domain: DomainConfig, key: str = "domain") -> list[list[str]]:
    """Divides a domain's sources into parts of about `part_bytes`, in the order of the sources and of their paths.

    The order of all examples is the same however many parts there are. Large JSON-lines files are divided at line
    ends; any other file belongs to one part. `key` is the domain's, for messages.

    Raises:
        ConfigError: for a source that names nothing that could be read.
        DataError: for a source that is empty.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for number, source in enumerate(domain.sources):
        for piece in _pieces(number, source, f"{key}.sources[{number}]", domain.part_bytes):
            if size and size + piece.end - piece.start > domain.part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(str(piece))
            size += piece.end - piece.start
    return parts


def leaf_digest(files: Sequence[str]) -> str:
    """Returns a digest of the bytes that a part reads, whatever its files are called.

    Hub datasets are known by id, subset, split and revision; installed corpora by the texts themselves (licences) or
    by the Python version that they come with. Digests of large files are remembered by size and time of change.
    """
    digests = [_digest(Piece.parse(text)) for text in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_piece(piece: Piece, source: SourceConfig) -> Iterator[installed.Example | Reject]:
    """Yields file, line and raw example of all that a piece holds; a reject for what can't be read."""
    if piece.path.startswith(INSTALLED):
        yield from installed.CORPORA[piece.path.removeprefix(INSTALLED)]()
    elif piece.path.startswith(HUB):
        yield from _read_hub(source)
    else:
        path = Path(piece.path)
        for item in read_examples(path, piece.start, piece.end):
            yield item if isinstance(item, Reject) else (path.name, *item)


def files_of(source: SourceConfig, key: str = "path") -> list[Path]:
    """Returns the files of a local source, sorted by path; of a folder or glob, those of a known type.

    Raises:
        ConfigError: if nothing readable is there.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
    elif glob.has_magic(source.path) and not path.exists():
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]  # noqa: PTH207 - absolute
    else:
        found = [path] if path.is_file() else []
    readable = sorted({p.resolve() for p in found if suffix(p) in READERS})
    if not readable:
        types = " ".join(READERS)
        what = f"Files of a known type ({types}; also .gz and .zst of these) are needed." if found else "Nothing there."
        raise bad_value(key, source.path, "a file, a folder, a glob or a hub id (owner/name)", what)
    if odd := next((p for p in readable if not _is_unicode(p)), None):
        raise bad_value(key, repr(str(odd)), "files with names in UTF-8", "Rename it.")
    if others := Counter(p.suffix or p.name for p in found if suffix(p) not in READERS):
        shown = ", ".join(f"{n} x {name}" for name, n in others.most_common(5))
        log.warning("%s: files of other types are left out (%s).", source.path, shown)
    return readable


def _pieces(number: int, source: SourceConfig, key: str, part_bytes: int) -> Iterator[Piece]:
    if source.path.startswith(INSTALLED):
        name = source.path.removeprefix(INSTALLED)
        if name not in installed.CORPORA:
            raise bad_value(f"{key}.path", source.path, f"{INSTALLED}<corpus>", nearest(name, installed.CORPORA))
        yield Piece(number, source.path)
    elif _is_hub_id(source.path):
        if not source.revision:
            repair = f"Set revision to the commit of {source.path} that you mean, so that every run means the same."
            raise bad_value(f"{key}.revision", source.revision, "the commit sha of a hub dataset", repair)
        yield Piece(number, ":".join((HUB[:-1], source.path, source.subset, source.split, source.revision)))
    else:
        files = files_of(source, f"{key}.path")
        if not any(file.stat().st_size for file in files):
            raise DataError(f"{key}.path={source.path}: empty. A source needs at least one record.")
        for file in files:
            yield from _file_pieces(number, file, part_bytes)


def _is_hub_id(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists() and suffix(Path(path)) not in READERS


def _file_pieces(number: int, file: Path, part_bytes: int) -> Iterator[Piece]:
    size = file.stat().st_size
    if suffix(file) not in (".jsonl", ".ndjson") or file.suffix in COMPRESSED or size <= part_bytes:
        yield Piece(number, str(file), 0, size)
        return
    start = 0
    with file.open("rb") as lines:
        while start < size:
            lines.seek(min(start + part_bytes, size) - 1)
            while (block := lines.readline(2**20)) and not block.endswith(b"\n"):
                pass
            end = lines.tell()
            yield Piece(number, str(file), start, end)
            start = end


def _read_hub(source: SourceConfig) -> Iterator[installed.Example]:
    import datasets

    told: dict[str, Any] = {"split": source.split, "revision": source.revision, "streaming": True}
    try:
        rows = datasets.load_dataset(source.path, source.subset or None, **told)
        for number, row in enumerate(rows, start=1):
            yield f"{source.path}@{source.revision[:12]}", number, row
    except Exception as error:  # the hub's client raises errors of many libraries
        repair = "Check path, subset, split and revision, and that the hub can be reached"
        raise DataError(f"hub dataset {source.path}: {str(error)[:300]}. {repair}.") from error


def _digest(piece: Piece) -> str:
    if piece.path.startswith(INSTALLED):
        return f"{piece.source} {piece.path} {installed.corpus_digest(piece.path.removeprefix(INSTALLED))}"
    if piece.path.startswith(HUB):
        return f"{piece.source} {piece.path}"
    is_large = piece.end - piece.start >= REMEMBERED_BYTES
    return f"{piece.source} {suffix(Path(piece.path))} {(_remembered_digest if is_large else _file_digest)(piece)}"


def _file_digest(piece: Piece) -> str:
    digest = hashlib.sha256()
    with Path(piece.path).open("rb") as file:
        file.seek(piece.start)
        left = piece.end - piece.start
        while left and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _remembered_digest(piece: Piece) -> str:
    """Reads a piece once for as long as its file's size and time of change stay; a lost cache costs time alone."""
    stat = Path(piece.path).stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_dist" / "digests"
    name = hashlib.sha256(f"{piece}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    try:
        return str(json.loads((cache / name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        digest = _file_digest(piece)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f"{name}.{os.getpid()}"
        aside.write_text(json.dumps(digest), encoding="utf-8")
        aside.replace(cache / name)
    except OSError as error:
        log.info("%s can't be written (%s): the digest of %s is worked out anew each time.", cache, error, piece.path)
    return digest


def _is_unicode(path: Path) -> bool:
    return str(path).encode("utf-8", "replace") == os.fsencode(path)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)
