"""Personal data that needs more than patterns (names, places) are found by presidio, an optional extra."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from qlora_dist.errors import bad_value

Scrubber = Callable[[str, Counter[str] | None], str]

MIN_SCORE = 0.5
PIECE_CHARS = 2**14
"""Texts are analysed in pieces: spaCy refuses a million characters, and wants some 10 KB of memory for each."""

KEPT = {"URL", "DATE_TIME", "NRP"}
"""What presidio finds too, but belongs to nobody in particular."""


@lru_cache(maxsize=4)
def presidio_scrubber(language: str, model: str) -> Scrubber:
    """Returns a function that replaces what presidio's analyzer finds by `<ENTITY>`.

    Args:
        language: of the texts, as presidio names it, e.g. `en`.
        model: a spaCy pipeline with named entities: an installed package, or its folder.

    Raises:
        ConfigError: if the extra or the model isn't installed.
    """
    try:
        import tldextract.tldextract as names
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider
        from spacy.util import is_package
    except ImportError as error:
        repair = "Install it with pip install 'qlora_dist[presidio]', or use clean.pii=patterns."
        raise bad_value("clean.pii", "presidio", f"presidio-analyzer ({error})", repair) from error
    if not is_package(model) and not Path(model).expanduser().exists():
        repair = f"Install it with python -m spacy download {model}."
        raise bad_value("clean.pii_model", model, "an installed spaCy model, or its folder", repair)
    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL)
    # by the list of domains that it has with it: a text becomes the same record with a network and without
    names.TLD_EXTRACTOR = names.TLDExtract(suffix_list_urls=(), cache_dir=None)
    told = {"nlp_engine_name": "spacy", "models": [{"lang_code": language, "model_name": model}]}
    engine = NlpEngineProvider(nlp_configuration=told).create_engine()
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=[language])

    def scrubbed(text: str, counts: Counter[str] | None) -> str:
        found = [r for r in analyzer.analyze(text, language, score_threshold=MIN_SCORE) if r.entity_type not in KEPT]
        pieces, at = [], 0
        for result in sorted(found, key=lambda r: (r.start, -r.end)):
            if result.start < at or text[result.start - 1 : result.start] == "<":  # within one before, or a mark
                continue
            pieces += [text[at : result.start], f"<{result.entity_type}>"]
            at = result.end
            if counts is not None:
                counts[result.entity_type] += 1
        return "".join([*pieces, text[at:]])

    def scrub(text: str, counts: Counter[str] | None = None) -> str:
        return "".join(scrubbed(piece, counts) for piece in _pieces(text))

    return scrub


def _pieces(text: str) -> Iterator[str]:
    """Cuts text after line ends, else after spaces, else anywhere."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        least, most = start + PIECE_CHARS // 2, start + PIECE_CHARS
        end = text.rfind("\n", least, most) + 1 or text.rfind(" ", least, most) + 1 or most
        yield text[start:end]
        start = end
    yield text[start:]
