"""What a user types, and what the composed config or the one-line error says."""

import pytest

from qlora_dist.config.train import gradient_accumulation
from qlora_dist.errors import ConfigError
from qlora_dist.launch.compose import compose_run, valid_keys
from qlora_dist.launch.conf import conf_folder


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    return str(caught.value)


def test_the_documented_overrides_compose():
    config = compose_run(["+experiment=legal", "train.learning_rate=1e-4", "lora.lora_rank=16", "launcher=local"])
    assert config.name == "legal"
    assert config.train.learning_rate == 1e-4
    assert config.lora.lora_rank == 16
    assert list(config.domain) == ["legal"]


def test_several_domains_compose_each_under_its_name():
    config = compose_run(["domain=[legal,code]", "domain.code.num_shards=3"])
    assert list(config.domain) == ["legal", "code"]
    assert config.domain["code"].num_shards == 3
    assert config.general.sources[0].path == "installed:reference"


def test_one_domain_may_be_given_without_brackets():
    assert list(compose_run(["domain=code"]).domain) == ["code"]


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_folder() / "experiment").glob("*.yaml")))
def test_every_shipped_experiment_composes(name: str):
    assert compose_run([f"+experiment={name}"]).name == name


@pytest.mark.parametrize(
    "group", ["model", "lora", "train", "strategy", "sweep", "merge", "evaluate", "export", "tracking", "launcher"]
)
def test_every_option_of_every_group_composes(group: str):
    options = sorted(p.stem for p in (conf_folder() / group).glob("*.yaml"))
    assert options
    pinned = [f"model.revision={'0' * 40}"] if group == "model" else []
    for option in options:
        compose_run([f"{group}={option}", *pinned])


def test_a_hub_model_must_be_pinned():
    assert error_of("model=qwen3_8b").startswith(
        "model.revision='': expected the full commit sha of Qwen/Qwen3-8B-Base"
    )


def test_an_unknown_key_is_named_with_the_nearest_one():
    assert error_of("lora.lora_rnk=16") == "lora.lora_rnk: there is no such key. Did you mean lora_rank?"
    assert error_of("+lora.lora_rnk=16") == "lora.lora_rnk: there is no such key. Did you mean lora_rank?"
    assert error_of("trian.epochs=2") == "trian.epochs: there is no such key. Did you mean train.epochs?"
    assert "Did you mean num_shards?" in error_of("domain.legal.num_shard=2")


def test_an_unknown_option_is_named_with_the_nearest_one():
    assert error_of("model=tinny") == "model=tinny: expected one of the files in conf/model/. Did you mean tiny?"
    assert "Did you mean legal?" in error_of("+experiment=legel")
    assert "Did you mean legal?" in error_of("domain=[legle]")


def test_an_experiment_without_its_plus_says_how():
    message = error_of("experiment=legal")
    assert message.startswith("experiment: it is not in the defaults list. Write +experiment=<name>, one of: ")


def test_a_wrong_type_names_key_value_and_what_was_wanted():
    assert error_of("lora.lora_rank=abc") == "lora.lora_rank=abc: expected a whole number."
    assert error_of("train.learning_rate=fast") == "train.learning_rate=fast: expected a number."
    assert error_of("lora.use_rslora=perhaps") == "lora.use_rslora=perhaps: expected true or false."
    assert error_of("model.quantization=nf8").startswith("model.quantization=nf8: expected one of nf4, none")


@pytest.mark.parametrize("value", ["[q_proj,v_proj]", "[[q_proj],v_proj]", "q_proj"])
def test_a_sweep_of_modules_says_that_it_wants_a_list_of_lists(value: str):
    wanted = "a list of lists, as [[q_proj],[q_proj,v_proj]]"
    assert (
        error_of("sweep=grid", f"sweep.target_modules={value}") == f"sweep.target_modules={value}: expected {wanted}."
    )


