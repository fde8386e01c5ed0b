"""On a GPU: speed and memory of the loop on an 8B shape, against a plain peft loop, and memory on a 70B shape.

`python benchmarks/bench_gpu.py` writes benchmarks/results/gpu.md where there is a GPU; `--tiny` goes the same way on a
small shape, on any machine, and writes nothing. Bases are random: one decoder layer is quantized and written for all.

Limits: a token asks for 4(N + H) + 6P + 3.5a operations without recomputation, a = 2 S h L, and 2N + 2P + a more with
it (N parameters of the decoder's linear layers, H of the head, P of the adapter, S slots of a row); dequantization
costs 331 / T of a product's time at T tokens a micro-batch. Memory's floor: weights, adapter with moments, activations.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_train import circumstances

RESULTS = Path(__file__).parent / "results" / "gpu.md"
WARM_STEPS = 2
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden": 4096, "heads": 32, "key_heads": 8, "inner": 14336, "layers": 32, "vocab": 128256},
    "70B": {"hidden": 8192, "heads": 64, "key_heads": 8, "inner": 28672, "layers": 80, "vocab": 128256},
    "tiny": {"hidden": 64, "heads": 4, "key_heads": 2, "inner": 128, "layers": 3, "vocab": 512},
}
"""Llama-3's widths (arXiv 2407.21783, table 3), and some of no meaning."""


def make_base(folder: Path, name: str) -> Any:
    """Writes a random pre-quantized base of this shape, without ever holding its 16-bit weights; returns it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qlora_dist.config.model import ModelConfig
    from qlora_dist.config.stages import BaseConfig
    from qlora_dist.model.base import open_base, prepare_base
    from qlora_dist.model.tensorfile import TensorFile, TensorWriter

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=1,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    (folder / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(folder / "model"))), {}, folder / "base")
    stored = folder / "base" / "nf4" / "model.safetensors"
    with TensorFile(stored) as file:
        one = {key: file.read(key) for key in file.entries}
    whole = {}
    for key, value in one.items():
        for layer in range(shape["layers"] if ".layers.0." in key else 1):
            whole[key.replace(".layers.0.", f".layers.{layer}.")] = value
    with TensorWriter(stored, whole) as writer:
        for key, value in whole.items():
            writer.add(key, value)
    for file_of_config in (folder / "model" / "config.json", folder / "base" / "nf4" / "config.json"):
        fields = json.loads(file_of_config.read_text())
        fields["num_hidden_layers"] = shape["layers"]
        fields.pop("layer_types", None)
        file_of_config.write_text(json.dumps(fields))
    return replace(open_base(folder / "base"), num_layers=shape["layers"])


def recipe(tokens: int, recomputes: bool) -> tuple[Any, Any]:
    """Returns LoRA of rank 16 on all linear layers, one row a micro-batch and step."""
    from qlora_dist.config.train import Checkpointing, LoraConfig, TrainConfig

    train = TrainConfig(
        row_tokens=tokens,
        tokens_per_step=tokens,
        micro_batch_tokens=tokens,
        activation_checkpointing=Checkpointing.on if recomputes else Checkpointing.off,
    )
    return LoraConfig(lora_rank=16), train


def run_ours(base: Any, rows: Any, tokens: int, recomputes: bool, steps: int) -> dict[str, float]:
    """Takes steps of the loop; returns tokens/s after the first two, the peak, and the last loss."""
    from qlora_dist.config.model import ModelConfig
    from qlora_dist.train.budget import plan_budget
    from qlora_dist.train.engine import Engine
    from qlora_dist.train.lanes import Lane
    from qlora_dist.train.strategies.ddp import ReplicatedBase

    lora, train = recipe(tokens, recomputes)
    train.epochs = 1000.0
    lane = Lane("one", lora, train, 1, rows, plan_budget(train, rows.num_rows, 1))
    stepper = Engine.build(ModelConfig(), base, [lane], ReplicatedBase()).stepper
    return timed(lambda step: stepper.take({0: step})[0].loss, tokens, steps)


def run_stock(base: Any, rows: Any, tokens: int, recomputes: bool, steps: int) -> dict[str, float]:
    """Takes the same steps with transformers, peft and AdamW, as their documentation has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qlora_dist.model.quantize import keep_cpu_weights
    from qlora_dist.runtime import device
    from qlora_dist.train.batches import tensors
    from qlora_dist.train.budget import plan_budget

    model = AutoModelForCausalLM.from_pretrained(base.prequantized, device_map={"": device()}, dtype=torch.bfloat16)
    keep_cpu_weights(model)
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    _, train = recipe(tokens, recomputes)
    train.epochs = 1000.0
    budget = plan_budget(train, rows.num_rows, 1)

    def step_of(step: int) -> float:
        batch = {n: v.to(device()) for n, v in tensors(rows, budget.rows_of_step(step)).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return timed(step_of, tokens, steps)


def timed(step_of: Any, tokens: int, steps: int) -> dict[str, float]:
    """Takes some steps to get warm, then times the others."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, loss = 0.0, 0.0
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
        loss = step_of(step)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = float(torch.cuda.max_memory_allocated()) if on_gpu else 0.0
    return {"tokens_per_s": steps * tokens / seconds, "peak_bytes": peak, "loss": loss}


def limits(name: str, tokens: int, recomputes: bool) -> tuple[float, float]:
    """Returns the most tokens/s that the GPU's arithmetic allows (0 where its peak isn't known), and memory's floor."""
    from qlora_dist.config.model import ModelConfig
    from qlora_dist.model.footprint import Shape, base_bytes, lane_bytes
    from qlora_dist.train.speed import peak_per_s

    told = SHAPES[name]
    key = told["hidden"] // told["heads"] * told["key_heads"]
    shape = Shape(told["hidden"], told["hidden"], key, told["inner"], told["layers"], told["vocab"])
    lora, train = recipe(tokens, recomputes)
    sizes = list(shape.linears().values())
    linear = shape.num_layers * sum(i * o for i, o in sizes)
    factors = shape.num_layers * lora.lora_rank * sum(i + o for i, o in sizes)
    attention = 2 * tokens * shape.hidden * shape.num_layers
    asked = 4 * (linear + shape.vocab * shape.hidden) + 6 * factors + 3.5 * attention
    asked += (2 * linear + 2 * factors + attention) if recomputes else 0
    peak = peak_per_s(torch.cuda.get_device_name()) if torch.cuda.is_available() else 0.0
    floor = base_bytes(shape, ModelConfig()) + lane_bytes(shape, ModelConfig(), lora, train)
    return peak / asked, float(floor)


