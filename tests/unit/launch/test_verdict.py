from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.launch.drive import GATE_FAILED, _say_verdict
from qlora_dist.pipeline.plan import Plan


def verdict(ship: bool) -> dict[str, Any]:
    reason = {"check": "little forgotten", "passed": ship, "wanted": "at most 0.1", "found": "+0.3000"}
    return {"model": "merged", "ship": ship, "reasons": [reason]}


@pytest.mark.parametrize(
    ("gate", "ship", "code"),
    [("strict", False, GATE_FAILED), ("strict", True, 0), ("report", False, 0)],
)
def test_strict_gate_alone_turns_a_verdict_into_an_exit_code(tmp_path: Path, gate: str, ship: bool, code: int) -> None:
    plan = Plan(experiment="x", root=str(tmp_path), command="", config={"evaluate": {"gate": gate}})
    out = io.StringIO()
    assert _say_verdict(plan, verdict(ship), Console(file=out)) == code
    assert ("verdict  ship" if ship else "verdict  do not ship") in out.getvalue()
    assert "little forgotten: +0.3000" in out.getvalue()


@pytest.mark.parametrize(("gate", "code"), [("strict", GATE_FAILED), ("off", 0)])
def test_strict_gate_does_not_pass_what_nobody_judged(tmp_path: Path, gate: str, code: int) -> None:
    plan = Plan(experiment="x", root=str(tmp_path), command="", config={"evaluate": {"gate": gate}})
    assert _say_verdict(plan, None, Console(file=io.StringIO())) == code
