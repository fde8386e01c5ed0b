"""Records become token ids, each with a mark whether it is trained and the bytes that it stands for.

N tokens of a record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.data import RenderConfig, TrainOn
from qlora_dist.data.record import Message, Record
from qlora_dist.data.templates import PLAIN, REPAIR, ChatTemplate, RefusedError, Span
from qlora_dist.errors import DataError

CHUNK_CHARS = 2**18
"""Running text is tokenized in pieces of about this size: a tokenizer needs many times the memory of its input."""

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record's tokens, which of them are trained, and the UTF-8 bytes that each adds (special tokens: none)."""

    tokens_N: np.ndarray
    trained_N: np.ndarray
    bytes_N: np.ndarray


@dataclass
class Encoder:
    """A saved tokenizer with its special tokens and chat template.

    A text starts with the model's BOS; with `<|endoftext|>` where it has none (as Qwen's pre-training does), or with
    its end token where that is missing too.
    """

    folder: Path
    render: RenderConfig = field(default_factory=RenderConfig)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more special
            raise DataError(f"{self.folder}: no tokenizer.json that can be read ({error}).") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.told = _read_json(self.folder / "tokenizer_config.json")
        self.special = {name: _token_text(self.told.get(name)) for name in SPECIAL_NAMES}
        self.vocab_size = self._vocab_size()
        self.end_id = self._end_id()
        self.start_id = self._first_id(self.special["bos_token"], "<|endoftext|>", self.special["eos_token"])
        self.pad_id = self._first_id(self.special["pad_token"], self.special["eos_token"])
        self.template = ChatTemplate(self._template(), tuple(self.special.items()))

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | str]:
        """Yields each record's tokens, in order, or the reason why it is left out.

        Raises:
            DataError: if the template can't be used (see `ChatTemplate.conversation`).
        """
        texts = iter(self._encode_texts([r.text for r in records if r.text]))
        talks = iter(self._encode_conversations([r.messages for r in records if not r.text]))
        for record in records:
            yield next(texts) if record.text else next(talks)

    @cached_property
    def silent_ids(self) -> list[int]:
        """Ids of the special tokens, which stand for no bytes of a record."""
        added = self.tokenizer.get_added_tokens_decoder()
        return sorted({i for i, token in added.items() if token.special} | {self.end_id, self.start_id})

    @cached_property
    def bytes_of_id(self) -> np.ndarray | None:
        """The bytes that each token stands for [V], where a token is a string of bytes (byte-level BPE)."""
        told = json.loads(self.tokenizer.to_str())
        if (told.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        sizes = np.zeros(max(self.vocab_size, self.tokenizer.get_vocab_size()), dtype=np.int64)
        added = self.tokenizer.get_added_tokens_decoder()
        for token, i in self.tokenizer.get_vocab().items():
            sizes[i] = len(token.encode()) if i in added else len(token)
        sizes[self.silent_ids] = 0
        return sizes

    def check_template(self) -> None:
        """Checks with a conversation of its own that the template is prefix-stable, ends turns and has one BOS at most.

        Raises:
            DataError: if it doesn't.
        """
        turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.template.conversation(turns + turns)
        encoded = next(self._encode_conversations([turns + turns]))
        assert isinstance(encoded, Encoded)
        last = int(encoded.tokens_N[encoded.trained_N][-1])
        if last not in self.silent_ids:
            shown = self.tokenizer.id_to_token(last)
            raise DataError(
                f"{self.folder}: its chat template ends an assistant turn with {shown!r}, no special token: the model "
                "would never learn to stop. Set render.chat_template of the domain to one that ends with eos_token."
            )
        num_starts = int((encoded.tokens_N == self.start_id).sum())
        if self.special["bos_token"] and self.start_id != self.end_id and num_starts > 1:
            raise DataError(f"{self.folder}: its chat template begins with two BOS tokens. {REPAIR}")

    def _encode_texts(self, texts: list[str]) -> Iterator[Encoded]:
        self.tokenizer.encode_special_tokens = True  # "<s>" in a text is three characters
        pieces = [_chunks(text) for text in texts]
        flat = [piece for chunks in pieces for piece in chunks]
        batch = self.tokenizer.encode_batch if self.bytes_of_id is None else self.tokenizer.encode_batch_fast
        encodings = iter(batch(flat, add_special_tokens=False))
        for chunks in pieces:
            parts = [self._sized(chunk, next(encodings)) for chunk in chunks]
            tokens_N = np.concatenate([*(ids for ids, _ in parts), [self.end_id]]).astype(np.uint32)
            bytes_N = np.concatenate([*(sizes for _, sizes in parts), [0]])
            yield Encoded(tokens_N, np.ones(len(tokens_N), dtype=bool), bytes_N)

    def _sized(self, text: str, encoding: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(encoding.ids, dtype=np.uint32)
        if self.bytes_of_id is not None:
            sizes = self.bytes_of_id[ids]
            if sizes.sum() == len(text) if text.isascii() else sizes.sum() == len(text.encode()):
                return ids, sizes
            encoding = self.tokenizer.encode(text, add_special_tokens=False)  # rewritten text: count by offsets
        return ids, _bytes_by_offsets(text, encoding)

    def _encode_conversations(self, conversations: list[list[Message]]) -> Iterator[Encoded | str]:
        rendered = [self._rendered(messages) for messages in conversations]
        self.tokenizer.encode_special_tokens = False
        texts = [item[0] for item in rendered if not isinstance(item, str)]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        for item in rendered:
            yield item if isinstance(item, str) else self._marked(*item, next(encodings))

    def _rendered(self, messages: list[Message]) -> tuple[str, list[Span]] | str:
        if any(token in m["content"] for m in messages for token in self._special_texts):
            return "special token in text"
        try:
            return self.template.conversation(messages)
        except RefusedError:
            return "refused by the chat template"

    def _marked(self, text: str, spans: list[Span], encoding: Any) -> Encoded:
        tokens_N = np.array(encoding.ids, dtype=np.uint32)
        start_N = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        trained_N = np.full(len(tokens_N), self.render.train_on is TrainOn.all)
        for span in spans:
            trained_N |= (start_N >= span.start) & (start_N < span.end)
        bytes_N = _bytes_by_offsets(text, encoding)
        bytes_N[np.isin(tokens_N, self.silent_ids)] = 0
        return Encoded(tokens_N, trained_N, bytes_N)

    @cached_property
    def _special_texts(self) -> list[str]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content.strip()]

    def _vocab_size(self) -> int:
        known = self.tokenizer.get_vocab()
        largest = max(known.values(), default=0)
        told = _read_json(self.folder / "config.json")
        size = told.get("vocab_size") or (told.get("text_config") or {}).get("vocab_size") or largest + 1
        if largest >= size:
            raise DataError(
                f"{self.folder}: its tokenizer knows {largest + 1} tokens, the model {size}. Use the model's own "
                "tokenizer, or a base whose embeddings were resized for the added tokens."
            )
        return int(size)

    def _end_id(self) -> int:
        end = self.tokenizer.token_to_id(self.special["eos_token"]) if self.special["eos_token"] else None
        if end is None:
            found = self.special["eos_token"] or "none"
            raise DataError(f"{self.folder}: no end token (eos_token: {found}). Name one in tokenizer_config.json.")
        return int(end)

    def _first_id(self, *tokens: str) -> int:
        ids = (self.tokenizer.token_to_id(token) for token in tokens if token)
        return next((int(i) for i in ids if i is not None), self.end_id)

    def _template(self) -> str:
        own = self.folder / "chat_template.jinja"
        if self.render.chat_template:
            return self.render.chat_template
        if own.is_file():
            return own.read_text(encoding="utf-8")
        template = self.told.get("chat_template")
        if isinstance(template, list):
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template or PLAIN


_OPEN: dict[tuple[str, str, int], Encoder] = {}


def open_encoder(folder: Path, render: RenderConfig) -> Encoder:
    """Returns the encoder of a tokenizer and a render config; a process opens each once, and again if it changes."""
    times = [path.stat().st_mtime_ns for path in folder.glob("*")]
    key = (str(folder), repr(render), max(times, default=0))
    if key not in _OPEN:
        _OPEN[key] = Encoder(folder, render)
    return _OPEN[key]


def tokenizer_digest(folder: Path) -> str:
    """Returns the SHA-256 of a tokenizer's file: rows name it, so that they are read with the one that made them."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _chunks(text: str) -> list[str]:
    """Cuts long text before line starts (or anywhere, where a line is longer than a chunk)."""
    chunks = []
    while len(text) > CHUNK_CHARS:
        at = text.rfind("\n", CHUNK_CHARS // 2, CHUNK_CHARS) + 1 or CHUNK_CHARS
        chunks.append(text[:at])
        text = text[at:]
    return [*chunks, text]


def _bytes_by_offsets(text: str, encoding: Any) -> np.ndarray:
    """Returns the UTF-8 bytes that each token adds; they sum to those of the whole text."""
    if not encoding.ids:
        return np.zeros(0, dtype=np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], dtype=np.int64))
    ends[-1] = len(text)
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
        ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
    return np.diff(ends, prepend=0)


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else (value or "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return values
