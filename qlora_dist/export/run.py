"""One export from start to end: checks, writing aside, comparing, the rename, and what is said of it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qlora_dist.errors import ModelError, bad_value
from qlora_dist.export import check
from qlora_dist.export.huggingface import DTYPES, Gain, write_model
from qlora_dist.export.refusals import refuse_without_gguf
from qlora_dist.export.weights import MergedWeights
from qlora_dist.model.base import model_folder, no_progress_bars
from qlora_dist.model.peft_folder import PeftFolder
from qlora_dist.model.weights import find_weights, folder_digest
from qlora_dist.runtime import Facts, log, write_json

EXPORT_FILE = "export.json"
LOW_GAIN = 0.9
"""Below this share of ΔW that survives rounding, the export says how to keep more."""
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def export(arguments: argparse.Namespace) -> Facts:
    """Writes what the arguments ask for to `--out`, whole or not at all, and returns what was measured.

    Raises:
        ModelError: if base, adapter or format can't be used, or the result isn't the same model.
        ConfigError: for arguments that don't go together.
    """
    base = model_folder(arguments.base, arguments.revision)
    out = Path(arguments.out)
    with (
        PeftFolder(Path(arguments.adapter)) as adapter,
        MergedWeights(base, adapter, as_nf4=arguments.base_as == "nf4") as weights,
    ):
        check_base(adapter, base)
        dtype = _dtype(arguments, base)
        facts: Facts = {
            "adapter": str(adapter.path),
            "base": str(base),
            "base_as": arguments.base_as,
            "to": arguments.to,
            "dtype": dtype,
            "out": str(out),
        }
        with _aside(out) as partial:
            gains = _write(arguments, weights, partial, dtype)
            facts |= gain_facts(gains)
            if not arguments.no_check and arguments.to != "gguf-lora":
                facts |= _check(arguments, base, adapter, partial, dtype)
            if arguments.to == "hf":
                write_json(partial / EXPORT_FILE, facts)
    return facts


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


def _dtype(arguments: argparse.Namespace, base: Path) -> str:
    if arguments.dtype == "q8_0" and arguments.to != "gguf":
        raise bad_value("--dtype", "q8_0", f"bf16, f16 or f32 with --to {arguments.to}", "Set --to gguf for 8 bits.")
    if arguments.dtype:
        return str(arguments.dtype)
    return "f32" if arguments.to == "gguf-lora" else _SHORT[find_weights(base).dtype]


def _write(arguments: argparse.Namespace, weights: MergedWeights, out: Path, dtype: str) -> dict[str, Gain]:
    if arguments.to == "hf":
        out.mkdir()
        return write_model(weights, out, DTYPES[dtype])
    refuse_without_gguf(arguments.to)
    from qlora_dist.export.gguf_file import write_gguf, write_gguf_lora

    if arguments.to == "gguf":
        return write_gguf(weights, out, dtype, arguments.tokenizer_pre)
    write_gguf_lora(weights.adapter, weights.config, out, dtype)
    return {}


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """Yields a path beside `out` that becomes `out` if the block ends well."""
    if out.exists():
        raise ModelError(f"--out={out}: is there already. Choose another name, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)
    try:
        yield partial
        partial.replace(out)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check(arguments: argparse.Namespace, base: Path, adapter: PeftFolder, out: Path, dtype: str) -> Facts:
    """Returns how far the export is from base + adapter; and if training saw 4 bits, from the other base + adapter."""
    no_progress_bars()
    tokens_1T, as_nf4 = check.probe_tokens(base), arguments.base_as == "nf4"
    exported_TV = check.exported_logits(out, base, tokens_1T)
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

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"written: {facts['out']} ({facts['to']}, {facts['dtype']}, base {facts['base_as']})")
    if "gain" in facts:
        lowest, values = next(iter(facts["modules"].items()))
        console.print(
            f"gain: {facts['gain']:.1%} of ΔW survives rounding; lowest {values['gain']:.1%} in {lowest}"
            f" (‖ΔW‖ / ‖W‖ {facts['update_size']:.2g})"
        )
    if "drift" in facts:
        drift = facts["drift"]
        console.print(
            f"check: logits {drift['error']:.2%} from base + adapter (the base alone: {drift['effect']:.2%}),"
            f" KL {drift['kl']:.2g} nats, same greedy token {drift['greedy_agreement']:.1%}"
        )
    if "other_base" in facts:
        other = facts["other_base"]
        console.print(
            f"the other base: logits {other['error']:.2%} from --base-as {other['base_as']} + adapter,"
            f" KL {other['kl']:.2g} nats (4-bit training saw nf4)"
        )
    if facts.get("gain", 1.0) < LOW_GAIN or facts.get("drift", {}).get("share", 0.0) > 1 - LOW_GAIN:
        repair = "export with --dtype f32, or ship the adapter unmerged"
        console.print(f"warning: rounding to {facts['dtype']} eats a part of this adapter: {repair}.")
    console.print(f"next: {_next(facts)}")


def _next(facts: Facts) -> str:
    if facts["to"] == "hf":
        script = f"from transformers import pipeline; print(pipeline('text-generation', '{facts['out']}')('The'))"
        return f'python -c "{script}"'
    if facts["to"] == "gguf":
        return f"llama-cli -m {facts['out']} -p 'The'"
    return f"llama-cli -m BASE.gguf --lora {facts['out']} -p 'The'"
