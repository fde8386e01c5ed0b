"""A raw example's kind is told by its fields, checked, and made into a record of text or messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from qlora_dist.config.data import Kind
from qlora_dist.data.record import CONTEXT, QUESTION, Message, Record

Raw = Mapping[str, Any]

ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "document", "body"),
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input",),
    "context": ("context", "passage", "passages", "documents"),
    "response": ("response", "output", "answer", "completion", "target"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
    "licence": ("licence", "license"),
}
"""The names under which each field is known, case and blanks set aside; the first that is there counts."""

FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.text: ("text",),
    Kind.instruction: ("instruction", "input", "response", "system"),
    Kind.rag: ("context", "instruction", "response", "system"),
    Kind.chat: ("messages", "system"),
    Kind.preference: ("instruction", "chosen", "rejected"),
    Kind.classification: ("text", "label", "system"),
}
"""The fields that a kind reads, besides `licence`."""

UNKNOWN = "unknown fields"
"""The reason of a reject whose columns fit no kind."""

LICENCE_CHARS = 100
"""What is longer is no licence's name."""

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
"""Roles of OpenAI and ShareGPT conversations, by the names that chat templates know."""


class UnusableError(Exception):
    """An example that can't become a record: `reason` is counted, `detail` is shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def make_record(raw: Any, kind: Kind = Kind.auto, fields: Mapping[str, str] | None = None) -> Record:
    """Makes a record of one raw example.

    Args:
        raw: a JSON object, or a plain string (running text).
        kind: what it is; `auto` tells it by its fields.
        fields: the source's own names of the fields, e.g. `{"response": "answer_text"}`.

    Raises:
        UnusableError: if it has no known kind, or a field is absent, empty or of the wrong type.
    """
    if isinstance(raw, str):
        raw = {"text": raw}
    if not isinstance(raw, Mapping):
        repair = "; an array of examples belongs in a file named .json" if isinstance(raw, list) else ""
        raise UnusableError("not an object", f"expected a JSON object, found {type(raw).__name__}{repair}")
    known = {field: raw[column] for field, column in columns(raw, fields or {}).items()}
    kind = detect(known, raw) if kind is Kind.auto else kind
    record = MAKERS[kind](known)
    licence = known.get("licence")
    if isinstance(licence, str) and len(licence) <= LICENCE_CHARS and licence.isprintable():
        record.licence = licence.strip()
    return record


def detect(known: Raw, raw: Raw) -> Kind:
    """Tells the kind of a raw example by which fields are there.

    Raises:
        UnusableError: if no kind has these fields.
    """
    wanted = (
        (Kind.chat, {"messages"}),
        (Kind.preference, {"chosen", "rejected"}),
        (Kind.rag, {"context", "instruction", "response"}),
        (Kind.instruction, {"instruction", "response"}),
        (Kind.instruction, {"input", "response"}),
        (Kind.classification, {"text", "label"}),
        (Kind.text, {"text"}),
    )
    for kind, names in wanted:
        if names <= known.keys():
            return kind
    found = sorted(str(name) for name, value in raw.items() if value is not None)
    raise UnusableError(UNKNOWN, f"found {', '.join(found[:8]) or 'none'}")


def columns(raw: Raw, fields: Mapping[str, str]) -> dict[str, str]:
    """Returns the column of a raw example that each field is read from; fields without one are left out.

    Args:
        raw: the example, by its own names.
        fields: the names that were told, which then count alone.
    """
    own: dict[Any, Any] = {}
    for column, value in raw.items():
        if value is not None:
            own.setdefault(_plain(column), column)
    own |= {column: column for column, value in raw.items() if value is not None}
    found: dict[str, str] = {}
    for field, names in ALIASES.items():
        if field in fields:
            found |= {field: fields[field]} if raw.get(fields[field]) is not None else {}
        elif known := next((name for name in names if name in own), None):
            found[field] = own[known]
    return found


def _plain(column: Any) -> str:
    """Returns a column's name as `ALIASES` would write it: `System Prompt` is `system_prompt`."""
    return str(column).strip().lower().replace(" ", "_").replace("-", "_")


