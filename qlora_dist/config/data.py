"""Where a domain's records come from, how they are cleaned and split, and how they become packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qlora_dist.config.fields import execution, setting
from qlora_dist.errors import bad_value


class Kind(Enum):
    """What a raw example is; `auto` tells it by its fields."""

    auto = "auto"
    text = "text"
    instruction = "instruction"
    rag = "rag"
    chat = "chat"
    preference = "preference"
    classification = "classification"


class Use(Enum):
    """Which split a source's records go to: the one that chance gives each (`auto`), or all to one."""

    auto = "auto"
    train = "train"
    validation = "validation"
    test = "test"


class ShardMode(Enum):
    """How a domain's training records are dealt to its shards."""

    iid = "iid"
    by_source = "by_source"
    stratified = "stratified"


class Deduplicate(Enum):
    """Which copies of a record are dropped."""

    none = "none"
    exact = "exact"
    near = "near"


class Pii(Enum):
    """How personal data are found: not at all, by patterns with checksums, or by those and presidio."""

    none = "none"
    patterns = "patterns"
    presidio = "presidio"


class TrainOn(Enum):
    """Which tokens of a conversation are trained: the assistant's, or all."""

    completion = "completion"
    all = "all"


class LongRecords(Enum):
    """What becomes of a record longer than a row: split over several segments, or dropped and counted."""

    split = "split"
    drop = "drop"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One place records come from: a file, a folder, a glob, a Hugging Face dataset id, or `installed:<corpus>`.

    `fields` maps the names that a kind wants to the source's own columns, e.g. `{response: answer}`. Running text is
    divided at blank lines into passages of at least `passage_chars`, each a record (0: the text is one record).
    `use` sets a source aside: a test set of your own (`use: test`), or generated text that must not be held out
    (`use: train`). `subset`, `split` and `revision` are for hub datasets. `licence` is carried to the rows and the
    manifest; a record's own (its column `licence` or `license`) goes before it.
    """

    path: str = execution("???")
    weight: float = setting(1.0, above=0, at_most=100)
    kind: Kind = setting(Kind.auto)
    fields: dict[str, str] = setting(dict)
    passage_chars: int = setting(0, at_least=0)
    use: Use = setting(Use.auto)
    licence: str = ""
    subset: str = execution("")
    split: str = execution("train")
    revision: str = execution("")


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """What is done to a record's text, and between which bounds it is kept.

    `pii_language` and `pii_model` (a spaCy model) are presidio's.
    """

    normalize: bool = True
    pii: Pii = setting(Pii.none)
    pii_language: str = "en"
    pii_model: str = "en_core_web_lg"
    min_chars: int = setting(1, at_least=1)
    max_chars: int = setting(10_000_000, at_least=1)
    min_word_share: float = setting(0.0, at_least=0, at_most=1)
    max_repeat_share: float = setting(1.0, above=0, at_most=1)

    def check(self, key: str) -> None:
        """Refuses bounds that nothing fits between."""
        if self.max_chars < self.min_chars:
            raise bad_value(f"{key}.max_chars", self.max_chars, f"at least {key}.min_chars = {self.min_chars}")


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How a domain's records are divided into train, validation and test.

    A training record is *contaminated* when it holds `contamination_share` of the 13-word sequences of a held-out
    prompt or answer.
    """

    validation_share: float = setting(0.08, at_least=0, below=1)
    test_share: float = setting(0.08, at_least=0, below=1)
    deduplicate: Deduplicate = setting(Deduplicate.near)
    near_threshold: float = setting(0.8, at_least=0.3, at_most=1)
    contamination_share: float = setting(0.5, above=0, at_most=1)
    drop_contaminated: bool = True

    def check(self, key: str) -> None:
        """Refuses held-out shares that leave nothing to train on."""
        if self.validation_share + self.test_share >= 1:
            raise bad_value(f"{key}.test_share", self.test_share, f"less than 1 - {key}.validation_share")


@dataclass(kw_only=True, slots=True)
class RenderConfig:
    """How a record becomes tokens.

    `chat_template` is Jinja text or the name of a file that holds it; empty, it means the model's own, or the plain
    one of `data.templates`.
    """

    chat_template: str = ""
    train_on: TrainOn = setting(TrainOn.completion)
    long_records: LongRecords = setting(LongRecords.split)
    overlap_tokens: int = setting(0, at_least=0)

    def check(self, key: str) -> None:
        """Puts a template file's text in place of its name: data are known by their bytes.

        Raises:
            ConfigError: if it is neither Jinja nor a file.
        """
        if self.chat_template and "{" not in self.chat_template:
            path = Path(self.chat_template).expanduser()
            if not path.is_file():
                raise bad_value(f"{key}.chat_template", self.chat_template, "a Jinja chat template, or a file of one")
            self.chat_template = path.read_text(encoding="utf-8")


@dataclass(kw_only=True, slots=True)
class DomainConfig:
    """One subject: its corpus, how it is cleaned, split, sharded and rendered.

    Only `sources` and `clean` decide what stage `records` makes; the other fields reach the stages that read them in
    configs of their own, and so stay out of its key.

    `terms` are the domain's own words and phrases, by which its scores count what a model knows to say; an entry that
    ends in `.txt` is a file with one a line. Without any, they are found in the training text by the rule of
    `evaluate.terms`.
    """

    sources: list[SourceConfig] = setting(list)
    clean: CleanConfig = setting(CleanConfig)
    max_reject_share: float = execution(0.05, at_least=0, at_most=1)
    part_bytes: int = execution(256 * 2**20, at_least=2**16)
    split: SplitConfig = execution(SplitConfig)
    num_shards: int = execution(2, at_least=1, at_most=100_000)
    shard_mode: ShardMode = execution(ShardMode.iid)
    shard_weight: float = execution(1.0, above=0)
    render: RenderConfig = execution(RenderConfig)
    terms: list[str] = execution(list)

    def check(self, key: str) -> None:
        """Refuses a domain without sources; puts the lines of a term file in place of its name.

        Raises:
            ConfigError: if there is no source, or a term file can't be read.
        """
        if not self.sources:
            raise bad_value(
                f"{key}.sources", self.sources, "at least one source", f"Set {key}.sources=[{{path: DIR}}]."
            )
        self.terms = [term for entry in self.terms for term in _terms(f"{key}.terms", entry)]


def _terms(key: str, entry: str) -> list[str]:
    if not entry.endswith(".txt"):
        return [entry]
    path = Path(entry).expanduser()
    if not path.is_file():
        raise bad_value(key, entry, "a term, or a text file with one a line")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
