"""`python -m qlora_dist.export ADAPTER --base BASE --to hf|gguf|gguf-lora --dtype bf16|f16|f32|q8_0 --out PATH`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qlora_dist.errors import QloraDistError
from qlora_dist.runtime import quiet_libraries

PROGRAM = "python -m qlora_dist.export"
OPTIONS = {"model.revision": "--revision", "model.path": "--base", "export.tokenizer_pre": "--tokenizer-pre"}
"""The keys of a run's config, and what they are called here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = parser().parse_args(argv)
    quiet_libraries()
    from qlora_dist.export.run import export, show

    try:
        facts = export(arguments)
    except QloraDistError as error:
        told = str(error)
        for key, option in OPTIONS.items():
            told = told.replace(f"{key}=", f"{option}=")
        print(f"error: {told}", file=sys.stderr)
        return error.exit_code
    show(facts)
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Merge a LoRA adapter into its base and write a model that needs neither peft nor this project.",
        epilog="Each weight gets one float32 sum and one rounding; the logits are compared with base + adapter.",
    )
    p.add_argument("adapter", metavar="ADAPTER", help="a PEFT folder, such as runs/legal/adapter")
    p.add_argument("--base", required=True, help="the base model: a folder, or a hub id with --revision")
    p.add_argument("--revision", default="", metavar="SHA", help="the commit of a hub id")
    p.add_argument("--to", choices=["hf", "gguf", "gguf-lora"], default="hf", help="default %(default)s")
    p.add_argument("--dtype", choices=["bf16", "f16", "f32", "q8_0"], help="default: each weight as in the base")
    p.add_argument("--out", required=True, metavar="PATH", help="a folder (hf) or a file (gguf); must not exist")
    p.add_argument(
        "--base-as",
        choices=["original", "nf4"],
        default="original",
        help="add to the original weights, or to what 4-bit training saw (default %(default)s)",
    )
    p.add_argument("--tokenizer-pre", default="", metavar="NAME", help="gguf: llama.cpp's name of the pre-tokenizer")
    p.add_argument("--no-check", action="store_true", help="don't load the models to compare their logits")
    return p


if __name__ == "__main__":
    sys.exit(main())
