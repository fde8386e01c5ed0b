"""Lanes: K adapters trained at once on one base, against K runs of the loop and K runs of the stock workflow.

`python benchmarks/bench_lanes.py` writes benchmarks/results/lanes.md; `--small` runs in a minute and writes nothing.
The three sides train the same adapters on the same rows, in turn, in one process on one thread, and what they trained
is compared; peak memory is measured in a process of its own for each side. `--parts 16x32,memory --keep FILE` measures
some parts alone and writes the results once FILE holds all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_train import SHAPES, circumstances, spread

RESULTS = Path(__file__).parent / "results" / "lanes.md"
SIDES = {"stock": "K runs of Trainer + peft + bitsandbytes", "solo": "K runs of the loop", "fused": "K lanes, fused"}
WATCHED_STEPS = 2
"""The certificate looks closely at the first two steps: they are not timed, on any side."""
DTYPES = ("float32", "bfloat16")
TIMED_RUNS = 2
"""Runs that follow each other are alike: the speed of K of them is measured on the first two."""


def prepare(folder: Path, shape: str, num_tokens: tuple[int, ...]) -> None:
    """Makes a random base, its pre-quantized copy for each dtype, and rows of each length."""
    from qlora_dist.config.model import Dtype, ModelConfig
    from qlora_dist.config.stages import BaseConfig
    from qlora_dist.model.base import prepare_base
    from qlora_dist.testing import save_rows, save_tiny_model

    model = save_tiny_model(folder / "model", **SHAPES[shape])
    for dtype in DTYPES:
        base = folder / f"base-{dtype}"
        base.mkdir()
        prepare_base(BaseConfig(model=ModelConfig(path=str(model), compute_dtype=Dtype[dtype])), {}, base)
    for size in num_tokens:
        save_rows(folder / f"rows-{size}", 64, size)


def configs_of(cell: Cell, steps: int) -> dict[str, Any]:
    """Returns K recipes: ranks 8, 16 and 32, alphas, learning rates and seeds of their own, one row a step."""
    from qlora_dist.config.model import Dtype, ModelConfig
    from qlora_dist.config.stages import AdapterConfig
    from qlora_dist.config.train import LoraConfig, StrategyConfig, StrategyName, TrainConfig

    size = cell.tokens
    train = TrainConfig(row_tokens=size, tokens_per_step=size, micro_batch_tokens=size, max_steps=steps, epochs=1000)
    return {
        f"lane-{k}": AdapterConfig(
            model=ModelConfig(compute_dtype=Dtype[cell.dtype]),
            lora=LoraConfig(lora_rank=(16, 8, 16, 32)[k % 4], lora_alpha=(16.0, 32.0)[k % 2]),
            train=replace(train, learning_rate=1e-3 / (1 + k % 3)),
            strategy=StrategyConfig(name=StrategyName.ddp),
            seed=k,
        )
        for k in range(cell.num_lanes)
    }


class Times:
    """A sink that notes when each step was logged, and its loss."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.loss: list[float] = []

    def log(self, step: int, values: Any) -> None:
        """Notes one step."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())
        self.loss.append(values["loss"])

    def seconds(self) -> tuple[float, float]:
        """Returns the CPU seconds and those by the clock of the steps that are timed."""
        return self.cpu[-1] - self.cpu[WATCHED_STEPS - 1], self.wall[-1] - self.wall[WATCHED_STEPS - 1]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared: how many adapters, at how many tokens a step each, in which dtype."""

    num_lanes: int
    tokens: int
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Found:
    """What one side came to: its speed, and the last loss and the adapter of each run that was timed."""

    tokens_per_cpu_s: float
    tokens_per_s: float
    losses: list[float]
    adapters: list[dict[str, Any]]


