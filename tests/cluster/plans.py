"""What runs on the clusters of the tests, and how two runs of it are compared."""

import hashlib
import json
from pathlib import Path

TRIALS = ["sweep=grid", "sweep.lora_rank=[2,4]"]
TWO_RANKS = ["strategy=ddp", "strategy.world_size=2", "train.tokens_per_step=512", "train.micro_batch_tokens=256"]
LONG = ["train.epochs=40", "train.max_steps=40", "train.checkpoint_every_s=0.3", "evaluate.max_rows=8"]
PLAN = [*TRIALS, *TWO_RANKS, *LONG]
LIMIT_S = 400


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
