"""llama.cpp as a judge: a GGUF file served in this process, asked for tokens, greedy text and probabilities."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

NUM_GREEDY = 12


class LlamaCpp:
    """One GGUF file served by llama.cpp in this process."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
        settings.cpuparams.n_threads = 1
        settings.verbosity = 0
        if lora is not None:
            told = xllamacpp.CommonAdapterLoraInfo()
            told.path, told.scale = str(lora), 1.0
            settings.lora_adapters = [told]
        self._server = xllamacpp.Server(settings)

    def greedy(self, prompt: list[int]) -> list[int]:
        return self._ask("/completion", prompt=prompt, n_predict=NUM_GREEDY, return_tokens=True, ignore_eos=True)[
            "tokens"
        ]

    def tokens(self, text: str) -> list[int]:
        return self._ask("/tokenize", content=text, add_special=True)["tokens"]

    def loss(self, tokens: list[int], vocab_size: int, letter: int) -> float:
        """Returns the mean negative log-likelihood of the tokens after the first, in nats.

        The next token is forced to a whole letter: llama.cpp keeps back the probabilities of half characters.
        """
        total = 0.0
        for i in range(1, len(tokens)):
            forced = {"n_predict": 1, "n_probs": vocab_size, "logit_bias": [[letter, 1e4]], "temperature": 1.0}
            told = self._ask("/completion", prompt=tokens[:i], cache_prompt=False, **forced)
            found = {p["id"]: p["logprob"] for p in told["completion_probabilities"][0]["top_logprobs"]}
            total -= found[tokens[i]]
        return total / (len(tokens) - 1)

    def _ask(self, path: str, **fields: Any) -> dict[str, Any]:
        body = json.dumps({"temperature": 0.0} | fields).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())
