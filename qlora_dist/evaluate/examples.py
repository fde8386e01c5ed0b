"""Answers side by side: the same question, the reference, and what each model said, with the differences marked."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from qlora_dist.evaluate.answers import read_answers

MAX_EXAMPLES = 5
MAX_CHARS = 600
MIN_SHARED = 0.3


class Marked(str):
    """Text whose words are marked as `same`, `added` (not in the reference) or `absent` (only there)."""

    parts: list[tuple[str, str]]

    def __new__(cls, text: str, parts: list[tuple[str, str]]) -> Marked:
        """Makes the text, with its parts beside it."""
        made = super().__new__(cls, text)
        made.parts = parts
        return made


def collect_examples(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Returns the first questions of each domain, `{"domain", "prompt", "reference", "answers": {model: text}}`."""
    answers = {model: read_answers(folder) for model, folder in folders.items()}
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for answer in (a for of_model in answers.values() for a in of_model):
        if sum(domain == answer.domain for domain, _ in chosen) < MAX_EXAMPLES:
            said = {"domain": answer.domain, "prompt": answer.prompt[:MAX_CHARS], "answers": {}}
            chosen.setdefault((answer.domain, answer.record), {**said, "reference": answer.reference[:MAX_CHARS]})
    for model, of_model in answers.items():
        for answer in of_model:
            if example := chosen.get((answer.domain, answer.record)):
                example["answers"][model] = answer.answer[:MAX_CHARS]
    return list(chosen.values())


def mark(answer: str, reference: str) -> Marked:
    """Returns the answer with its words compared to the reference's; where little is shared, nothing is marked."""
    ours, theirs = answer.split(), reference.split()
    matcher = SequenceMatcher(a=theirs, b=ours, autojunk=False)
    if matcher.ratio() < MIN_SHARED:
        return Marked(answer, [("same", answer or "(nothing)")])
    parts: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind in {"delete", "replace"}:
            parts.append(("absent", " ".join(theirs[a:b])))
        if kind in {"insert", "replace"}:
            parts.append(("added", " ".join(ours[c:d])))
        if kind == "equal":
            parts.append(("same", " ".join(ours[c:d])))
    return Marked(answer, parts)
