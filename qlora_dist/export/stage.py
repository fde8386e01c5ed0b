"""Stage `export`: what a run ships besides its PEFT folder, made and checked as `python -m qlora_dist.export` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_dist.config.export import ExportDtype, ExportFormat
from qlora_dist.config.stages import ExportedConfig
from qlora_dist.runtime import Facts, quiet_libraries


def export_model(config: ExportedConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves `model/`, or `model.gguf`, of the inputs `base` and `adapter`.

    Raises:
        ModelError: if base, adapter or format can't be used, or the result isn't the same model.
    """
    quiet_libraries()
    from qlora_dist.export.__main__ import parser
    from qlora_dist.export.run import export
    from qlora_dist.model.base import open_base

    told = config.export
    target = out / ("model" if told.format is ExportFormat.hf else "model.gguf")
    argv = [str(inputs["adapter"]), "--base", open_base(inputs["base"]).path, "--out", str(target)]
    argv += ["--to", told.format.name.replace("_", "-"), "--base-as", told.base_as.name]
    argv += [] if told.dtype is ExportDtype.base else ["--dtype", told.dtype.name]
    argv += ["--tokenizer-pre", told.tokenizer_pre] if told.tokenizer_pre else []
    facts = export(parser().parse_args(argv))
    return {name: value for name, value in facts.items() if name != "modules"} | {"out": target.name}
