"""The command line of merging: PEFT folders and globs in, one PEFT folder and a table out."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.adapters.folders import find_folders
from qlora_dist.adapters.merge import BASE, MERGE_FILE, ROWS, merge_folders
from qlora_dist.config.fields import check
from qlora_dist.config.merge import CALIBRATED, LearnedPer, MergeConfig, MergeMethod, MergeWeights
from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import MergedConfig
from qlora_dist.errors import ConfigError, QloraDistError, bad_value, nearest
from qlora_dist.runtime import Facts, log, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "python -m qlora_dist.adapters.merge"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = parser().parse_args(with_negative_weights(sys.argv[1:] if argv is None else argv))
    quiet_libraries()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from qlora_dist.model.tensorfile import whole

    try:
        folders = find_folders(arguments.adapters)
        config = merged_config(arguments, list(folders))
        if config.merge.method in CALIBRATED:
            log.setLevel(logging.INFO)  # they look at data, which takes minutes, and say how many are left
        with whole(Path(arguments.out)) as aside, told_as_options():
            aside.mkdir()
            facts = merge_folders(config, folders, calibration(arguments, list(folders)), aside)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    from rich.console import Console

    show(facts, folders, Path(arguments.out), Console())
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns the parser; its defaults are those of `MergeConfig`."""
    default = MergeConfig()
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Merge LoRA adapters into one, in the space of the updates B A. The result is a plain PEFT folder.",
        epilog="Weights: tokens (what each was trained on), uniform, inverse_loss, or numbers: 0.5,0.3,0.2.",
    )
    p.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a PEFT folder, a folder or glob of such, or a run")
    p.add_argument("--out", required=True, metavar="DIR", help="where the merged adapter goes; must not exist")
    p.add_argument("--method", default=default.method.name, help=f"{' | '.join(m.name for m in MergeMethod)}")
    p.add_argument("--weights", default=default.weights.name, help="tokens | uniform | inverse_loss | numbers")
    p.add_argument("--scale", type=float, default=default.scale, help="multiplies the whole (default %(default)s)")
    p.add_argument("--rank", type=int, default=default.rank, help="the most that the result's lora_rank may be")
    p.add_argument("--energy", type=float, default=default.energy, help="the share of the squared spectrum to keep")
    p.add_argument("--density", type=float, default=default.density, help="ties: share kept (default %(default)s)")
    p.add_argument("--drop", type=float, default=default.drop, help="dare: share dropped (default %(default)s)")
    p.add_argument("--seed", type=int, default=default.seed, help="dare: of the draw (default %(default)s)")
    p.add_argument("--base", default="", metavar="DIR", help="regmean, learned, greedy_soup: a run's base artifact")
    p.add_argument("--rows", default="", metavar="DIR", help="the same: packed rows, development data for greedy_soup")
    p.add_argument("--learned-per", default=default.learned_per.name, help="learned: adapter | module")
    p.add_argument("--workers", type=int, default=default.workers, help="threads; 0: one a core")
    return p


