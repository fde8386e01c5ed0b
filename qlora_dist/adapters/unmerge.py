"""Taking one part out of an exact merge: `python -m qlora_dist.adapters.unmerge MERGED --part LABEL --out DIR`.

An exact merge keeps its parts' factors side by side, so that a shard can be withdrawn without the other adapters at
hand, and nothing of it stays behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.adapters.merge import MERGE_FILE
from qlora_dist.errors import ModelError, QloraDistError, nearest
from qlora_dist.runtime import Facts, quiet_libraries, write_json

if TYPE_CHECKING:
    from qlora_dist.model.peft_folder import Factors, PeftFolder

_OF_THE_WHOLE = ("cosines", "cross_energy", "spectrum")


def remove_part(merged: Path, label: str, out: Path) -> Facts:
    """Writes the merge without one of its parts: its factors left out, the other weights made to sum to one again.

    With weights `given` the others stay as they are, bit by bit; else they are those of a merge that never had the
    part, to one rounding.

    Args:
        merged: a folder that method concat wrote.
        label: the part that goes.
        out: an empty folder.

    Raises:
        ModelError: if the merge wasn't exact, has no such part, or no other.
    """
    from qlora_dist.model.peft_folder import PeftFolder, PeftWriter
    from qlora_dist.model.weights import read_json

    facts = read_json(merged / MERGE_FILE, "only a merge of this project knows its parts")
    index = _index(facts, label, merged)
    weights = [part["weight"] for part in facts["parts"]]
    factor = 1.0 if facts["weights"] == "given" else 1 / (1 - weights[index])
    with PeftFolder(merged) as whole:
        with PeftWriter(out, whole) as writer:
            for module in whole.modules:
                writer.add(module, _without(whole.factors(module), facts["modules"][module]["ranks"], index, factor))
            writer.add_saved()
        _write_provenance(whole, facts["parts"][index], out)
    left = _facts_without(facts, index, factor)
    write_json(out / MERGE_FILE, left)
    return left


def _index(facts: Facts, label: str, merged: Path) -> int:
    labels = [part["label"] for part in facts["parts"]]
    if facts["method"] != "concat":
        repair = "Merge the other adapters again."
        raise ModelError(f"{merged}: method {facts['method']} mixes its parts, so none can be taken out. {repair}")
    if label not in labels:
        raise ModelError(f"{merged}: has no part {label}. {nearest(label, labels)}")
    if facts["whole_layers_of"] == label:
        raise ModelError(f"{merged}: {label} brought whole layers (modules_to_save). Merge the other adapters again.")
    if len(labels) == 1:
        raise ModelError(f"{merged}: {label} is its only part: nothing would be left.")
    return labels.index(label)


def _without(factors: Factors, ranks: Sequence[int], index: int, factor: float) -> Factors:
    import torch

    from qlora_dist.model.peft_folder import Factors

    A_parts, B_parts = list(factors.A_RI.split(ranks)), list(factors.B_OR.split(ranks, dim=1))
    del A_parts[index], B_parts[index]
    return Factors(torch.cat(A_parts), torch.cat(B_parts, dim=1) * factor)


def _write_provenance(whole: PeftFolder, part: Facts, out: Path) -> None:
    from qlora_dist.model.adapter import write_provenance

    if whole.provenance is not None:
        tokens = whole.provenance.trained_tokens - part["trained_tokens"]
        write_provenance(out, replace(whole.provenance, trained_tokens=tokens))


def _facts_without(facts: Facts, index: int, factor: float) -> Facts:
    left = {name: value for name, value in facts.items() if name not in (*_OF_THE_WHOLE, "norm", "modules")}
    left["parts"] = [p | {"weight": p["weight"] * factor} for i, p in enumerate(facts["parts"]) if i != index]
    ranks = {m: [r for i, r in enumerate(f["ranks"]) if i != index] for m, f in facts["modules"].items()}
    left["modules"] = {module: {"ranks": r, "lora_rank": sum(r)} for module, r in ranks.items()}
    left["lora_rank"] = left["largest_rank"] = max(sum(r) for r in ranks.values())
    left["removed"] = [*facts.get("removed", []), facts["parts"][index]["label"]]
    return left


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_dist.adapters.unmerge",
        description="Take one part out of an exact merge. The other adapters need not be at hand.",
    )
    parser.add_argument("merged", metavar="MERGED", help="a folder that method concat wrote")
    parser.add_argument("--part", required=True, help="the label of the part that goes")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the rest goes; must not exist")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    from qlora_dist.adapters.command import show_result
    from qlora_dist.model.tensorfile import whole

    try:
        with whole(Path(arguments.out)) as aside:
            aside.mkdir()
            facts = remove_part(Path(arguments.merged), arguments.part, aside)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    from rich.console import Console

    console, left = Console(), ", ".join(f"{part['label']} ({part['weight']:.4g})" for part in facts["parts"])
    told = f"left: {left}; without {', '.join(facts['removed'])}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    show_result(Path(arguments.out), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
