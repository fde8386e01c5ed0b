"""A corpus in files, taken through the stages as the planner would; and tokenizers small enough to read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.data import DomainConfig, RenderConfig, SourceConfig
from qlora_dist.config.stages import RecordsConfig, RowsConfig, ShardsConfig, SplitsConfig
from qlora_dist.data.record import Record, read_records
from qlora_dist.data.records import write_records
from qlora_dist.data.rows import Rows, write_rows
from qlora_dist.data.shards import write_shards
from qlora_dist.data.sources import plan_parts
from qlora_dist.data.splits import write_splits

TOPICS = ("contract", "tenant", "landlord", "notice", "court", "appeal", "verdict", "statute", "clause", "penalty")


def sentence(number: int, num_words: int = 30) -> str:
    """A text of its own for each number: no two share a run of words."""
    words = [TOPICS[(number * 7 + i * i) % len(TOPICS)] + str(number * 1000 + i) for i in range(num_words)]
    return " ".join(words)


@dataclass
class Corpus:
    """One domain on its way through the stages; each step keeps its facts."""

    folder: Path
    domain: DomainConfig
    name: str = "law"
    facts: dict[str, Any] = field(default_factory=dict)

    def out(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def records(self) -> "Corpus":
        for part, files in enumerate(plan_parts(self.domain)):
            config = RecordsConfig(domain=self.name, source=self.domain, files=files, part=part)
            self.facts[f"records-{part}"] = write_records(config, {}, self.out(f"records-{part}"))
        return self

    def parts(self) -> dict[str, Path]:
        return {p.name: p for p in sorted(self.folder.glob("records-*"))}

    def splits(self) -> "Corpus":
        config = SplitsConfig(domain=self.name, split=self.domain.split, max_reject_share=self.domain.max_reject_share)
        self.facts["splits"] = write_splits(config, self.parts(), self.out("splits"))
        return self

    def shards(self, tokenizer: Path | None = None) -> "Corpus":
        config = ShardsConfig(domain=self.name, num_shards=self.domain.num_shards, shard_mode=self.domain.shard_mode)
        inputs = {"splits": self.folder / "splits"} | ({"tokenizer": tokenizer} if tokenizer else {})
        self.facts["shards"] = write_shards(config, inputs, self.out("shards"))
        return self

    def rows(self, tokenizer: Path, shard: int = -1, split: str = "train", row_tokens: int = 64, **render: Any) -> Rows:
        name = f"rows-{split}-{shard}"
        config = RowsConfig(split=split, shard=shard, row_tokens=row_tokens, render=RenderConfig(**render))
        source = "shards" if shard >= 0 else "splits"
        inputs = {"tokenizer": tokenizer, source: self.folder / source}
        self.facts[name] = write_rows(config, inputs, self.out(name))
        return Rows.open(self.folder / name)

    def read(self, split: str) -> list[Record]:
        return list(read_records(self.folder / "splits" / f"{split}.jsonl"))

    def rejects(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / stage / "rejects.jsonl").read_bytes().splitlines()]


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Makes a corpus of raw examples (a list for each file), written as JSON lines."""

    def make(*files: Sequence[Any], name: str = "law", source: dict[str, Any] | None = None, **domain: Any) -> Corpus:
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for i, examples in enumerate(files):
            lines = (e if isinstance(e, str) else json.dumps(e) for e in examples)
            (folder / f"{i:03}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        sources = [SourceConfig(path=str(folder), **(source or {}))]
        return Corpus(tmp_path / name, DomainConfig(sources=sources, **domain))

    return make


def save_tokenizer(
    folder: Path,
    specials: Sequence[str] = ("<s>", "</s>"),
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    template: str = "",
    vocab_size: int | None = None,
) -> Path:
    """Saves a byte-level tokenizer with these special tokens as a model's folder would hold it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": bos, "eos_token": eos, "chat_template": template or None}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in told.items() if v}))
    size = vocab_size or len(alphabet) + len(specials)
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are bytes, with <s> and </s>, without a chat template."""
    return save_tokenizer(tmp_path / "tokenizer")
