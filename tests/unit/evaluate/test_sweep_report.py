"""What the report says of a sweep: who is chosen and why, each trial beside the best, and all of them in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig
from qlora_dist.evaluate.page import Section
from qlora_dist.evaluate.report import write_report
from qlora_dist.evaluate.sections import report_sections
from qlora_dist.evaluate.summary import view
from qlora_dist.evaluate.trials import choose_among
from qlora_dist.pipeline.swept import sweep_summary
from qlora_dist.pipeline.winner import write_verdict

from .test_trials import documents

LEVELS = {"r4": 1.6, "r8": 1.40, "r64": 1.401}
RANKS = {"r4": 4, "r8": 8, "r64": 64}


def verdict(folder: Path, *, seed: int, general: dict[str, float]) -> Path:
    """Writes what a shard's sweep came to, as stages `winner` and `halved` do."""
    folder.mkdir()
    trials = [TrialConfig(name=name, lora=LoraConfig(lora_rank=rank)) for name, rank in RANKS.items()]
    found = {
        name: documents(level, noise=0.05, seed=seed + i, general=general.get(name, 1.0))
        for i, (name, level) in enumerate(LEVELS.items())
    }
    told = choose_among(trials, found, documents(2.0), "legal", 0.1)
    told["trials"] = [row | {"state": "finished", "tokens": 4096} for row in told["trials"]]
    rungs = [
        {"rung": rung, "trial": name, "tokens": tokens, "value": level + 1 / tokens, "forgetting": 0, "went_on": True}
        for rung, tokens in enumerate((512, 1536))
        for name, level in LEVELS.items()
    ]
    write_verdict(folder, "legal", trials, told | {"rungs": rungs, "grid_tokens": 36864})
    return folder


@pytest.fixture
def swept(summary: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of two shards, on the second of which r64 forgets too much."""
    folders = {
        "legal-0": verdict(tmp_path / "0", seed=1, general={}),
        "legal-1": verdict(tmp_path / "1", seed=11, general={"r64": 1.5}),
    }
    curve = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    curves = {"tiny": curve} | {f"{label}.{name}": curve for label in folders for name in RANKS}
    summary["nodes"].append({"stage": "tiny", "label": "tiny", "key": "t1", "state": "done", "facts": {"tokens": 8}})
    return {**summary, "sweep": sweep_summary(folders), "curves": curves}


def section(summary: dict[str, Any], title: str = "Sweep") -> Section:
    (found,) = [s for s in report_sections(view(summary)) if s.title == title]
    return found


def test_the_chosen_trial_and_the_reason_stand_first_and_each_shard_has_its_table_folded(
    swept: dict[str, Any],
) -> None:
    why, means, *by_shard = section(swept).tables_of()
    assert (why.caption, why.columns) == ("Chosen", ["shard", "trial", "why"])
    assert [row[:2] for row in why.rows] == [["legal-0", "r8"], ["legal-1", "r8"]]
    assert "fewest bits per byte" in why.rows[0][2]
    assert (means.caption, means.folded) == ("Trials: means over 2 shards", False)
    assert [(t.caption, t.folded) for t in by_shard] == [("Trials of legal-0", True), ("Trials of legal-1", True)]
    assert "24,576 tokens were trained, 33% of the 73,728" in section(swept).text


def test_trials_stand_best_first_with_their_intervals_as_a_person_reads_them(swept: dict[str, Any]) -> None:
    (_, _, *_, table) = section(swept).tables_of()
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["trial"] for row in rows] == sorted(LEVELS, key=lambda name: LEVELS[name])
    assert [row["chosen"] for row in rows] == [True, None, None]
    assert rows[0]["interval of that"] is None, "the best is not compared with itself"
    low, high = (float(part) for part in rows[2]["interval of that"].split(" to "))
    assert 0.1 < low < rows[2]["over_best"] < high < 0.3
    forgets = table.columns.index("forgets little enough")
    assert [row[forgets] for row in table.rows] == [True, False, True]
    assert table.is_judged(forgets)
    assert not table.is_judged(table.columns.index("chosen"))
    assert not {"low", "high", "over_best_low", "p_holm", "forgets_too_much"} & set(table.columns)


def test_trials_that_were_stopped_come_last_whoever_came_furthest_first_and_no_column_is_empty(
    swept: dict[str, Any],
) -> None:
    settings = {"lora_rank": 4, "learning_rate": 1e-3}
    stopped = [
        {"trial": f"s{tokens}", **settings, "tokens": tokens, "state": "stopped at 0", "over_best": None}
        for tokens in (512, 2048, 1024)
    ]
    ended = {"trial": "end", **settings, "tokens": 4096, "state": "finished", "validation_bits_per_byte": 2.0}
    shard = {"label": "legal-0", "winner": "end", "trials": [*stopped, ended]}
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": [shard]}
    (_, table) = section(swept).tables_of()
    assert [row[0] for row in table.rows] == ["end", "s2048", "s1024", "s512"]
    assert "over_best" not in table.columns


def test_each_trial_is_drawn_beside_the_best_with_its_paired_interval(swept: dict[str, Any]) -> None:
    drawn = dict(section(swept).figures)
    assert list(drawn) == ["sweep-behind-legal-0", "sweep-rungs-legal-0", "sweep-behind-legal-1", "sweep-rungs-legal-1"]
    (points,), (table,) = drawn["sweep-behind-legal-0"]["data"], section(swept).tables_of("sweep-behind-legal-0")
    assert points["x"] == sorted(points["x"])
    assert points["y"] == ["r64", "r8", "r4"]
    assert (points["x"][0], points["error_x"]["array"][0]) == (0.0, 0.0)
    assert points["marker"]["symbol"] == ["circle", "diamond", "circle"], "the smaller one is as good, and so chosen"
    for i, (_, value, low, high) in enumerate(table.rows[1:], start=1):
        assert points["x"][i] - points["error_x"]["arrayminus"][i] == pytest.approx(low)
        assert points["x"][i] + points["error_x"]["array"][i] == pytest.approx(high)
        assert low < value < high
    for figure in drawn.values():
        go.Figure(figure)


def test_curves_of_the_chosen_trials_have_colour_and_the_bases_are_apart(swept: dict[str, Any]) -> None:
    (_, figure), *_ = section(swept, "Training").figures
    told = {line["name"]: line for line in figure["data"]}
    assert "tiny" not in told
    assert list(told)[-2:] == ["legal-0.r8", "legal-1.r8"], "they are drawn last, and so lie on top"
    assert [name for name, line in told.items() if line["showlegend"]] == ["legal-0.r8", "legal-1.r8"]
    assert told["legal-0.r8"]["line"]["color"] != told["legal-1.r8"]["line"]["color"]
    assert len({line["line"]["color"] for name, line in told.items() if not name.endswith("r8")}) == 1
    (_, base), *_ = section(swept, "Pre-training of the base").figures
    assert [line["name"] for line in base["data"]] == ["tiny"]
    go.Figure(figure)


def test_page_and_markdown_hold_every_trial_of_every_shard(swept: dict[str, Any], tmp_path: Path) -> None:
    write_report(swept, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in RANKS:
        assert markdown.count(f"\n| {name} |") >= 5, "means, two shards, and beside the best of two shards"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<summary>Trials of legal-") == 2
