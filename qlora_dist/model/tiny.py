"""The embedded base: a Llama of a few million parameters, pre-trained here on the `general` corpus.

It exists so that the whole of the project runs, for real, on a machine with no GPU and no model hub.
Legend: B rows of a batch, T slots of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.config.model import TinyConfig
from qlora_dist.config.stages import TinyStageConfig
from qlora_dist.data.rows import Rows, row_order
from qlora_dist.errors import DataError, TrainError
from qlora_dist.runtime import Facts, JsonlSink, Progress, log_metrics, set_seed, sinks

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def make_tiny(config: TinyStageConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Pre-trains the embedded base on packed rows; `out` becomes a Hugging Face model folder.

    Seeded: the same rows, config, machine and number of threads give the same bytes.

    Raises:
        DataError: if the rows hold nothing to train on.
        TrainError: if the loss is no longer a number.
    """
    from transformers import AutoTokenizer, LlamaConfig

    tiny = config.tiny
    set_seed(tiny.seed)
    rows = Rows.open(inputs["rows"])
    if rows.num_rows == 0:
        raise DataError(f"{inputs['rows']} holds no row: the general corpus is too small to pre-train on.")
    model = _new_model(LlamaConfig.from_pretrained(inputs["tokenizer"]))
    started = time.monotonic()
    with sinks(JsonlSink(out / "metrics.jsonl")):
        losses = list(_train(model, rows, tiny))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(inputs["tokenizer"]).save_pretrained(out)
    seconds = time.monotonic() - started
    tokens = len(losses) * tiny.tokens_per_step
    return {
        "parameters": model.num_parameters(),
        "steps": len(losses),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if losses else 0.0,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def llama_config(tiny: TinyConfig, bos_id: int, eos_id: int, pad_id: int) -> LlamaConfig:
    """Returns the transformers config of the embedded base."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_key_value_heads,
        max_position_embeddings=8 * tiny.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        dtype="float32",
    )


def _new_model(config: LlamaConfig) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("cpu"):
        return LlamaForCausalLM(config)


def _train(model: LlamaForCausalLM, rows: Rows, tiny: TinyConfig) -> Iterator[float]:
    """Takes the optimizer steps that the token budget allows, yielding each one's mean loss in nats a token."""
    import torch

    rows_per_step = max(1, tiny.tokens_per_step // rows.row_tokens)
    steps = tiny.pretrain_tokens // (rows_per_step * rows.row_tokens)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tiny.learning_rate, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY
    )
    progress = Progress(total=steps)
    progress.update(0)
    order = _row_stream(rows, tiny.seed)
    model.train()
    for step in range(1, steps + 1):
        started = time.monotonic()
        rate = tiny.learning_rate * _schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(model, rows, [next(order) for _ in range(rows_per_step)], optimizer)
        if not math.isfinite(loss):
            raise TrainError(f"The loss of the embedded base is {loss} at step {step}. Lower model.tiny.learning_rate.")
        speed = rows_per_step * rows.row_tokens / (time.monotonic() - started)
        log_metrics(step, {"loss": loss, "learning_rate": rate, "tokens_per_s": speed})
        progress.update(step, loss=loss, tokens_per_s=speed)
        yield loss


def _step(model: LlamaForCausalLM, rows: Rows, indices: list[int], optimizer: torch.optim.Optimizer) -> float:
    import torch

    batch = rows.batch(indices)
    tokens_BT, position_BT = torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.position_BT)
    labels_BT = tokens_BT.masked_fill(~torch.from_numpy(batch.trained_BT), -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
        loss = model(input_ids=tokens_BT, position_ids=position_BT, labels=labels_BT, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _has_fast_bfloat16() -> bool:
    """Says whether this CPU multiplies bfloat16 in hardware; elsewhere float32 is the faster one."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _row_stream(rows: Rows, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        order: numpy.ndarray = row_order(rows.num_rows, seed, epoch)
        yield from (int(index) for index in order)
        epoch += 1


def _schedule(step: int, steps: int) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step <= warmup:
        return step / warmup
    through = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * through))