def _string(known: Raw, name: str, *, optional: bool = False) -> str:
    value = known.get(name)
    if value is None and optional:
        return ""
    if value is None:
        raise UnusableError("absent field", name)
    if isinstance(value, list) and name == "context" and all(isinstance(v, str) for v in value):
        value = "\n\n".join(value)
    if isinstance(value, (bool, int, float)) and name == "label":
        value = str(value)
    if not isinstance(value, str):
        raise UnusableError("wrong type", f"{name}: expected text, found {type(value).__name__}")
    if not optional and not value.strip():
        raise UnusableError("empty field", name)
    return value


def _text(known: Raw) -> Record:
    return Record(kind="text", text=_string(known, "text"))


def _instruction(known: Raw) -> Record:
    asked, given = _string(known, "instruction", optional=True), _string(known, "input", optional=True)
    prompt = "\n\n".join(part for part in (asked, given) if part.strip())
    if not prompt:
        raise UnusableError("empty field", "instruction")
    return _answered("instruction", known, prompt, _string(known, "response"))


def _rag(known: Raw) -> Record:
    context, asked = _string(known, "context", optional=True), _string(known, "instruction")
    prompt = f"{CONTEXT}{context}{QUESTION}{asked}" if context.strip() else asked
    return _answered("rag", known, prompt, _string(known, "response"))


def _classification(known: Raw) -> Record:
    return _answered("classification", known, _string(known, "text"), _string(known, "label"))


def _answered(kind: str, known: Raw, prompt: str, answer: str) -> Record:
    system = _string(known, "system", optional=True)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    turns: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(kind=kind, messages=head + turns)


def _chat(known: Raw) -> Record:
    messages = _messages(known.get("messages"), "messages")
    system = _string(known, "system", optional=True)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Record(kind="chat", messages=_checked_turns(messages))


def _preference(known: Raw) -> Record:
    prompt: list[Message] = []
    if isinstance(known.get("instruction"), list):
        prompt = _messages(known["instruction"], "prompt")
    elif known.get("instruction") is not None:
        prompt = [{"role": "user", "content": _string(known, "instruction")}]
    chosen, rejected = _answer(known, "chosen", prompt), _answer(known, "rejected", prompt)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("wrong turns", "chosen and rejected answer different prompts")
    return Record(kind="preference", messages=_checked_turns(chosen), rejected=rejected[-1]["content"])


def _answer(known: Raw, name: str, prompt: list[Message]) -> list[Message]:
    if isinstance(known.get(name), list):
        turns = _messages(known[name], name)
        turns = turns if turns[: len(prompt)] == prompt else prompt + turns
    else:
        turns = [*prompt, {"role": "assistant", "content": _string(known, name)}]
    if turns[-1]["role"] != "assistant":
        raise UnusableError("wrong turns", f"{name} ends with {turns[-1]['role']}, not with assistant")
    return turns


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise UnusableError("wrong type", f"{name}: expected a list of turns, found {type(value).__name__}")
    if not value:
        raise UnusableError("empty field", name)
    return [_message(turn, f"{name}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableError("wrong type", f"{name}: expected an object, found {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI's list of content parts
        pieces = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [piece for piece in pieces if isinstance(piece, str)]
        content = "".join(texts) if len(texts) == len(pieces) else content
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UnusableError("unknown role", f"{name}: {str(role)[:40]}")
    if not isinstance(content, str):
        raise UnusableError("wrong type", f"{name}: expected text, found {type(content).__name__}")
    return {"role": ROLES[role.lower()], "content": content}


def _checked_turns(messages: list[Message]) -> list[Message]:
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise UnusableError("no answer", "no assistant turn")
    if "system" in roles[1:]:
        raise UnusableError("wrong turns", "a system turn that isn't the first")
    if next(r for r in roles if r != "system") == "assistant":
        raise UnusableError("wrong turns", "the first turn is the assistant's")
    if any(a == b for a, b in pairwise(roles) if a != "tool"):
        raise UnusableError("wrong turns", "two turns of one role in a row")
    while roles[-1] != "assistant":  # a question nobody answers teaches nothing
        roles.pop()
    messages = messages[: len(roles)]
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise UnusableError("empty field", "an assistant turn")
    return messages


MAKERS: dict[Kind, Callable[[Raw], Record]] = {
    Kind.text: _text,
    Kind.instruction: _instruction,
    Kind.rag: _rag,
    Kind.chat: _chat,
    Kind.preference: _preference,
    Kind.classification: _classification,
}
