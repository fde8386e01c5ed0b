"""Training: this project's loop against stock transformers.Trainer + peft + bitsandbytes.

`python benchmarks/bench_train.py` writes benchmarks/results/train.md; `--small` runs in a minute and writes nothing.
Each measurement runs in a process of its own, the two sides in turn; on a GPU where there is one.
`--parts training --keep FILE` measures some parts alone and writes the results once FILE holds all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "train.md"
SHAPES = {
    "tiny": {"hidden_size": 128, "num_layers": 2},
    "small": {"hidden_size": 512, "num_layers": 8},
}


def prepare(folder: Path, shape: str, row_tokens: int, num_rows: int, dtype: str) -> None:
    """Makes a random base, its pre-quantized copy, and rows."""
    from qlora_dist.config.model import Dtype, ModelConfig
    from qlora_dist.config.stages import BaseConfig
    from qlora_dist.model.base import prepare_base
    from qlora_dist.testing import save_rows, save_tiny_model

    model = save_tiny_model(folder / "model", dtype="bfloat16", **SHAPES[shape])
    (folder / "base").mkdir()
    stored = ModelConfig(path=str(model), compute_dtype=Dtype[dtype])
    prepare_base(BaseConfig(model=stored), {}, folder / "base")
    save_rows(folder / "rows", num_rows, row_tokens)


def train_once(folder: Path, strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains in this process and returns speed over the steps after the first, peak memory and the last loss."""
    from qlora_dist.config.model import Dtype, ModelConfig
    from qlora_dist.config.stages import AdapterConfig
    from qlora_dist.config.train import LoraConfig, StrategyConfig, StrategyName, TrainConfig
    from qlora_dist.runtime import rank, sinks, world_size
    from qlora_dist.train import train_adapter

    class Times:
        def __init__(self) -> None:
            self.cpu: list[float] = []
            self.wall: list[float] = []
            self.loss: list[float] = []

        def log(self, step: int, values: Any) -> None:
            self.cpu.append(time.process_time())
            self.wall.append(time.perf_counter())
            self.loss.append(values["loss"])

    row_tokens, step_tokens = options["row_tokens"], options["tokens_per_step"]
    recipe = TrainConfig(
        row_tokens=row_tokens,
        tokens_per_step=step_tokens,
        micro_batch_tokens=options["micro_batch_tokens"],
        max_steps=options["steps"],
        epochs=1000,
        learning_rate=1e-3,
        dense_cache_share=options.get("dense_cache_share", -1.0),
    )
    config = AdapterConfig(
        model=ModelConfig(compute_dtype=Dtype[options["dtype"]]),
        lora=LoraConfig(lora_rank=16),
        train=recipe,
        strategy=StrategyConfig(
            name=StrategyName[strategy], world_size=world_size(), zero_stage=options.get("zero_stage", 2)
        ),
        seed=1,
    )
    inputs = {"base": folder / "base", "tokenizer": folder / "model", "rows": folder / "rows"}
    times = Times()
    with tempfile.TemporaryDirectory() as out, sinks(times):
        facts = train_adapter(config, inputs, Path(out))
    if rank() != 0:
        return {}
    done = (len(times.wall) - 1) * step_tokens
    return {
        "tokens_per_s": done / (times.wall[-1] - times.wall[0]),
        "tokens_per_cpu_s": done / (times.cpu[-1] - times.cpu[0]),
        "peak_bytes": facts["peak_memory_bytes"],
        "base_bytes": facts.get("base_bytes_per_rank", 0),
        "losses": times.loss,
    }


def load_once(folder: Path, how: str, options: dict[str, Any]) -> dict[str, Any]:
    """Loads the base in this process, imports apart, and returns the seconds it took."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    from qlora_dist.config.model import Dtype, ModelConfig
    from qlora_dist.model.base import load_model, open_base
    from qlora_dist.model.prequantized import load_prequantized

    base, config = open_base(folder / "base"), ModelConfig(compute_dtype=Dtype[options["dtype"]])
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping[type(_config_of(base))]  # the architecture's module, imported for both
    started, cpu = time.perf_counter(), time.process_time()
    load_prequantized(base, config) if how == "stored" else load_model(base, config)
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def _config_of(base: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder())


def measure(folder: Path, what: str, how: str, options: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Runs one measurement in processes of its own, each on one thread, and returns what rank 0 printed."""
    from qlora_dist.testing import rank_environment

    argv = [sys.executable, __file__, "--one", what, how, str(folder), json.dumps(options)]
    port = 29000 + os.getpid() % 1000 + ranks
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            argv, env=environment | rank_environment(r, ranks, port), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0].decode() for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{what} {how} failed; run it alone: {' '.join(argv)}")
    found: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return found


def in_turn(folder: Path, what: str, sides: Sequence[str], options: dict[str, Any], pairs: int) -> dict[str, list[Any]]:
    """Measures the sides in turn, A B A B …, `pairs` times."""
    found: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(pairs):
        for side in sides:
            found[side].append(measure(folder, what, side, options))
    return found


def spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Returns the median with the least and the greatest value."""
    shown = [form.format(v) for v in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} – {shown[2]})"


def ratios(found: dict[str, list[Any]], over: str, under: str, key: str) -> str:
    """Returns the median and range of the ratios of pairs."""
    pairs = zip(found[over], found[under], strict=True)
    return spread([a[key] / b[key] for a, b in pairs], "{:.2f}")


def compare_training(folder: Path, options: dict[str, Any], pairs: int) -> list[str]:
    """Compares the loop with the stock workflow on the same rows and seed."""
    found = in_turn(folder, "train", ("single", "ddp"), options, pairs)
    lines = ["| | tokens/s | tokens a CPU second | peak memory, MB | last loss |", "|---|---|---|---|---|"]
    names = {"single": "transformers.Trainer + peft + bitsandbytes", "ddp": "the loop, one process"}
    for side, name in names.items():
        runs = found[side]
        cells = [spread([r[key] for r in runs]) for key in ("tokens_per_s", "tokens_per_cpu_s")]
        peak = spread([r["peak_bytes"] / 1e6 for r in runs])
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {peak} | {runs[0]['losses'][-1]:.4f} |")
    pair = zip(found["ddp"][0]["losses"], found["single"][0]["losses"], strict=True)
    gap = max(abs(a - b) for a, b in pair)
    lines.append("")
    lines.append(
        f"Ratio of pairs: {ratios(found, 'ddp', 'single', 'tokens_per_s')} by the clock, "
        f"{ratios(found, 'ddp', 'single', 'tokens_per_cpu_s')} by CPU time. "
        f"The losses of {len(found['ddp'][0]['losses'])} steps differ by at most {gap:.4f}."
    )
    return lines


def compare_bfloat16(folder: Path, options: dict[str, Any], pairs: int) -> list[str]:
    """Compares both sides as stock recipes have it, in bfloat16: the loop multiplies in what is fastest here."""
    found = in_turn(folder, "train", ("single", "ddp"), options | {"dtype": "bfloat16", "steps": 3}, pairs)
    lines = ["| | tokens/s | tokens a CPU second |", "|---|---|---|"]
    names = {"single": "the stock workflow, compute dtype bfloat16", "ddp": "the loop, compute dtype bfloat16"}
    for side, name in names.items():
        cells = [spread([r[key] for r in found[side]]) for key in ("tokens_per_s", "tokens_per_cpu_s")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    gap = max(abs(a - b) for a, b in zip(found["ddp"][0]["losses"], found["single"][0]["losses"], strict=True))
    told = f"Ratio of pairs by CPU time: {ratios(found, 'ddp', 'single', 'tokens_per_cpu_s')}"
    return [*lines, "", f"{told}; the losses of 3 steps differ by at most {gap:.4f}."]


def fastest_dtype() -> str:
    """Returns the compute dtype in which this machine multiplies fastest: on old CPUs that isn't a 16-bit one."""
    import torch

    from qlora_dist.model.frozen import product_dtype
    from qlora_dist.runtime import device

    return str(product_dtype(torch.bfloat16, device().type)).removeprefix("torch.")


def circumstances() -> str:
    """Returns hardware, versions and commit."""
    import torch

    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if "model name" in x), platform.machine())  # noqa: PTH123, SIM115
    return f"{cpu}, {os.cpu_count()} cores (one thread a process), {gpu}; {versions}; commit {commit.strip()}."


def main() -> None:
    """Runs all measurements, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--parts", default="", help="training or bfloat16: what is measured now; by default all")
    parser.add_argument("--keep", type=Path, help="a file that keeps what was measured between calls")
    parser.add_argument("--dtype", default="", help="of products; by default the one that this machine is fastest in")
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "HOW", "FOLDER", "OPTIONS"))
    args = parser.parse_args()
    if args.one:
        what, how, folder, options = args.one
        run = (
            train_once(Path(folder), how, json.loads(options))
            if what == "train"
            else load_once(Path(folder), how, json.loads(options))
        )
        print(json.dumps(run))
        return
    options: dict[str, Any] = {"row_tokens": 128, "tokens_per_step": 512, "micro_batch_tokens": 128, "steps": 6}
    options["dtype"] = args.dtype or fastest_dtype()
    shape, pairs = ("tiny", 1) if args.small else ("small", args.pairs)
    few = 1 if args.small else 2
    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape, options["row_tokens"], 64, options["dtype"])
        measures = {
            "training": lambda: compare_training(folder, options, pairs),
            "bfloat16": lambda: compare_bfloat16(folder, options, few),
        }
        for part in args.parts.split(",") if args.parts else measures:
            kept[part] = measures[part]()
            print("\n".join(kept[part]), flush=True)
            if args.keep:
                args.keep.write_text(json.dumps(kept))
    if kept.keys() >= measures.keys() and not args.small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(results(kept, options, shape, pairs, few), encoding="utf-8")


def results(kept: dict[str, list[str]], options: dict[str, Any], shape: str, pairs: int, few: int) -> str:
    """Returns the whole text."""
    base = f"Base: random Llama, {SHAPES[shape]}; NF4, double quant, {options['dtype']}."
    recipe = f"Recipe: LoRA rank 16, {json.dumps(options)}. Median (least – greatest) of {pairs} runs in turn"
    text = ["# Training", "", circumstances(), base, f"{recipe} ({few} under bfloat16).", ""]
    titles = {
        "training": "Against the stock workflow",
        "bfloat16": "In bfloat16, as stock recipes have it",
    }
    for part, title in titles.items():
        text += [f"## {title}", "", *kept[part], ""]
    return "\n".join(text)


if __name__ == "__main__":
    main()
