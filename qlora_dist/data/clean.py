"""A record's text is normalised, scrubbed where asked, and kept only between bounds."""

from __future__ import annotations

import re
import unicodedata

from qlora_dist.config.data import CleanConfig
from qlora_dist.data.kinds import Unusable
from qlora_dist.data.record import Record

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_END = re.compile("\r\n?|\u2028|\u2029")
TRAILING = re.compile("[ \t]+(?=\n)")
BLANK_LINES = re.compile("\n{4,}")


class Dropped(Unusable):
    """A record that could be used but is left out by wish of the config."""


def clean(record: Record, config: CleanConfig) -> Record:
    """Cleans a record in place and returns it.

    Raises:
        Unusable: if its text is no Unicode.
        Dropped: if it lies outside the bounds.
    """
    record.text = _clean_text(record.text, config)
    record.rejected = _clean_text(record.rejected, config)
    for message in record.messages:
        message["content"] = _clean_text(message["content"], config)
    answers = [m["content"] for m in record.messages if m["role"] == "assistant"] or [record.text]
    if not all(answer.strip() for answer in answers):
        raise Unusable("empty field", "nothing is left after cleaning")
    _check_bounds(record.whole(), config)
    return record


def normalize(text: str) -> str:
    """Returns text in Unicode's form NFC with `\\n` line ends, no control characters and no trailing blanks."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = CONTROL.sub("", LINE_END.sub("\n", text))
    return BLANK_LINES.sub("\n\n\n", TRAILING.sub("", text)).strip("\n")


def _clean_text(text: str, config: CleanConfig) -> str:
    if not text:
        return text
    if not text.isascii() and SURROGATE.search(text):
        raise Unusable("not Unicode", "a lone surrogate")
    if config.normalize:
        text = normalize(text)
    return text


def _check_bounds(text: str, config: CleanConfig) -> None:
    if len(text) < config.min_chars:
        raise Dropped("too short", f"{len(text)} characters")
    if len(text) > config.max_chars:
        raise Dropped("too long", f"{len(text)} characters")
