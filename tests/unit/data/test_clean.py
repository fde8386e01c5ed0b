"""Cleaning changes what it says it changes, and each drop has its reason."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.config.data import CleanConfig, Pii
from qlora_dist.data import presidio
from qlora_dist.data.clean import DroppedError, clean, normalize, passages, repeat_share, word_share
from qlora_dist.data.kinds import UnusableError, make_record
from qlora_dist.data.pii import scrub
from qlora_dist.data.presidio import presidio_scrubber
from qlora_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("e\u0301", "\u00e9"),
        ("a \t\nb", "a\nb"),
        ("\n\na\n\n\n\n\n\nb\n", "a\n\n\nb"),
        ("a\x00b\x07\ufeffc\td", "abc\td"),
        ("    indented\n\tcode", "    indented\n\tcode"),
    ],
)
def test_normalising(raw: str, kept: str) -> None:
    assert normalize(raw) == kept


def test_text_is_left_as_it_is_where_that_is_wished() -> None:
    raw = "e\u0301 \t\r\n\n\n\n\n\x07 b "
    assert clean(make_record(raw), CleanConfig(normalize=False)).text == raw
    assert clean(make_record(raw), CleanConfig()).text != raw


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 20))
def test_passages_hold_all_words_in_order_and_are_long_enough(text: str, num_chars: int) -> None:
    found = list(passages(text, num_chars))
    assert "".join(found).split() == text.split() or "".join(" ".join(found).split()) == "".join(text.split())
    assert all(len(passage) >= num_chars for passage in found[:-1])


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [
        ({"min_chars": 10}, "short", "too short"),
        ({"max_chars": 10}, "x" * 11, "too long"),
        ({"min_word_share": 0.8}, "|---|---|===|", "few words"),
        ({"max_repeat_share": 0.5}, "again\n" * 10, "repeated lines"),
    ],
)
def test_bounds_drop_by_wish(config: dict[str, Any], text: str, reason: str) -> None:
    with pytest.raises(DroppedError) as caught:
        clean(make_record(text), CleanConfig(**config))
    assert caught.value.reason == reason


def test_text_in_any_script_counts_as_words() -> None:
    for text in ("Es gilt das Recht", "यह कानून है", "法律适用", "القانون"):
        assert word_share(text) == 1
    assert repeat_share("a\nb\nc") == 0


def test_lone_surrogates_and_texts_of_nothing_are_refused() -> None:
    for text, reason in (("a\ud800b", "not Unicode"), ("\x00\x01", "empty field")):
        with pytest.raises(UnusableError) as caught:
            clean(make_record({"instruction": "q", "response": text}), CleanConfig())
        assert not isinstance(caught.value, DroppedError)
        assert caught.value.reason == reason


FOUND = [
    ("Write to anna.b+c@mail.example.co.uk now", "Write to <EMAIL> now"),
    ("from 192.168.17.4 and 2001:db8::8a2e:370:7334.", "from <IP> and <IP>."),
    ("IBAN DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", "IBAN <IBAN>, <IBAN>"),
    ("card 4111 1111 1111 1111 or 5500-0000-0000-0004", "card <CARD> or <CARD>"),
    ("call +49 30 901820 or (212) 555-0199 or 212-555-0199", "call <PHONE> or <PHONE> or <PHONE>"),
    ("key AKIAIOSFODNN7EXAMPLE and ghp_abcdefghijklmnopqrstuvwxyz0123456789", "key <KEY> and <KEY>"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----", "<KEY>"),
]
KEPT = [
    "version 1.2.3.4567 of 2024-01-31, 127.0.0.1, 0.0.0.0, mask 255.255.255.0",
    "order 4111 1111 1111 1112, ISBN 978-3-16-148410-0, 12:34:56, std::vector, a::b, dead::beef, @decorator, a@b",
    "DE89 3704 0044 0532 0130 01 and article 12.3.4.5.6",
    "sections 100-200-3000 and 1234567890, 3.141592653589793, 0000000000000000",
    "sha256 9f86d081884c7d659a2feaa0c55ad015 at 10:30",
]


@pytest.mark.parametrize(("text", "scrubbed"), FOUND)
def test_personal_data_is_replaced_and_counted(text: str, scrubbed: str) -> None:
    counts: Counter[str] = Counter()
    assert scrub(text, counts) == scrubbed
    assert counts.total() == scrubbed.count("<")
    assert scrub(scrubbed) == scrubbed


@pytest.mark.parametrize("text", KEPT)
def test_what_fails_its_checksum_or_belongs_to_nobody_stays(text: str) -> None:
    assert scrub(text) == text


@given(st.text(alphabet="0123456789 -.+@:abDE/()", max_size=300))
def test_scrubbing_ends_on_any_text_and_only_when_asked(text: str) -> None:
    scrub(text)
    record = make_record("mail a@b.example now")
    assert clean(record, CleanConfig()).text == "mail a@b.example now"
    assert clean(record, CleanConfig(pii=Pii.patterns)).text == "mail <EMAIL> now"


def test_presidio_adds_what_patterns_do_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra `presidio` is not installed")
    import spacy

    pipeline = spacy.blank("en")  # a model by rules stands in for one by statistics: presidio asks both the same
    names = [("PERSON", "Anna Schmidt"), ("GPE", "Berlin"), ("ORG", "Acme"), ("DATE", "1970-01-01")]
    rules = [{"label": label, "pattern": name} for label, name in names]
    pipeline.add_pipe("entity_ruler").add_patterns(rules)  # type: ignore[attr-defined]
    pipeline.to_disk(tmp_path / "ruled")
    monkeypatch.setattr("socket.getaddrinfo", None)  # whoever asked for an address would fail
    config = CleanConfig(pii=Pii.presidio, pii_model=str(tmp_path / "ruled"))
    counts: Counter[str] = Counter()
    text = "Anna Schmidt of Acme, Berlin, born 1970-01-01: SSN 536-90-4399, mail a@b.example, see http://x.example"
    record = clean(make_record(text), config, counts)
    told = "<PERSON> of <ORGANIZATION>, <LOCATION>, born 1970-01-01: SSN <US_SSN>, mail <EMAIL>, see http://x.example"
    assert record.text == told
    assert counts == {"PERSON": 1, "ORGANIZATION": 1, "LOCATION": 1, "US_SSN": 1, "EMAIL": 1}
    assert presidio_scrubber("en", config.pii_model)("mail a@b.co.uk", None) == "mail <EMAIL_ADDRESS>"
    monkeypatch.setattr(presidio, "PIECE_CHARS", 500)
    long = "Anna Schmidt wrote.\n" * 100 + "x" * 1000
    assert presidio_scrubber("en", str(tmp_path / "ruled"))(long, None) == long.replace("Anna Schmidt", "<PERSON>")
    with pytest.raises(ConfigError, match="python -m spacy download no_such_model"):
        presidio_scrubber("en", "no_such_model")


@given(st.text("ab \n", max_size=400), st.integers(1, 20))
def test_presidio_reads_all_of_a_text_in_small_pieces_cut_between_words(text: str, num_chars: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presidio, "PIECE_CHARS", num_chars)
        pieces = list(presidio._pieces(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= num_chars for piece in pieces)
    assert all(a[-1] in " \n" or len(a) == num_chars for a in pieces[:-1])


def test_presidio_that_is_not_installed_is_named_with_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"qlora_dist\[presidio\]"):
        clean(make_record("words"), CleanConfig(pii=Pii.presidio, pii_model="not asked before"))
