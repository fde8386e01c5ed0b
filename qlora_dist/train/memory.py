"""What a training holds in memory."""

from __future__ import annotations

import psutil
import torch

from qlora_dist.runtime import device, local_world_size, peak_resident_bytes


def peak_memory_bytes() -> int:
    """Returns the most memory held so far: allocated on the GPU where there is one, else this process's own."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def free_memory_bytes() -> int:
    """Returns the memory that this rank may still use: of its GPU, or its share of what this machine has left."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device())[0])
    return int(psutil.virtual_memory().available // local_world_size())
