"""Scoring K adapters: one job on one loaded base, against a process and a load for each, in turn.

`python benchmarks/bench_scores.py` scores 16 adapters `--pairs` times (3) each way and writes
benchmarks/results/scores.md (some ten minutes on 2 cores); `--small` scores 4 once and writes nothing. Both sides must
give the same scores. What is scored is short on purpose: loading is what one job saves, and the more text is scored,
the less it matters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from qlora_dist.config.model import ModelConfig


class Took(NamedTuple):
    """Seconds on the wall, and of the processor."""

    wall_s: float
    processor_s: float


RESULTS = Path(__file__).parent / "results" / "scores.md"
ROW_TOKENS, NUM_ROWS = 256, 2


def make_inputs(root: Path, num_adapters: int) -> None:
    """Saves a Llama of some 15 M parameters, adapters of random factors, and packed rows of random tokens."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_dist.config.stages import BaseConfig
    from qlora_dist.data.rows import SEGMENT
    from qlora_dist.model.adapter import Provenance, save_adapter, write_provenance
    from qlora_dist.model.base import open_base, prepare_base
    from qlora_dist.testing import save_tiny_model

    save_tiny_model(root / "model", hidden_size=512, num_layers=6)
    (root / "base").mkdir()
    prepare_base(BaseConfig(model=model_config(root)), {}, root / "base")
    base = open_base(root / "base")
    told = Provenance(base_path=base.path, base_revision="", base_digest=base.digest, tokenizer_digest="",
                      quantization="nf4", dtype="float32", trained_tokens=1)  # fmt: skip
    for i in range(num_adapters):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        save_adapter(
            peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), config), root / f"a{i}", base
        )
        write_provenance(root / f"a{i}", told)
    rows = root / "rows"
    rows.mkdir()
    np.save(rows / "tokens.npy", np.random.default_rng(0).integers(0, 256, (NUM_ROWS, ROW_TOKENS)).astype(np.uint32))
    np.save(rows / "trained.npy", np.arange(ROW_TOKENS)[None].repeat(NUM_ROWS, 0) > 0)
    table = [(i, 0, ROW_TOKENS, i, ROW_TOKENS - 1) for i in range(NUM_ROWS)]
    np.save(rows / "segments.npy", np.array(table, dtype=SEGMENT))
    known = [{"id": f"r{i}", "cluster": f"c{i}", "source": ""} for i in range(NUM_ROWS)]
    (rows / "records.jsonl").write_text("".join(json.dumps(k) + "\n" for k in known))
    sizes = {"row_tokens": ROW_TOKENS, "num_rows": NUM_ROWS, "vocab_size": 259}
    (rows / "rows.json").write_text(
        json.dumps(sizes | {"end_id": 257, "start_id": 256, "pad_id": 258, "silent_ids": [256, 257, 258]})
    )


def model_config(root: Path) -> ModelConfig:
    from qlora_dist.config.model import Dtype, ModelConfig

    return ModelConfig(path=str(root / "model"), compute_dtype=Dtype.float32)  # bfloat16 is emulated on most CPUs


def score(root: Path, numbers: list[int]) -> None:
    """Scores some adapters in this process, one after another."""
    from qlora_dist.config.evaluate import EvaluateConfig
    from qlora_dist.config.stages import ScoresConfig
    from qlora_dist.evaluate.scores import score_models

    model = model_config(root)
    labels = [f"a{i}" for i in numbers]
    outs = {f"a{i}": root / f"scores-{i}" for i in numbers}
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)  # what an earlier life found would be kept
        out.mkdir()
    configs = {label: ScoresConfig(model=model, evaluate=EvaluateConfig(), name=label) for label in labels}
    inputs = {n: {"base": root / "base", "adapter": root / n, "rows-legal": root / "rows"} for n in labels}
    failed = [found for found in score_models(configs, inputs, outs).values() if isinstance(found, Exception)]
    assert not failed, failed


def timed(root: Path, jobs: list[list[int]]) -> tuple[Took, list[str]]:
    """Returns what these jobs take, a process each and one at a time, and every score they wrote."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for numbers in jobs:
        command = [sys.executable, __file__, "--worker", str(root), *map(str, numbers)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    scores = [(root / f"scores-{i}" / "scores.json").read_text() for numbers in jobs for i in numbers]
    return Took(seconds, processor), scores


def write_results(num_adapters: int, pairs: list[tuple[Took, Took]]) -> None:
    apart, together = ([p[i] for p in pairs] for i in (0, 1))
    ratios = [statistics.median(p[1][i] / p[0][i] for p in pairs) for i in (0, 1)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "peft", "bitsandbytes"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        f"# Scoring {num_adapters} adapters\n\n{__doc__}\n"
        "Llama, hidden 512, 6 layers, NF4, float32 arithmetic; adapters of rank 8; "
        f"{NUM_ROWS} rows of {ROW_TOKENS} tokens; one core.\n\n"
        "| way | processor s, median | least | most | wall s, median | least | most |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        + "".join(
            f"| {name} | {_spread(t.processor_s for t in took)} | {_spread(t.wall_s for t in took)} |\n"
            for name, took in (("a process and a load for each", apart), ("one job on one loaded base", together))
        )
        + f"\nTogether over apart, median of {len(pairs)} pairs in turn: **{ratios[1]:.2f}** of the processor time, "
        f"{ratios[0]:.2f} of the wall time. Both ways wrote the same scores.\n\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}; commit {commit}"
    )


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="4 adapters, one pair, nothing written")
    parser.add_argument("--pairs", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        score(Path(args.worker[0]), [int(n) for n in args.worker[1:]])
        return
    num_adapters, num_pairs = (4, 1) if args.small else (16, args.pairs)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, num_adapters)
        pairs = []
        for _ in range(num_pairs):
            apart, scores_apart = timed(root, [[i] for i in range(num_adapters)])
            together, scores_together = timed(root, [list(range(num_adapters))])
            assert scores_apart == scores_together, "both ways must give the same scores"
            pairs.append((apart, together))
            print(f"apart {apart}, together {together}: {together.processor_s / apart.processor_s:.2f}", flush=True)
    if not args.small:
        write_results(num_adapters, pairs)


if __name__ == "__main__":
    main()
