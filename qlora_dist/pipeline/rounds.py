"""Stage `worker`: one shard's adapter, averaged with the others' in rounds.

It stands in the pipeline since it joins two rooms that don't know each other: `train` trains, `adapters` averages.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from qlora_dist.config.stages import WorkerConfig
from qlora_dist.runtime import Facts, rank

ROWS = "rows-"


def train_worker(config: WorkerConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves what this worker made in the last round, and in `start/` what all of them began that round with.

    Inputs are those of stage `adapter`, and `rows-<label>` of every worker, by which all know when they meet.

    Raises:
        TrainError: what stage `adapter` raises.
        Preempted: also where this worker makes room for one that isn't running.
    """
    from qlora_dist.data.rows import Rows
    from qlora_dist.model.adapter import read_provenance, write_provenance
    from qlora_dist.pipeline.meeting import MeetingFolder
    from qlora_dist.train.adapter import train_adapter
    from qlora_dist.train.budget import plan_budget

    rows = {label: Rows.open(inputs[ROWS + label]).num_rows for label in config.rounds.workers}
    num_steps = {label: plan_budget(config.train, number, config.seed).num_steps for label, number in rows.items()}
    meeting = MeetingFolder(config, num_steps)
    last = len(meeting.ends[config.label]) - 1
    with meeting.attended() if rank() == 0 else nullcontext():
        facts = train_adapter(config, inputs, out, meeting)
        if rank() == 0:
            shutil.rmtree(out / "start", ignore_errors=True)
            shutil.copytree(meeting.round_folder(last - 1), out / "start")
            write_provenance(out, replace(read_provenance(out), trained_tokens=meeting.tokens_after(last)))
    return facts | meeting.facts()
