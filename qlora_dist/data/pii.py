"""Personal data in a text is replaced by what it was: `<EMAIL>`, `<IP>`, `<PHONE>`, `<IBAN>`, `<CARD>`, `<KEY>`.

Patterns find candidates; checksums (Luhn, ISO 7064 mod 97) and number ranges decide, so that version numbers, dates
and order numbers stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

Check = Callable[[str], bool]

EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9_.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
PHONE = re.compile(r"(?<![\w.+/-])(?<!\d )(?:\+|00)[1-9]\d{0,2}[ .()/-]{0,2}(?:\d[ .()/-]{0,2}){6,12}(?<=\d)(?![\w-])")
PHONE_US = re.compile(r"(?<![\w.+/-])(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}(?![\w-])")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
CARD = re.compile(r"(?<![\w.-])[2-6](?:[ -]?\d){12,18}(?![\w-])")
CARD_DIGITS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6\d{15,18}"
)
KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|(?<!\w)(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)"
    r"|(?<!\w)(?:ghp|gho|ghs|github_pat|glpat|hf|sk|pk|xox[abp]|AIza)[_-][A-Za-z0-9_-]{16,255}(?!\w)"
    r"|(?<!\w)AIza[A-Za-z0-9_-]{35}(?!\w)"
    r"|(?<!\w)eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    re.DOTALL,
)


def is_card(text: str) -> bool:
    """Says whether digits begin and count as a card's do, and end with their Luhn check digit (ISO/IEC 7812)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits))]
    return bool(CARD_DIGITS.fullmatch("".join(map(str, digits)))) and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """Says whether a candidate leaves 1 modulo 97, as an IBAN does (ISO 13616)."""
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_address(text: str) -> bool:
    """Says whether this is an IP address that can belong to someone: neither loopback nor unspecified nor a mask.

    A short name of hexadecimal letters, such as `a::b`, is a name in a program.
    """
    if ":" in text and (len(text) < 8 or not any(c.isdigit() for c in text)):
        return False
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or text.startswith("255."))


def _any(text: str) -> bool:
    return True


FINDERS: tuple[tuple[str, str, re.Pattern[str], Check], ...] = (
    ("KEY", "-_.", KEY, _any),
    ("EMAIL", "@", EMAIL, _any),
    ("IBAN", "", IBAN, is_iban),
    ("CARD", "", CARD, is_card),
    ("IP", ".", IPV4, is_address),
    ("IP", ":", IPV6, is_address),
    ("PHONE", "+0", PHONE, _any),
    ("PHONE", "-.", PHONE_US, _any),
)
"""Name, characters of which a candidate holds one (to skip quickly), pattern, check; in the order of their turns."""


def scrub(text: str, counts: Counter[str] | None = None) -> str:
    """Returns the text with personal data replaced by `<NAME>`, and adds what it found to `counts`."""
    for name, hints, pattern, holds in FINDERS:
        if hints and not any(hint in text for hint in hints):
            continue

        def replaced(match: re.Match[str], name: str = name, holds: Check = holds) -> str:
            if not holds(match.group()):
                return match.group()
            if counts is not None:
                counts[name] += 1
            return f"<{name}>"

        text = pattern.sub(replaced, text)
    return text
