"""The benchmark for GPUs goes its way on a small shape: both sides train the same rows from the same random base."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "bench_gpu.py"


@pytest.mark.slow
def test_tiny_form_measures_both_sides():
    done = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, check=True)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    rows = [row for row in table if row[0] == "tiny"]
    assert [(row[2], row[3]) for row in rows] == [
        (how, side) for how in ("off", "on") for side in ("the loop", "transformers + peft")
    ]
    losses = [float(row[-1]) for row in rows]
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)
    assert all(float(row[4].split()[0].replace(",", "")) > 0 for row in rows)
