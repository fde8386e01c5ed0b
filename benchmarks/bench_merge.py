"""Merging: against PEFT's `svd` on the same adapters, and a whole 8B-shaped set from files.

`python benchmarks/bench_merge.py` writes benchmarks/results/merge.md; `--small` runs in seconds and writes nothing.
Each measurement runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "merge.md"
SETS = "## Whole sets"
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def peak_over(start_bytes: int) -> int:
    """Returns how far this process's memory peaked over what it held at the start."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 - start_bytes


def reset_peak() -> int:
    """Forgets the peak so far and returns what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def against_peft(width: int, rank: int, num_adapters: int, repeats: int, who: str) -> dict[str, Any]:
    """Measures one of the two on the same random adapters; returns times, peak and the error of the update."""
    import peft
    import torch

    from qlora_dist.adapters.algebra import Stack
    from qlora_dist.model.peft_folder import Factors

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.PeftModel(base, config, adapter_name="0")
    for i in range(1, num_adapters):
        model.add_adapter(str(i), config)
    layer = model.base_model.model[0]
    for i in range(num_adapters):
        layer.lora_B[str(i)].weight.data.normal_()
    weights = [1 / num_adapters] * num_adapters
    parts = [Factors(layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data) for i in range(num_adapters)]
    if who == "here":
        torch.set_num_threads(1)
    torch.linalg.svd(torch.randn(64, 64))  # wakes the libraries

    seconds = []
    start, merged = reset_peak(), parts[0]
    for _ in range(repeats):
        began = time.perf_counter()
        if who == "peft":
            names = [str(i) for i in range(num_adapters)]
            model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=rank)
        else:
            merged, _ = Stack(parts).best(weights, rank)
        seconds.append(time.perf_counter() - began)
        if who == "peft" and len(seconds) < repeats:
            model.delete_adapter("merged")
    peak = peak_over(start)
    update = layer.get_delta_weight("merged").detach() if who == "peft" else merged.B_OR @ merged.A_RI
    Q_B, R_B = torch.linalg.qr(torch.cat([p.B_OR for p in parts], 1).double())
    Q_A, R_A = torch.linalg.qr(torch.cat([p.A_RI for p in parts]).T.double())
    U, sigma, V = torch.linalg.svd(R_B @ R_A.T / num_adapters)
    exact = (Q_B @ (U[:, :rank] * sigma[:rank])) @ (V[:rank] @ Q_A.T)
    error = float((update - exact).norm() / exact.norm())
    return {"seconds": seconds, "peak": peak, "error": error}


def write_adapters(folder: Path, num_adapters: int, num_layers: int, rank: int) -> list[Path]:
    """Writes random adapters of Llama 8B's shape and returns their folders."""
    import torch

    from qlora_dist.model.tensorfile import TensorWriter

    found = []
    for i in range(num_adapters):
        path = folder / f"shard-{i}"
        path.mkdir(parents=True)
        told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(told))
        draw = torch.Generator().manual_seed(i)
        shapes = {f"model.layers.{n}.{m}": s for n in range(num_layers) for m, s in LLAMA_8B.items()}
        names = [f"base_model.model.{m}.lora_{f}.weight" for m in shapes for f in "AB"]
        with TensorWriter(path / "adapter_model.safetensors", names) as file:
            for module, (num_out, num_in) in shapes.items():
                file.add(f"base_model.model.{module}.lora_A.weight", torch.randn(rank, num_in, generator=draw) / 64)
                file.add(f"base_model.model.{module}.lora_B.weight", torch.randn(num_out, rank, generator=draw) / 64)
        found.append(path)
    return found


