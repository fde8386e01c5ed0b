"""Corpus to packed rows: speed and peak memory of each stage, at one size and at ten times that.

`python benchmarks/bench_data.py` writes benchmarks/results/data.md (100 MB and 1 GB of text of its own making, some
ten minutes); `--small` does 4 and 40 MB and writes nothing; with `--folder DIR`, what was measured is kept there and a
run that was cut off goes on after its last whole stage. As under the launcher, each node is a process of its own: parts
are read two at a time, the other stages spread their work over both cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

RESULTS = Path(__file__).parent / "results" / "data.md"
CORES = 2
ROW_TOKENS = 2048
NUM_SHARDS = 2
VOCABULARY = 30_000


def texts(num_bytes: int) -> Iterator[str]:
    """Yields records of Zipf-distributed words, about 2 KB each; one in twenty is a near-copy, one in fifty a copy."""
    rng = np.random.default_rng(11)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(VOCABULARY)]
    made, last = 0, ""
    while made < num_bytes:
        num_words = int(rng.lognormal(5.5, 0.8)) + 5
        words = [vocabulary[i] for i in (rng.zipf(1.2, num_words) - 1) % VOCABULARY]
        kind = rng.random()
        if kind < 0.05 and last:
            words = last.split(" ")
            words[len(words) // 2] = "changed"
        text = last if 0.05 <= kind < 0.07 and last else " ".join(words)
        last = text
        made += len(text)
        yield text


def write_corpus(path: Path, num_bytes: int) -> int:
    with path.open("w") as file:
        return sum(bool(file.write(json.dumps({"text": text}) + "\n")) for text in texts(num_bytes))


def write_tokenizer(folder: Path) -> None:
    """Trains a byte-level BPE of 8192 tokens on two megabytes of the same kind of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(2_000_000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8192}))


def run_node(told: dict[str, Any]) -> None:
    """Runs one stage in this process and prints its facts."""
    from qlora_dist.config import stages
    from qlora_dist.config.data import DomainConfig, SourceConfig
    from qlora_dist.data.records import write_records
    from qlora_dist.data.rows import write_rows
    from qlora_dist.data.shards import write_shards
    from qlora_dist.data.splits import write_splits

    functions = {"records": write_records, "splits": write_splits, "shards": write_shards, "rows": write_rows}
    if told["stage"] == "records":
        told["config"]["source"] = DomainConfig(sources=[SourceConfig(path=told["config"].pop("path"))])
    config = getattr(stages, f"{told['stage'].title()}Config")(**told["config"])
    out = Path(told["out"])
    out.mkdir(parents=True)
    started = time.perf_counter()
    facts = functions[told["stage"]](config, {name: Path(p) for name, p in told["inputs"].items()}, out)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    facts |= {
        "seconds": time.perf_counter() - started, "largest_mb": max(u.ru_maxrss for u in used) / 1024,
        "cpu_s": sum(u.ru_utime + u.ru_stime for u in used),
    }  # fmt: skip
    print(json.dumps(facts))


def run_nodes(nodes: Sequence[dict[str, Any]], cores: int) -> list[dict[str, Any]]:
    """Runs nodes of so many cores, as many at a time as `CORES` allows, and returns their facts.

    The last holds the wall time of all, the most memory that all of their processes together had at any time, the disk
    that they wrote, and the most that they had written at any time.
    """
    waiting, running, facts = list(nodes), [], []
    outs = [Path(node["out"]) for node in nodes]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"}
    started, most, most_disk, looks = time.perf_counter(), 0, 0, 0
    while waiting or running:
        while waiting and (len(running) + 1) * cores <= CORES:
            command = [sys.executable, __file__, "--node", json.dumps(waiting.pop(0))]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        most = max(most, sum(resident(process.pid) for process in running))
        most_disk = max(most_disk, sum(map(written_bytes, outs))) if looks % 10 == 0 else most_disk
        looks += 1
        for process in [p for p in running if p.poll() is not None]:
            assert process.returncode == 0
            facts.append(json.loads(process.stdout.read()))
            running.remove(process)
        time.sleep(0.1)
    disk = sum(map(written_bytes, outs))
    facts[-1] |= {"wall_s": time.perf_counter() - started, "together_mb": most / 2**20}
    facts[-1] |= {"disk_mb": disk / 1e6, "most_disk_mb": max(most_disk, disk) / 1e6}
    return facts


