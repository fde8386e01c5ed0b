"""The report in a real browser: drawn, quiet, self-contained, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.evaluate.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: pip install -e .[browser]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
SUMMARY = Path(__file__).parents[1] / "golden" / "summary.json"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(json.loads(SUMMARY.read_text(encoding="utf-8")), folder)
    return folder / "report.html"


class Seen:
    """An opened page, with whatever it complained of and whatever it asked the network for."""

    def __init__(self, browser: Any, report: Path, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in {"error", "warning"} else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_draws_every_figure_without_a_complaint_or_a_request(browser: Any, report: Path, scheme: str) -> None:
    seen = Seen(browser, report, color_scheme=scheme)
    seen.page.wait_for_function("() => document.querySelectorAll('.figure .main-svg').length > 0")
    seen.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")  # drawn when unfolded
    seen.page.wait_for_function(
        "() => [...document.querySelectorAll('.figure')].every(f => f.querySelector('.main-svg'))"
    )
    assert seen.evaluate("document.querySelectorAll('.figure').length") >= 10
    assert seen.complaints == []
    assert seen.requests == [report.as_uri()]


def test_points_are_drawn_for_each_model_and_set(browser: Any, report: Path) -> None:
    seen = Seen(browser, report)
    assert seen.evaluate("document.querySelectorAll('[data-figure=scores-bits_per_byte] .points .point').length") == 6
    assert seen.evaluate("document.querySelectorAll('[data-figure=scores-bits_per_byte] .errorbar').length") == 6


def contrast(seen: Seen) -> float:
    """Returns the WCAG contrast of body text."""
    return float(
        seen.evaluate(
            """() => {
      const light = (c) => { const p = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2]; };
      const s = getComputedStyle(document.body);
      const [a, b] = [light(s.color), light(s.backgroundColor)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); }"""
        )
    )


def test_dark_and_light_differ_and_can_both_be_read(browser: Any, report: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        seen = Seen(browser, report, color_scheme=scheme)
        assert contrast(seen) > 7
        shades[scheme] = seen.evaluate("getComputedStyle(document.body).backgroundColor")
    assert shades["light"] != shades["dark"]


def test_figures_follow_when_the_theme_changes(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, color_scheme="light")
    ink = "getComputedStyle(document.querySelector('.figure .xtitle')).fill"
    before = seen.evaluate(ink)
    seen.page.emulate_media(color_scheme="dark")
    seen.page.wait_for_function(f"() => {ink} !== '{before}'", timeout=5000)


def test_phone_scrolls_down_but_not_sideways(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, viewport={"width": 375, "height": 700}, is_mobile=True, has_touch=True)
    seen.page.wait_for_function("() => document.querySelectorAll('.figure .main-svg').length > 0")
    assert seen.evaluate("document.documentElement.scrollWidth") <= 375
    widest = (
        "Math.max(...[...document.querySelectorAll('.figure .main-svg')].map(f => f.getBoundingClientRect().right))"
    )
    assert seen.evaluate(widest) <= 375


def point_at_middle(seen: Seen, place: Any) -> dict[str, float]:
    """Points at a figure's middle until it tells a value, as a person would again; returns where its axes lie."""
    for _ in range(30):
        box: dict[str, float] | None = place.locator(".nsewdrag").bounding_box()
        assert box is not None
        seen.page.mouse.move(box["x"] + 5, box["y"] + 5)
        seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        seen.page.wait_for_timeout(300)
        if place.locator(".hoverlayer").text_content():
            return box
    raise AssertionError("the figure tells no value where one points")


def test_curves_zoom_and_tell_their_values_where_one_points(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, viewport={"width": 1200, "height": 900})
    place = seen.page.locator("[data-figure=curve-loss]")
    seen.page.wait_for_function(  # a figure that is drawn later than it is pointed at moves away from the pointer
        "() => [...document.querySelectorAll('.figure')]"
        ".every(f => f.closest('details:not([open])') || f.querySelector('.main-svg'))"
    )
    place.scroll_into_view_if_needed()
    box = point_at_middle(seen, place)
    axis = "document.querySelector('[data-figure=curve-loss]')._fullLayout.xaxis.range"
    low, high = seen.evaluate(axis)
    seen.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=5)
    seen.page.mouse.up()
    seen.page.wait_for_function(f"() => {axis}[1] - {axis}[0] < {(high - low) / 2}")


def test_link_to_a_folded_section_unfolds_it(browser: Any, report: Path) -> None:
    seen = Seen(browser, report)
    assert not seen.evaluate("document.querySelector('#calibration > details').open")
    seen.page.click("nav a[href='#calibration']")
    seen.page.wait_for_function("() => document.querySelector('#calibration > details').open")
    seen.page.wait_for_function("() => document.querySelector('[data-figure^=calibration] .main-svg') !== null")


def test_paper_has_the_folded_parts_too(browser: Any, report: Path) -> None:
    seen = Seen(browser, report)
    assert not seen.evaluate("document.querySelector('details').open")
    seen.page.emulate_media(color_scheme="dark")
    seen.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert seen.evaluate("[...document.querySelectorAll('details.section')].every(d => d.open)")
    shown = "[...document.querySelectorAll('.main-svg')].filter(s => s.checkVisibility())"
    assert seen.evaluate(f"{shown}.length") > 0
    assert seen.evaluate(f"{shown}.every(s => s.getBoundingClientRect().width === 680)"), "no wider than the page"
    inks = "[...document.querySelectorAll('.xtick text')].map(t => getComputedStyle(t).fill)"
    assert set(seen.evaluate(inks)) == {"rgb(0, 0, 0)"}, "dark on white, whatever the screen's scheme"
    seen.page.emulate_media(media="print")
    assert not seen.evaluate("[...document.querySelectorAll('details.numbers')].some(d => d.checkVisibility())")
    assert len(seen.page.pdf()) > 20_000
    seen.page.emulate_media(media="screen")
    seen.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not seen.evaluate("document.querySelector('details').open")
    assert seen.evaluate(f"{shown}.every(s => s.getBoundingClientRect().width !== 680)"), "as wide as the screen wants"


def test_markup_in_a_run_is_shown_as_text(browser: Any, tmp_path: Path) -> None:
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    evil = "</script><script>document.title='owned'</script><b>x</b>"
    summary |= {"experiment": evil, "curves": {evil: summary["curves"]["legal-0"]}}
    for row in summary["scores"]:
        row["model"] = evil if row["model"] == "merged" else row["model"]
    write_report(summary, tmp_path)
    seen = Seen(browser, tmp_path / "report.html")
    assert seen.complaints == []
    assert seen.page.title() == f"{evil} · qlora_dist"
    assert seen.evaluate("document.querySelectorAll('main b').length") == 0
