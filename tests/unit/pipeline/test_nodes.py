"""What a plan holds, and which keys move when one thing changes."""

import json
import uuid
from pathlib import Path

import pytest

from qlora_dist.config.stages import BaseConfig, ScoresConfig, TinyStageConfig
from qlora_dist.errors import QloraDistError
from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan, unread_keys
from qlora_dist.pipeline.plan import Plan, drift, read_plan
from qlora_dist.pipeline.run import manifest_of
from qlora_dist.testing import save_tiny_model


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20)))
    return folder


def plan_of(corpus: Path, *overrides: str) -> Plan:
    sources = [f"domain.files.sources=[{{path: {corpus}}}]", f"general.sources=[{{path: {corpus}}}]"]
    return make_plan(
        compose_run(["domain=files", "train=tiny", *sources, f"root={corpus.parent / 'runs'}", *overrides])
    )


def keys(plan: Plan) -> dict[str, str]:
    return {node.name: node.key for node in plan.nodes}


def moved(before: Plan, after: Plan) -> set[str]:
    old, new = keys(before), keys(after)
    return {name for name in old if new.get(name) != old[name]}


def test_a_plan_has_an_adapter_a_shard_and_scores_for_every_model(corpus: Path):
    names = plan_of(corpus, "domain.files.num_shards=3").names()
    assert [n for n in names if n.startswith("adapter/")] == [f"adapter/files-{i}" for i in range(3)]
    scores = [n for n in names if n.startswith("scores/")]
    assert scores == ["scores/base", "scores/files-0", "scores/files-1", "scores/files-2", "scores/merged"]


def test_every_node_comes_after_what_it_reads(corpus: Path):
    seen: set[str] = set()
    for node in plan_of(corpus).nodes:
        assert set(node.inputs.values()) <= seen
        seen.add(node.id)
    assert len(seen) == len(plan_of(corpus).nodes)


def test_planning_twice_gives_the_same_keys_wherever_the_files_lie(corpus: Path, tmp_path: Path):
    before = keys(plan_of(corpus))
    other = tmp_path / "elsewhere" / "corpus"
    other.parent.mkdir()
    corpus.rename(other)
    assert keys(plan_of(other)) == before


def test_the_learning_rate_moves_adapters_and_what_reads_them_alone(corpus: Path):
    changed = moved(plan_of(corpus), plan_of(corpus, "train.learning_rate=1e-4"))
    assert {name.partition("/")[0] for name in changed} == {"adapter", "merged", "scores"}
    assert "scores/base" not in changed


def test_quantization_does_not_move_the_rows(corpus: Path):
    changed = moved(plan_of(corpus), plan_of(corpus, "model.quantization=none"))
    assert not {name for name in changed if name.startswith(("rows", "tokenizer", "tiny/"))}
    assert "adapter/files-0" in changed


@pytest.mark.parametrize(
    "override",
    ["launcher.max_parallel=1", "tracking=none", "train.micro_batch_tokens=1024", "name=other", "plan_only=true"],
)
def test_execution_keys_move_nothing(corpus: Path, override: str):
    assert moved(plan_of(corpus), plan_of(corpus, override)) == set()


def test_new_bytes_in_a_source_move_what_depends_on_them(corpus: Path):
    before = plan_of(corpus)
    (corpus / "b.jsonl").write_text(json.dumps({"text": "a new text"}) + "\n")
    after = plan_of(corpus)
    assert "splits/files" in moved(before, after)
    assert "files: other bytes" in drift(after, before)["records/files-0"]


def test_the_drift_report_names_field_values_and_way(corpus: Path):
    report = drift(plan_of(corpus, "lora.lora_rank=4"), plan_of(corpus, "lora.lora_rank=8"))
    assert report["adapter/files-0"] == ["lora.lora_rank: 8 -> 4"]
    assert report["merged/all"] == ["through adapter/files-0", "through adapter/files-1"]
    assert drift(plan_of(corpus), plan_of(corpus)) == {}


def test_a_written_plan_reads_back_whole_and_rebuilds_each_stage_config(corpus: Path):
    plan = plan_of(corpus)
    again = read_plan(plan.write())
    assert again == plan
    told = again.node("adapter/files-0").told()
    assert told.lora.lora_rank == 16
    assert told.model.quantization.name == "nf4"


def test_with_a_referee_parts_are_judged_on_development_data_and_the_test_set_is_read_for_the_chosen_alone(
    corpus: Path,
):
    plan = plan_of(corpus, "merge=referee")
    chosen = plan.node("chosen/all")
    rows = {name: plan.node(i).name for name, i in chosen.inputs.items() if name.startswith("rows-")}
    assert rows == {"rows-files": "rows/files-validation", "rows-general": "rows/general-validation"}
    assert [n for n in plan.names() if n.startswith("scores/")] == ["scores/base", "scores/merged"]
    assert plan.node("scores/merged").inputs["adapter"] == chosen.id


def test_scoring_the_development_split_needs_no_second_rows(corpus: Path):
    names = plan_of(corpus, "evaluate.split=validation").names()
    assert names.count("rows/files-validation") == 1


def test_an_export_reads_the_base_and_what_is_shipped(corpus: Path):
    plan = plan_of(corpus, "export=gguf")
    node = plan.node("export/merged")
    assert {name: plan.node(id).name for name, id in node.inputs.items()} == {
        "base": "base/tiny",
        "adapter": "merged/all",
    }
    assert not [n for n in plan_of(corpus).names() if n.startswith("export")]


