"""What tests of this package and of code built on it need: small real models, rows, and several real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}
"""The architectures that `save_tiny_model` makes, with transformers' config class of each."""


def save_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_key_value_heads: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Saves a small random model with a byte-level tokenizer as a Hugging Face folder, and returns the folder."""
    import torch
    import transformers

    from qlora_dist.model.base import no_progress_bars

    no_progress_bars()
    torch.manual_seed(seed)
    vocab_size = save_byte_tokenizer(folder)
    config = getattr(transformers, ARCHITECTURES[architecture])(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // 4,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        **fields,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(str(folder))
    return folder


def save_byte_tokenizer(folder: Path) -> int:
    """Saves a tokenizer of 256 bytes and begin, end and padding tokens; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|begin|>", "<|end|>", "<|pad|>")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    ).save_pretrained(str(folder))
    return len(alphabet) + 3


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120, num_nodes: int = 1
) -> list[Any]:
    """Runs `function(*args)` in `num_ranks` real processes over gloo, and returns what each returned.

    `function` must be importable (a module's own), since the processes are spawned.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or naming the ranks that never ended.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_run_rank, args=(function, args, rank, num_ranks, port, results), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(results, num_ranks, timeout_s)
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()


def _collect(results: Any, num_ranks: int, timeout_s: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < num_ranks:
        try:
            rank, value, failure = results.get(timeout=timeout_s)
        except Exception:
            missing = sorted(set(range(num_ranks)) - set(found))
            raise AssertionError(f"ranks {missing} gave no result within {timeout_s:g} s") from None
        if failure:
            raise AssertionError(f"rank {rank} of {num_ranks} failed:\n{failure}")
        found[rank] = value
    return [found[rank] for rank in range(num_ranks)]


def _run_rank(  # noqa: PLR0917 - the target of a process takes its arguments by position
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, num_ranks: int, port: int, results: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*args), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def requires_gpu(test: Any) -> Any:
    """Marks a test `gpu`, and skips it where there is no CUDA device."""
    import pytest
    import torch

    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skipped(test))


__all__ = ["ARCHITECTURES", "requires_gpu", "run_ranks", "save_byte_tokenizer", "save_rows", "save_tiny_model"]


def save_rows(folder: Path, num_rows: int = 8, row_tokens: int = 32, *, vocab_size: int = 259, seed: int = 0) -> Path:
    """Saves packed rows of random records, two or three a row, in the format of docs/design.md; returns the folder.

    Their tokens follow a simple rule (each one more than the last, with some noise), so that training lowers the
    loss. The first third of each segment is a prompt and isn't trained.
    """
    generator = np.random.default_rng(seed)
    tokens_BT = np.zeros((num_rows, row_tokens), dtype=np.uint32)
    trained_BT = np.zeros((num_rows, row_tokens), dtype=bool)
    segments: list[tuple[int, int, int, int, int]] = []
    for row in range(num_rows):
        cuts = np.sort(generator.choice(np.arange(6, row_tokens - 6), size=2, replace=False))
        bounds = [0, *cuts.tolist(), row_tokens - int(generator.integers(0, 4))]
        for start, end in pairwise(bounds):
            if end - start < 4:
                continue
            length = end - start
            noise = generator.integers(0, 2, size=length)
            tokens_BT[row, start:end] = (int(generator.integers(0, 200)) + np.cumsum(1 + noise)) % 256
            tokens_BT[row, end - 1] = 257
            trained_BT[row, start + max(1, length // 3) : end] = True
            segments.append((row, start, length, len(segments), length - max(1, length // 3) - 1))
    _write_rows(folder, tokens_BT, trained_BT, segments, vocab_size)
    return folder


def _write_rows(
    folder: Path,
    tokens_BT: np.ndarray,
    trained_BT: np.ndarray,
    segments: list[tuple[int, int, int, int, int]],
    vocab_size: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    from qlora_dist.data.rows import SEGMENT

    np.save(folder / "tokens.npy", tokens_BT)
    np.save(folder / "trained.npy", trained_BT)
    np.save(folder / "segments.npy", np.array(segments, dtype=SEGMENT))
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for *_, record, _ in segments:
            file.write(json.dumps({"id": f"r{record}", "cluster": f"r{record}", "source": "test"}) + "\n")
    shape = {"row_tokens": tokens_BT.shape[1], "num_rows": tokens_BT.shape[0], "vocab_size": vocab_size}
    special = {"start_id": 256, "end_id": 257, "pad_id": 258, "silent_ids": [256, 257, 258]}
    (folder / "rows.json").write_text(json.dumps(shape | special), encoding="utf-8")