def train_all(folder: Path, side: str, cell: Cell, steps: int) -> Found:
    """Trains K adapters on one side, or as many of them as are timed."""
    from contextlib import ExitStack

    from safetensors.torch import load_file

    from qlora_dist.config.train import StrategyConfig, StrategyName
    from qlora_dist.runtime import sinks
    from qlora_dist.train import train_adapter, train_adapters

    configs = configs_of(cell, steps)
    base, rows = folder / f"base-{cell.dtype}", folder / f"rows-{cell.tokens}"
    inputs = {"base": base, "tokenizer": folder / "model", "rows": rows}
    timed = list(configs)[:TIMED_RUNS]
    times = {label: Times() for label in timed}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        outs = {label: Path(name) / label for label in configs}
        for out in outs.values():
            out.mkdir()
        if side == "fused":
            for label in timed:
                stack.enter_context(sinks(times[label], lane=label))
            train_adapters(configs, dict.fromkeys(configs, inputs), outs)
            cpu_s, wall_s = times[timed[0]].seconds()
            done = cell.num_lanes
        else:
            for label in timed:
                config = configs[label]
                strategy = StrategyConfig(name=StrategyName.single) if side == "stock" else config.strategy
                with sinks(times[label]):
                    train_adapter(replace(config, strategy=strategy), inputs, outs[label])
            cpu_s, wall_s = (sum(own) for own in zip(*(t.seconds() for t in times.values()), strict=True))
            done = len(timed)
        adapters = [load_file(outs[label] / "adapter_model.safetensors") for label in timed]
    size = done * cell.tokens * (steps - WATCHED_STEPS)
    return Found(size / cpu_s, size / wall_s, [own.loss[-1] for own in times.values()], adapters)


def products_alone(folder: Path, cell: Cell, repeats: int) -> float:
    """Returns tokens a CPU second if a step were its products with the frozen layers alone: x Wᵀ, and dy W back.

    No way to train takes fewer of them, so this is the limit of each side, as fast as this machine multiplies.
    """
    import torch

    from qlora_dist.model.footprint import shape_in

    shape = shape_in(folder / "model")
    assert shape is not None
    rows, spent = cell.num_lanes * cell.tokens, 0.0
    for wide_in, wide_out in shape.linears().values():
        weight_OI = torch.randn(wide_out, wide_in)
        x_TI, dy_TO = torch.randn(rows, wide_in), torch.randn(rows, wide_out)
        for repeat in range(repeats + 1):
            started = time.process_time()
            for _ in range(shape.num_layers):
                x_TI @ weight_OI.T
                dy_TO @ weight_OI
            spent += (time.process_time() - started) if repeat else 0.0
    return rows * repeats / spent


