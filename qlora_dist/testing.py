"""What tests of this package and of code built on it need: small real models, rows, and several real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
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


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Runs `function(*args)` in `num_ranks` real processes over gloo, and returns what each returned.

    Raises:
        AssertionError: as `RankPool.run`.
    """
    with RankPool() as pool:
        return pool.run(function, num_ranks, *args, timeout_s=timeout_s)


class RankPool:
    """Real processes that are kept between runs, so that several tests pay for one start of torch.

    A function must be importable (a module's own), since the processes are spawned.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[tuple[Any, Any]] = []
        self._results: Any = self._context.Queue()

    def run(self, function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120) -> list[Any]:
        """Runs `function(*args)` on ranks 0 … num_ranks - 1, and returns what each returned.

        Raises:
            AssertionError: with the traceback of the first rank that failed, or naming the ranks that never ended.
        """
        self._start(num_ranks)
        port = _free_port()
        for rank in range(num_ranks):
            self._ranks[rank][1].put((function, args, rank_environment(rank, num_ranks, port)))
        try:
            return self._collect(num_ranks, timeout_s)
        except AssertionError:
            self.close()  # the others wait for the one that failed
            raise

    def close(self) -> None:
        """Ends the processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join(10)
        self._ranks, self._results = [], self._context.Queue()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, num_ranks: int) -> None:
        while len(self._ranks) < num_ranks:
            tasks = self._context.Queue()
            process = self._context.Process(target=_serve, args=(len(self._ranks), tasks, self._results), daemon=True)
            process.start()
            self._ranks.append((process, tasks))

    def _collect(self, num_ranks: int, timeout_s: float) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < num_ranks:
            try:
                rank, value, failure = self._results.get(timeout=timeout_s)
            except queue.Empty:
                missing = sorted(set(range(num_ranks)) - set(found))
                raise AssertionError(f"ranks {missing} gave no result within {timeout_s:g} s") from None
            if failure:
                raise AssertionError(f"rank {rank} of {num_ranks} failed:\n{failure}")
            found[rank] = value
        return [found[rank] for rank in range(num_ranks)]


PLACE_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which torchrun tells a process its place."""


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Returns what torchrun would tell rank `rank` of `num_ranks` on this machine; a lone process is told nothing."""
    place = (rank, rank, num_ranks, num_ranks, "127.0.0.1", port)
    return dict(zip(PLACE_VARIABLES, map(str, place), strict=True)) if num_ranks > 1 else {}


def _serve(rank: int, tasks: Any, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        function, args, environment = tasks.get()
        for name in PLACE_VARIABLES:
            os.environ.pop(name, None)
        os.environ |= environment
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
