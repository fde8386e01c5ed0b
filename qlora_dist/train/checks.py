"""The checks of the base and of the rows, before the first step.

B rows, T slots. Checks that compute on the model run on every rank alike: a sharded base needs all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.data.rows import Rows
from qlora_dist.errors import TrainError
from qlora_dist.model.frozen import frozen_linears
from qlora_dist.train.batches import IGNORED, tensors
from qlora_dist.train.budget import Budget
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.lanes import Lane
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.step import Stepper
from qlora_dist.train.strategies import Strategy


def check_base(certificate: Certificate, model: LaneModel, config: ModelConfig) -> None:
    """Checks dtypes and storage of the base, before it is sharded."""
    check_dtypes(certificate, model, getattr(torch, config.compute_dtype.name))
    layers = [layer for _, layer in frozen_linears(model)]
    check_storage(certificate, sum(layer.is_4bit for layer in layers), len(layers), config)


def check_dtypes(certificate: Certificate, model: nn.Module, wanted: torch.dtype) -> None:
    """Checks that all of the base has one dtype, and what is trained float32."""
    frozen = Counter(str(p.dtype) for p in model.parameters() if not p.requires_grad)
    trained = Counter(str(p.dtype) for p in model.parameters() if p.requires_grad)
    certificate.require(
        "one dtype for the base, float32 for adapters",
        set(frozen) == {str(wanted)} and set(trained) == {"torch.float32"},
        f"base {_census(frozen)}; adapters {_census(trained)}",
        "Don't upcast parts of the base (prepare_model_for_kbit_training does), and store 4 bits in the compute dtype.",
    )


def check_storage(certificate: Certificate, four_bit: int, num_layers: int, config: ModelConfig) -> None:
    """Checks that the frozen layers are in 4 bits, all or none, as the config says."""
    certificate.require(
        "the base is stored as asked",
        four_bit == (num_layers if config.quantization is Quantization.nf4 else 0),
        f"{four_bit} of {num_layers} frozen layers in 4 bits, model.quantization={config.quantization.name}",
        "Load the base with its quantization config.",
    )


def check_placement(certificate: Certificate, model: LaneModel, strategy: Strategy, whole_bytes: int) -> None:
    """Checks that each rank holds its part of the base and no more: FSDP has left 4-bit weights whole in silence."""
    held = strategy.base_bytes(model)
    whole = [n for n, p in model.named_parameters() if not p.requires_grad and not _is_divided(p)]
    num_parts = strategy.num_parts
    predicted = whole_bytes / num_parts
    certificate.require(
        "each rank holds its part of the base",
        held <= predicted * 1.02 + 65536 and (num_parts == 1 or not whole),
        f"{held:,} bytes a rank, {whole_bytes:,} in all, in {num_parts} parts; {len(whole)} tensors whole",
        "The storage dtype must equal the compute dtype, or the sharding leaves the 4-bit weights out.",
    )


def check_rows(certificate: Certificate, rows: Rows, budget: Budget | None = None) -> None:
    """Checks that there is something to learn, the end of a record included, and in each step of a `budget`."""
    trained_BT = np.asarray(rows.trained_BT)
    share = float(trained_BT.mean())
    certificate.require(
        "tokens are trained",
        bool(trained_BT.any()),
        f"{int(trained_BT.sum()):,} of {trained_BT.size:,} slots ({share:.0%})",
        "Check the records' responses and train.row_tokens.",
    )
    if budget is not None:
        taught_B = np.asarray(trained_BT.any(1))
        steps = range(0 if taught_B.all() else budget.num_steps)
        idle = [step for step in steps if not taught_B[budget.rows_of_step(step)].any()]
        certificate.require(
            "each step has targets",
            not idle,
            f"{budget.num_steps - len(idle):,} of {budget.num_steps:,} steps"
            + (f"; none in step {idle[0] + 1}, so its loss would read 0" if idle else ""),
            "Raise train.tokens_per_step, or check that the records' responses are not cut off.",
        )
    ends = int((trained_BT & (np.asarray(rows.tokens_BT) == rows.end_id)).sum())
    certificate.require(
        "the end token is trained",
        ends > 0,
        f"{ends:,} targets are the end token {rows.end_id}",
        "A template must end each response with the tokenizer's end token, or the model never stops.",
    )


def check_loss(certificate: Certificate, stepper: Stepper, lane: Lane) -> None:
    """Checks the loss in chunks against the model's own whole logits, on a real row."""
    batch = {n: v.to(stepper.strategy.device) for n, v in tensors(lane.rows, np.array([0])).items()}
    ours, whole = (float(_forward(stepper, batch, whole_logits=whole)) for whole in (False, True))
    _refuse_lost_base(whole)
    tolerance = 1e-4 if next(stepper.model.parameters()).dtype == torch.float32 else 2e-2
    certificate.require(
        "the loss is the model's own",
        abs(ours - whole) <= tolerance * max(1.0, abs(whole)),
        f"{ours:.6g} in chunks, {whole:.6g} of whole logits",
        "This architecture changes logits after its head: name the config field in train/loss.py.",
    )


