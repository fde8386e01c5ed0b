"""Halving: does it find what the full grid finds, and at which share of its tokens?

`python benchmarks/bench_halving.py` writes benchmarks/results/halving.md; `--seeds 1` and the like write nothing.

For each seed one fused job trains all 27 configurations to the end and measures each at every rung. Lanes don't
influence each other, so what halving would have decided follows from these curves exactly: it is replayed on them.
For the first seed the halving is run for real too, and compared with its replay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_dist.config.fields import everything
from qlora_dist.config.stages import AdapterConfig, HalvedConfig
from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.run import run_node
from qlora_dist.runtime import quiet_libraries
from qlora_dist.train.halving import Halving, Result, play, rung_steps, rung_tokens, steps_taken

RESULTS = Path(__file__).parent / "results" / "halving.md"
GRID = ["sweep.lora_rank=[4,8,16]", "sweep.lora_alpha=[8,16,32]", "sweep.learning_rate=[1e-3,5e-3,25e-3]"]
MODEL = "{vocab_size: 1024, hidden_size: 64, intermediate_size: 128, num_layers: 2, context_tokens: 128, \
pretrain_tokens: 120000}"
TRAIN = "{row_tokens: 128, tokens_per_step: 256, micro_batch_tokens: 256, epochs: 100, max_steps: 18}"
ETA, WITHIN, SHARE = 3, 0.005, 0.35
"""What is wanted: within half a percent of the best, at 35 % of the tokens or less."""


@dataclass(frozen=True)
class Seed:
    """All curves of one seed: bits per byte of each configuration at each rung."""

    seed: int
    values: list[list[float]]
    seconds: float


@dataclass(frozen=True)
class Found:
    """What halving found of one seed, and what it cost."""

    seed: int
    best: float
    found: float
    share: float
    winner: int

    @property
    def gap(self) -> float:
        """How far the configuration that was found is behind the best, as a share of its bits per byte."""
        return self.found / self.best - 1


def plan_of(root: Path, seed: int) -> Plan:
    """Plans the sweep of one seed: seeds share the corpus, the base and the rows."""
    told = ["+experiment=smoke", f"model.tiny={MODEL}", f"train={{{TRAIN[1:-1]}}}", "domain.legal.num_shards=1"]
    told = [t for t in told if not t.startswith("train=")]
    pairs = [p.strip().split(": ") for p in TRAIN[1:-1].split(",")]
    told += ["model.compute_dtype=float32", "sweep.max_rows=24"]
    told += [f"train.{key}={value}" for key, value in pairs]
    return make_plan(
        compose_run([*told, "sweep=halving", *GRID, "sweep.max_forgetting=9", f"seed={seed}", f"root={root}"])
    )


def halved_of(plan: Plan) -> HalvedConfig:
    """Returns what stage `halved` is told."""
    told = plan.node("halved/legal-0").told()
    assert isinstance(told, HalvedConfig)
    return told


def prepare(plan: Plan) -> None:
    """Makes everything that the sweep reads."""
    needed = set(plan.node("halved/legal-0").inputs.values())
    for node in reversed(plan.nodes):
        if node.id in needed:
            needed |= set(node.inputs.values())
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    for node in plan.nodes:
        if node.id in needed:
            run_node(plan, node)


def record(plan: Plan, seed: int) -> Seed:
    """Trains all configurations to the end in one job, and measures each at every rung."""
    from qlora_dist.data.rows import Rows
    from qlora_dist.evaluate.held_out import HeldOut
    from qlora_dist.evaluate.trials import bits_per_byte
    from qlora_dist.runtime import Progress
    from qlora_dist.train.race import Race
    from qlora_dist.train.training import Training

    config, inputs = halved_of(plan), plan.store.inputs(plan.node("halved/legal-0").inputs)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trainings = {}
        for trial in config.trials:
            (out := Path(scratch) / trial.name).mkdir()
            told = AdapterConfig(
                model=config.model, lora=trial.lora, train=trial.train, strategy=config.strategy, seed=trial.seed
            )
            trainings[trial.name] = Training.open(told, inputs, out)
        stops = halving_of(config, next(iter(trainings.values())).budget.num_steps).steps[0]
        values: list[list[float]] = [[] for _ in config.trials]
        with Race.open(trainings, Path(scratch) / "checkpoints") as race:
            for stop in stops:
                race.train_to(dict.fromkeys(trainings, stop))
                for number, trial in enumerate(config.trials):
                    with race.seated(trial.name) as model:
                        held_out = HeldOut(
                            config.domain, "validation", Rows.open(inputs["validation"]), config.max_rows
                        )
                        progress = Progress(held_out.num_rows, unit="row")
                        documents = held_out.measure(model, 4096, progress, with_kl=False)
                    values[number].append(bits_per_byte(documents, config.domain))
    return Seed(seed, values, time.monotonic() - started)


def halving_of(config: HalvedConfig, num_steps: int, lanes: int = 0) -> Halving:
    tokens = config.trials[0].train.tokens_per_step
    rungs = rung_tokens(num_steps * tokens, config.eta, config.first_rung_tokens, tokens)
    stops = rung_steps(num_steps, tokens, rungs)
    return Halving([stops] * len(config.trials), config.eta, lanes or len(config.trials))


def replay(config: HalvedConfig, recorded: Seed, num_steps: int, lanes: int) -> tuple[Found, Halving]:
    """Plays halving on recorded curves."""
    played = play(halving_of(config, num_steps, lanes), lambda t, r: Result(recorded.values[t][r]))
    last = played.num_rungs - 1
    winner = min(played.finishers(), key=lambda t: (recorded.values[t][last], t))
    best = min(values[last] for values in recorded.values)
    share = sum(steps_taken(played).values()) / (num_steps * len(config.trials))
    return Found(recorded.seed, best, recorded.values[winner][last], share, winner), played


def compare_with_real(plan: Plan, recorded: Seed, num_steps: int) -> dict[str, Any]:
    """Runs one halving for real; says whether it decided as its replay, and how far its values are from the curves."""
    config, node = halved_of(plan), plan.node("halved/legal-0")
    started = time.monotonic()
    run_node(plan, node)
    told = json.loads((plan.store.folder(node.id) / "sweep.json").read_text(encoding="utf-8"))
    _, played = replay(config, recorded, num_steps, config.lanes)
    names = [trial.name for trial in config.trials]
    real = {(names.index(row["trial"]), row["rung"]): row["value"] for row in told["rungs"]}
    return {
        "same_decisions": set(real) == set(played.results),
        "same_best": told["best"] == names[replay(config, recorded, num_steps, config.lanes)[0].winner],
        "furthest": max(abs(value - recorded.values[t][r]) for (t, r), value in real.items()),
        "seconds": time.monotonic() - started,
        "share": told["tokens"] / told["grid_tokens"],
    }


def hardware() -> str:
    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{cpu or platform.machine()}, {os.cpu_count()} cores (one thread); {versions}; commit {commit.strip()}"


def _read(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def written(
    config: HalvedConfig, seeds: list[Seed], found: dict[int, list[Found]], real: dict[str, Any], steps: int
) -> str:
    """Returns the results as Markdown."""
    head = (
        "| seed | best of the grid | "
        + " | ".join(f"halving, {lanes} lanes | behind | tokens" for lanes in found)
        + " |"
    )
    rows = []
    for number, recorded in enumerate(seeds):
        mine = [of[number] for of in found.values()]
        cells = [f"| {f.found:.4f} | {f.gap:.2%} | {f.share:.1%} " for f in mine]
        rows.append(f"| {recorded.seed} | {mine[0].best:.4f} {''.join(cells)}|")
    summary = []
    for lanes, of in found.items():
        good = sum(f.gap <= WITHIN for f in of)
        exact = sum(f.gap == 0 for f in of)
        furthest, most = max(f.gap for f in of), max(f.share for f in of)
        usual = statistics.median(f.share for f in of)
        summary.append(
            f"- {lanes} lanes: within {WITHIN:.1%} of the grid's best in **{good} of {len(of)}** seeds (the very best "
            f"in {exact}), behind by {furthest:.2%} at most; **{most:.1%}** of the grid's tokens at most, {usual:.1%} "
            "in the median."
        )
    last = len(seeds[0].values[0]) - 1
    good_ones = [sum(v[last] <= min(w[last] for w in s.values) * (1 + WITHIN) for v in s.values) for s in seeds]
    chance = statistics.mean(good_ones) / len(config.trials)
    spread = [max(v[last] for v in s.values) / min(v[last] for v in s.values) - 1 for s in seeds]
    return f"""# Halving against the full grid

