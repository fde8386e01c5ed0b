"""What is said of a run's jobs while they go on, line by line where there is no terminal."""

from io import StringIO

import pytest
from rich.console import Console

from qlora_dist.config.stages import AdapterConfig
from qlora_dist.launch.base import State
from qlora_dist.launch.screen import PLAIN_EVERY_S, Screen
from qlora_dist.pipeline.plan import Plan
from qlora_dist.runtime import write_json


@pytest.fixture
def plan(tmp_path):
    plan = Plan(experiment="run", root=str(tmp_path), command="", config={})
    for seed, group in ((1, "lanes"), (2, "lanes"), (3, "")):
        plan.add("adapter", f"legal-{seed}", AdapterConfig(seed=seed), group=group)
    (plan.folder / "logs").mkdir(parents=True)
    for node, lanes in ((plan.nodes[0], {"lanes": 2}), (plan.nodes[2], {})):
        told = {"done": 3, "total": 9, "unit": "step", "left_s": 60, "loss": 2.5, "tokens_per_s": 1000}
        write_json(plan.progress_path(node), told | lanes)
    return plan


def test_a_job_is_told_once_with_the_median_of_its_lanes(plan, monkeypatch):
    said = StringIO()
    screen = Screen(plan, Console(file=said, width=200))
    states = {node.name: State.running for node in plan.nodes}
    screen.update(states)
    said.truncate(0)
    said.seek(0)
    monkeypatch.setattr(screen, "_told", screen._told - 2 * PLAIN_EVERY_S)
    screen.update(states)
    first, second = said.getvalue().splitlines()
    assert first == (
        "[0/3] running adapter/legal-1 and 1 beside it step 3/9 loss 2.500 (median of 2) tokens/s 1,000 left 1:00"
    )
    assert second == "[0/3] running adapter/legal-3 step 3/9 loss 2.500 tokens/s 1,000 left 1:00"
