"""Every point of `-m` is checked before the first runs, and what `-m` can't list is one error."""

import pytest

from qlora_dist.errors import ConfigError
from qlora_dist.launch.multirun import check_points


@pytest.mark.parametrize("value", ["interval(2,4)", "glob(*)"])
def test_values_that_cant_be_listed_are_one_error(value: str):
    with pytest.raises(ConfigError) as caught:
        check_points(["-m", "+experiment=legal", f"lora.lora_alpha={value}"])
    wanted = "values that -m can list. Write each one: lora.lora_alpha=<one>,<another>."
    assert str(caught.value) == f"lora.lora_alpha={value}: expected {wanted}"


def test_broken_grammar_is_one_error():
    with pytest.raises(ConfigError, match="expected key=value in Hydra's grammar"):
        check_points(["-m", "domain=[legal"])


def test_a_mistake_in_the_last_point_is_found():
    with pytest.raises(ConfigError, match=r"lora\.lora_rank=0: expected a number at least 1"):
        check_points(["-m", "+experiment=legal", "lora.lora_rank=4,0"])


def test_flags_come_first_and_what_is_swept_is_told():
    ordered, swept = check_points(["+experiment=legal", "lora.lora_rank=range(4,6)", "-m"])
    assert ordered == ["-m", "+experiment=legal", "lora.lora_rank=range(4,6)"]
    assert swept == {"lora.lora_rank"}