def written_bytes(folder: Path) -> int:
    """Returns the bytes that the files of a folder take on the disk; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += 512 * Path(parent, name).stat().st_blocks
    return total


def resident(pid: int) -> int:
    """Returns the resident memory of a process and all that it started; pages they share count for each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def measure(folder: Path, num_bytes: int, tokenizer: Path) -> dict[str, Any]:
    """Takes a corpus of this size through all stages; returns one line of figures for each."""
    from qlora_dist.config.data import DomainConfig, SourceConfig
    from qlora_dist.data.sources import leaf_digest, plan_parts

    corpus, known = folder / "corpus.jsonl", folder / "facts.json"
    facts: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}
    num_records = facts.get("num_records") or write_corpus(corpus, num_bytes)
    size_mb = corpus.stat().st_size / 1e6
    started, used = time.perf_counter(), time.process_time()
    parts = plan_parts(DomainConfig(sources=[SourceConfig(path=str(corpus))], part_bytes=max(2**16, num_bytes // 4)))
    for part in parts:
        leaf_digest(part)
    lines = {
        "plan": {
            "seconds": time.perf_counter() - started, "cpu_s": time.process_time() - used, "nodes": len(parts),
            "together_mb": 0, "largest_mb": 0, "disk_mb": 0, "most_disk_mb": 0,
        }
    }  # fmt: skip
    where = {name: str(folder / name) for name in ("splits", "shards")}
    records = {f"records-{i}": str(folder / f"records-{i}") for i in range(len(parts))}
    stages = {
        "records": [
            {"stage": "records", "config": {"domain": "x", "files": part, "part": i, "path": str(corpus)},
             "inputs": {}, "out": records[f"records-{i}"]}
            for i, part in enumerate(parts)
        ],
        "splits": [{"stage": "splits", "config": {"domain": "x"}, "inputs": records, "out": where["splits"]}],
        "shards": [
            {"stage": "shards", "config": {"domain": "x", "num_shards": NUM_SHARDS},
             "inputs": {"splits": where["splits"], "tokenizer": str(tokenizer)}, "out": where["shards"]}
        ],
        "rows": [
            {"stage": "rows", "config": {"shard": k, "row_tokens": ROW_TOKENS},
             "inputs": {"shards": where["shards"], "tokenizer": str(tokenizer)}, "out": str(folder / f"rows-{k}")}
            for k in range(NUM_SHARDS)
        ],
    }  # fmt: skip
    facts["num_records"] = num_records
    for name, nodes in stages.items():
        found = facts[name] = facts.get(name) or run_nodes(nodes, 1 if name == "records" else CORES)
        known.write_text(json.dumps(facts))
        lines[name] = {
            "seconds": found[-1]["wall_s"], "nodes": len(nodes), "largest_mb": max(f["largest_mb"] for f in found),
            "cpu_s": sum(f["cpu_s"] for f in found),
            **{name: found[-1][name] for name in ("together_mb", "disk_mb", "most_disk_mb")},
        }  # fmt: skip
        print(f"{size_mb:,.0f} MB {name}: {lines[name]}", flush=True)
    rows = facts["rows"]
    return {
        "size_mb": size_mb, "num_records": num_records, "lines": lines, "left_out": facts["splits"][0]["left_out"],
        "integrity": facts["splits"][0]["integrity"], "max_over_mean": facts["shards"][0]["max_over_mean"],
        "tokens": [r["tokens"] for r in rows], "fill": [r["fill"] for r in rows],
    }  # fmt: skip


def written(found: list[dict[str, Any]]) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "tokenizers", "rensa"))
    lines = []
    for run in found:
        total, cpu = (sum(line[k] for line in run["lines"].values()) for k in ("seconds", "cpu_s"))
        lines += [
            f"| {run['size_mb']:,.0f} | {name} | {line['nodes']} | {line['seconds']:.1f} "
            f"| {run['num_records'] / line['seconds']:,.0f} | {run['size_mb'] / line['seconds']:.1f} "
            f"| {line['cpu_s']:.1f} | {run['size_mb'] / line['cpu_s']:.1f} "
            f"| {line['largest_mb']:,.0f} | {line['together_mb']:,.0f} "
            f"| {line['disk_mb']:,.0f} | {line['most_disk_mb']:,.0f} |"
            for name, line in run["lines"].items()
        ]
        most, largest, most_disk = (
            max(line[k] for line in run["lines"].values()) for k in ("together_mb", "largest_mb", "most_disk_mb")
        )
        disk = sum(line["disk_mb"] for line in run["lines"].values())
        lines.append(
            f"| **{run['size_mb']:,.0f}** | **all** | | **{total:.1f}** | {run['num_records'] / total:,.0f} "
            f"| {run['size_mb'] / total:.1f} | {cpu:.1f} | {run['size_mb'] / cpu:.1f} | **{largest:,.0f}** "
            f"| **{most:,.0f}** | {disk:,.0f} | {most_disk:,.0f} |"
        )
    notes = [
        f"- {run['size_mb']:,.0f} MB: {run['num_records']:,} records; left out {run['left_out']}; highest similarity "
        f"across splits {run['integrity']['highest_similarity']}; shards of {run['tokens']} tokens; fill {run['fill']}."
        for run in found
    ]
    return f"""# Corpus to rows

`python benchmarks/bench_data.py`, {platform.machine()}, {CORES} processes at a time on {os.cpu_count()} cores, Python \
{platform.python_version()}, {versions}, commit {commit.stdout.strip()}.

Text of the benchmark's own making: JSON lines of some 2 KB of Zipf-distributed words, 5 % near-copies, 2 % copies. \
Default config (near-copies and contamination dropped, splits checked again), byte-level BPE of 8,192 tokens, rows of \
{ROW_TOKENS}, {NUM_SHARDS} shards. Each node in a process of its own; stages after records spread their work over \
{CORES} cores. *Largest*: the peak of the largest process (ru_maxrss). *Together*: the most that all processes of a \
stage had resident at one time, shared pages counted for each (looked at ten times a second). *Disk*: what its \
artifacts take; *at work*: the most that they and their scratch files took at one time (looked at once a second). \
Seconds are wall time, start of processes included; *CPU s* is processor time of all processes, which other work on \
the machine changes little.

| MB | stage | nodes | s | records/s | MB/s | CPU s | MB/CPU s | largest, MB | together, MB | disk, MB | at work, MB |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{chr(10).join(notes)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="4 and 40 MB, nothing written")
    parser.add_argument("--mb", type=int, nargs="+", default=[100, 1000], help="sizes in MB (100 1000)")
    parser.add_argument("--folder", type=Path, help="where to work and keep what was measured (a temporary folder)")
    parser.add_argument("--node", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.node:
        run_node(json.loads(told.node))
        return
    found = []
    for num_bytes in (1_000_000 * mb for mb in ([4, 40] if told.small else told.mb)):
        folder = told.folder / f"{num_bytes}" if told.folder else Path(tempfile.mkdtemp(prefix="bench_data_"))
        try:
            write_tokenizer(folder / "tokenizer")
            found.append(measure(folder, num_bytes, folder / "tokenizer"))
        finally:
            if not told.folder:
                shutil.rmtree(folder)
    text = written(found)
    print(text)
    if not told.small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
