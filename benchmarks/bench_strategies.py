"""Strategies at 1, 2 and 4 processes: what each costs beside `ddp` on one, and what a rank holds of the base.

`python benchmarks/bench_strategies.py` writes benchmarks/results/strategies.md; `--small` runs in a minute or two and
writes nothing. Each measurement runs in processes of its own, on one thread each; the layouts take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_train import SHAPES, circumstances, measure, prepare, spread

RESULTS = Path(__file__).parent / "results" / "strategies.md"
LAYOUTS = [
    ("ddp", 1, 2),
    ("ddp", 2, 2),
    ("fsdp", 2, 2),
    ("deepspeed", 2, 2),
    ("deepspeed", 2, 3),
    ("ddp", 4, 2),
    ("fsdp", 4, 2),
    ("deepspeed", 4, 2),
    ("deepspeed", 4, 3),
]
"""Strategy, processes, stage of ZeRO."""


def name_of(layout: tuple[str, int, int]) -> str:
    """Returns a layout's strategy in words."""
    strategy, _, stage = layout
    return f"deepspeed {stage}" if strategy == "deepspeed" else strategy


def rows_of(found: dict[tuple[str, int, int], list[dict[str, Any]]]) -> list[str]:
    """Returns the table: tokens a CPU second of a process, relative to the first layout, and what a rank holds."""
    one = statistics.median(run["tokens_per_cpu_s"] for run in found[LAYOUTS[0]])
    lines = [
        "| strategy | processes | tokens a CPU second of a process | of `ddp` on one | base on each, MB | peak, MB |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for layout, runs in found.items():
        speeds = [run["tokens_per_cpu_s"] / layout[1] for run in runs]
        share, base = statistics.median(speeds) / one, runs[0]["base_bytes"] / 1e6
        peak = spread([run["peak_bytes"] / 1e6 for run in runs])
        lines.append(f"| {name_of(layout)} | {layout[1]} | {spread(speeds)} | {share:.2f} | {base:.1f} | {peak} |")
    return lines


def gap_of(found: dict[tuple[str, int, int], list[dict[str, Any]]]) -> float:
    """Returns the largest difference between any two layouts' losses of one step."""
    losses = [runs[0]["losses"] for runs in found.values()]
    return max(max(step) - min(step) for step in zip(*losses, strict=True))


def main() -> None:
    """Measures the layouts in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    shape, rounds = ("tiny", 1) if args.small else ("small", args.pairs)
    layouts = [layout for layout in LAYOUTS if layout[1] < 4 or not args.small]
    options: dict[str, Any] = {"row_tokens": 128, "tokens_per_step": 512, "micro_batch_tokens": 128, "steps": 5}
    options |= {"dtype": "float32", "dense_cache_share": 0.0}
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape, options["row_tokens"], 64, options["dtype"])
        for _ in range(rounds):
            for layout in layouts:
                strategy, ranks, stage = layout
                found[layout].append(measure(folder, "train", strategy, options | {"zero_stage": stage}, ranks))
    text = ["# Strategies", "", circumstances(), ""]
    text += [f"Random Llama {SHAPES[shape]}, NF4, LoRA rank 16, {options}; the dense cache is off on all sides."]
    text += [f"Median (least – greatest) of {rounds} runs in turn. Processes share the machine's cores.", ""]
    text += [*rows_of(found), "", f"The losses of {options['steps']} steps differ by at most {gap_of(found):.5f}."]
    print("\n".join(text))
    if not args.small:
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
