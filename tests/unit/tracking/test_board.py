from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qlora_dist.evaluate.board import main

pytest.importorskip("wandb_workspaces", reason="pip install -e .[board]")


def test_board_has_the_four_sections_with_the_metrics_that_runs_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--entity", "team", "--domains", "legal,code", "--print"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert (spec["entity"], spec["project"]) == ("team", "qlora_dist")
    sections = {s["name"]: json.dumps(s) for s in spec["spec"]["section"]["panelBankConfig"]["sections"]}
    assert list(sections) == ["Training", "Sweep", "Domains", "System"]
    assert all(m in sections["Training"] for m in ("loss", "learning_rate", "tokens_per_s"))
    assert "lora_rank" in sections["Sweep"]
    assert "validation_bits_per_byte" in sections["Sweep"]
    assert all(f"{d}/bits_per_byte" in sections["Domains"] for d in ("legal", "code", "general"))


def test_board_without_a_key_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["--entity", "team"]) == 2
    assert "--print" in capsys.readouterr().err


def test_help_of_the_board_needs_no_wandb() -> None:
    code = "import sys; sys.modules['wandb']=None; from qlora_dist.evaluate.board import main; main(['--help'])"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