def with_negative_weights(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `--weights -0.5,1.5` in one: argparse would take the numbers for an option."""
    joined = list(arguments)
    for i in reversed(range(len(joined) - 1)):
        if joined[i] == "--weights" and re.match(r"-[\d.]", joined[i + 1]):
            joined[i : i + 2] = [f"--weights={joined[i + 1]}"]
    return joined


@contextmanager
def told_as_options() -> Iterator[None]:
    """Names the config's keys as this command's options in what it says of a mistake."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"\bmerge\.([a-z]+)=", r"--\1=", str(error))) from None


def merged_config(arguments: argparse.Namespace, labels: Sequence[str]) -> MergedConfig:
    """Returns the stage's config as the arguments say it, checked.

    Raises:
        ConfigError: for an unknown method, a number of weights that isn't that of the adapters, a bad value.
    """
    if arguments.method not in MergeMethod.__members__:
        raise bad_value(
            "--method", arguments.method, "a merge method", nearest(arguments.method, MergeMethod.__members__)
        )
    if MergeMethod[arguments.method] in CALIBRATED and not (arguments.base and arguments.rows):
        repair = "Give --base and --rows, folders below runs/artifacts, or set merge.method in a run."
        raise bad_value("--method", arguments.method, "--base and --rows with it: it looks at data", repair)
    if arguments.learned_per not in LearnedPer.__members__:
        raise bad_value("--learned-per", arguments.learned_per, "adapter or module")
    weights, given = _weights(arguments.weights, labels)
    merge = MergeConfig(
        method=MergeMethod[arguments.method],
        weights=weights,
        learned_per=LearnedPer[arguments.learned_per],
        **{
            name: getattr(arguments, name) for name in ("scale", "rank", "energy", "density", "drop", "seed", "workers")
        },
    )
    with told_as_options():
        check(merge, "merge")
    return MergedConfig(merge=merge, shard_weights=given, model=ModelConfig() if arguments.base else None)


def calibration(arguments: argparse.Namespace, labels: Sequence[str]) -> dict[str, Path]:
    """Returns the base and the rows among a merge's inputs, where the method looks at data."""
    if MergeMethod[arguments.method] not in CALIBRATED:
        return {}
    return {BASE: Path(arguments.base), **{f"{ROWS}{label}": Path(arguments.rows) for label in labels}}


def _weights(text: str, labels: Sequence[str]) -> tuple[MergeWeights, dict[str, float]]:
    rules = {name for name in MergeWeights.__members__ if name != "given"}
    if text in rules:
        return MergeWeights[text], {}
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise bad_value("--weights", text, "a rule or numbers such as 0.5,0.3,0.2", nearest(text, rules)) from None
    if len(numbers) != len(labels):
        raise bad_value("--weights", text, f"{len(labels)} numbers, one for each of {', '.join(labels)}")
    return MergeWeights.given, dict(zip(labels, numbers, strict=True))


def show(facts: Facts, folders: dict[str, Path], out: Path, console: Console) -> None:
    """Prints the parts, how they relate, what was kept, and the command to type next."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{facts['method']} of {len(folders)} adapters, {facts['num_modules']} modules")
    table.add_column("adapter", overflow="fold")
    for name in ("weight", "rank", "tokens", "‖ΔW‖"):
        table.add_column(name, justify="right")
    for i, part in enumerate(facts["parts"]):
        numbers = (
            f"{part['weight']:.4g}",
            str(part["lora_rank"]),
            str(part["trained_tokens"] or "-"),
            f"{part['norm']:.4g}",
        )
        table.add_row(escape(f"{i + 1} {part['label']}"), *numbers)
    console.print(table)
    angles = Table("cosine", *(str(i + 1) for i in range(len(facts["parts"]))))
    for i, cosines in enumerate(facts["cosines"]):
        angles.add_row(str(i + 1), *(f"{c:+.3f}" for c in cosines))
    if len(facts["parts"]) > 1:
        console.print(angles)
    console.print(
        f"merged: rank {facts['lora_rank']} of {facts['largest_rank']}, ‖ΔW‖ {facts['norm']:.4g},"
        f" energy kept {facts['energy_kept']:.2%}, cross energy {facts['cross_energy']:+.1%}",
        highlight=False,
    )
    show_result(out, console)


def show_result(out: Path, console: Console) -> None:
    """Prints where the adapter is, and the command to type next."""
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tell(f"written: {out} (a PEFT folder; its parts stand in {MERGE_FILE})")
    command = ["python", "-m", "qlora_dist.export", str(out), "--base", *_base_of(out), "--to", "hf"]
    tell(f"next: {shlex.join([*command, '--out', f'{out}-model'])}")


def _base_of(adapter: Path) -> list[str]:
    """Returns what the adapter says of its base as the export's arguments, `BASE` where it says nothing."""
    from qlora_dist.model.peft_folder import PeftFolder

    with PeftFolder(adapter) as folder:
        known, config = folder.provenance, folder.config
    if known is not None:
        path, revision = known.base_path, known.base_revision
    else:
        path, revision = config.get("base_model_name_or_path") or "BASE", config.get("revision") or ""
    return [path, *(["--revision", revision] if revision else [])]
