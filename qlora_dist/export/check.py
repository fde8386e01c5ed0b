"""Is what was exported the same model? Its logits beside those of base + adapter, before it is called done.

Shape letters: T tokens of the probe text, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import ModelError
from qlora_dist.export.nf4 import linear_weights, nf4_round_trip
from qlora_dist.model.weights import TOKENIZER_FILES

TOLERANCES = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1.5e-1}
"""The largest relative error of the logits that rounding to a dtype explains."""
PROBE = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.\n"
    "def add(first, second):\n    return first + second\n"
    "The patient was seen in 1998 with 3.5 mg/l; 12 of 40 had fever. What does it mean?\n"
)
"""What the logits are compared on: prose, code and numbers, so that one domain doesn't hide an error in another."""
PROBE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an export is from base + adapter, and how far the adapter moved the base.

    `error` is ‖logits − logits of base + adapter‖ / ‖the latter‖, each token's mean taken out; `effect` the same for
    the base alone; `kl` the mean over tokens of KL(base + adapter ‖ export) in nats.
    """

    error: float
    effect: float
    kl: float
    greedy_agreement: float


def probe_tokens(folder: Path, vocab_size: int) -> torch.Tensor:
    """Returns the probe text as token ids [1, T], by the tokenizer in `folder`.

    Raises:
        ModelError: if there is no tokenizer, or it has tokens that the model hasn't.
    """
    from transformers import AutoTokenizer

    repair = "Put the base's own there, or set --no-check, which compares no logits."
    try:
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(PROBE).input_ids[:PROBE_TOKENS]
    except Exception as error:  # whatever the library of that kind of tokenizer raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_there = any((folder / name).exists() for name in TOKENIZER_FILES)
        found = f"its tokenizer can't be read ({first})" if is_there else "has no tokenizer"
        raise ModelError(f"{folder}: {found}. {repair}") from None
    if not tokens or max(tokens) >= vocab_size:
        found = f"gives token {max(tokens)}, the model has {vocab_size}" if tokens else "makes no token of plain text"
        raise ModelError(f"{folder}: its tokenizer {found}. {repair}")
    return torch.tensor([tokens])


def reference_logits(
    base: Path, adapter: Path, tokens_1T: torch.Tensor, as_nf4: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits [T, V] of the base alone and of base + unmerged adapter, computed in float32."""
    from peft import PeftModel

    model = _load(base)
    if as_nf4:
        rounded = linear_weights(base)
        for name, values in model.named_parameters():
            if name in rounded:
                values.data.copy_(nf4_round_trip(values.data))
    alone = _logits(model, tokens_1T)
    adapted = _logits(PeftModel.from_pretrained(model, str(adapter)), tokens_1T)
    del model
    gc.collect()
    return alone, adapted


def exported_logits(out: Path, base: Path, tokens_1T: torch.Tensor, *, is_tied: bool) -> torch.Tensor:
    """Returns the logits [T, V] of an exported folder or GGUF file, as transformers reads it, in float32.

    `is_tied` says of a GGUF file, which doesn't, whether embedding and head are one weight.
    """
    if out.is_dir():
        return _logits(_load(out), tokens_1T)
    from transformers import AutoConfig, LlamaConfig

    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = is_tied
    if config.model_type == "mistral":  # llama.cpp, and so transformers' GGUF reader, knows it as a Llama
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")})
    with redirect_stderr(StringIO()):  # a progress bar that no setting turns off
        model = _load(out.parent, gguf_file=out.name, config=config)
    return _logits(model, tokens_1T)


def drift(alone_TV: torch.Tensor, adapted_TV: torch.Tensor, exported_TV: torch.Tensor) -> Drift:
    """Returns how far `exported` is from `adapted`, beside how far `alone` is."""
    log_p, log_q = adapted_TV.log_softmax(-1), exported_TV.log_softmax(-1)
    return Drift(
        error=_relative(exported_TV, adapted_TV),
        effect=_relative(alone_TV, adapted_TV),
        kl=max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())),  # rounding may leave less than nothing
        greedy_agreement=float((adapted_TV.argmax(-1) == exported_TV.argmax(-1)).float().mean()),
    )


def refuse_drift(found: Drift, dtype: str, out: Path) -> None:
    """Refuses an export whose logits are further from base + adapter than rounding explains.

    Args:
        found: how far they are.
        dtype: of the stored weights; several, with '+' between, where the base's differ.
        out: what is refused.

    Raises:
        ModelError: naming the error and the tolerance.
    """
    tolerance = max(TOLERANCES[one] for one in dtype.split("+"))
    if found.error <= tolerance:
        return
    if not math.isfinite(found.error):
        repair = "Look for such values in the base's files; if there are none, the adapter is too large for it."
        raise ModelError(f"{out}: its logits, or those of base + adapter, hold NaN or infinite values. {repair}")
    shown = f"its logits are {found.error:.2%} from those of base + adapter, {tolerance:.2%} is what {dtype} explains"
    repair = "Export with --dtype f32; if that fails too, the adapter isn't of this base."
    if dtype == "f32":
        repair = "Rounding isn't the reason: the adapter isn't of this base, or is of a kind that PEFT adds otherwise."
    raise ModelError(f"{out}: {shown}. {repair}")


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options).eval()


@torch.inference_mode()
def _logits(model: Any, tokens_1T: torch.Tensor) -> torch.Tensor:
    logits_TV: torch.Tensor = model(input_ids=tokens_1T).logits[0].float()
    return logits_TV


def _relative(found_TV: torch.Tensor, wanted_TV: torch.Tensor) -> float:
    wanted = wanted_TV - wanted_TV.mean(-1, keepdim=True)
    found = found_TV - found_TV.mean(-1, keepdim=True)
    return float((found - wanted).norm() / wanted.norm())
