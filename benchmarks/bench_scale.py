"""A plan of 2,000 nodes: how long it takes to plan it, to submit it to a real Slurm, and to print its status.

Starts a throw-away Slurm on this machine (root; Debian's munge slurmctld slurmd slurm-client), whose nodes are too
small for any of the jobs to start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qlora_dist.launch.compose import compose_run
from qlora_dist.launch.jobs import make_jobs
from qlora_dist.launch.open import opened
from qlora_dist.pipeline.nodes import make_plan
from tests.pipeline.conftest import SMALL, make_workplace

SHARDS = 662
SCRIPT = Path(__file__).parents[1] / "tests" / "cluster" / "slurm-cluster"


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        subprocess.run([SCRIPT, "start", "--dir", folder / "slurm", "--port", "19817"], check=True, stdout=-3)
        os.environ["SLURM_CONF"] = str(folder / "slurm" / "slurm.conf")
        try:
            measure(folder)
        finally:
            subprocess.run([SCRIPT, "stop", "--dir", folder / "slurm"], check=False)


def measure(folder: Path) -> None:
    make_workplace(folder / "work")
    work = folder / "work"
    overrides = [
        *SMALL,
        f"domain.files.sources=[{{path: {work / 'legal'}}}]",
        f"general.sources=[{{path: {work / 'general'}}}]",
        f"domain.files.num_shards={SHARDS}",
        f"root={work / 'runs'}",
        "launcher=slurm",
        "launcher.slurm.gpus_per_rank=0",
        "launcher.slurm.cpus_per_rank=1",
        "launcher.slurm.options=[--hold]",
    ]
    config = compose_run(overrides)
    started = time.perf_counter()
    plan = make_plan(config, "")
    plan.write()
    planned = time.perf_counter()
    with opened(plan, config.launcher) as (launcher, machine):
        jobs = make_jobs(plan, plan.nodes, machine, 0)
        launcher.check(jobs)
        for job in jobs:
            launcher.submit(job)
        launcher.poll()
    submitted = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dist.status", plan.folder], check=False, capture_output=True, text=True
    )
    shown = time.perf_counter()
    arrays = len((plan.folder / "slurm" / "001" / "ids").read_text().splitlines())
    print("| nodes | arrays | planned and written, s | checked and submitted, s | status, s | lines |")
    print("|---|---|---|---|---|---|")
    took = f"{planned - started:.2f} | {submitted - planned:.2f} | {shown - submitted:.2f}"
    print(f"| {len(plan.nodes)} | {arrays} | {took} | {len(done.stdout.splitlines())} |")


if __name__ == "__main__":
    main()
