"""A source names files, a hub dataset or an installed corpus; here it becomes parts, each with a digest."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_dist.config.data import DomainConfig, SourceConfig, Use
from qlora_dist.data import installed
from qlora_dist.data.divide import borders, can_be_divided
from qlora_dist.data.formats import READERS, read_examples
from qlora_dist.data.hub import read_hub
from qlora_dist.data.kinds import ALIASES
from qlora_dist.data.opening import suffix
from qlora_dist.data.record import Reject
from qlora_dist.data.tables import DELIMITERS, head
from qlora_dist.errors import DataError, bad_value, nearest
from qlora_dist.runtime import log

INSTALLED, HUB = "installed:", "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LARGE_PARTS = 4
REMEMBERED_BYTES = 32 * 2**20
"""Pieces of files above this size have their digest remembered between plans."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one part reads of one source: bytes `start` to `end` of a file, a hub dataset or an installed corpus.

    A file's name, as records and rejects know it, is the last `depth` parts of its path: its place in the source's
    folder. In plans a piece is a string, `<number of the source>/<depth>:<path>@<start>-<end>`.
    """

    source: int
    path: str
    start: int = 0
    end: int = 0
    depth: int = 1

    def __str__(self) -> str:
        return f"{self.source}/{self.depth}:{self.path}@{self.start}-{self.end}"

    @property
    def name(self) -> str:
        """The file's path within the folder that its source names."""
        return "/".join(Path(self.path).parts[-self.depth :])

    @classmethod
    def parse(cls, text: str) -> Piece:
        """Reads a piece back from its string."""
        head, _, span = text.rpartition("@")
        numbers, _, path = head.partition(":")
        source, _, depth = numbers.partition("/")
        start, _, end = span.partition("-")
        return cls(int(source), path, int(start), int(end), int(depth or 1))


def pieces_of(number: int, source: SourceConfig, key: str, part_bytes: int) -> Iterator[Piece]:
    """Yields the pieces of a domain's source of this number; `key` is the source's, for messages.

    Raises:
        ConfigError: if it names nothing that could be read.
        DataError: if it is empty.
    """
    if unknown := next((name for name in source.fields if name not in ALIASES), None):
        raise bad_value(f"{key}.fields", unknown, f"names of fields ({', '.join(ALIASES)})", nearest(unknown, ALIASES))
    if source.path.startswith(INSTALLED):
        name = source.path.removeprefix(INSTALLED)
        if name not in installed.CORPORA:
            raise bad_value(f"{key}.path", source.path, f"{INSTALLED}<corpus>", nearest(name, installed.CORPORA))
        yield Piece(number, source.path)
    elif _is_hub_id(source.path):
        if not COMMIT.fullmatch(source.revision):
            repair = f"Set revision to the commit of {source.path} that you mean, so that every run means the same."
            raise bad_value(f"{key}.revision", source.revision, "the commit sha of a hub dataset", repair)
        yield Piece(number, ":".join((HUB[:-1], source.path, source.subset, source.split, source.revision)))
    else:
        files = files_of(source, f"{key}.path")
        if not any(file.stat().st_size for file in files):
            raise DataError(f"{key}.path={source.path}: empty. A source needs at least one record.")
        folder = _folder_of(source.path)
        for file in files:
            depth = len(file.relative_to(folder).parts) if file.is_relative_to(folder) else 1
            yield from _file_pieces(number, file, part_bytes, depth)


