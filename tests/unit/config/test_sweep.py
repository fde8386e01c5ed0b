"""What a sweep varies: lists and named points, checked as the fields themselves are, and duplicates run once."""

import dataclasses

import pytest

from qlora_dist.config.sweep import FIELDS, Sweep, SweepConfig, trials_of
from qlora_dist.config.train import LoraConfig, Schedule, TrainConfig
from qlora_dist.errors import ConfigError
from qlora_dist.launch.compose import compose_run


def sweep(*overrides: str) -> Sweep:
    config = compose_run(overrides)
    return trials_of(config.sweep, config.lora, config.train, config.seed)


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    return str(caught.value)


def test_every_identity_field_of_lora_and_train_can_be_varied_and_no_other():
    wanted = {
        f.name
        for config in (LoraConfig, TrainConfig)
        for f in dataclasses.fields(config)
        if not f.metadata.get("execution")
    }
    assert set(FIELDS) == wanted - {"method"} | {"seed"}
    assert set(FIELDS) <= {f.name for f in dataclasses.fields(SweepConfig)}


def test_lists_are_combined_and_name_the_trials():
    made = sweep("sweep=grid", "sweep.lora_rank=[4,8]", "sweep.learning_rate=[1e-4,2e-4]", "sweep.seed=[1,2]")
    assert [t.name for t in made.trials][:3] == ["r4-lr0.0001-s1", "r4-lr0.0001-s2", "r4-lr0.0002-s1"]
    assert len(made.trials) == 8
    last = made.trials[-1]
    assert (last.lora.lora_rank, last.train.learning_rate, last.seed) == (8, 2e-4, 2)
    assert last.lora.lora_alpha == compose_run([]).lora.lora_alpha, "what isn't varied is the run's own"


def test_named_points_are_typed_as_their_fields_and_combine_with_lists():
    points = "sweep.points=[{name: a, lora_rank: 8, schedule: linear}, {name: b, learning_rate: 1}]"
    made = sweep("sweep=grid", points, "sweep.lora_alpha=[16,32]")
    assert [t.name for t in made.trials] == ["a-a16", "a-a32", "b-a16", "b-a32"]
    assert made.trials[0].train.schedule is Schedule.linear
    assert made.trials[2].train.learning_rate == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.lora_rnk=[8]"], "sweep.lora_rnk: there is no such key. Did you mean lora_rank?"),
        (["sweep.points=[{name: a, lora_rnk: 8}]"], "sweep.points[0].lora_rnk: no sweep varies it. Did you mean"),
        (["sweep.points=[{name: a, micro_batch_tokens: 8}]"], "sweep.points[0].micro_batch_tokens: no sweep varies it"),
        (["sweep.points=[{lora_rank: 8}]"], "sweep.points[0].name='': expected a name"),
        (["sweep.points=[{name: a, schedule: cosin}]"], "sweep.schedule=cosin: expected one of cosine, linear"),
        (["sweep.lora_rank=[0]"], "sweep.lora_rank=0: expected a number at least 1"),
        (["sweep.lora_rank=[x]"], "sweep.lora_rank[0]=x: expected a whole number"),
        (["sweep.lora_rank=[8,8]"], "sweep: two points are called r8"),
        (["sweep.tokens_per_step=[5000]"], "train.tokens_per_step=5000: expected a multiple"),
        (["sweep.lora_rank=[8]", "sweep.points=[{name: a, lora_rank: 4}]"], "sweep.lora_rank: it is in sweep.points"),
        (["sweep.seed=[-1]"], "sweep.seed=-1: expected a whole number at least 0"),
        (["sweep.points=[{name: base, lora_rank: 8}]"], "sweep.points[0].name=base: expected another name than base"),
        (["sweep.points=[{name: a, seed: true}]"], "sweep.seed=True: expected a whole number"),
        (
            ["sweep.optimizer=[adamw,adamw_8bit]", "strategy=deepspeed", "strategy.world_size=2"],
            "strategy=ddp or fsdp. (Trial optimizer_adamw_8bit of the sweep.)",
        ),
        (
            ["sweep.lora_rank=[8]", "general.split.validation_share=0"],
            "general.split.validation_share=0.0: expected more than 0 with a sweep",
        ),
        (["sweep.lora_rank=[8]", "train.method=full"], "train.method=full: expected lora with a sweep"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_error(overrides, message):
    assert message in error_of("sweep=grid", *overrides)


def test_a_list_without_a_sweep_and_a_sweep_without_a_list_are_no_silent_nothing():
    with pytest.raises(ConfigError, match=r"sweep=grid: expected a list of values, or points\. Set sweep\.lora_rank"):
        sweep("sweep=grid")
    assert "Set sweep=grid or sweep=halving" in error_of("sweep.lora_rank=[8]")


def test_recipes_that_write_one_training_in_two_ways_are_run_once():
    points = (
        "sweep.points=[{name: a, lora_rank: 4, lora_alpha: 16, target_modules: [q_proj, v_proj]},"
        "{name: b, lora_rank: 4, lora_alpha: 8, use_rslora: true, target_modules: [v_proj, q_proj]},"
        "{name: c, lora_rank: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}]"
    )
    made = sweep("sweep=grid", points)
    assert [t.name for t in made.trials] == ["a", "c"]
    assert made.duplicates == {"b": "a"}
    assert len(sweep("sweep=grid", points, "sweep.find_duplicates=false").trials) == 3


def test_alpha_and_learning_rate_are_never_one_anothers_duplicates():
    one, other = "{name: a, lora_alpha: 16, learning_rate: 2e-4}", "{name: b, lora_alpha: 32, learning_rate: 1e-4}"
    points = f"sweep.points=[{one}, {other}]"
    assert sweep("sweep=grid", points).duplicates == {}


def test_what_a_sweep_is_judged_by_may_be_a_source_that_was_set_aside():
    told = ("sweep=grid", "sweep.lora_rank=[8]", "general.split.validation_share=0")
    compose_run([*told, "general.sources=[{path: a}, {path: b, use: validation}]"])


def test_values_that_read_the_same_in_six_digits_are_written_out_in_names():
    made = sweep("sweep=grid", "sweep.learning_rate=[1e-4,1.00000001e-4]", "sweep.lora_alpha=[16]")
    assert [t.name for t in made.trials] == ["a16-lr0.0001", "a16-lr0.000100000001"]