Probe = Callable[[dict[str, torch.Tensor]], float]
"""Returns the base's summed loss of a batch."""


def probe_of(stepper: Stepper) -> Probe:
    """Returns the engine's own probe: the loop's forward, adapters and dropout out of the way."""
    at_once = sum(lane.train.micro_batch_tokens // lane.train.row_tokens for lane in stepper.lanes)

    def probe(batch: dict[str, torch.Tensor]) -> float:
        return float(_forward(stepper, twice(batch) if at_once > 1 else batch))

    return probe


def twice(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns each row twice: an attention may keep segments apart in a batch of one row, and mix them in others."""
    return {name: value.repeat(2, 1) for name, value in batch.items()}


def check_no_leak(certificate: Certificate, rows: Rows, device: torch.device, probe: Probe) -> None:
    """Changes one segment of a real row and looks whether the loss of another one moves."""
    row = _row_of_two(rows)
    name = "no attention between segments"
    if row is None:
        certificate.require(name, True, "no row has two segments that are trained", "")
        return
    first, second = rows.segments_of(row)[:2]
    batch = {n: v.to(device) for n, v in tensors(rows, np.array([row])).items()}
    start, length = int(second["start"]), int(second["length"])
    batch["labels"][:, :start] = IGNORED
    batch["labels"][:, start + length :] = IGNORED
    before = probe(batch)
    _refuse_lost_base(before)
    other = _with_changed(batch, int(first["start"]), int(first["length"]))
    own = _with_changed(batch, start, max(1, length - 1))
    leak, moved = (abs(probe(b) - before) for b in (other, own))
    certificate.require(
        name,
        leak <= 1e-3 * max(1.0, abs(before)) and moved > leak,
        f"loss {before:.5g} moves by {leak:.2g} with the other segment, by {moved:.2g} with its own",
        "Set model.attention=sdpa or flex_attention: the one that runs does not keep packed segments apart.",
    )


def _refuse_lost_base(loss: float) -> None:
    if not math.isfinite(loss):
        repair = "Its weights overflow: look at the model's files, or set model.compute_dtype=bfloat16"
        raise TrainError(f"Step 0: loss is {loss} of the base alone, on a real row. {repair}.")


def _row_of_two(rows: Rows) -> int | None:
    for row in range(min(rows.num_rows, 1000)):
        segments = rows.segments_of(row)
        if len(segments) >= 2:
            part = slice(int(segments[1]["start"]), int(segments[1]["start"]) + int(segments[1]["length"]))
            if np.asarray(rows.trained_BT[row, part]).any() and int(segments[1]["length"]) > 1:
                return row
    return None


def _with_changed(batch: dict[str, torch.Tensor], start: int, length: int) -> dict[str, torch.Tensor]:
    tokens = batch["input_ids"].clone()
    part = tokens[:, start : start + length]
    tokens[:, start : start + length] = (part + 1 + torch.arange(length, device=part.device) % 7) % 250
    return batch | {"input_ids": tokens}


def _forward(stepper: Stepper, batch: dict[str, torch.Tensor], whole_logits: bool = False) -> torch.Tensor:
    """Returns the base's summed loss of one row, adapters and dropout out of the way."""
    stepper.seating.rows = {}
    stepper.model.eval()
    with torch.no_grad():
        nll_B: torch.Tensor = stepper.model(**batch, whole_logits=whole_logits)
    stepper.model.train()
    return nll_B.sum()


def _is_divided(parameter: torch.Tensor) -> bool:
    """Says whether FSDP or ZeRO-3 has divided a parameter over the ranks."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def base_fingerprint(model: nn.Module) -> list[int]:
    """Returns two checksums of this rank's bytes of the base, computed where they lie."""
    plain, placed = 0, 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        data = _local(parameter).detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, data.numel(), 1 << 24):
            part = data[start : start + (1 << 24)].to(torch.int64)
            plain += int(part.sum())
            placed = (placed * 31 + int((part * torch.arange(1, part.numel() + 1, device=part.device)).sum())) % (2**61)
    return [plain, placed]


def check_unchanged(certificate: Certificate, before: list[int], after: list[int]) -> None:
    """Checks that the base holds the bytes that it held before the first step, by their checksums."""
    certificate.require(
        "the base is unchanged",
        before == after,
        f"checksum {after[1]:x} of this rank's part, {before[1]:x} before",
        "Something wrote to frozen weights: run again, and report it.",
    )


def _census(found: Counter[str]) -> str:
    return ", ".join(f"{count} {dtype.removeprefix('torch.')}" for dtype, count in sorted(found.items())) or "none"
