"""Stage `chosen`: candidates are merged, scored on development data, and judged; the winner is what is shipped.

It stands in the pipeline since it joins two rooms that don't know each other: `adapters` merges and judges,
`evaluate` scores.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_dist.config.merge import CALIBRATED, MergeConfig, MergeMethod
from qlora_dist.config.stages import ChosenConfig, MergedConfig, ScoresConfig
from qlora_dist.runtime import Facts, clear, log, write_json

ADAPTER, ROWS, CALIBRATION = "adapter-", "rows-", "calibration-"
REFEREE_FILE = "referee.json"
DEVELOPMENT = "validation"


def choose_merge(config: ChosenConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves the winning adapter's PEFT folder in `out`, and all standings in `referee.json`.

    Inputs are `base`, one `adapter-<label>` for each part, one `rows-<domain>` of development data for each domain
    and for `general`, and `calibration-<label>`, a part's training rows, for merges that look at them. The parts
    themselves are candidates too. What an earlier life of this node merged and scored is kept.

    Raises:
        ModelError: if the parts can't be merged.
        DataError: if a domain has no development data.
    """
    from qlora_dist.adapters.merge import MERGE_FILE
    from qlora_dist.adapters.referee import BASE, judge

    parts = {name.removeprefix(ADAPTER): path for name, path in inputs.items() if name.startswith(ADAPTER)}
    folders: dict[str, Path | None] = {BASE: None, **parts, **_merge_all(config, inputs, parts, out / "candidates")}
    rows: list[dict[str, Any]] = []
    for number, (name, folder) in enumerate(folders.items(), 1):
        log.info("candidate %d/%d: %s", number, len(folders), name)
        rows += _development_rows(config, inputs, name, folder, out / "scores" / str(number))
    verdict = judge(rows, forgetting_at_most=config.merge.max_forgetting) | _relations(out / "candidates")
    _keep(out, folders[verdict["chosen"]])
    write_json(out / REFEREE_FILE, verdict)
    told = json.loads((out / MERGE_FILE).read_text(encoding="utf-8")) if (out / MERGE_FILE).exists() else {}
    return verdict | {name: value for name, value in told.items() if name != "modules"}


def _relations(candidates: Path) -> Facts:
    """Returns how the parts lie to each other, whichever candidate is shipped."""
    from qlora_dist.adapters.merge import MERGE_FILE

    told = json.loads((candidates / "0" / MERGE_FILE).read_text(encoding="utf-8"))
    parts = [{name: value for name, value in part.items() if name != "weight"} for part in told["parts"]]
    return {"parts": parts, **{name: told[name] for name in ("cosines", "cross_energy", "spectrum")}}


def candidate_merges(merge: MergeConfig) -> dict[str, MergeConfig]:
    """Returns every merge that is compared, by name (`concat x1.5`)."""
    from qlora_dist.adapters.referee import SCALES, candidates

    return candidates(merge, merge.compare, merge.scales or SCALES)


def _merge_all(
    config: ChosenConfig, inputs: Mapping[str, Path], parts: Mapping[str, Path], folder: Path
) -> dict[str, Path]:
    rows = {ROWS + n.removeprefix(CALIBRATION): path for n, path in inputs.items() if n.startswith(CALIBRATION)}
    given = {**parts, "base": inputs["base"], **rows} if rows else parts
    merged: dict[str, Path] = {}
    first: dict[MergeMethod, Path] = {}
    for number, (name, merge) in enumerate(candidate_merges(config.merge).items()):
        merged[name], aside = folder / str(number), folder / f".{number}.partial"
        if not merged[name].exists():  # else an earlier life made it
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _merge_one(config, merge, given, first.get(merge.method), aside)
            aside.rename(merged[name])
        if merge.method in CALIBRATED:
            first.setdefault(merge.method, merged[name])
    return merged


def _merge_one(
    config: ChosenConfig, merge: MergeConfig, inputs: Mapping[str, Path], same: Path | None, out: Path
) -> None:
    """Makes one candidate: anew, or out of the same merge at another scale."""
    from qlora_dist.adapters.merge import merge_adapters
    from qlora_dist.adapters.scaled import rescale

    if same is not None:
        rescale(same, merge.scale, out)
    else:
        told = MergedConfig(merge=merge, shard_weights=config.shard_weights, model=config.model)
        merge_adapters(told, inputs, out)


def _development_rows(
    config: ChosenConfig, inputs: Mapping[str, Path], name: str, adapter: Path | None, out: Path
) -> Iterator[dict[str, Any]]:
    from qlora_dist.evaluate.documents import DOCUMENTS_FILE
    from qlora_dist.evaluate.scores import score_model

    evaluate = dataclasses.replace(config.evaluate, split=DEVELOPMENT, max_answers=0, max_rows=config.max_rows)
    told = ScoresConfig(model=config.model, evaluate=evaluate, name=name)
    needs = {key: path for key, path in inputs.items() if key == "base" or key.startswith(ROWS)}
    out.mkdir(parents=True, exist_ok=True)
    score_model(told, needs | ({"adapter": adapter} if adapter else {}), out)
    for line in (out / DOCUMENTS_FILE).read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        yield {
            "candidate": name,
            "domain": document["domain"],
            "document": document["record"],
            "cluster": document["cluster"],
            "nll": document["nll_bits"] * math.log(2),
            "bytes": document["bytes"],
            "tokens": document["tokens"],
        }


def _keep(out: Path, chosen: Path | None) -> None:
    """Leaves the chosen adapter's files alone in `out`."""
    assert chosen is not None, "the base is no candidate"
    kept = out / ".chosen"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(chosen, kept, ignore=shutil.ignore_patterns("manifest.json", ".*", "metrics.jsonl"))
    clear(out)
    for path in kept.iterdir():
        path.rename(out / path.name)
    kept.rmdir()
