"""Records become token ids, each with a mark whether it is trained and the bytes it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.data import RenderConfig, TrainOn
from qlora_dist.data.record import Record
from qlora_dist.data.templates import PLAIN, ChatTemplate
from qlora_dist.errors import DataError


@dataclass(slots=True)
class Encoded:
    """A record's tokens [N], which of them are trained [N], and the UTF-8 bytes each adds [N].

    `opening` counts the leading tokens that each segment of running text repeats (its BOS).
    """

    tokens_N: np.ndarray
    trained_N: np.ndarray
    bytes_N: np.ndarray


class Encoder:
    """A saved tokenizer, its special tokens and its chat template."""

    def __init__(self, folder: Path, render: RenderConfig | None = None) -> None:
        from tokenizers import Tokenizer

        self.render = render or RenderConfig()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        told = _read_json(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self.special = {name: _token_text(told.get(name)) for name in names}
        self.vocab_size = int(_read_json(folder / "config.json").get("vocab_size") or self.tokenizer.get_vocab_size())
        self.end_id = self._id(self.special["eos_token"])
        if self.end_id is None:
            raise DataError(f"{folder}: its tokenizer names no end token. Set eos_token in tokenizer_config.json.")
        start = self._id(self.special["bos_token"])
        start = self._id("<|endoftext|>") if start is None else start
        self.start_id = self.end_id if start is None else start
        pad = self._id(self.special["pad_token"])
        self.pad_id = self.end_id if pad is None else pad
        self.template = ChatTemplate(
            self._template(folder, told), tuple((name, text) for name, text in self.special.items())
        )
        added = self.tokenizer.get_added_tokens_decoder()
        self.silent_ids = sorted({i for i, token in added.items() if token.special} | {self.end_id, self.start_id})

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded]:
        """Yields the tokens of each record, in order."""
        texts: list[str] = []
        plans: list[list[tuple[int, bool]]] = []
        for record in records:
            spans = [(record.text, True)] if record.text else self._spans(record)
            plans.append([(len(texts) + i, trained) for i, (_, trained) in enumerate(spans)])
            texts += [text for text, _ in spans]
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        for record, plan in zip(records, plans, strict=True):
            pieces = [(texts[i], encodings[i], trained) for i, trained in plan]
            yield self._joined(pieces, is_text=bool(record.text))

    def _spans(self, record: Record) -> list[tuple[str, bool]]:
        spans = [(span.text, span.trained) for span in self.template.spans(record.messages) if span.text]
        return [(text, True) for text, _ in spans] if self.render.train_on is TrainOn.all else spans

    def _joined(self, pieces: list[tuple[str, Any, bool]], *, is_text: bool) -> Encoded:
        ids = [np.array(encoding.ids, dtype=np.uint32) for _, encoding, _ in pieces]
        trained = [np.full(len(i), t) for i, (_, _, t) in zip(ids, pieces, strict=True)]
        sizes = [_byte_counts(text, encoding) for text, encoding, _ in pieces]
        if is_text:
            end = np.array([self.end_id], dtype=np.uint32)
            ids, trained, sizes = [*ids, end], [*trained, np.array([True])], [*sizes, np.array([0])]
        tokens_N = np.concatenate(ids)
        bytes_N = np.concatenate(sizes)
        bytes_N[np.isin(tokens_N, self.silent_ids)] = 0
        return Encoded(tokens_N, np.concatenate(trained), bytes_N)

    def _id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.token_to_id(token) if token else None
        return found

    def _template(self, folder: Path, told: dict[str, Any]) -> str:
        if self.render.chat_template:
            return Path(self.render.chat_template).expanduser().read_text(encoding="utf-8")
        file = folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = told.get("chat_template")
        if isinstance(template, list):
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template or PLAIN


def _byte_counts(text: str, encoding: Any) -> np.ndarray:
    """Returns the UTF-8 bytes that each token adds; they sum to those of the whole text."""
    if not len(encoding.ids):
        return np.zeros(0, dtype=np.int64)
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    ends = np.maximum.accumulate(ends)
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
