"""A sweep read as an Optuna study: states, values and rungs are Optuna's own, and its tools work on them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_dist.errors import ConfigError
from qlora_dist.evaluate.study import main, read_studies

optuna = pytest.importorskip("optuna")


def rows() -> list[dict]:
    grid = [(4, 1e-3, 2.5), (8, 1e-3, 2.3), (4, 4e-3, None), (8, 4e-3, 2.2), (16, 4e-3, None)]
    states = ["finished", "finished", "stopped at 0", "finished", "lost"]
    return [
        {
            "trial": f"r{rank}-lr{rate:g}", "lora_rank": rank, "lora_alpha": 16.0, "learning_rate": rate,
            "target_modules": ["q_proj"] if rank == 4 else [],
            "validation_bits_per_byte": value, "tokens": 100, "state": state, "forgetting": 0.01,
        }
        for (rank, rate, value), state in zip(grid, states, strict=True)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rungs = [
        {"rung": 0, "trial": row["trial"], "tokens": 10, "value": 3.0 + i} for i, row in enumerate(rows()) if i < 4
    ]
    rungs += [{"rung": 1, "trial": "r8-lr0.004", "tokens": 100, "value": 2.2}]
    shard = {
        "label": "legal-0", "winner": "r8-lr0.004", "reason": "it is the best.", "trials": rows(), "rungs": rungs,
        "varied": ["lora_rank", "learning_rate", "target_modules"],
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"experiment": "sweep", "sweep": {"shards": [shard]}}))
    return tmp_path


def test_each_trial_is_one_of_optunas_with_its_end_and_its_rungs(run):
    (study,) = read_studies(run).values()
    assert study.study_name == "sweep:legal-0"
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "FAIL"]
    assert study.best_trial.user_attrs["name"] == "r8-lr0.004"
    assert study.best_value == 2.2
    assert study.best_params == {"lora_rank": 8, "learning_rate": 4e-3, "target_modules": ""}
    assert study.trials[3].intermediate_values == {10: 6.0, 100: 2.2}
    assert study.user_attrs["winner"] == "r8-lr0.004"


def test_optunas_importances_and_samplers_work_on_it(run):
    (study,) = read_studies(run).values()
    importances = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert set(importances) <= {"lora_rank", "learning_rate", "target_modules"}
    study.sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=1)
    asked = study.ask(dict(study.trials[0].distributions))
    assert 4 <= asked.params["lora_rank"] <= 16
    assert 1e-3 <= asked.params["learning_rate"] <= 4e-3


def test_the_command_keeps_studies_where_it_is_told_and_a_second_time_makes_them_anew(run, tmp_path):
    storage = f"sqlite:///{tmp_path / 'sweep.db'}"
    for _ in range(2):
        command = [sys.executable, "-m", "qlora_dist.evaluate.study", str(run), "--storage", storage]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "PRUNED" in done.stdout
    assert len(optuna.load_study(study_name="sweep:legal-0", storage=storage).trials) == 5


def test_a_run_without_a_sweep_and_an_unknown_shard_are_one_line(run, tmp_path, capsys):
    assert main([str(run), "--shard", "legal-1"]) == 2
    assert "the sweep has none of that name" in capsys.readouterr().err
    (run / "summary.json").write_text('{"experiment": "x", "sweep": {}}')
    with pytest.raises(ConfigError, match="without a sweep"):
        read_studies(run)


def test_a_sweep_that_lost_trials_is_told_from_a_run_without_one(run):
    nodes = [{"stage": "adapter", "label": f"legal-0.r{i}", "state": "failed"} for i in range(7)]
    summary = {"experiment": "x", "config": {"sweep": {"name": "grid"}}, "sweep": {}, "nodes": nodes}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=r"sweep=grid, of which no shard came to its end\. Failed: ") as caught:
        read_studies(run)
    assert "adapter/legal-0.r4, 2 more. Run the same command again" in str(caught.value)


@pytest.mark.parametrize(
    "storage",
    ["nonsense", "sqlite:////nonexist/x.db", "redis://x", "nosuch+driver://x", "sqlite:///{run}/summary.json"],
)
def test_a_storage_that_optuna_cant_use_is_one_line(run, capsys, storage):
    storage = storage.format(run=run)
    assert main([str(run), "--storage", storage]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --storage={storage}: expected a database that Optuna can keep studies in")
    assert len(told.splitlines()) == 1