def test_an_export_that_would_fail_in_the_end_is_refused_before_any_work(corpus: Path, tmp_path: Path):
    base = save_tiny_model(tmp_path / "base")
    given = [f"model.path={base}", "export=gguf"]
    fields = json.loads((base / "tokenizer.json").read_text())
    fields["model"]["merges"], fields["pre_tokenizer"] = [["a", "b"]], {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(QloraDistError, match=r"export\.tokenizer_pre"):
        plan_of(corpus, *given)
    assert "export/merged" in plan_of(corpus, *given, "export.tokenizer_pre=gpt-2").names()
    assert "export/merged" in plan_of(corpus, given[0], "export=gguf_lora").names()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(QloraDistError, match=r"model_type=gemma3: --to gguf knows llama"):
        plan_of(corpus, *given)
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | quantized))
    with pytest.raises(QloraDistError, match=r"bitsandbytes \(4-bit\)"):
        plan_of(corpus, given[0], "export=hf")


def test_a_merge_divided_over_nodes_is_the_same_artifact(corpus: Path):
    plan = plan_of(corpus, "merge.num_parts=3")
    parts = [n for n in plan.nodes if n.stage == "merged_part"]
    assert [n.label for n in parts] == ["all-0", "all-1", "all-2"]
    assert all({plan.node(i).stage for i in n.inputs.values()} == {"adapter"} for n in parts)
    assert {n.id for n in parts} <= set(plan.node("merged/all").inputs.values())
    assert keys(plan).items() >= keys(plan_of(corpus)).items()
    with pytest.raises(QloraDistError, match=r"merge\.num_parts=3: expected 1 with a referee"):
        plan_of(corpus, "merge.num_parts=3", "merge.method=learned")


def test_workers_read_the_rows_of_all_and_meet_in_one_folder(corpus: Path):
    plan = plan_of(corpus, "merge=periodic", "domain.files.num_shards=2")
    workers = [n for n in plan.nodes if n.stage == "worker"]
    assert len(workers) == 2
    assert len({n.config["meeting"] for n in workers}) == 1
    assert all({f"rows-{w.label}" for w in workers} <= set(n.inputs) for n in workers)
    assert set(plan.node("merged/all").inputs) == {w.label for w in workers}
    assert not [n for n in plan.nodes if n.stage == "adapter"]
    other = plan_of(corpus, "merge=periodic", "domain.files.num_shards=2", "merge.wait_s=5", "merge.patience_s=1")
    assert [n.key for n in other.nodes] == [n.key for n in plan.nodes]


def test_full_fine_tuning_plans_no_merge_and_says_so(corpus: Path):
    plan = plan_of(corpus, "train.method=full")
    assert not [n for n in plan.names() if n.startswith("merged")]
    assert "not merged" in plan.notes[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["domain.files.sources=[{path: /nowhere/at/all}]"], "domain.files.sources[0].path=/nowhere/at/all: "),
        (["model.path=/nowhere"], "model.path=/nowhere: "),
        (["model.path=owner/name"], "model.revision="),
    ],
)
def test_what_is_not_there_is_an_error_before_any_work(corpus: Path, overrides: list[str], message: str):
    with pytest.raises(QloraDistError) as caught:
        plan_of(corpus, *overrides)
    assert message in str(caught.value)
    assert not (corpus.parent / "runs").exists()


def test_a_key_that_nothing_reads_is_told(tmp_path: Path):
    config = compose_run(["model.path=owner/name", f"model.revision={'a' * 40}", "train.method=full"])
    told = unread_keys(config, ["model.tiny.hidden_size", "lora.lora_rank", "train.epochs"])
    assert [line.partition(" ")[0] for line in told] == ["model.tiny.hidden_size", "lora.lora_rank"]


def test_a_plan_file_of_another_shape_is_refused(tmp_path: Path):
    (tmp_path / "plan.json").write_text('{"nodes": [{"what": 1}]}')
    with pytest.raises(QloraDistError, match="is no plan"):
        read_plan(tmp_path / "plan.json")


def test_what_an_input_names_by_its_place_is_on_the_machine_that_reads_it(tmp_path: Path):
    """A base says where the embedded one's files lie: another machine than the one that made them fetches both."""
    url = f"memory://{uuid.uuid4().hex}/runs"
    plans = []
    for machine in ("here", "there"):
        plan = Plan(experiment="test", root=url, staging=str(tmp_path / machine), command="", config={})
        base = plan.add("base", "tiny", BaseConfig(), inputs={"tiny": plan.add("tiny", "tiny", TinyStageConfig())})
        plan.add("scores", "base", ScoresConfig(), inputs={"base": base})
        plans.append(plan)
    here, there = plans
    for node in here.nodes[:2]:
        with here.store.owned(node.id, "job"):
            here.store.partial(node.id).mkdir(parents=True, exist_ok=True)
            (here.store.partial(node.id) / "file").write_text(node.name)
            here.store.commit(manifest_of(here, node, {}, 0.0))
    scores = there.node("scores/base")
    assert set(there.inputs(scores)) == {"base"}
    for node in there.nodes[:2]:
        assert (there.store.folder(node.id) / "file").read_text() == node.name
