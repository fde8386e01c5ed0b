"""One export from start to end: checks, writing aside, comparing, the rename, and what is said of it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from qlora_dist.errors import ModelError, bad_value
from qlora_dist.export import check
from qlora_dist.export.huggingface import DTYPES, Gain, write_model
from qlora_dist.export.refusals import refuse_base, refuse_unused, refuse_without_gguf
from qlora_dist.export.weights import MergedWeights
from qlora_dist.model.base import model_folder, no_progress_bars
from qlora_dist.model.peft_folder import PeftFolder, chat_template, vocabulary
from qlora_dist.model.tensorfile import whole
from qlora_dist.model.weights import find_weights, folder_digest, read_json
from qlora_dist.runtime import Facts, log, write_json

EXPORT_FILE = "export.json"
LOW_GAIN = 0.9
"""Below this share of ΔW that survives rounding, the export says how to keep more."""
_SHORT = {dtype: name for name, dtype in DTYPES.items()}


def export(arguments: argparse.Namespace) -> Facts:
    """Writes what the arguments ask for to `--out`, whole or not at all, and returns what was measured.

    Raises:
        ModelError: if base, adapter or format can't be used, or the result isn't the same model.
        ConfigError: for arguments that don't go together.
    """
    base = model_folder(arguments.base, arguments.revision)
    _refuse_early(arguments, base)
    out = Path(arguments.out)
    with (
        PeftFolder(Path(arguments.adapter)) as adapter,
        MergedWeights(base, adapter, as_nf4=arguments.base_as == "nf4") as weights,
    ):
        check_base(adapter, base)
        dtype = _dtype(arguments, weights)
        tokens = None
        if arguments.to != "gguf-lora":
            tell_of_tokenizer(adapter, base)
            tokens = None if arguments.no_check else check.probe_tokens(base, weights.vocab_size)
        facts: Facts = {
            "adapter": str(adapter.path),
            "base": str(base),
            "base_as": arguments.base_as,
            "to": arguments.to,
            "dtype": dtype,
            "out": str(out),
        }
        with whole(out) as aside:
            gains = _write(arguments, weights, aside, dtype)
            facts |= gain_facts(gains)
            if tokens is not None:
                facts |= _check(arguments, weights, aside, dtype, tokens)
            if arguments.to == "hf":
                write_json(aside / EXPORT_FILE, facts)
    return facts


def _refuse_early(arguments: argparse.Namespace, base: Path) -> None:
    """Refuses what the arguments and the base's small files tell, before a weight is read."""
    if arguments.dtype == "q8_0" and arguments.to != "gguf":
        raise bad_value("--dtype", "q8_0", f"bf16, f16 or f32 with --to {arguments.to}", "Set --to gguf for 8 bits.")
    refuse_unused(arguments.to, arguments.tokenizer_pre)
    if arguments.to != "hf":
        refuse_without_gguf(arguments.to)
    config = read_json(base / "config.json", "a model folder holds config.json and *.safetensors")
    refuse_base(config, base, arguments.to, arguments.tokenizer_pre)


def tell_of_tokenizer(adapter: PeftFolder, base: Path) -> None:
    """Says which of two tokenizers and chat templates is exported, where the adapter has others than the base."""
    own, theirs = vocabulary(adapter.path), vocabulary(base)
    if own is not None and theirs is not None and own != theirs:
        told = "its tokenizer.json numbers tokens otherwise than the base's, which is the one that is exported"
        log.warning("%s: %s.", adapter.path, told)
    template = chat_template(adapter.path)
    if template is not None and template != chat_template(base):
        log.warning("%s: its chat template is exported, in place of the base's.", adapter.path)


def check_base(adapter: PeftFolder, base: Path) -> None:
    """Checks by content that the adapter was trained on this base, where it says on which.

    Raises:
        ModelError: naming both.
    """
    known = adapter.provenance
    if known is None:
        log.warning(
            "%s doesn't say by content what base it was trained on; the shapes of its layers fit.", adapter.path
        )
        return
    digest = folder_digest(base, ["config.json", *find_weights(base).files])
    if digest != known.base_digest:
        theirs = f"{known.base_path} (digest {known.base_digest[:12]})"
        raise ModelError(f"{adapter.path}: was trained on {theirs}, not on --base={base} (digest {digest[:12]}).")


