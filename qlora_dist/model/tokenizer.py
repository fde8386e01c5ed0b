"""The base's tokenizer: copied with the model's config, or trained for the embedded base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_dist.config.model import TinyConfig
from qlora_dist.config.stages import TokenizerConfig
from qlora_dist.data.record import read_records
from qlora_dist.errors import DataError, ModelError
from qlora_dist.runtime import Facts, write_json

SPECIAL_TOKENS = BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
"""The trainer gives them the first ids, 0, 1 and 2, in this order."""


def write_tokenizer(config: TokenizerConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes tokenizer files and the model's `config.json` to `out`.

    Raises:
        ModelError: if the base has no usable tokenizer or config.
        DataError: if there is too little text to train a tokenizer on.
    """
    if config.tiny is not None:
        return _train_tokenizer(config.tiny, inputs, out)
    return _copy_tokenizer(config, out)


def _copy_tokenizer(config: TokenizerConfig, out: Path) -> Facts:
    from transformers import AutoConfig, AutoTokenizer

    revision = config.revision or None
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=revision)
        model_config = AutoConfig.from_pretrained(config.path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        wanted = "a folder or hub id with config.json and tokenizer files"
        raise ModelError(f"model.path={config.path}: expected {wanted}. {first}") from error
    tokenizer.save_pretrained(out)
    model_config.save_pretrained(out)
    vocab_size = model_config.get_text_config().vocab_size
    return {"vocab_size": len(tokenizer), "model_vocab_size": vocab_size, "has_template": bool(tokenizer.chat_template)}


def _train_tokenizer(tiny: TinyConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from qlora_dist.model.tiny import llama_config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(tiny, inputs), trainer)
    if tokenizer.get_vocab_size() != tiny.vocab_size:
        found = tokenizer.get_vocab_size()
        repair = f"Give it more text, or set model.tiny.vocab_size={found}."
        raise DataError(
            f"The training text has only {found} tokens to learn, {tiny.vocab_size} were asked for. {repair}"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", _tokenizer_config(8 * tiny.context_tokens))
    llama_config(tiny, *range(len(SPECIAL_TOKENS))).save_pretrained(out)
    return {"vocab_size": tiny.vocab_size, "model_vocab_size": tiny.vocab_size, "has_template": False}


def _tokenizer_config(model_max_length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }


def _training_texts(tiny: TinyConfig, inputs: Mapping[str, Path]) -> Iterator[str]:
    """Yields the general training text whole, and the first `domain_sample_bytes` of each domain's."""
    yield from (record.whole() for record in read_records(inputs["splits-general"] / "train.jsonl"))
    for name in sorted(inputs):
        if name == "splits-general":
            continue
        left = tiny.domain_sample_bytes
        for record in read_records(inputs[name] / "train.jsonl"):
            if left <= 0:
                break
            yield record.whole()
            left -= len(record.whole().encode())
