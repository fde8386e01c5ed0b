"""`python -m qlora_dist.evaluate.study runs/legal`: a sweep read as Optuna studies, one a shard.

Each trial is a frozen trial of Optuna with the values that were varied, what it came to at each rung, and its end:
complete, pruned (stopped by halving) or failed (lost). So Optuna's plots and importances work on it, and its samplers
can go on from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.errors import ConfigError, QloraDistError, bad_value, nearest

METRIC = "validation_bits_per_byte"
ATTRIBUTES = ("tokens", "forgetting", "low", "high", "over_best", "over_best_low", "over_best_high", "p_holm", "state")
SUMMARY_FILE = "summary.json"
MAX_NAMED = 5
"""Nodes that failed which an error names."""


def read_studies(folder: Path, storage: str | None = None) -> dict[str, Any]:
    """Returns the Optuna study of each shard of a run's sweep, by the shard's label.

    Args:
        folder: the run's folder, which holds `summary.json`.
        storage: where Optuna keeps the studies, as `sqlite:///sweep.db`; in memory by default. A study that is there
            already is made anew.

    Raises:
        ConfigError: if Optuna isn't installed, it can't use the storage, or no shard's sweep came to its end.
    """
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder / SUMMARY_FILE} can't be read ({error}). Name the folder of a finished run."
        ) from None
    shards = (summary.get("sweep") or {}).get("shards") or []
    if not shards:
        raise _no_shards(folder, summary)
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ConfigError(f"{error}. Install it with: pip install 'qlora_dist[optuna]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        kept = optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:  # no such place, no driver, another form
        raise _bad_storage(storage, error) from error
    try:
        names = {shard["label"]: f"{summary['experiment']}:{shard['label']}" for shard in shards}
        return {shard["label"]: make_study(names[shard["label"]], shard, kept) for shard in shards}
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _bad_storage(storage, error) from error


def _no_shards(folder: Path, summary: Mapping[str, Any]) -> ConfigError:
    """Says whether a run had no sweep at all, or one of which no shard came to its end."""
    name = ((summary.get("config") or {}).get("sweep") or {}).get("name", "none")
    if name == "none":
        return ConfigError(f"{folder} is of a run without a sweep. Run one with sweep=grid or sweep=halving.")
    bad = [f"{n['stage']}/{n['label']}" for n in summary.get("nodes") or [] if n.get("state") == "failed"]
    more = f", {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    lost = f" Failed: {', '.join(bad[:MAX_NAMED])}{more}." if bad else ""
    repair = "Run the same command again: what is done is not done twice."
    return ConfigError(f"{folder} is of a run with sweep={name}, of which no shard came to its end.{lost} {repair}")


def _bad_storage(storage: str | None, error: Exception) -> ConfigError:
    why = str(error).splitlines()[0].rstrip(".")
    wanted = "a database that Optuna can keep studies in, as sqlite:///sweep.db in a folder that there is"
    return bad_value("--storage", storage, wanted, f"({why}.)")


def make_study(name: str, shard: Mapping[str, Any], storage: Any = None) -> Any:
    """Returns one shard's trials as an Optuna study that minimises bits per byte of development data.

    Args:
        name: the study's name.
        shard: what the sweep came to on the shard.
        storage: where Optuna keeps the study, as its name or as Optuna's own; in memory by default.
    """
    import optuna

    if storage and name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize")
    study.set_user_attr("metric", METRIC)
    study.set_user_attr("winner", shard["winner"])
    study.set_user_attr("reason", shard["reason"])
    varied = shard["varied"] or ["lora_rank"]
    spaces = {field: _distribution([row[field] for row in shard["trials"]]) for field in varied}
    rungs: dict[str, dict[int, float]] = {}
    for rung in shard.get("rungs", []):
        if rung["value"] is not None:
            rungs.setdefault(rung["trial"], {})[rung["tokens"]] = rung["value"]
    for row in shard["trials"]:
        study.add_trial(_trial(row, spaces, rungs.get(row["trial"], {})))
    return study


def _trial(row: Mapping[str, Any], spaces: Mapping[str, Any], rungs: Mapping[int, float]) -> Any:
    from optuna.trial import TrialState, create_trial

    value = row.get(METRIC)
    state = TrialState.COMPLETE if value is not None else TrialState.PRUNED if rungs else TrialState.FAIL
    if row["state"] == "lost":
        state = TrialState.FAIL
    return create_trial(
        state=state,
        value=value if state is TrialState.COMPLETE else None,
        params={field: _plain(row[field]) for field in spaces},
        distributions=dict(spaces),
        intermediate_values=dict(rungs),
        user_attrs={"name": row["trial"]} | {key: row[key] for key in ATTRIBUTES if row.get(key) is not None},
    )


def _distribution(values: Sequence[Any]) -> Any:
    """Returns the range of numbers, on a logarithmic scale where all are positive; of all else the choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return IntDistribution(min(values), max(values), log=min(values) > 0)
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return FloatDistribution(float(min(values)), float(max(values)), log=min(values) > 0)
    return CategoricalDistribution(list(dict.fromkeys(_plain(v) for v in values)))


def _plain(value: Any) -> Any:
    """Returns a value as Optuna holds it: a list as text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the trials of a sweep as Optuna sees them, and keeps the studies where `--storage` says."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_dist.evaluate.study", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run, as runs/legal")
    parser.add_argument("--storage", help="where Optuna keeps the studies, as sqlite:///sweep.db")
    parser.add_argument("--shard", help="one shard's study alone")
    args = parser.parse_args(argv)
    try:
        studies = read_studies(args.run, args.storage)
        if args.shard and args.shard not in studies:
            raise ConfigError(f"--shard={args.shard}: the sweep has none of that name. {nearest(args.shard, studies)}")
        _print(studies if not args.shard else {args.shard: studies[args.shard]})
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(studies: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for study in studies.values():
        fields = list(study.trials[0].params)
        table = Table(title=study.study_name, title_justify="left", box=None, pad_edge=False)
        for column in ("trial", *fields, "state", METRIC.replace("_", " "), "rungs"):
            table.add_column(column)
        for trial in study.trials:
            value = "" if trial.value is None else f"{trial.value:.4f}"
            settings = [str(trial.params[field]) for field in fields]
            table.add_row(
                trial.user_attrs["name"], *settings, trial.state.name, value, str(len(trial.intermediate_values))
            )
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
