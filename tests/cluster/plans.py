"""What runs on the clusters of the tests, how it is watched, and how two runs of it are compared."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.pipeline.conftest import Workplace

TRIALS = ["sweep=grid", "sweep.lora_rank=[2,4]"]
STEP = ["train.tokens_per_step=512", "train.micro_batch_tokens=128"]
FOUR_RANKS = ["strategy=ddp", "strategy.world_size=4", *STEP]
TWO_RANKS = ["strategy=ddp", "strategy.world_size=2", *STEP]
LONG = ["train.epochs=90", "train.max_steps=90", "train.checkpoint_every_s=0.3", "evaluate.max_rows=8"]
PLAN = [*TRIALS, *FOUR_RANKS, *LONG]
"""Two shards with two trials each: a training of four processes a shard."""
ON_SLURM = ["launcher=slurm", "launcher.slurm.gpus_per_rank=0", "launcher.slurm.cpus_per_rank=1"]
ON_SLURM += ["launcher.slurm.ranks_per_node=2", "launcher.slurm.poll_s=0.5", "launcher.slurm.signal_s=60"]
ON_RAY = ["launcher=ray", "launcher.ray.cpus_per_rank=1"]
S3 = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:5555",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
CLIENT_PORT = 10001
STAGING = Path(f"/tmp/qlora-dist-cluster-test-{os.getpid()}")
"""Each node of the Ray sees a folder of its own here, as machines do that share none."""
LIMIT_S = 900.0
"""What a test waits for comes within so long on a machine with ten times the work; on an idle one in a tenth of it."""

T = TypeVar("T")


def wait_for(what: Callable[[], T], seconds: float = LIMIT_S, every: float = 0.2) -> T:
    """Waits until something is so, and returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)
    return found


def contents(root: Path, stage: str) -> dict[str, str]:
    """Returns a digest of each file that a stage's artifacts hold, but of those that tell of time and memory.

    Where the root stands in a file (an adapter names its base), its name is left out.
    """
    found = {}
    for path in (root / "artifacts" / stage).glob("*/manifest.json"):
        for name in json.loads(path.read_text())["files"]:
            if name != "metrics.jsonl":
                said = (path.parent / name).read_bytes().replace(str(root).encode(), b"")
                found[f"{path.parent.name}/{name}"] = hashlib.sha256(said).hexdigest()
    return found


def checkpoints(workplace: Workplace) -> set[Path]:
    """Returns what trainings have kept so far."""
    return set((workplace.folder / "runs" / "artifacts" / "adapter").rglob("step-*/state.json"))


def logs_of(workplace: Workplace, stage: str) -> str:
    """Returns all that the jobs of a stage said."""
    return "".join(path.read_text() for path in (workplace.run_folder / "logs").glob(f"{stage}*.log"))


def said_by(command: str, *argv: str | Path) -> str:
    """Returns what `python -m qlora_dist.<command>` says."""
    words = [sys.executable, "-m", f"qlora_dist.{command}", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S).stdout


def watching(workplace: Workplace) -> "subprocess.Popen[str]":
    """Starts `status --watch` of a run, which ends with it."""
    words = [sys.executable, "-m", "qlora_dist.status", str(workplace.run_folder), "--watch"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@dataclass
class ClusterRun:
    """A run on a cluster that has ended, and what was said of it meanwhile."""

    workplace: Workplace
    during: list[dict] = field(default_factory=list)
    """What `status --json` said while a training ran."""
    plain: str = ""
    """What `status` said then."""
    watched: str = ""
    """What `status --watch` said from then to the end."""

    def look(self) -> None:
        """Asks how the run stands, while it does."""
        self.during = json.loads(said_by("status", self.workplace.run_folder, "--json"))["nodes"]
        self.plain = said_by("status", self.workplace.run_folder)
