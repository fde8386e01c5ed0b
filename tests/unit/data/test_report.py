"""The report says of a domain's data what its stages found, by source, licence, reason and kind."""

from pathlib import Path

from qlora_dist.config.data import CleanConfig, DomainConfig, Pii, SourceConfig
from qlora_dist.evaluate.data_sections import data
from qlora_dist.evaluate.summary import view

from .conftest import Corpus, sentence


def test_records_are_told_by_source_and_licence_and_personal_data_by_kind(tmp_path: Path) -> None:
    for name, num in (("faq", 30), ("rulings", 20)):
        lines = (f'{{"text": "{sentence(num * 100 + i)} mail a{i}@b.example"}}\n' for i in range(num))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) + "{}\n")
    sources = [SourceConfig(path=str(tmp_path / f"{n}.jsonl"), licence=x) for n, x in (("faq", "MIT"), ("rulings", ""))]
    domain = DomainConfig(sources=sources, clean=CleanConfig(pii=Pii.patterns))
    facts = Corpus(tmp_path / "made", domain).records().splits().facts["splits"]
    config = {"domain": {"law": {"sources": [{"path": source.path} for source in sources]}}}
    section = data(view({"config": config, "nodes": [{"stage": "splits", "label": "law", "facts": facts}]}))
    assert section is not None
    tables = {table.caption: list(table.rows) for table in section.tables}
    assert tables["Personal data replaced"] == [["law", "EMAIL", 50]]
    assert tables["Not trained on, by reason"] == [["law", "read", "unknown fields", 2]]
    origins = {(by, name): counts for _, by, name, *counts in tables["Where records come from"]}
    assert {origin: sum(counts) for origin, counts in origins.items()} == {
        ("source", sources[0].path): 30,
        ("source", sources[1].path): 20,
        ("licence", "MIT"): 30,
    }
    assert [sum(counts) for counts in zip(*(origins["source", s.path] for s in sources), strict=True)] == [
        facts["splits"][part]["records"] for part in ("train", "validation", "test")
    ]


def test_a_run_that_lost_its_config_still_tells_its_sources_by_number() -> None:
    facts = {"splits": {"train": {"records": 3, "source 1": 3}, "test": "odd"}, "replaced": None}
    section = data(view({"nodes": [{"stage": "splits", "label": "law", "facts": facts}]}))
    assert section is not None
    [origins] = [table for table in section.tables if table.caption == "Where records come from"]
    assert origins.rows == [["law", "source", "1", 3, 0, 0]]
