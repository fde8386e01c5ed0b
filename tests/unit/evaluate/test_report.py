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

from qlora_dist.evaluate.report import score_table, write_report
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
    assert {s.title for s in sections} == {"Scores", "Against the base", "Training", "Merge"}
    for section in sections:
        assert len(section.tables) >= len(section.figures)
        for _, figure in section.figures:
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
    (table, mapped), ((name, figure),) = section.tables, section.figures
    assert name == mapped.of == "sweep-rank-alpha"
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
