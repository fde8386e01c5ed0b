"""Packing: speed and fill against TRL's best-fit decreasing on the same lengths.

`python benchmarks/bench_packing.py` writes benchmarks/results/packing.md and needs `pip install --no-deps trl`;
`--small` runs in seconds and writes nothing. Both sides take turns in one process; CPU time is counted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_dist.data.packing import pack

RESULTS = Path(__file__).parent / "results" / "packing.md"
PAIRS = 7


def lengths_of(num: int, row_tokens: int) -> np.ndarray:
    """Returns log-normal lengths (median 245, mean 404 tokens), none longer than a row."""
    return np.random.default_rng(7).lognormal(5.5, 1.0, num).astype(np.int64).clip(1, row_tokens)


def packed_here(lengths: np.ndarray, tokens: np.ndarray, row_tokens: int) -> int:
    """Packs, and moves all tokens to their rows."""
    rows, starts, num_rows = pack(lengths, row_tokens)
    order = np.lexsort((starts, rows))
    ends = np.cumsum(lengths)
    out = np.zeros((num_rows, row_tokens), dtype=np.int32)
    flat, targets = out.reshape(-1), (rows * row_tokens + starts)[order].tolist()
    sources, sizes = (ends - lengths)[order].tolist(), lengths[order].tolist()
    for target, source, size in zip(targets, sources, sizes, strict=True):
        flat[target : target + size] = tokens[source : source + size]
    return num_rows


def table(lengths: np.ndarray, tokens: np.ndarray) -> pa.Table:
    """Returns the sequences as TRL takes them."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(tokens))})


def seconds(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def compare(num: int, row_tokens: int, pairs: int) -> list[dict[str, Any]]:
    """Measures planning alone (TRL's on one-bit tokens, which cost next to nothing to move), and with the tokens."""
    from trl.data_utils import _pack_bfd

    lengths = lengths_of(num, row_tokens)
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    bits, whole = table(lengths, tokens % 2 == 0), table(lengths, tokens)
    least = int(-(-lengths.sum() // row_tokens))
    kinds: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "plan": (lambda: pack(lengths, row_tokens), lambda: _pack_bfd(bits, row_tokens)),
        "plan and move": (lambda: packed_here(lengths, tokens, row_tokens), lambda: _pack_bfd(whole, row_tokens)),
    }
    num_rows = {"here": pack(lengths, row_tokens)[2], "trl": len(_pack_bfd(bits, row_tokens))}
    found = []
    for kind, (here, trl) in kinds.items():
        times = [(seconds(here), seconds(trl)) for _ in range(pairs)]
        ratios = sorted(b / a for a, b in times)
        found.append(
            {
                "sequences": num, "row_tokens": row_tokens, "work": kind,
                "here_s": statistics.median(a for a, _ in times), "trl_s": statistics.median(b for _, b in times),
                "ratio": statistics.median(ratios), "least_ratio": ratios[0], "most_ratio": ratios[-1],
                "fill": lengths.sum() / (num_rows["here"] * row_tokens), "of_bound": least / num_rows["here"],
                "trl_fill": lengths.sum() / (num_rows["trl"] * row_tokens),
            }
        )  # fmt: skip
    return found


def batched_fill(num: int, row_tokens: int) -> float:
    """Returns the fill of TRL's `pack_dataset` as it is called by default, in batches of 1000 sequences."""
    from trl.data_utils import _pack_bfd

    lengths = lengths_of(num, row_tokens)
    whole = table(lengths, np.zeros(lengths.sum(), dtype=bool))
    rows = sum(len(_pack_bfd(whole.slice(i, 1000).combine_chunks(), row_tokens)) for i in range(0, num, 1000))
    return float(lengths.sum() / (rows * row_tokens))


def written(found: list[dict[str, Any]], default_fill: float) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    head = "| sequences | row tokens | work | here, s | TRL, s | TRL / here (range) | fill | of the bound | TRL fill |"
    lines = [
        f"| {r['sequences']:,} | {r['row_tokens']} | {r['work']} | {r['here_s']:.4f} | {r['trl_s']:.3f} "
        f"| **{r['ratio']:.1f}** ({r['least_ratio']:.1f}-{r['most_ratio']:.1f}) | {r['fill']:.5f} "
        f"| {r['of_bound']:.5f} | {r['trl_fill']:.5f} |"
        for r in found
    ]
    return f"""# Packing against TRL

`python benchmarks/bench_packing.py`, {platform.processor() or platform.machine()}, one core, Python \
{platform.python_version()}, numpy {np.__version__}, trl {metadata.version("trl")}, pyarrow {pa.__version__}, commit \
{commit.stdout.strip()}.

Log-normal lengths (mu 5.5, sigma 1.0, cut off at the row), seed 7. Medians of {PAIRS} pairs in turn, CPU seconds. \
*plan*: which sequence goes where; TRL's is timed on one-bit tokens. *plan and move*: the tokens are in their rows. \
*of the bound*: least number of rows that could hold the tokens, over the rows made.

{head}
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

TRL's `pack_dataset` packs batches of 1,000 by default: fill {default_fill:.5f} on 100,000 sequences, rows of 2,048.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few seconds, nothing written")
    is_small = parser.parse_args().small
    sizes = [(10_000, 2048)] if is_small else [(10_000, 2048), (100_000, 2048), (100_000, 8192)]
    found = [row for num, row_tokens in sizes for row in compare(num, row_tokens, 2 if is_small else PAIRS)]
    text = written(found, batched_fill(10_000 if is_small else 100_000, 2048))
    print(text)
    if not is_small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