def compare(name: str, tokens: int, recomputes: bool, sides: dict[str, Any], *, runs: int, steps: int) -> list[str]:
    """Measures the sides in turn on one base, and returns lines of the table."""
    from qlora_dist.data.rows import Rows
    from qlora_dist.testing import save_rows

    limit, floor = limits(name, tokens, recomputes)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), name)
        rows = Rows.open(save_rows(Path(folder) / "rows", 16, tokens, vocab_size=SHAPES[name]["vocab"]))
        for _ in range(runs):
            for side, run in sides.items():
                found[side].append(run(base, rows, tokens, recomputes, steps))
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    lines = []
    for side, told in found.items():
        speeds = sorted(run["tokens_per_s"] for run in told)
        middle, peak = speeds[len(speeds) // 2], told[0]["peak_bytes"]
        share = f"{middle / limit:.0%}" if limit else "–"
        over = f"{peak / 2**30:.1f} ({peak / floor:.2f})" if peak else "–"
        cells = [name, str(tokens), "on" if recomputes else "off", side]
        cells += [f"{middle:,.0f} ({speeds[0]:,.0f} – {speeds[-1]:,.0f})", share, over, f"{told[0]['loss']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Runs what this machine can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the same way on a small shape, on any machine")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a CUDA device. --tiny goes the same way on any machine.")
    both = {"the loop": run_ours, "transformers + peft": run_stock}
    columns = ["base", "tokens a row", "checkpointing", "side", "tokens/s", "of the limit", "peak GiB (over the floor)"]
    text = [
        "# On a GPU",
        "",
        circumstances(),
        "",
        f"| {' | '.join([*columns, 'last loss'])} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if args.tiny:
        text += [
            line for recomputes in (False, True) for line in compare("tiny", 64, recomputes, both, runs=1, steps=2)
        ]
    else:
        for tokens in (2048, 4096):
            for recomputes in (False, True):
                text += compare("8B", tokens, recomputes, both, runs=args.runs, steps=args.steps)
        text += compare("70B", 2048, True, {"the loop": run_ours}, runs=1, steps=4)
    print("\n".join(text))
    if not args.tiny:
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