def plan_parts(domain: DomainConfig, key: str = "domain") -> list[list[str]]:
    """Divides a domain's sources into parts of about `part_bytes`, in the order of the sources and of their paths.

    Sources that are set aside for testing come first, then those for validation, so that of near-copies theirs stays;
    then all others. The order of all examples is the same however many parts there are. Large files are divided (see
    `divide`). `key` is the domain's, for messages.

    Raises:
        ConfigError: for a source that names nothing that could be read.
        DataError: for a source that is empty.
    """
    parts: list[list[str]] = [[]]
    size = 0
    first = [Use.test, Use.validation]
    ordered = sorted(
        enumerate(domain.sources), key=lambda item: first.index(item[1].use) if item[1].use in first else 2
    )
    for number, source in ordered:
        for piece in pieces_of(number, source, f"{key}.sources[{number}]", domain.part_bytes):
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
        yield from read_hub(source)
    else:
        for item in read_examples(Path(piece.path), piece.start, piece.end):
            yield replace(item, file=piece.name) if isinstance(item, Reject) else (piece.name, *item)


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
        what = f"Files of a known type ({types}; also .gz and .zst of these) are needed." if found else _absent(path)
        raise bad_value(key, source.path, "a file, a folder, a glob or a hub id (owner/name)", what)
    if odd := next((p for p in readable if not _is_unicode(p)), None):
        raise bad_value(key, repr(str(odd)), "files with names in UTF-8", "Rename it.")
    if others := Counter(p.suffix or p.name for p in found if suffix(p) not in READERS):
        shown = ", ".join(f"{n} x {name}" for name, n in others.most_common(5))
        log.warning("%s: files of other types are left out (%s).", source.path, shown)
    return readable


def _absent(path: Path) -> str:
    """Says that nothing is at a path, and what is there instead: a name like it, or no folder."""
    missing = next((folder for folder in reversed(path.parents) if not folder.exists()), None)
    if missing and not glob.has_magic(str(missing)):
        return f"Nothing there. {missing.absolute()} is no folder."
    close = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1) if path.parent.is_dir() else []
    return "Nothing there." + (f" Did you mean {close[0]}?" if close else f" (Looked in {path.parent.absolute()})")


def _folder_of(path: str) -> Path:
    """Returns the folder that a source names: of a glob, what stands before its first wildcard; of a file, its own."""
    whole = Path(path).expanduser()
    if not whole.exists():
        fixed = next(i for i, part in enumerate(whole.parts) if glob.has_magic(part))
        whole = Path(*whole.parts[:fixed])
    whole = whole.resolve()
    return whole if whole.is_dir() else whole.parent


def _is_hub_id(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists() and suffix(Path(path)) not in READERS


def _file_pieces(number: int, file: Path, part_bytes: int, depth: int) -> Iterator[Piece]:
    size = file.stat().st_size
    if size > LARGE_PARTS * part_bytes and not can_be_divided(file):
        log.warning("%s: %.1f GB are read by one process; as plain JSON lines, it would be divided.", file, size / 1e9)
    find = partial(borders, file, part_bytes)
    is_scanned = size > part_bytes and suffix(file) in DELIMITERS
    for start, end in pairwise(_remembered(f"borders {file} {part_bytes}", file, find) if is_scanned else find()):
        yield Piece(number, str(file), start, end, depth)


def _digest(piece: Piece) -> str:
    if piece.path.startswith(INSTALLED):
        return f"{piece.source} {piece.path} {installed.corpus_digest(piece.path.removeprefix(INSTALLED))}"
    if piece.path.startswith(HUB):
        return f"{piece.source} {piece.path}"
    path = Path(piece.path)
    is_large = piece.end - piece.start >= REMEMBERED_BYTES
    digest = _remembered(f"{piece}", path, partial(_file_digest, piece)) if is_large else _file_digest(piece)
    is_whole = not piece.start and piece.end == path.stat().st_size
    return f"{piece.source} {suffix(path)} {digest}" + ("" if is_whole else f" {head(path)}")


def _file_digest(piece: Piece) -> str:
    digest = hashlib.sha256()
    with Path(piece.path).open("rb") as file:
        file.seek(piece.start)
        left = piece.end - piece.start
        while left and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _remembered(what: str, path: Path, find: Callable[[], Any]) -> Any:
    """Reads a file once for as long as its size and time of change stay; a lost cache costs time alone."""
    stat = path.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_dist" / "digests"
    name = hashlib.sha256(f"{what}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    try:
        return json.loads((cache / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = find()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f"{name}.{os.getpid()}"
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(cache / name)
    except OSError as error:
        log.info("%s can't be written (%s): %s is read anew each time.", cache, error, path)
    return found


def _is_unicode(path: Path) -> bool:
    return str(path).encode("utf-8", "replace") == os.fsencode(path)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)
