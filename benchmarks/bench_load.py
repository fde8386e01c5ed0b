"""Loading the base: its pre-quantized file against transformers' quantization on the fly.

`python benchmarks/bench_load.py` writes benchmarks/results/load.md; `--small` runs in a minute and writes nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench_train import SHAPES, circumstances, in_turn, prepare, ratios, spread

RESULTS = Path(__file__).parent / "results" / "load.md"


def compare_loading(folder: Path, options: dict[str, Any], pairs: int) -> list[str]:
    """Compares reading the pre-quantized base with transformers' quantization on the fly."""
    found = in_turn(folder, "load", ("quantize", "stored"), options, pairs)
    lines = ["| | seconds | CPU seconds |", "|---|---|---|"]
    for side, name in (("quantize", "transformers, quantized on the fly"), ("stored", "the pre-quantized base")):
        cells = [spread([r[key] for r in found[side]], "{:.3f}") for key in ("seconds", "cpu_s")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += ["", f"Ratio of pairs: {ratios(found, 'quantize', 'stored', 'seconds')}."]
    return lines


def main() -> None:
    """Measures both sides in turn, each in a process of its own, imports apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    shape, pairs = ("tiny", 1) if args.small else ("small", args.pairs)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), shape, 128, 8, "float32")
        size = (Path(name) / "base" / "nf4" / "model.safetensors").stat().st_size
        text = ["# Loading the base", "", circumstances(), ""]
        text += [
            f"Random Llama {SHAPES[shape]}: {size / 1e6:.1f} MB in NF4. Files in the page cache; {pairs} pairs.",
            "",
        ]
        text += compare_loading(Path(name), {"dtype": "float32"}, pairs)
    print("\n".join(text))
    if not args.small:
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
