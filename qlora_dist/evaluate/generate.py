"""Answers are generated greedily, many at a time, with the template and the stop tokens of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dist.data.encode import Encoder
from qlora_dist.data.record import Message


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model said: the text without special tokens, its tokens, and whether it ended of itself."""

    text: str
    num_tokens: int
    ended: bool


class Prompter:
    """Turns conversations into prompts as training rendered them, and tokens back into text."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.stop_ids = self._stop_ids()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens before the answer to `messages`, which end with a user's (or a tool's) turn."""
        answered: list[Message] = [*messages, {"role": "assistant", "content": "."}]
        text, spans = self.encoder.template.conversation(answered)
        self.encoder.tokenizer.encode_special_tokens = False
        ids: list[int] = self.encoder.tokenizer.encode(text[: spans[-1].start], add_special_tokens=False).ids
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Returns the tokens of running text that is to be continued, after the token that starts a text."""
        self.encoder.tokenizer.encode_special_tokens = True
        ids: list[int] = self.encoder.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.encoder.start_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones left out."""
        silent = set(self.encoder.silent_ids)
        text: str = self.encoder.tokenizer.decode([i for i in ids if i not in silent], skip_special_tokens=True)
        return text

    def _stop_ids(self) -> list[int]:
        self.encoder.tokenizer.encode_special_tokens = False
        closing = self.encoder.tokenizer.encode(self.encoder.template.closing, add_special_tokens=False).ids
        return sorted({self.encoder.end_id, *(i for i in closing if i in set(self.encoder.silent_ids))})


def generate(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    *,
    adapters: Sequence[str] | None = None,
) -> Iterator[Generated]:
    """Yields the greedy answer to each prompt, in order; prompts of about one length share a batch.

    Args:
        model: a causal language model, PEFT's wrapper or not.
        prompter: of the tokenizer and template of training.
        prompts: tokens, as `Prompter.prompt_ids` makes them.
        max_new_tokens: of each answer.
        batch_tokens: a batch's prompts and answers together.
        adapters: PEFT's name of the adapter that answers each prompt (`__base__` for none): one batch may hold
            several. Without it, what is switched on answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Generated] = {}
    while order:
        longest = len(prompts[order[-1]]) + max_new_tokens
        size = max(1, batch_tokens // longest)
        batch, order = order[-size:], order[:-size]
        names = [adapters[i] for i in batch] if adapters is not None and hasattr(model, "peft_config") else None
        answers = _generate_batch(model, prompter, [prompts[i] for i in batch], max_new_tokens, names)
        found.update(zip(batch, answers, strict=True))
    yield from (found[i] for i in range(len(prompts)))


def _generate_batch(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    adapters: list[str] | None,
) -> list[Generated]:
    import torch

    pad, longest = prompter.encoder.pad_id, max(len(p) for p in prompts)
    tokens_BT = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for b, prompt in enumerate(prompts):  # padded on the left: the answer starts at the same slot in each row
        tokens_BT[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, longest - len(prompt) :] = 1
    place = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        out_BT = model.generate(
            input_ids=tokens_BT.to(place),
            attention_mask=mask_BT.to(place),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=prompter.stop_ids,
            pad_token_id=pad,
            **({"adapter_names": adapters} if adapters is not None else {}),
        )
    return [_until_stop(prompter, row) for row in out_BT[:, longest:].tolist()]


def _until_stop(prompter: Prompter, ids: list[int]) -> Generated:
    stop = next((i for i, token in enumerate(ids) if token in prompter.stop_ids), None)
    kept = ids if stop is None else ids[:stop]
    return Generated(prompter.decode(kept).strip(), len(kept), stop is not None)
