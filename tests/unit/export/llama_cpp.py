"""llama.cpp as a judge: a GGUF file served by a process of its own, asked for tokens, text and probabilities.

Not in this process: llama.cpp's server may wait forever for its own threads when it is taken down, and no time-out of
a test ends that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest

NUM_GREEDY = 12
SERVE = """
import sys
import xllamacpp

model, lora = sys.argv[1:]
settings = xllamacpp.CommonParams()
settings.model.path = model
settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
settings.cpuparams.n_threads = 1
settings.verbosity = 0
if lora:
    told = xllamacpp.CommonAdapterLoraInfo()
    told.path, told.scale = lora, 1.0
    settings.lora_adapters = [told]
server = xllamacpp.Server(settings)
print("\\nserves at", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """One GGUF file served by llama.cpp, as long as this object lives."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        pytest.importorskip("xllamacpp")
        command = [sys.executable, "-c", SERVE, str(model), str(lora or "")]
        pipe = subprocess.PIPE
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        weakref.finalize(self, _end, server)
        assert server.stdout is not None
        told = next((line for line in server.stdout if line.startswith("serves at ")), "")
        assert told, f"llama.cpp can't serve {model}"
        self._address = told.split()[-1]

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
        request = urllib.request.Request(self._address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()
