"""A sweep's part of a run's summary, made from what each shard came to."""

import json

from qlora_dist.pipeline.swept import METRIC, sweep_summary
from qlora_dist.pipeline.winner import SWEEP_FILE


def test_means_are_of_the_shards_of_one_domain(tmp_path):
    folders = {}
    for domain, number, value in (("legal", 0, 2.0), ("legal", 1, 3.0), ("code", 0, 8.0)):
        label = f"{domain}-{number}"
        trials = [
            {"trial": "a", "lora_rank": 4, METRIC: value, "forgetting": 0.0, "over_best": 0.0, "tokens": 10},
            {"trial": "b", "lora_rank": 8, METRIC: value + 1, "forgetting": 0.1, "over_best": 1.0, "tokens": 10},
        ]
        told = {"domain": domain, "winner": "a", "reason": "", "trials": trials, "tokens": 20, "columns": ["lora_rank"]}
        folders[label] = tmp_path / label
        folders[label].mkdir()
        (folders[label] / SWEEP_FILE).write_text(json.dumps(told))
    rows = {(row["domain"], row["label"]): row for row in sweep_summary(folders)["trials"]}
    assert {key: row[METRIC] for key, row in rows.items()} == {
        ("legal", "a"): 2.5,
        ("legal", "b"): 3.5,
        ("code", "a"): 8.0,
        ("code", "b"): 9.0,
    }
    assert {key: row["chosen_by"] for key, row in rows.items() if row["chosen_by"]} == {
        ("legal", "a"): 2,
        ("code", "a"): 1,
    }
    alone = sweep_summary({label: folder for label, folder in folders.items() if "legal" in label})["trials"]
    assert all("domain" not in row for row in alone)
