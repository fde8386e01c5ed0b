"""A record's text is normalised, scrubbed where asked, and kept only between bounds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from qlora_dist.config.data import CleanConfig, Pii
from qlora_dist.data.kinds import UnusableError
from qlora_dist.data.pii import scrub
from qlora_dist.data.presidio import presidio_scrubber
from qlora_dist.data.record import Record

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
ASCII_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_END = re.compile("\r\n?|\u2028|\u2029")
TRAILING = re.compile("[ \t]+(?=\n)")
BLANK_LINES = re.compile("\n{4,}")
PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


class DroppedError(UnusableError):
    """A record that could be used but is left out by wish of the config."""


def clean(record: Record, config: CleanConfig, found: Counter[str] | None = None) -> Record:
    """Cleans a record in place and returns it; `found` counts the personal data that were replaced.

    Raises:
        UnusableError: if its text is no Unicode, or nothing is left of it.
        DroppedError: if it lies outside the bounds.
    """
    record.text = _clean_text(record.text, config, found)
    record.rejected = _clean_text(record.rejected, config, found)
    for message in record.messages:
        message["content"] = _clean_text(message["content"], config, found)
    answers = [m["content"] for m in record.messages if m["role"] == "assistant"] or [record.text]
    if not all(answer.strip() for answer in answers):
        raise UnusableError("empty field", "nothing is left after cleaning")
    _check_bounds(record.whole(), config)
    return record


def normalize(text: str) -> str:
    r"""Returns text in Unicode's form NFC with `\n` line ends, no control characters and no trailing blanks."""
    if text.isascii():
        text = LINE_END.sub("\n", text).translate(ASCII_CONTROL) if "\r" in text else text.translate(ASCII_CONTROL)
    else:
        text = CONTROL.sub("", LINE_END.sub("\n", unicodedata.normalize("NFC", text)))
    if " \n" in text or "\t\n" in text:
        text = TRAILING.sub("", text)
    return (BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text).strip("\n")


def passages(text: str, num_chars: int) -> Iterator[str]:
    """Divides text at blank lines into passages of at least `num_chars` characters, as short as they can be."""
    start = 0
    for blank in PARAGRAPH.finditer(text):
        if blank.start() - start >= num_chars:
            yield text[start : blank.start()]
            start = blank.end()
    if text[start:].strip():
        yield text[start:]


def _clean_text(text: str, config: CleanConfig, found: Counter[str] | None) -> str:
    if not text:
        return text
    if not text.isascii() and SURROGATE.search(text):
        raise UnusableError("not Unicode", "a lone surrogate")
    if config.normalize:
        text = normalize(text)
    if config.pii is not Pii.none:
        text = scrub(text, found)
    if config.pii is Pii.presidio:
        text = presidio_scrubber(config.pii_language, config.pii_model)(text, found)
    return text


def _check_bounds(text: str, config: CleanConfig) -> None:
    if len(text) < config.min_chars:
        raise DroppedError("too short", f"{len(text)} characters")
    if len(text) > config.max_chars:
        raise DroppedError("too long", f"{len(text)} characters")
    if config.min_word_share and (share := word_share(text)) < config.min_word_share:
        raise DroppedError("few words", f"{share:.0%} letters, digits and spaces")
    if config.max_repeat_share < 1 and (share := repeat_share(text)) > config.max_repeat_share:
        raise DroppedError("repeated lines", f"{share:.0%} of it")


def word_share(text: str) -> float:
    """Returns the share of letters, digits, combining marks and spaces, in any script."""
    return sum(c.isalnum() or c.isspace() or unicodedata.category(c)[0] == "M" for c in text) / max(1, len(text))


def repeat_share(text: str) -> float:
    """Returns the share of characters in lines that repeat an earlier one (Rae et al. 2021, table A1)."""
    seen: set[str] = set()
    repeated = 0
    for line in filter(None, map(str.strip, text.split("\n"))):
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, len(text))
