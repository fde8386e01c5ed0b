"""Merge methods on four real shards: gain on legal and code text, and what was forgotten, on development data.

`python benchmarks/bench_methods.py` runs two plans over the same shards of the embedded base (`merge=referee` with all
methods, and `merge=periodic`) and writes benchmarks/results/methods.md. `--root DIR` keeps what was trained.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "methods.md"
METHODS = ("concat", "svd", "ties", "dare", "tsv", "iso", "knots_ties", "linear_ab", "regmean", "learned")
SCALES = (1.0, 1.5)
RECIPE = (
    "domain=[legal,code]",
    "model=tiny",
    "train=tiny",
    "strategy=ddp",
    "domain.legal.num_shards=2",
    "domain.code.num_shards=2",
    "tracking=none",
)


def launch(root: str, name: str, *overrides: str) -> dict[str, Any]:
    """Runs one plan and returns its summary."""
    command = [sys.executable, "-m", "qlora_dist.launch", f"name={name}", f"root={root}", *RECIPE, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads((Path(root) / name / "summary.json").read_text()))


def facts_of(summary: dict[str, Any], stage: str) -> dict[str, Any]:
    """Returns what a stage's node said."""
    return next(dict(n["facts"]) for n in summary["nodes"] if n["stage"] == stage)


def standing_lines(verdict: dict[str, Any]) -> list[str]:
    """Returns a line for each candidate, the one with the most gain first."""
    lines = []
    for one in verdict["standings"]:
        gains = " | ".join(f"{one['gain_by_domain'][d]:+.3f}" for d in ("legal", "code"))
        marks = " ".join(
            w for w, is_so in (("shipped", one["candidate"] == verdict["chosen"]), ("front", one["on_front"])) if is_so
        )
        lines.append(f"| {one['candidate']} | {one['gain']:+.3f} | {gains} | {one['forgetting']:+.3f} | {marks} |")
    return lines


def test_line(name: str, summary: dict[str, Any]) -> str:
    """Returns a line of the sealed test set: what one merge gained on it."""
    values = {(s["model"], s["domain"]): s["value"] for s in summary["scores"] if s["metric"] == "bits_per_byte"}
    won = [values["base", d] - values["merged", d] for d in ("legal", "code", "general")]
    return f"| {name} | {won[0]:+.3f} | {won[1]:+.3f} | {-won[2]:+.3f} |"


def described(shape: dict[str, Any]) -> str:
    """Returns a base's shape in words."""
    return f"a Llama of {shape['num_hidden_layers']} layers, {shape['hidden_size']} wide, {shape['vocab_size']} tokens"


def hardware() -> str:
    """Returns what this ran on."""
    import torch

    told = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {model}; {versions}; commit {commit.strip()}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="", help="a model folder in place of the embedded base")
    parser.add_argument("--rows", type=int, default=64, help="rows of each held-out set")
    parser.add_argument("--steps", type=int, default=100, help="the most that an adapter is trained")
    parser.add_argument("--methods", default=",".join(METHODS), help="which methods, of %(default)s")
    parser.add_argument("--scales", default=",".join(map(str, SCALES)), help="at which scales (default %(default)s)")
    parser.add_argument("--no-periodic", action="store_true", help="leave merge=periodic out")
    parser.add_argument("--root", default="", help="where the runs go; else a folder that is removed")
    arguments = parser.parse_args()
    machine = hardware()
    with tempfile.TemporaryDirectory() as aside:
        root = arguments.root or aside
        common = [f"evaluate.max_rows={arguments.rows}", f"train.max_steps={arguments.steps}"]
        common += [f"model.path={arguments.base}"] if arguments.base else []
        looks = ["merge.calibration_rows=4", "merge.steps=10"]  # of regmean and learned
        compared, grid = f"merge.compare=[{arguments.methods}]", f"merge.scales=[{arguments.scales}]"
        referee = launch(
            root, "referee", *common, "merge=referee", compared, grid, *looks, "merge.rank=8", "merge.density=0.2"
        )
        periodic = None
        if not arguments.no_periodic:
            periodic = launch(root, "periodic", *common, "merge=periodic", "merge.every_steps=25")
        base = next(Path(n["folder"]) for n in referee["nodes"] if n["stage"] == "base")
        base = Path(json.loads((base / "base.json").read_text())["path"])
        shape = json.loads((base / "config.json").read_text())
    verdict = facts_of(referee, "chosen")
    text = [
        "# Merge methods on four shards\n",
        machine + "\n",
        f"Two shards of `legal` and two of `code`, one adapter each (rank 8, at most {arguments.steps} steps),",
        f"on {described(shape)}{' (given with --base)' if arguments.base else ', the embedded base'},",
        "merged by every method, weighted by tokens, cut to rank 8 where the method cuts (`concat` is exact, rank 32).",
        "Bits per byte on development data: *gain* over the base is the mean of both domains, more is better;",
        "*forgotten* is the loss on general text, less is better. regmean and learned look at 4 rows of each part, the",
        f"latter for 10 steps. As they came out: one seed, {arguments.rows} rows of each set.\n",
        "| candidate | gain | legal | code | forgotten | |",
        "|---|---|---|---|---|---|",
        *standing_lines(verdict),
        f"\nShipped: {verdict['chosen']} ({verdict['reason']}); its gain is {verdict['gain']['value']:.3f}"
        f" ({verdict['gain']['low']:.3f} to {verdict['gain']['high']:.3f}).\n",
        "The sealed test set, read for what was shipped alone:\n",
        "| merge | legal | code | forgotten |",
        "|---|---|---|---|",
        test_line(f"referee: {verdict['chosen']}", referee),
    ]
    if periodic is not None:
        rounds = facts_of(periodic, "merged")["rounds"]
        text += [
            test_line("periodic", periodic),
            f"\n`periodic` is the same shards trained together apart (`merge=periodic`), {len(rounds)} rounds,",
            "averaged every 25 steps at most.",
        ]
    RESULTS.write_text("\n".join(text) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
