"""Scoring K adapters: one process with one loaded base, against a process and a load for each, in turn.

`python benchmarks/bench_scores.py` scores 16 adapters three times each way and writes benchmarks/results/scores.md
(some ten minutes on 2 cores); `--small` scores 4 once and writes nothing. Both sides must give the same scores.
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
from importlib import metadata
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "scores.md"
ROW_TOKENS, NUM_ROWS = 256, 12


def make_inputs(root: Path, num_adapters: int) -> None:
    """Saves a Llama of some 15 M parameters, adapters of random factors, and packed rows of random tokens."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_dist.config.model import ModelConfig
    from qlora_dist.config.stages import BaseConfig
    from qlora_dist.data.rows import SEGMENT
    from qlora_dist.model.adapter import Provenance, save_adapter, write_provenance
    from qlora_dist.model.base import open_base, prepare_base
    from qlora_dist.testing import save_tiny_model

    save_tiny_model(root / "model", hidden_size=512, num_layers=6)
    (root / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(root / "model"))), {}, root / "base")
    base = open_base(root / "base")
    told = Provenance(base_path=base.path, base_revision="", base_digest=base.digest, tokenizer_digest="",
                      quantization="nf4", dtype="bfloat16", trained_tokens=1)  # fmt: skip
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


def score(root: Path, numbers: list[int]) -> None:
    """Scores some adapters in this process, one after another."""
    from qlora_dist.config.evaluate import EvaluateConfig
    from qlora_dist.config.model import ModelConfig
    from qlora_dist.config.stages import ScoresConfig
    from qlora_dist.evaluate.scores import score_model

    for i in numbers:
        out = root / f"scores-{i}"
        out.mkdir(exist_ok=True)
        config = ScoresConfig(model=ModelConfig(path=str(root / "model")), evaluate=EvaluateConfig(), name=f"a{i}")
        score_model(config, {"base": root / "base", "adapter": root / f"a{i}", "rows-legal": root / "rows"}, out)


def timed(root: Path, jobs: list[list[int]]) -> tuple[float, list[str]]:
    """Returns the seconds that these jobs take, a process each and one at a time, and every score they wrote."""
    started = time.monotonic()
    for numbers in jobs:
        command = [sys.executable, __file__, "--worker", str(root), *map(str, numbers)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds = time.monotonic() - started
    return seconds, [(root / f"scores-{i}" / "scores.json").read_text() for numbers in jobs for i in numbers]


def write_results(num_adapters: int, pairs: list[tuple[float, float]]) -> None:
    apart, together = ([p[i] for p in pairs] for i in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "peft", "bitsandbytes"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        f"# Scoring {num_adapters} adapters\n\n{__doc__}\n"
        f"Llama, hidden 512, 6 layers, NF4; adapters of rank 8; {NUM_ROWS} rows of {ROW_TOKENS} tokens; one core.\n\n"
        "| way | median s | least | most |\n| --- | ---: | ---: | ---: |\n"
        + "".join(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |\n"
            for name, values in (("a load for each", apart), ("one loaded base", together))
        )
        + f"\nTogether over apart, median of {len(pairs)} pairs in turn: **{ratio:.2f}**\n\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}; commit {commit}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="4 adapters, one pair, nothing written")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        score(Path(args.worker[0]), [int(n) for n in args.worker[1:]])
        return
    num_adapters, num_pairs = (4, 1) if args.small else (16, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, num_adapters)
        pairs = []
        for _ in range(num_pairs):
            apart, scores_apart = timed(root, [[i] for i in range(num_adapters)])
            together, scores_together = timed(root, [list(range(num_adapters))])
            assert scores_apart == scores_together, "both ways must give the same scores"
            pairs.append((apart, together))
            print(f"apart {apart:.1f} s, together {together:.1f} s: {together / apart:.2f}", flush=True)
    if not args.small:
        write_results(num_adapters, pairs)


if __name__ == "__main__":
    main()
