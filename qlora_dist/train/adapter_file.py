"""A lane as a PEFT folder, and the check that what was written is what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_dist.model.adapter import ADAPTER_FILES, settle_adapter_config
from qlora_dist.model.base import Base
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.lanes import Lane


def save_lane(lane: Lane, folder: Path, base: Base) -> None:
    """Writes a lane's factors as PEFT's two files."""
    from safetensors.torch import save_file

    config_file, weights_file = ADAPTER_FILES
    tensors = {name: value.cpu().contiguous() for name, value in lane.state().items()}
    aside = folder / f".{weights_file}.partial"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.chmod(0o644)
    aside.replace(folder / weights_file)
    lane.peft_config.inference_mode = True
    lane.peft_config.save_pretrained(str(folder))
    settle_adapter_config(folder / config_file, base)


def check_saved(certificate: Certificate, live: Mapping[str, torch.Tensor], lora_rank: int, folder: Path) -> None:
    """Reads the folder again, as PEFT would, and compares it with the live weights, by PEFT's names."""
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    config = PeftConfig.from_pretrained(str(folder))
    same = saved.keys() == live.keys() and all(torch.equal(saved[name], live[name].cpu()) for name in live)
    certificate.require(
        "the saved adapter is the trained one",
        same and bool(saved) and config.r == lora_rank,
        f"{len(saved)} of {len(live)} tensors, {sum(v.numel() for v in saved.values()):,} values, read back",
        "Look at the disk, and run again: the training continues from its checkpoint.",
    )
