"""Export: a 2-GB random model and its adapter into a merged folder, beside a plain copy and beside load-merge-save.

`python benchmarks/bench_export.py` writes benchmarks/results/export.md; `--small` runs in seconds and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "export.md"


def make(folder: str, layers: int, width: int) -> None:
    """Writes a random bfloat16 Llama in shards, tensor by tensor, and a rank-16 adapter of its linear layers."""
    import torch

    from qlora_dist.model.tensorfile import TensorWriter

    root, inner, vocab = Path(folder), 11 * width // 4, 32000
    (root / "base").mkdir(parents=True)
    (root / "adapter").mkdir()
    linear = {
        **{f"self_attn.{p}_proj": (width, width) for p in "qkvo"},
        **{f"mlp.{p}_proj": (inner, width) for p in ("gate", "up")},
        "mlp.down_proj": (width, inner),
    }
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    (root / "base" / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes |= {f"model.layers.{n}.{m}.weight": s for n in range(layers) for m, s in linear.items()}
    norms = [f"model.layers.{n}.{m}_layernorm.weight" for n in range(layers) for m in ("input", "post_attention")]
    names = [*shapes, *norms, "model.norm.weight"]
    shards = [names[i::2] for i in range(2)]
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        with TensorWriter(root / "base" / file, shard) as writer:
            for name in shard:
                values = torch.randn(shapes[name]) * 0.02 if name in shapes else torch.ones(width)
                writer.add(name, values.bfloat16())
                where[name] = file
    index = {"metadata": {}, "weight_map": where}
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    told = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "task_type": "CAUSAL_LM"}
    told["target_modules"] = sorted(m.split(".")[1] for m in linear)
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    modules = [(f"model.layers.{n}.{m}", s) for n in range(layers) for m, s in linear.items()]
    keys = [f"base_model.model.{m}.lora_{f}.weight" for m, _ in modules for f in "AB"]
    with TensorWriter(root / "adapter" / "adapter_model.safetensors", keys) as writer:
        for module, (num_out, num_in) in modules:
            writer.add(f"base_model.model.{module}.lora_A.weight", torch.randn(16, num_in) / num_in**0.5)
            writer.add(f"base_model.model.{module}.lora_B.weight", torch.randn(num_out, 16) * 0.005)


def to_disk(folder: Path) -> int:
    """Waits until every file of a folder is on the disk; returns their bytes."""
    size = 0
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    return size


def copy(folder: str) -> dict[str, Any]:
    """Copies the base's files with the system's `cp`, and waits for the disk."""
    out = Path(folder) / "copy"
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", f"{folder}/base", str(out)], check=True)
    copied = time.perf_counter() - began
    size = to_disk(out)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "unsynced": copied, "cpu": used.ru_utime + used.ru_stime, "peak": 0, "bytes": size}


def here(folder: str, dtype: str) -> dict[str, Any]:
    """Merges into a folder; peak is over what the interpreter held with everything imported."""
    import torch

    from qlora_dist.export.huggingface import DTYPES, write_model
    from qlora_dist.export.weights import MergedWeights
    from qlora_dist.model.peft_folder import PeftFolder
    from qlora_dist.runtime import peak_resident_bytes

    torch.randn(64, 64) @ torch.randn(64, 64)
    held = peak_resident_bytes()
    out = Path(folder) / "merged"
    out.mkdir()
    began, worked = time.perf_counter(), time.process_time()
    with PeftFolder(Path(folder) / "adapter") as adapter, MergedWeights(Path(folder) / "base", adapter) as weights:
        gains = write_model(weights, out, DTYPES[dtype])
        largest = max(weights.entry(name).num_bytes for name in weights.names)
    written, cpu = time.perf_counter() - began, time.process_time() - worked
    size = to_disk(out)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    peak = peak_resident_bytes() - held
    lowest = min(gain.share for gain in gains.values())
    told = {"seconds": seconds, "unsynced": written, "cpu": cpu, "peak": peak, "bytes": size}
    return told | {"largest": largest, "lowest_gain": lowest}


def load_and_save(folder: str) -> dict[str, Any]:
    """Does the same as most tools do: load the model, merge_and_unload, save_pretrained."""
    import peft
    import torch
    import transformers

    from qlora_dist.runtime import peak_resident_bytes

    held = peak_resident_bytes()
    began, worked = time.perf_counter(), time.process_time()
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter").merge_and_unload()
    model.save_pretrained(f"{folder}/saved")
    written, cpu = time.perf_counter() - began, time.process_time() - worked
    size = to_disk(Path(folder) / "saved")
    seconds = time.perf_counter() - began
    shutil.rmtree(f"{folder}/saved")
    peak = peak_resident_bytes() - held
    return {"seconds": seconds, "unsynced": written, "cpu": cpu, "peak": peak, "bytes": size}


def apart(function: str, *arguments: Any) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--run", function, json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]) or {})


def hardware() -> str:
    """Returns what this ran on."""
    import torch

    told = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{os.cpu_count()} cores of {model}, {load}; {versions}; commit {commit.strip()}."


def rows(folder: str, repeats: int) -> tuple[list[str], dict[str, Any]]:
    """Returns the lines of the table, and the last measurement of ours."""
    size = sum(p.stat().st_size for p in (Path(folder) / "base").glob("*.safetensors"))
    told: dict[str, list[dict[str, Any]]] = {"cp": [], "here, bf16": [], "here, f32": [], "load, merge, save": []}
    for _ in range(repeats):
        told["cp"].append(apart("copy", folder))
        told["here, bf16"].append(apart("here", folder, "bf16"))
        told["here, f32"].append(apart("here", folder, "f32"))
    told["load, merge, save"].append(apart("load_and_save", folder))
    lines = []
    copying = max(x["bytes"] / x["seconds"] for x in told["cp"])
    for name, found in told.items():
        best = min(found, key=lambda x: x["seconds"])
        spread = "-".join(f"{x['seconds']:.1f}" for x in sorted(found, key=lambda x: x["seconds"]))
        read, written = size / best["seconds"], best["bytes"] / best["seconds"]
        speed = (
            f"{read / 2**20:.0f} MiB/s | {read / copying:.0%} | {written / 2**20:.0f} MiB/s | {written / copying:.0%}"
        )
        used = f"{best['unsynced']:.1f} s | {best['cpu']:.1f} s"
        lines.append(f"| {name} | {spread} s | {used} | {speed} | {best['peak'] / 2**20:.0f} MiB |")
        print(lines[-1], flush=True)
    return lines, told["here, bf16"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; writes no results")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(globals()[arguments.run[0]](*json.loads(arguments.run[1]))))
        return
    machine = hardware()
    with tempfile.TemporaryDirectory() as folder:
        apart("make", folder, *((2, 256) if arguments.small else (18, 2048)))
        size = sum(p.stat().st_size for p in (Path(folder) / "base").glob("*.safetensors"))
        lines, ours = rows(folder, 1 if arguments.small else 3)
    bound = (2 * ours["largest"] + 300e6) / 2**20
    print(f"bound {bound:.0f} MiB, peak {ours['peak'] / 2**20:.0f} MiB, lowest gain {ours['lowest_gain']:.3f}")
    if arguments.small:
        return
    text = [
        "# Export\n",
        machine + "\n",
        f"A random bfloat16 Llama of {size / 1e9:.2f} GB in two files and a rank-16 adapter of all its linear layers,",
        "merged into a new folder, the base's files in the page cache; times until all is on the disk (`fsync` of each",
        "file, on every side; all runs) and until all is written (the fastest). Speed is bytes a second, read of the",
        "base and written (float32 is twice as many), each beside those of `cp -r` of the same files, both with",
        "`fsync`; peak memory is over what the process held with everything imported.\n",
        "| what | on the disk | written | of a core | read | of copying | written | of copying | peak |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        f"\nThe largest tensor has {ours['largest'] / 2**20:.0f} MiB; twice that and 300 MB is {bound:.0f} MiB.",
        f"The lowest gain of a layer in bf16 was {ours['lowest_gain']:.3f}.",
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(text) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