def from_files(folder: str, method: str, rank: int, workers: int) -> dict[str, Any]:
    """Merges the adapters in `folder` in this process; returns seconds and the whole process's peak memory."""
    import torch  # noqa: F401 - its import isn't measured

    from qlora_dist.adapters.merge import merge_adapters
    from qlora_dist.config.merge import MergeConfig, MergeMethod, MergeWeights
    from qlora_dist.config.stages import MergedConfig
    from qlora_dist.runtime import peak_resident_bytes

    inputs = {p.name: p for p in sorted(Path(folder).glob("shard-*"))}
    out = Path(folder) / "merged"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    merge = MergeConfig(method=MergeMethod[method], weights=MergeWeights.uniform, rank=rank, workers=workers)
    began = time.perf_counter()
    facts = merge_adapters(MergedConfig(merge=merge), inputs, out)
    seconds = time.perf_counter() - began
    size = (out / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(out)
    peak = peak_resident_bytes()
    return {"seconds": [seconds], "peak": peak, "modules": facts["num_modules"], "written": size}


def apart(function: str, *arguments: Any) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--run", function, json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(width: int, rank: int, num_adapters: int, rounds: int) -> str:
    """Returns one line of the table against PEFT: rounds of both in turn, each in a process of its own."""
    found = []
    for _ in range(rounds):
        theirs = apart("against_peft", width, rank, num_adapters, 2, "peft")
        found.append((theirs, apart("against_peft", width, rank, num_adapters, 15, "here")))
    peft, here = ([statistics.median(one["seconds"]) for one in side] for side in zip(*found, strict=True))
    ratios = [p / h for p, h in zip(peft, here, strict=True)]
    peaks = [statistics.median(one["peak"] for one in side) for side in zip(*found, strict=True)]
    return (
        f"| {width}² | {num_adapters} × {rank} | {rounds} | {spread(peft, '.2f')} s"
        f" | {spread([1e3 * x for x in here], '.1f')} ms | {spread(ratios, '.0f')}"
        f" | {found[0][0]['error']:.1e} | {found[0][1]['error']:.1e}"
        f" | {peaks[0] / 2**20:.0f} | {peaks[1] / 2**20:.1f} | 1/{peaks[0] / max(peaks[1], 1):.0f} |"
    )


def spread(values: list[float], form: str) -> str:
    """Returns the median, and the least and the greatest in brackets."""
    low, high = format(min(values), form), format(max(values), form)
    middle = format(statistics.median(values), form)
    return f"{middle} ({low} – {high})" if len(values) > 1 else middle


def whole_set(folder: Path, num_adapters: int, num_layers: int, rank: int) -> list[str]:
    """Returns the lines of the table of whole sets."""
    write_adapters(folder, num_adapters, num_layers, rank)
    lines = []
    for method, cut in (("concat", 0), ("svd", rank), ("ties", rank), ("tsv", rank), ("knots_ties", rank)):
        found = apart("from_files", str(folder), method, cut, 0)
        written = f"{found['written'] / 2**20:.0f} MiB"
        lines.append(
            f"| {method} | {cut or num_adapters * rank} | {found['modules']} | {found['seconds'][0]:.1f} s |"
            f" {found['peak'] / 2**20:.0f} MiB | {written} |"
        )
        print(lines[-1], flush=True)
    return lines


def hardware() -> str:
    """Returns what this ran on."""
    import torch

    told = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    import peft

    versions = f"torch {torch.__version__}, peft {peft.__version__}, Python {platform.python_version()}"
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores of {model}, load {load:.1f} at the start; {versions}; commit {commit.strip()}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; writes no results")
    parser.add_argument("--sets", action="store_true", help="only the whole sets; the other table stays as it is")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(globals()[arguments.run[0]](*json.loads(arguments.run[1]))))
        return
    machine = hardware()
    shapes = [(256, 4, 4, 1)] if arguments.small else [(2048, 16, 4, 7), (2048, 16, 8, 3), (4096, 16, 4, 3)]
    lines = []
    for shape in shapes if not arguments.sets else []:
        lines.append(compare(*shape))
        print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sets = whole_set(Path(folder), 2 if arguments.small else 8, 1 if arguments.small else 32, 16)
    if arguments.small:
        return
    table = [
        "# Merging\n",
        machine + "\n",
        "Against `add_weighted_adapter(combination_type='svd')` of PEFT on the same random adapters of one linear",
        "layer, cut to one adapter's rank, both in turn in processes of their own: median (least – greatest) of the",
        "rounds. Errors of ΔW are against the best of that rank, by QR and SVD in float64; peak is what the process's",
        "resident memory grew by. PEFT has all cores, ours one, as in a merge of many modules.\n",
        "| layer | adapters | rounds | PEFT | here | times faster | error, PEFT | error, here"
        " | peak, PEFT (MiB) | peak, here | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    if arguments.sets:
        table = RESULTS.read_text().partition(SETS)[0].rstrip().splitlines()
    text = [
        *table,
        f"\n{SETS}\n",
        machine + "\n",
        "8 random adapters of rank 16 on all linear layers of Llama 8B (224 modules, 1.3 GB of files), from files to",
        "a file; peak is the whole process, interpreter and torch included.\n",
        "| method | rank of the result | modules | time | peak memory | written |",
        "|---|---|---|---|---|---|",
        *sets,
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(text) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
