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
    assert [row["trial"] for row in rows] == ["r8", "r4", "r64"], "what forgets too much comes after what doesn't"
    assert [row["chosen"] for row in rows] == [True, None, None]
    assert rows[0]["interval of that"] is None, "the best is not compared with itself"
    low, high = (float(part) for part in rows[1]["interval of that"].split(" to "))
    assert 0.1 < low < rows[1]["over_best"] < high < 0.3
    forgets = table.columns.index("forgets little enough")
    assert [row[forgets] for row in table.rows] == [True, True, False]
    assert forgets < table.columns.index("validation_bits_per_byte")
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
    figure, (table,) = drawn["sweep-behind-legal-0"], section(swept).tables_of("sweep-behind-legal-0")
    others, chosen = figure["data"]
    assert figure["layout"]["yaxis"]["categoryarray"] == ["r64", "r8", "r4"]
    assert (others["y"], chosen["y"]) == (["r64", "r4"], ["r8"]), "the smaller one is as good, and so chosen"
    assert (others["x"][0], others["error_x"]["array"][0]) == (0.0, 0.0)
    points = {name: (points, i) for points in figure["data"] for i, name in enumerate(points["y"])}
    for name, _, value, low, high in table.rows[1:]:
        drawn_points, i = points[name]
        assert drawn_points["x"][i] - drawn_points["error_x"]["arrayminus"][i] == pytest.approx(low)
        assert drawn_points["x"][i] + drawn_points["error_x"]["array"][i] == pytest.approx(high)
        assert low < value < high
    for figure in drawn.values():
        go.Figure(figure)


def test_a_trial_that_forgets_too_much_has_a_mark_beside_the_best_and_the_legend_says_why(
    swept: dict[str, Any],
) -> None:
    figure = dict(section(swept).figures)["sweep-behind-legal-1"]
    told = {points["name"]: (points["y"], points["marker"]["symbol"]) for points in figure["data"]}
    assert told == {
        "forgets little enough": (["r4"], "circle"),
        "forgets too much": (["r64"], "x"),
        "chosen": (["r8"], "diamond"),
    }
    assert figure["layout"]["showlegend"]
    (table,) = section(swept).tables_of("sweep-behind-legal-1")
    assert {row[0]: row[1] for row in table.rows} == {name: kind for kind, ((name,), _) in told.items()}