def _dtype(arguments: argparse.Namespace, weights: MergedWeights) -> str:
    """Returns the dtype of what is written; those of the base, most values first, where each weight keeps its own."""
    if arguments.dtype:
        return str(arguments.dtype)
    if arguments.to == "gguf-lora":
        return "f32"
    sizes: Counter[torch.dtype] = Counter()
    for entry in map(weights.entry, weights.names):
        sizes[entry.dtype] += entry.num_bytes // entry.dtype.itemsize
    found = [dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point]
    if unknown := [dtype for dtype in found if dtype not in _SHORT]:
        shown = f"bf16, f16 or f32: {weights.base} has weights of {str(unknown[0]).removeprefix('torch.')}"
        raise bad_value("--dtype", "", shown, "Set --dtype f32.")
    names = [_SHORT[dtype] for dtype in found]
    return "+".join(names) if arguments.to == "hf" else names[0]


def _write(arguments: argparse.Namespace, weights: MergedWeights, out: Path, dtype: str) -> dict[str, Gain]:
    if arguments.to == "hf":
        out.mkdir()
        return write_model(weights, out, DTYPES[dtype] if arguments.dtype else None)
    from qlora_dist.export.gguf_file import write_gguf, write_gguf_lora

    if arguments.to == "gguf":
        return write_gguf(weights, out, dtype, arguments.tokenizer_pre)
    write_gguf_lora(weights, out, dtype)
    return {}


def _check(
    arguments: argparse.Namespace, weights: MergedWeights, out: Path, dtype: str, tokens_1T: torch.Tensor
) -> Facts:
    """Returns how far the export is from base + adapter; and if training saw 4 bits, from the other base + adapter."""
    no_progress_bars()
    base, adapter, as_nf4 = weights.base, weights.adapter, arguments.base_as == "nf4"
    exported_TV = check.exported_logits(out, base, tokens_1T, is_tied=weights.is_tied)
    found = check.drift(*check.reference_logits(base, adapter.path, tokens_1T, as_nf4), exported_TV)
    check.refuse_drift(found, dtype, Path(arguments.out))
    facts: Facts = {"drift": asdict(found) | {"share": found.error / found.effect if found.effect else 0.0}}
    if as_nf4 or (adapter.provenance is not None and adapter.provenance.quantization == "nf4"):
        other = check.drift(*check.reference_logits(base, adapter.path, tokens_1T, not as_nf4), exported_TV)
        facts["other_base"] = {"base_as": "original" if as_nf4 else "nf4", **asdict(other)}
    return facts


def gain_facts(gains: Mapping[str, Gain]) -> Facts:
    """Returns the gain of all layers together and of each, lowest first."""
    if not gains:
        return {}
    whole = sum(gains.values(), Gain())
    modules = {name: {"gain": round(g.share, 6), "size": g.size} for name, g in gains.items()}
    return {
        "gain": round(whole.share, 6),
        "update_size": whole.size,
        "modules": dict(sorted(modules.items(), key=lambda item: item[1]["gain"])),
    }


def show(facts: Facts) -> None:
    """Prints what was written, what survived, how near it is, and the command to type next."""
    from rich.console import Console

    tell = partial(Console(soft_wrap=True, highlight=False).print, markup=False)
    tell(f"written: {facts['out']} ({facts['to']}, {facts['dtype']}, base {facts['base_as']})")
    if "gain" in facts:
        lowest, values = next(iter(facts["modules"].items()))
        tell(
            f"gain: {facts['gain']:.1%} of ΔW survives rounding; lowest {values['gain']:.1%} in {lowest}"
            f" (‖ΔW‖ / ‖W‖ {facts['update_size']:.2g})"
        )
    if "drift" in facts:
        drift = facts["drift"]
        tell(
            f"check: logits {drift['error']:.2%} from base + adapter (the base alone: {drift['effect']:.2%}),"
            f" KL {drift['kl']:.2g} nats, same greedy token {drift['greedy_agreement']:.1%}"
        )
    if "other_base" in facts:
        other = facts["other_base"]
        tell(
            f"the other base: logits {other['error']:.2%} from --base-as {other['base_as']} + adapter,"
            f" KL {other['kl']:.2g} nats (4-bit training saw nf4)"
        )
    if facts.get("gain", 1.0) < LOW_GAIN or facts.get("drift", {}).get("share", 0.0) > 1 - LOW_GAIN:
        repair = "export with --dtype f32, or ship the adapter unmerged"
        tell(f"warning: rounding to {facts['dtype']} eats a part of this adapter: {repair}.")
    tell(f"next: {_next(facts)}")


def _next(facts: Facts) -> str:
    if facts["to"] == "hf":
        script = f"from transformers import pipeline; print(pipeline('text-generation', '{facts['out']}')('The'))"
        return f'python -c "{script}"'
    if facts["to"] == "gguf":
        return f"llama-cli -m {facts['out']} -p 'The'"
    return f"llama-cli -m BASE.gguf --lora {facts['out']} -p 'The'"