@pytest.mark.parametrize("value", ["[a,b]", "[{name: small},b]", "a"])
def test_points_of_a_sweep_say_that_they_want_names_and_values(value: str):
    wanted = "a list of named points, as [{name: small, lora_rank: 4}]"
    assert error_of("sweep=grid", f"sweep.points={value}") == f"sweep.points={value}: expected {wanted}."


def test_a_field_that_no_sweep_varies_says_so_and_where_it_is_set():
    how = "It says how a trial is trained, not what is made."
    for name in ("compile", "micro_batch_tokens"):
        message = error_of("sweep=grid", f"sweep.{name}=[1,2]")
        assert message.startswith(f"sweep.{name}: no sweep varies train.{name}. {how} Set train.{name}=<value>")
        assert "a sweep varies lora_rank, " in message
    assert error_of("sweep.method=[full]").startswith("sweep.method: no sweep varies train.method. Set train.method=")


def test_valid_names_are_those_that_can_be_typed():
    message = error_of("sweep.zzzz=1")
    assert "lora_rank, " in message
    assert "[]" not in message


def test_a_sweep_of_rows_that_dont_divide_the_micro_batch_names_the_key_that_there_is():
    message = error_of(
        "sweep=grid", "sweep.row_tokens=[64,100]", "train.row_tokens=64", "train.micro_batch_tokens=1024"
    )
    assert message.startswith("train.micro_batch_tokens=1024: expected a multiple of row_tokens = 100. ")
    assert "a multiple of train.row_tokens and of every row_tokens of the sweep" in message


def test_a_value_out_of_range_names_its_bounds():
    assert error_of("lora.lora_rank=0").startswith("lora.lora_rank=0: expected a number at least 1")
    assert error_of("train.learning_rate=-1").startswith("train.learning_rate=-1.0: expected a number above 0")
    assert error_of("domain.legal.num_shards=0").startswith("domain.legal.num_shards=0: expected a number at least 1")


def test_a_step_that_does_not_divide_names_the_nearest_that_does():
    message = error_of("train.tokens_per_step=5000", "train.micro_batch_tokens=2048")
    assert message.startswith("train.tokens_per_step=5000: expected a multiple of train.micro_batch_tokens x ")
    assert message.endswith("Set train.tokens_per_step=6144.")
    assert "Set train.micro_batch_tokens=" in error_of("train.micro_batch_tokens=1000", "train.row_tokens=256")


def test_gradient_accumulation_is_derived_from_the_token_budget():
    config = compose_run(["train.tokens_per_step=8192", "train.micro_batch_tokens=1024", "train.row_tokens=256"])
    assert gradient_accumulation(config.train, 1) == 8
    assert gradient_accumulation(config.train, 4) == 2


@pytest.mark.parametrize("name", ["artifacts", "a/b", "..", ""])
def test_a_name_that_can_be_no_folder_is_refused(name: str):
    assert "expected letters, digits" in error_of(f"name={name!r}" if name else "name=''")


def test_a_domain_without_sources_is_refused():
    assert "domain.legal.sources" in error_of("domain.legal.sources=[]")


def test_broken_override_grammar_is_one_line():
    assert "expected key=value" in error_of("domain=[legal")


def test_a_users_own_config_folder_comes_first(tmp_path):
    (tmp_path / "domain").mkdir()
    (tmp_path / "domain" / "mine.yaml").write_text("mine:\n  sources: [{path: /data/mine}]\n")
    assert list(compose_run(["domain=mine"], config_dir=str(tmp_path)).domain) == ["mine"]


def test_every_group_has_keys_and_no_key_is_listed_twice():
    keys = valid_keys()
    assert len(keys) == len(set(keys))
    assert {"train.tokens_per_step", "domain.<domain>.num_shards", "model.tiny.hidden_size"} <= set(keys)


def test_help_names_every_group_and_option():
    from qlora_dist.launch.conf import help_text

    page = help_text()
    for path in conf_folder().glob("*/*.yaml"):
        (line,) = [line for line in page.splitlines() if line.startswith(f"  {path.parent.name} ")]
        assert path.stem in line
