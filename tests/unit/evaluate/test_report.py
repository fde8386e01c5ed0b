from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora_dist.evaluate.figures import heat_map
from qlora_dist.evaluate.report import difference_table, score_table, write_report
from qlora_dist.evaluate.sections import report_sections
from qlora_dist.evaluate.summary import view


class Links(HTMLParser):
    """Collects whatever a browser would fetch, and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self._raw = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._raw += tag in {"script", "style"}
        self.fetched += [str(v) for k, v in attrs if k in {"src", "href"} and not str(v).startswith(("#", "data:"))]

    def handle_endtag(self, tag: str) -> None:
        self._raw -= tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text.append(data)


def render(summary: dict[str, Any], folder: Path) -> Links:
    write_report(summary, folder)
    page = Links()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    return page


def test_report_is_one_file_that_fetches_nothing(summary: dict[str, Any], tmp_path: Path) -> None:
    assert render(summary, tmp_path).fetched == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_report_shows_scores_use_command_certificate_and_config(summary: dict[str, Any], tmp_path: Path) -> None:
    text = " ".join(render(summary, tmp_path).text)
    for wanted in (
        "merged",
        "2.4",
        "do not ship (little forgotten)",
        "-0.8",
        summary["use"],
        "trained share",
        "lora.lora_rank",
        "123,456",
        "0123abc",
    ):
        assert wanted in text, wanted


def test_markdown_says_the_same_numbers_as_html(summary: dict[str, Any], tmp_path: Path) -> None:
    html = " ".join(render(summary, tmp_path).text)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [
        c.strip().replace("\\|", "|") for line in lines if line.startswith("| ") for c in line.strip("|").split(" | ")
    ]
    assert len(cells) > 100
    assert [c for c in cells if re.search(r"\d", c) and c not in html] == []


def test_every_markdown_table_is_rectangular(summary: dict[str, Any], tmp_path: Path) -> None:
    write_report(summary, tmp_path)
    blocks = re.findall(r"(?:^\|.*\n)+", (tmp_path / "report.md").read_text(encoding="utf-8"), re.M)
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_every_figure_is_one_that_plotly_accepts_and_has_a_table(summary: dict[str, Any]) -> None:
    sections = [s for s in report_sections(view(summary)) if s.figures]
    drawn = {"Scores", "Against the base", "Calibration", "Sweep", "Training", "Merge", "Data", "Lineage"}
    assert {s.title for s in sections} == drawn
    for section in sections:
        for name, figure in section.figures:
            assert section.tables_of(name), name
            go.Figure(figure)


def test_text_from_a_run_cannot_become_markup(summary: dict[str, Any], tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>|"
    summary["experiment"] = summary["nodes"][1]["label"] = evil
    summary["curves"] = {evil: summary["curves"]["legal-0"]}
    summary["nodes"][0] |= {"state": "failed", "error": evil}
    page = render(summary, tmp_path)
    assert page.fetched == []
    assert any(evil in text for text in page.text)
    assert "<img" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_failed_run_names_node_reason_and_log_first(summary: dict[str, Any], tmp_path: Path) -> None:
    summary |= {"state": "failed", "adapter": None, "scores": [], "curves": {}, "use": ""}
    summary["nodes"][1] |= {
        "state": "failed",
        "error": "out of memory",
        "log": "logs/adapter-legal-0.log",
        "facts": None,
    }
    text = " ".join(render(summary, tmp_path).text)
    assert text.index("out of memory") < text.index("Config")
    assert "logs/adapter-legal-0.log" in text
    assert "No adapter was shipped" in text


def test_numbers_the_page_draws_are_those_of_the_summary(summary: dict[str, Any], tmp_path: Path) -> None:
    write_report(summary, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="figures">(.*?)</script>', html, re.S)
    assert found
    bars = json.loads(found[1])["scores-bits_per_byte"]["data"]
    assert {b["name"]: b["y"] for b in bars} == {"base": [3.2, 3.2], "legal-0": [2.6, 2.6], "merged": [2.4, 2.4]}
    assert bars[0]["error_y"]["array"] == pytest.approx([0.1, 0.1])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_report_survives_any_part_that_is_absent_or_odd(summary: dict[str, Any], data: st.DataObject) -> None:
    """A report about a broken run is needed most: whichever value is missing or of another form, sections come out."""
    broken = copy.deepcopy(summary)
    odd = st.sampled_from([None, [], {}, 0, float("nan"), "", "x"])
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = broken
        key = data.draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place)))
        if key == "nodes" and place[key]:
            place = data.draw(st.sampled_from(place[key]))
            key = data.draw(st.sampled_from(sorted(place)))
            if key == "facts" and place[key]:
                place = place[key]
                key = data.draw(st.sampled_from(sorted(place)))
        place[key] = data.draw(odd)
    assert report_sections(view(broken))[0].title == "Outcome"


def test_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    assert "Outcome" in render({}, tmp_path).text


def test_score_table_has_a_row_a_model_and_says_the_interval(summary: dict[str, Any]) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    console.print(score_table(summary))
    text = console.export_text()
    assert [line.split()[1] for line in text.splitlines() if "±" in line] == ["base", "legal-0", "merged"]
    assert "2.400 ±0.100" in text


def test_examples_mark_the_words_that_differ_from_the_reference(summary: dict[str, Any], tmp_path: Path) -> None:
    write_report(summary, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    same, absent, added = "the licensee pays", "the", "a"
    wanted = f'<span class="same">{same}</span> <span class="absent">{absent}</span> <span class="added">{added}</span>'
    assert wanted in html
    assert "| merged | the licensee pays a fee |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_energy_kept_by_rank_adds_up_the_spectrum(summary: dict[str, Any], tmp_path: Path) -> None:
    write_report(summary, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 1 | 0.6 |" in text
    assert "| 2 | 0.85 |" in text
    assert "| 4 | 1 |" in text


def trials() -> list[dict[str, Any]]:
    grid = [(4, 8, 1e-3, 2.5), (4, 16, 1e-3, 2.4), (8, 8, 1e-3, 2.3), (8, 8, 1e-4, 2.1), (8, 16, 1e-3, 2.6)]
    keys = ("lora_rank", "lora_alpha", "learning_rate", "validation_loss")
    return [{"label": f"t{i}", **dict(zip(keys, values, strict=True))} for i, values in enumerate(grid)]


def test_trials_of_a_sweep_are_a_table_and_a_map_of_rank_by_alpha_with_the_best_framed(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    summary["sweep"] = {"trials": trials()}
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Sweep"]
    (table, map_table), ((name, figure),) = section.tables, section.figures
    assert name == map_table.of == "sweep-rank-alpha"
    assert map_table.rows == [["8", 2.5, 2.1], ["16", 2.4, 2.6]]
    assert table.columns == ["trial", "lora_rank", "lora_alpha", "learning_rate", "validation_loss"]
    assert len(table.rows) == 5
    (cells,) = figure["data"]
    assert (cells["x"], cells["y"]) == (["4", "8"], ["8", "16"])
    assert cells["z"] == [[2.5, 2.1], [2.4, 2.6]], "of two learning rates the better one"
    (frame,) = figure["layout"]["shapes"]
    assert (frame["x0"], frame["x1"], frame["y0"], frame["y1"]) == (0.5, 1.5, -0.5, 0.5)
    go.Figure(figure)
    assert "| t3 | 8 | 8 | 0.0001 | 2.1 |" in (render(summary, tmp_path), (tmp_path / "report.md").read_text())[1]


def test_sweep_over_one_setting_has_a_table_and_no_map(summary: dict[str, Any]) -> None:
    summary["sweep"] = {"trials": [t for t in trials() if t["lora_alpha"] == 8]}
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Sweep"]
    assert section.tables
    assert section.figures == []


def test_sealed_test_that_was_read_before_is_said_first_and_once_read_is_said_too(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    text = " ".join(render(summary, tmp_path).text)
    assert "The sealed test had been read for other choices (1) before this one: see the notes." in text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markdown.index("## Outcome") < markdown.index(f"> {summary['notes'][0]}") < markdown.index("## Scores")
    summary["sealed"][0]["before"] = []
    assert "read once, for this choice alone" in " ".join(render(summary, tmp_path).text)


def test_lineage_draws_each_artifact_once_and_no_line_that_only_shortens_a_longer_way(summary: dict[str, Any]) -> None:
    summary["nodes"][-1]["inputs"]["splits-legal"] = "splits/legal-d4"  # it reads the rows of these splits as well
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Lineage"]
    ((_, figure),), (table,) = section.figures, section.tables
    _, points = figure["data"]
    assert sorted(points["text"]) == sorted(row[0] for row in table.rows)
    assert len(points["text"]) == len(summary["nodes"])
    assert lines_drawn(figure) == {
        ("records/legal-0", "splits/legal"),
        ("splits/legal", "rows/legal-0"),
        ("rows/legal-0", "adapter/legal-0"),
        ("adapter/legal-0", "merged/all"),
        ("rows/legal-0", "scores/base"),
        ("merged/all", "scores/merged"),
    }
    assert ["scores/merged", "f1", ["rows/legal-0", "merged/all", "splits/legal"], "done", 2.0] in table.rows


def lines_drawn(figure: dict[str, Any]) -> set[tuple[str, str]]:
    edges, points = figure["data"]
    place = dict(zip(points["y"], points["text"], strict=True))
    ends = [place[y] for y in edges["y"] if y is not None]
    return set(zip(ends[::2], ends[1::2], strict=True))


def test_lineage_of_many_adapters_draws_them_as_one_and_all_else_by_name(summary: dict[str, Any]) -> None:
    adapter = summary["nodes"][3]
    summary["nodes"] += [{**adapter, "label": f"legal-{i}", "key": f"k{i}"} for i in range(1, 90)]
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Lineage"]
    ((_, figure),) = section.figures
    assert {("rows/legal-0", "adapter × 90"), ("adapter × 90", "merged/all")} <= lines_drawn(figure)
    assert len(section.tables[0].rows) == len(summary["nodes"])


def test_lineage_of_hundreds_of_stages_nodes_is_drawn_by_stage(summary: dict[str, Any]) -> None:
    row = summary["nodes"][2]
    for i in range(12):
        more = [{**row, "stage": f"stage{i}", "label": str(j), "key": f"{i}-{j}"} for j in range(6)]
        summary["nodes"] += more
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Lineage"]
    ((_, figure),) = section.figures
    assert {f"stage{i} × 6" for i in range(12)} <= set(figure["data"][1]["text"])


def test_lineage_finds_a_trial_by_its_artifact_which_bears_its_shards_label(summary: dict[str, Any]) -> None:
    trial = {"stage": "adapter", "label": "legal-0.r8", "key": "t8", "artifact": "adapter/legal-0-t8", "state": "done"}
    summary["nodes"] += [{**trial, "inputs": {"rows": "rows/legal-0-a5"}}]
    summary["nodes"] += [{"stage": "winner", "label": "legal-0", "key": "w", "inputs": {"a": "adapter/legal-0-t8"}}]
    summary["nodes"][2] |= {"artifact": "rows/legal-0-a5"}
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Lineage"]
    assert ("adapter/legal-0.r8", "winner/legal-0") in lines_drawn(section.figures[0][1])
    assert ["winner/legal-0", "w", ["adapter/legal-0.r8"], "", None] in section.tables[0].rows


def test_many_certificates_are_counted_together_and_who_failed_is_named(summary: dict[str, Any]) -> None:
    def node(number: int, *, passed: bool) -> dict[str, Any]:
        checks = [{"check": "tensors move", "passed": passed, "found": f"{number} of 4"}]
        return {"stage": "adapter", "label": f"legal-{number}", "key": str(number), "facts": {"certificate": checks}}

    summary["nodes"] = [node(number, passed=number != 3) for number in range(5)]
    (section,) = [s for s in report_sections(view(summary)) if s.title == "Certificate"]
    together, *each = section.tables
    assert together.rows == [["tensors move", "0 of 4 (and 4 more)", False, "4 of 5, not legal-3"]]
    assert together.is_judged(together.columns.index("passed"))
    assert [(t.caption, t.folded) for t in each] == [(f"legal-{number}", True) for number in range(5)]


def test_what_a_run_was_made_for_stands_before_what_it_may_have_forgotten(summary: dict[str, Any]) -> None:
    summary["scores"] = sorted(summary["scores"], key=lambda row: str(row["domain"]))
    assert summary["scores"][0]["domain"] == "general"
    domains = [row["domain"] for row in view(summary).scores]
    assert domains == sorted(domains, key=lambda domain: domain == "general")


def test_cells_of_a_map_have_digits_enough_to_be_told_apart() -> None:
    def texts(*values: float | None) -> list[str]:
        return list(heat_map([values], [str(i) for i in range(len(values))], ["row"], "")["data"][0]["text"][0])

    assert texts(2.9261, 2.9263, None) == ["2.926100", "2.926300", ""]
    assert texts(1.0, 0.31) == ["1.000", "0.310"]
    assert texts(120.0, 480.0) == ["120", "480"]
    assert texts(None) == [""]


def test_data_cost_and_form_are_counted(summary: dict[str, Any], tmp_path: Path) -> None:
    render(summary, tmp_path)
    lines = [line.strip() for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()]
    for wanted in (
        "| legal | 180 | 130 | 19 | 20 | 11 | 2 | 1 | instruction 180 |",
        "| legal | read | empty | 2 |",
        "| legal-0 | packed | longer than a row | 3 |",
        "| legal-0 | 130 | 12 | 50 | 110 | 180 | 240 |",
        "| base | legal | cut off | 3 |",
        f"| adapter | 1 | 61 | {61 * 2 / 3600:.4g} | 123,456 | – |",
    ):
        assert wanted in lines, wanted


def test_terminal_says_what_moved_with_interval_p_value_and_what_was_detectable(summary: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    console.print(difference_table(summary))
    (line,) = [line for line in console.export_text().splitlines() if "legal" in line and "bits" in line]
    cells = re.split(r"\s{2,}", line.strip())
    assert cells == ["legal", "bits per byte", "-0.800 (-0.900 to -0.700)", "0.002", "0.14", "12"]
    assert difference_table({}) is None