def gaps(mine: Found, theirs: Found) -> str:
    """Returns the largest difference of last losses, and the largest relative distance of two adapters."""
    loss = max(abs(a - b) for a, b in zip(mine.losses, theirs.losses, strict=True))
    away = 0.0
    for a, b in zip(mine.adapters, theirs.adapters, strict=True):
        if a.keys() != b.keys():
            raise SystemExit("The two sides made adapters of unequal layers.")
        top = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
        away = max(away, (top / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5)
    return f"{loss:.0e}, {away:.0e}"


def compare(folder: Path, cell: Cell, pairs: int, steps: int) -> str:
    """Returns one line of the table: the three sides in turn, `pairs` times."""
    found: dict[str, list[Found]] = {side: [] for side in SIDES}
    limits = []
    for _ in range(pairs):
        for side in SIDES:
            found[side].append(train_all(folder, side, cell, steps))
        limits.append(products_alone(folder, cell, steps))

    def ratio(side: str, what: str) -> str:
        both = zip(found["fused"], found[side], strict=True)
        return spread([getattr(a, what) / getattr(b, what) for a, b in both], "{:.2f}")

    cells = [spread([run.tokens_per_cpu_s for run in runs]) for runs in found.values()]
    cells += [ratio(*of) for of in (("stock", "tokens_per_cpu_s"), ("stock", "tokens_per_s"))]
    cells += [ratio("solo", "tokens_per_cpu_s"), spread(limits)]
    cells += [spread([100 * a.tokens_per_cpu_s / b for a, b in zip(found["fused"], limits, strict=True)])]
    cells += [gaps(found["fused"][0], found[side][0]) for side in ("stock", "solo")]
    return f"| {cell.dtype} | {cell.num_lanes} | {cell.tokens} | {pairs} | " + " | ".join(cells) + " |"


def peak_bytes(folder: Path, side: str, num_lanes: int, tokens: int) -> int:
    """Returns the peak memory of one side in a process of its own; runs that follow each other need one base."""
    argv = [sys.executable, __file__, "--one", side, str(folder), str(num_lanes), str(tokens)]
    done = subprocess.run(argv, env=os.environ, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found["peak_bytes"]


def memory_table(folder: Path, num_lanes: int, tokens: int) -> list[str]:
    """Compares the peak memory of K lanes in one process with that of one run, K of which would run side by side."""
    one, fused = (peak_bytes(folder, *what) for what in (("solo", 1, tokens), ("fused", num_lanes, tokens)))
    stock = peak_bytes(folder, "stock", 1, tokens)
    return [
        "| | peak memory, MB |",
        "|---|---|",
        f"| one stock run | {stock / 1e6:,.0f} |",
        f"| one run of the loop | {one / 1e6:,.0f} |",
        f"| {num_lanes} lanes, fused | {fused / 1e6:,.0f} |",
        "",
        f"{num_lanes} stock runs side by side would take {num_lanes * stock / 1e6:,.0f} MB.",
    ]


def measure_part(part: str, folder: Path, pairs: int, steps: int, largest: tuple[int, int]) -> list[str]:
    """Measures one part: `memory`, or K x tokens, as `16x32` or `bfloat16:16x32`; returns its lines."""
    if part == "memory":
        return memory_table(folder, *largest)
    dtype, _, size = part.rpartition(":")
    lanes, tokens = map(int, size.split("x"))
    return [compare(folder, Cell(lanes, tokens, dtype or "float32"), pairs, steps)]


def results(kept: dict[str, list[str]], cells: list[str], shape: str) -> str:
    """Returns the whole text."""
    text = ["# Lanes", "", circumstances(), f"Base: random Llama, {SHAPES[shape]}; NF4, double quant."]
    text += ["Ranks 8, 16, 32; one row a lane and step. Tokens a CPU second on one thread of the steps after the"]
    text += ["second: median (least – greatest) of the rounds, sides in turn; K runs by their first two."]
    text += ["Gaps, of the same two adapters: the largest difference of last losses, and the largest relative"]
    text += [
        "distance of two adapters (Frobenius norm over all layers). *Products alone*: the same K x tokens rows through"
    ]
    text += ["the frozen layers and back in float32, and nothing else: what no way to train can beat here."]
    text += ["bfloat16 is the dtype of stock recipes. Without 16-bit units, as here, the loop multiplies its values in"]
    text += ["float32 and rounds; stock leaves bfloat16 to the library's slow products.", ""]
    head = [
        "dtype",
        "K",
        "tokens a lane",
        "rounds",
        *SIDES.values(),
        "fused / stock",
        "the same by the clock",
        "fused / solo",
        "products alone",
    ]
    head += ["fused, % of them"]
    head += ["gaps to stock", "gaps to solo"]
    text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(line for cell in cells for line in kept[cell])]
    return "\n".join([*text, "", "## Memory", "", *kept["memory"], ""])


def main() -> None:
    """Runs all measurements, or some of them, or one of them in this process."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--parts", default="", help="as 16x32,memory: what is measured now; by default all")
    parser.add_argument("--keep", type=Path, help="a file that keeps what was measured between calls")
    parser.add_argument("--one", nargs=4, metavar=("SIDE", "FOLDER", "LANES", "TOKENS"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        from qlora_dist.train.memory import peak_memory_bytes

        side, folder, lanes, tokens = args.one
        train_all(Path(folder), side, Cell(int(lanes), int(tokens)), 3)
        print(json.dumps({"peak_bytes": peak_memory_bytes()}))
        return
    shape, pairs, steps = ("tiny", 1, 3) if args.small else ("small", args.pairs, 4)
    lanes, sizes = ((2, 4), (32,)) if args.small else ((4, 8, 16), (32, 128))
    cells = [f"{k}x{size}" for size in sizes for k in lanes]
    cells += [f"bfloat16:{lanes[-1]}x{size}" for size in sizes]
    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), shape, sizes)
        for part in args.parts.split(",") if args.parts else [*cells, "memory"]:
            kept[part] = measure_part(part, Path(name), pairs, steps, (lanes[-1], sizes[-1]))
            print("\n".join(kept[part]), flush=True)
            if args.keep:
                args.keep.write_text(json.dumps(kept))
    if kept.keys() >= {*cells, "memory"}:
        text = results(kept, cells, shape)
        print(text)
        if not args.small:
            RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
