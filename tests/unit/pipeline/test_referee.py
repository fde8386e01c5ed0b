"""Stage `chosen`: what an earlier life merged and scored is kept, and the same one is shipped."""

from dataclasses import replace

import pytest

from qlora_dist.config.merge import MergeConfig, MergeMethod
from qlora_dist.config.model import Dtype, ModelConfig
from qlora_dist.config.stages import BaseConfig, ChosenConfig
from qlora_dist.model.adapter import Provenance, write_provenance
from qlora_dist.model.base import open_base, prepare_base
from qlora_dist.pipeline.referee import choose_merge
from qlora_dist.testing import save_rows, save_tiny_model
from tests.unit.export.conftest import save_adapter


@pytest.fixture
def inputs(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, tmp_path / "base")
    base = open_base(tmp_path / "base")
    found = {"base": tmp_path / "base"}
    for i in range(2):
        folder = found[f"adapter-legal-{i}"] = save_adapter(tmp_path / f"legal-{i}", model, std=0.02 * (i + 1))
        write_provenance(folder, Provenance(str(model), "", base.digest, "t", "nf4", "float32", 100))
    for seed, domain in enumerate(("legal", "general")):
        found[f"rows-{domain}"] = save_rows(tmp_path / f"rows-{domain}", 4, seed=seed)
    return found


def test_a_killed_referee_goes_on_with_what_it_had_and_ships_the_same(inputs, tmp_path, monkeypatch):
    merge = MergeConfig(compare=[MergeMethod.concat, MergeMethod.ties], scales=[1.0, 2.0], rank=2)
    config = ChosenConfig(merge=merge, model=ModelConfig(compute_dtype=Dtype.float32))
    outs = [tmp_path / "whole", tmp_path / "again"]
    for out in outs:
        out.mkdir()
    told = choose_merge(config, inputs, outs[0])
    assert len(told["standings"]) == 2 + 2 * 2

    from qlora_dist.adapters import merge as merging
    from qlora_dist.evaluate import scores

    calls = []

    def counted(function, name, die_at=-1):
        def call(*args):
            calls.append(name)
            if calls.count(name) == die_at:
                raise KeyboardInterrupt
            return function(*args)

        return call

    monkeypatch.setattr(scores, "score_model", counted(scores.score_model, "score", die_at=3))
    monkeypatch.setattr(merging, "merge_adapters", counted(merging.merge_adapters, "merge"))
    with pytest.raises(KeyboardInterrupt):
        choose_merge(config, inputs, outs[1])
    kept = {path: path.stat().st_mtime_ns for path in outs[1].glob("scores/*/documents.jsonl")}
    assert len(kept) == 2
    again = choose_merge(replace(config), inputs, outs[1])
    assert calls.count("merge") == 4, "none was merged twice"
    assert again == told
    assert sorted(p.name for p in outs[0].iterdir()) == sorted(p.name for p in outs[1].iterdir())
    assert all((outs[1] / p.name).read_bytes() == p.read_bytes() for p in outs[0].iterdir())
