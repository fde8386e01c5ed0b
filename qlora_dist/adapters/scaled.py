"""A merge that was made, at another scale λ: what was found by looking at data isn't sought again."""

from __future__ import annotations

from pathlib import Path

from qlora_dist.adapters.merge import MERGE_FILE
from qlora_dist.model.adapter import write_provenance
from qlora_dist.model.peft_folder import Factors, PeftFolder, PeftWriter
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import Facts, write_json


def rescale(merged: Path, scale: float, out: Path) -> Facts:
    """Writes a merge as it would be with `scale`, to one rounding: λ multiplies the whole update.

    Args:
        merged: a folder that a merge wrote.
        scale: the λ that the result has in all.
        out: an empty folder.
    """
    facts = read_json(merged / MERGE_FILE, "a merge writes it")
    factor = scale / facts["scale"]
    with PeftFolder(merged) as folder:
        with PeftWriter(out, folder) as writer:
            for module in folder.modules:
                factors = folder.factors(module)
                writer.add(module, Factors(factors.A_RI, factors.B_OR * factor))
            writer.add_saved()
        if folder.provenance is not None:
            write_provenance(out, folder.provenance)
    modules = {name: told | {"norm": told["norm"] * factor} for name, told in facts["modules"].items()}
    scaled = facts | {"scale": scale, "norm": facts["norm"] * factor, "modules": modules}
    write_json(out / MERGE_FILE, scaled)
    return {name: value for name, value in scaled.items() if name != "modules"}
