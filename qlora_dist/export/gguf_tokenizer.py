"""A Hugging Face tokenizer in a GGUF file: byte-level BPE (`gpt2`) and SentencePiece-like BPE (`llama`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qlora_dist.errors import ModelError, bad_value, nearest
from qlora_dist.model.weights import read_json

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"|\p{N}" + _REST: "qwen2",
    _TEKKEN: "tekken",
}
"""The pattern that splits text before byte-level BPE, and llama.cpp's name of it."""
PRE_TOKENIZER_NAMES = frozenset({
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell", "cohere2moe",
    "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3", "default", "exaone",
    "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "gpt-2",
    "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m", "grok-2",
    "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna", "lfm2",
    "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b",
    "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "poro-chat", "qwen2", "qwen35",
    "refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "spark2_5", "stablelm2",
    "starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "ufakzeka", "viking", "whitespace", "youtu",
})  # fmt: skip
"""The names of pre-tokenizers in llama.cpp's llama-vocab.cpp; it refuses a file with any other."""


def add_tokenizer(writer: Any, folder: Path, vocab_size: int, pre: str = "", template: str | None = None) -> None:
    """Writes vocabulary, merges, special tokens and chat template into a GGUF file's header.

    Args:
        writer: the GGUF writer.
        folder: of tokenizer.json and tokenizer_config.json.
        vocab_size: the model's; what the tokenizer doesn't fill is marked unused.
        pre: llama.cpp's name of the pre-tokenizer, where it isn't found out.
        template: the chat template, in place of the folder's.

    Raises:
        ModelError: for a tokenizer that llama.cpp has no equal of, with the repair.
    """
    import gguf

    fields, pre = refuse_tokenizer(folder, pre, vocab_size)
    tokens, types = _tokens(fields, vocab_size)
    if fields["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre)
        writer.add_token_scores(_scores(fields, tokens))
        writer.add_add_space_prefix(_prepends_space(fields))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    has_merges = not fields["model"].get("byte_fallback")
    special = gguf.SpecialVocab(folder, load_merges=has_merges, n_vocab=vocab_size)
    special.chat_template = special.chat_template if template is None else template
    special.add_special_token.setdefault("bos", _begins_with_bos(folder))
    special.add_to_gguf(writer, quiet=True)


def refuse_tokenizer(folder: Path, pre: str, vocab_size: int) -> tuple[dict[str, Any], str]:
    """Returns the fields of tokenizer.json and llama.cpp's name of its pre-tokenizer, which `pre` may name.

    Raises:
        ConfigError: for a name that llama.cpp doesn't know.
        ModelError: for a tokenizer that llama.cpp has no equal of, or that is larger than the model; with the repair.
    """
    if pre and pre not in PRE_TOKENIZER_NAMES:
        raise bad_value("export.tokenizer_pre", pre, "a name that llama.cpp knows", nearest(pre, PRE_TOKENIZER_NAMES))
    fields = read_json(folder / "tokenizer.json", "llama.cpp's tokenizer is made from it")
    kind = fields["model"].get("type")
    if kind != "BPE":
        raise ModelError(f"{folder}: a {kind} tokenizer; --to gguf knows BPE. Export with --to hf.")
    if not fields["model"].get("merges"):
        raise ModelError(f"{folder}: its tokenizer has no merges, which llama.cpp asks for. Export with --to hf.")
    if (last := max(fields["model"]["vocab"].values(), default=0)) >= vocab_size:
        found = f"its tokenizer has a token {last}, the model {vocab_size} in all"
        raise ModelError(f"{folder}: {found}. Give the base its own tokenizer.")
    if fields["model"].get("byte_fallback"):
        return fields, "default"
    return fields, pre or pre_tokenizer_name(fields, folder)


def pre_tokenizer_name(fields: dict[str, Any], folder: Path) -> str:
    """Returns llama.cpp's name of a tokenizer.json's pre-tokenizer, by what it does and not by whose it is.

    Raises:
        ModelError: if llama.cpp has none that does the same, so far as is known here.
    """
    steps = fields.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(byte_level) == 1 and len(steps) == 1 and byte_level[0].get("use_regex", True):
        return "gpt-2"
    if len(byte_level) == 1 and len(patterns) == 1 and len(steps) == 2 and patterns[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[patterns[0]]
    where = "The list is in its llama-vocab.cpp."
    shown = hashlib.sha256(str(steps).encode()).hexdigest()[:8]
    repair = "Name the right one with --tokenizer-pre, in a run with export.tokenizer_pre, or export to hf instead."
    raise ModelError(
        f"{folder}/tokenizer.json: llama.cpp's name of its pre-tokenizer ({shown}) is unknown. {where} {repair}"
    )


def _tokens(fields: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns the text and the type of each token by id."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    unknown = fields["model"].get("unk_token")
    for text, i in fields["model"]["vocab"].items():
        is_byte = fields["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        kind = TokenType.BYTE if is_byte else TokenType.UNKNOWN if text == unknown else TokenType.NORMAL
        tokens[i], types[i] = text, int(kind)
    for added in fields.get("added_tokens", []):
        if added["id"] < vocab_size:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]] = added["content"]
            if types[added["id"]] != int(TokenType.UNKNOWN):
                types[added["id"]] = int(kind)
    return tokens, types


def _scores(fields: dict[str, Any], tokens: list[str]) -> list[float]:
    """Returns minus the rank of the merge that first makes each token: llama.cpp joins the pair of highest score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(fields["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank + 1)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _prepends_space(fields: dict[str, Any]) -> bool:
    steps = [fields.get("normalizer") or {}, fields.get("pre_tokenizer") or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", step.get("pretokenizers", []))]
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or any(step.get("prepend_scheme", "never") != "never" for step in steps)


def _begins_with_bos(folder: Path) -> bool:
    """Says whether the tokenizer itself puts a begin token before a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a").input_ids
    return bool(tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id)