`python benchmarks/bench_halving.py`, {hardware()}.

{len(config.trials)} configurations (`{" ".join(GRID)}`), embedded base `{MODEL}`, legal texts of this machine, \
`train={TRAIN}`: {steps} steps each, rungs at {", ".join(map(str, halving_of(config, steps).steps[0]))} steps, \
eta {ETA}. Bits per byte of development data. The worst configuration is behind the best by {min(spread):.1%} to \
{max(spread):.1%}; {min(good_ones)} to {max(good_ones)} of {len(config.trials)} lie within {WITHIN:.1%} of the best, \
so one picked at random would do in {chance:.0%} of seeds.

{chr(10).join(summary)}

A halving run for real (seed {seeds[0].seed}, {config.lanes} lanes, {real["seconds"]:.0f} s) took the same decisions \
as its replay: {real["same_decisions"]}; the same best: {real["same_best"]}; its values differ from the recorded \
curves by {real["furthest"]:.1e} bits per byte at most; {real["share"]:.1%} of the grid's tokens. Recording all \
curves took {statistics.median(s.seconds for s in seeds):.0f} s a seed.

{head}
|{"---|" * (2 + 3 * len(found))}
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="fewer than 20 write nothing")
    parser.add_argument("--root", type=Path, help="where artifacts and curves are kept, so that a run can go on")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch)
        first = plan_of(root, 1)
        prepare(first)
        seeds = [recorded_seed(root, seed) for seed in range(1, args.seeds + 1)]
        config, steps = halved_of(first), halved_of(first).trials[0].train.max_steps
        real = compare_with_real(first, seeds[0], steps)
    found = {lanes: [replay(config, seed, steps, lanes)[0] for seed in seeds] for lanes in (27, 9)}
    text = written(config, seeds, found, real, steps)
    print(text)
    if args.seeds >= 20:
        RESULTS.write_text(text, encoding="utf-8")


def recorded_seed(root: Path, seed: int) -> Seed:
    """Records a seed's curves, or reads those that an earlier run of this benchmark recorded in the same root."""
    plan = plan_of(root, seed)
    told = everything(halved_of(plan))
    kept = root / f"curves-{seed}.json"
    if kept.exists():
        values = json.loads(kept.read_text(encoding="utf-8"))
        if values["config"] == told:
            return Seed(seed, values["values"], values["seconds"])
    recorded = record(plan, seed)
    kept.write_text(json.dumps({"config": told, "values": recorded.values, "seconds": recorded.seconds}))
    print(f"seed {seed}: {recorded.seconds:.0f} s", flush=True)
    return recorded


if __name__ == "__main__":
    main()
