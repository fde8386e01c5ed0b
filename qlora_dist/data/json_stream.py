"""A JSON document is read entry by entry, without holding the whole of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

BLOCK_CHARS = 2**16
WRAPPED_CHARS = 200
BLANKS, NUMBER = " \t\r\n", "+-.eE0123456789"
WRAPPED = re.compile(r'\{[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*\[')
DECODER = json.JSONDecoder()


class MalformedError(ValueError):
    """The text is no JSON, or one entry is larger than allowed; nothing after it can be read."""


class Reader(Protocol):
    """What can be read piece by piece, as text."""

    def read(self, size: int, /) -> str:
        """Returns at most `size` characters, none at the end."""


class JsonStream:
    """The entries of an array, or the values that follow one another, of a text that is read in blocks."""

    def __init__(self, file: Reader, max_entry_chars: int) -> None:
        self._file, self._max = file, max_entry_chars
        self._text, self._at, self._is_done = "", 0, False

    def entries(self) -> Iterator[Any]:
        """Yields the entries of an array; of an object that holds an array `data` (and perhaps more), that one's.

        Of other values, one after another (JSON lines), each is an entry.

        Raises:
            MalformedError: where the text stops being JSON.
        """
        if self._peek() == "[":
            yield from self._array()
            self._at_end()
        elif self._is_wrapped():
            yield from self._array()
            self._rest_of_object()
            self._at_end()
        else:
            while self._peek():
                value = self._value()
                is_wrapped = isinstance(value, dict) and isinstance(value.get("data"), list)
                yield from value["data"] if is_wrapped else [value]

    def _is_wrapped(self) -> bool:
        """Says whether `{"data": [` comes now, and moves to the array: its entries need not be held at once."""
        while len(self._text) - self._at < WRAPPED_CHARS and self._fill(BLOCK_CHARS):
            pass
        found = WRAPPED.match(self._text, self._at)
        self._at = found.end() - 1 if found else self._at
        return bool(found)

    def _rest_of_object(self) -> None:
        """Reads over the other fields of the object that the array was in."""
        while (follows := self._peek()) == ",":
            self._at += 1
            self._value()
            if (colon := self._peek()) != ":":
                raise MalformedError(f"expected ':' after a name, found {colon!r}")
            self._at += 1
            self._value()
        if follows != "}":
            raise MalformedError(f"expected ',' or '}}' after the array, found {follows!r}")
        self._at += 1

    def _array(self) -> Iterator[Any]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            follows = self._peek()
            self._at += 1
            if follows == "]":
                return
            if follows != ",":
                raise MalformedError(f"expected ',' or ']' after an entry, found {follows!r}")

    def _at_end(self) -> None:
        if follows := self._peek():
            raise MalformedError(f"expected the end after the array, found {follows!r}")

    def _peek(self) -> str:
        """Skips blanks and returns the next character, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(BLOCK_CHARS):
                return ""

    def _value(self) -> Any:
        """Decodes the value at this place, reading twice as far each time that it turns out not to be whole."""
        self._peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                may_go_on = isinstance(value, (int, float)) and not self._text[end:].strip(NUMBER)
                if not may_go_on or not self._fill(BLOCK_CHARS):
                    self._at = end
                    return value
            except RecursionError:
                raise MalformedError("nested too deep") from None
            except ValueError as error:
                held = len(self._text) - self._at
                if held > self._max:
                    raise MalformedError(f"an entry of more than {self._max} characters, or broken: {error}") from None
                if not self._fill(max(held, BLOCK_CHARS)):
                    raise MalformedError(str(error)) from None

    def _fill(self, size: int) -> bool:
        """Reads on, dropping what was decoded; False at the end."""
        block = "" if self._is_done else self._file.read(size)
        self._is_done = self._is_done or not block
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)