def shard(label: str, winner: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What a sweep over rank and alpha came to on one shard; each row has at least `rank`, `alpha` and `value`."""
    trials = [
        {
            "trial": f"r{row['rank']}-a{row['alpha']}", "lora_rank": row["rank"], "lora_alpha": row["alpha"],
            "tokens": 100, "state": "finished", "validation_bits_per_byte": row["value"],
            "forgets_too_much": row.get("refused", False), "forgetting": 0.5 if row.get("refused") else 0.0,
        }
        if row["value"] is not None
        else {
            "trial": f"r{row['rank']}-a{row['alpha']}", "lora_rank": row["rank"], "lora_alpha": row["alpha"],
            "tokens": 10, "state": "stopped at 0",
        }
        for row in rows
    ]  # fmt: skip
    told = {"label": label, "domain": "legal", "winner": winner, "reason": "so.", "trials": trials}
    return told | {"columns": ["lora_rank", "lora_alpha"], **more}


def grid(*values: float | None, refused: int = -1) -> list[dict[str, Any]]:
    cells = [(4, 8), (8, 8), (4, 16), (8, 16)]
    return [
        {"rank": rank, "alpha": alpha, "value": value, "refused": i == refused}
        for i, ((rank, alpha), value) in enumerate(zip(cells, values, strict=True))
    ]


def test_the_map_frames_the_chosen_trial_and_has_a_cross_where_one_forgets_too_much(swept: dict[str, Any]) -> None:
    one = shard("legal-0", "r8-a8", grid(2.5, 2.3, 2.4, 2.1, refused=3))
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": [one]}
    figure = dict(section(swept).figures)["sweep-rank-alpha"]
    (frame,) = figure["layout"]["shapes"]
    assert (frame["x0"], frame["y0"]) == (0.5, -0.5), "rank 8, alpha 8: not the least value, which forgets too much"
    assert figure["data"][0]["text"] == [["2.500", "2.300"], ["2.400", "2.100<br>✗"]]
    assert "✗: forgets too much" in figure["layout"]["title"]["text"]
    (table,) = section(swept).tables_of("sweep-rank-alpha")
    assert table.rows == [["8", 2.5, 2.3], ["16", 2.4, "2.100 ✗"]]
    go.Figure(figure)


def test_of_several_trials_in_a_cell_one_that_is_allowed_is_drawn(swept: dict[str, Any]) -> None:
    one = shard("legal-0", "r8-a8", grid(2.5, 2.3, 2.4, 2.35))
    refused = {**one["trials"][0], "trial": "fast", "validation_bits_per_byte": 1.9, "forgets_too_much": True}
    one["trials"].append(refused)
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": [one]}
    assert dict(section(swept).figures)["sweep-rank-alpha"]["data"][0]["z"][0] == [2.5, 2.3]


def test_means_over_shards_say_where_a_trial_forgets_too_much_and_order_it_after_the_others(
    swept: dict[str, Any],
) -> None:
    shards = [shard("legal-0", "r8-a8", grid(2.5, 2.3, 2.4, 2.1, refused=3))]
    shards += [shard("legal-1", "r8-a16", grid(2.5, 2.3, 2.4, 2.1))]
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": shards}
    _, means, *_ = section(swept).tables_of()
    judged = means.columns.index("forgets little enough")
    assert [(row[0], row[judged]) for row in means.rows] == [
        ("r8-a8", True), ("r4-a16", True), ("r4-a8", True), ("r8-a16", "in 1 of 2 shards"),
    ]  # fmt: skip
    frames = dict(section(swept).figures)["sweep-rank-alpha"]["layout"]["shapes"]
    assert {(frame["x0"], frame["y0"]) for frame in frames} == {(0.5, -0.5), (0.5, 0.5)}, "one was chosen by each shard"


def test_means_are_of_the_shards_of_one_domain(swept: dict[str, Any]) -> None:
    shards = [shard(f"legal-{i}", "r8-a8", grid(2.5, 2.3, 2.4, 2.6)) for i in range(2)]
    shards += [shard("code-0", "r4-a8", grid(1.1, 1.3, 1.4, 1.6), domain="code")]
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": shards}
    tables = {table.caption: table for table in section(swept).tables_of()}
    value = tables["Trials: means over 2 shards of legal"].columns.index("validation_bits_per_byte")
    assert tables["Trials: means over 2 shards of legal"].rows[0][value] == pytest.approx(2.3)
    assert not tables["Trials of code-0"].folded
    assert not [caption for caption in tables if "means over 3" in caption]
    figures = dict(section(swept).figures)
    assert figures["sweep-rank-alpha-legal"]["data"][0]["z"][0] == pytest.approx([2.5, 2.3])
    assert figures["sweep-rank-alpha-code"]["data"][0]["z"][0] == [1.1, 1.3]


def test_what_a_halving_stopped_is_shown_by_its_value_at_its_last_rung(swept: dict[str, Any]) -> None:
    halved = grid(None, 2.3, None, None)
    rungs = [
        {"rung": 0, "trial": "r4-a8", "tokens": 10, "value": 2.9, "forgetting": 0.0, "went_on": False},
        {"rung": 0, "trial": "r8-a8", "tokens": 10, "value": 2.8, "forgetting": 0.0, "went_on": True},
        {"rung": 0, "trial": "r4-a16", "tokens": 10, "value": 2.85, "forgetting": 0.0, "went_on": True},
        {"rung": 1, "trial": "r4-a16", "tokens": 30, "value": 2.6, "forgetting": 0.2, "went_on": False},
        {"rung": 0, "trial": "r8-a16", "tokens": 10, "value": None, "forgetting": None, "went_on": False},
    ]
    swept["config"] = {"sweep": {"max_forgetting": 0.1}}
    one = shard("legal-0", "r8-a8", halved, rungs=rungs)
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": [one]}
    (_, table) = section(swept).tables_of()
    places = [table.columns.index(c) for c in ("validation_bits_per_byte", "measured", "forgets little enough")]
    assert [[row[0], *(row[place] for place in places)] for row in table.rows] == [
        ["r8-a8", 2.3, "at the end", True],
        ["r4-a16", 2.6, "at rung 1", False],
        ["r4-a8", 2.9, "at rung 0", True],
        ["r8-a16", None, None, None],
    ]
    figure = dict(section(swept).figures)["sweep-rank-alpha"]
    assert figure["data"][0]["text"] == [["2.900<br>rung 0", "2.300"], ["2.600<br>✗ rung 1", ""]]
    assert "rung: measured there" in figure["layout"]["title"]["text"]
    assert "the rungs chose who came to the end" in section(swept).text


def test_means_of_a_halving_are_taken_at_the_last_rung_that_a_trial_reached_on_all_shards(
    swept: dict[str, Any],
) -> None:
    def rung(number: int, value: float) -> dict[str, Any]:
        return {"rung": number, "trial": "r4-a8", "tokens": 10, "value": value, "forgetting": 0.0}

    shards = [shard("legal-0", "r4-a8", grid(2.0, 2.3, 2.4, 2.6), rungs=[rung(0, 2.9), rung(1, 2.5)])]
    shards += [shard("legal-1", "r8-a8", grid(None, 2.3, 2.4, 2.6), rungs=[rung(0, 2.7)])]
    swept["sweep"] = {"metric": "validation_bits_per_byte", "trials": [], "shards": shards}
    _, means, *_ = section(swept).tables_of()
    told = dict(zip(means.columns, next(row for row in means.rows if row[0] == "r4-a8"), strict=True))
    assert told["validation_bits_per_byte"] == pytest.approx(2.8), "not of one at its end and one at a rung"
    assert told["measured"] == "at rung 0"


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
