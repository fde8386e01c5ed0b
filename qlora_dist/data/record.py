"""One record: what its kind is, what it says, where it came from; and one line of JSON for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

BATCH_RECORDS, BATCH_CHARS = 512, 2**22
"""Batches hold at most this much, so that memory stays small whatever the records are."""


CONTEXT, QUESTION = "Context:\n", "\n\nQuestion:\n"
"""How a prompt with a context is written."""


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(kw_only=True, slots=True)
class Record:
    """One checked example: `text` for running text, `messages` for all that answers something.

    `rejected` is the worse answer of a preference pair, whose better one ends `messages`. `use` names the split that
    its source was set aside for.
    """

    kind: str
    text: str = ""
    messages: list[Message] = field(default_factory=list)
    rejected: str = ""
    id: str = ""
    cluster: str = ""
    file: str = ""
    line: int = 0
    source: int = 0
    weight: float = 1.0
    licence: str = ""
    use: str = ""

    def parts(self) -> list[str]:
        """Returns its pieces of text."""
        return [self.text] if self.text else [m["content"] for m in self.messages]

    def prompts_and_answers(self) -> list[str]:
        """Returns its pieces of text but for the system's, which many records share: what held-out sets consist of."""
        return [self.text] if self.text else [m["content"] for m in self.messages if m["role"] != "system"]

    def context(self) -> str:
        """Returns the context that its question is about, if it has one."""
        return self.prompts_and_answers()[0].rpartition(QUESTION)[0] if self.kind == "rag" else ""

    def own(self) -> str:
        """Returns what it says that others on the same context, or under the same system prompt, don't."""
        pieces = self.prompts_and_answers()
        if self.context():
            pieces[0] = pieces[0].rpartition(QUESTION)[2]
        return "\n".join(pieces)

    def whole(self) -> str:
        """Returns all that it says, as one text."""
        return "\n".join(self.parts())

    def content_id(self) -> str:
        """Returns 64 bits of the SHA-256 of what it says: equal records have equal ids, wherever they lie."""
        said = json.dumps([self.text, [[m["role"], m["content"]] for m in self.messages], self.rejected])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def to_line(self) -> str:
        """Returns it as one line of JSON, empty fields left out."""
        kept = {name: value for name in self.__slots__ if (value := getattr(self, name)) not in ("", [])}
        return json.dumps(kept, ensure_ascii=False) + "\n"


@dataclass(kw_only=True, slots=True)
class Reject:
    """One example that is left out: where it stood, and why.

    `broken` ones can't be used and count towards `max_reject_share`; the others were dropped by wish.
    """

    file: str
    line: int
    reason: str
    detail: str = ""
    broken: bool = True

    def to_line(self) -> str:
        """Returns it as one line of JSON; what is no Unicode in it is written as escapes."""
        line = json.dumps(asdict(self), ensure_ascii=False) + "\n"
        return line.encode("utf-8", "backslashreplace").decode()

    def __str__(self) -> str:
        return f"{self.place()}: {self.reason}" + (f" ({self.detail})" if self.detail else "")

    def place(self) -> str:
        """Returns file and line; the file alone where it can't be read at all."""
        return f"{self.file}:{self.line}" if self.line else self.file


def parse_record(line: str | bytes) -> Record:
    """Reads a record from its line of JSON."""
    values: dict[str, Any] = json.loads(line)
    return Record(**values)


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a file one by one."""
    with path.open("rb") as file:
        for line in file:
            yield parse_record(line)


def in_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yields records in lists that are small in number and in text."""
    batch: list[Record] = []
    chars = 0
    for record in records:
        batch.append(record)
        chars += sum(map(len, record.parts()))
        if len(batch) >= BATCH_RECORDS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
