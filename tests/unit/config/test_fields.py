import math
from dataclasses import dataclass

import pytest

from qlora_dist.config.fields import check, everything, execution, identity, setting
from qlora_dist.config.model import Quantization
from qlora_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Inner:
    share: float = setting(0.5, at_least=0, below=1)


@dataclass(kw_only=True, slots=True)
class Outer:
    count: int = setting(3, at_least=1, at_most=9)
    root: str = execution("runs")
    quantization: Quantization = setting(Quantization.nf4)
    inner: Inner = setting(Inner)
    named: dict[str, Inner] = setting(dict)
    listed: list[float] = setting(list, above=0)


def test_execution_fields_are_no_identity():
    assert "root" not in identity(Outer())
    assert everything(Outer())["root"] == "runs"


def test_enums_and_containers_become_plain_values():
    assert identity(Outer(named={"a": Inner(share=0.25)})) == {
        "count": 3,
        "quantization": "nf4",
        "inner": {"share": 0.5},
        "named": {"a": {"share": 0.25}},
        "listed": [],
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(count=0), "outer.count=0: expected a number at least 1 and at most 9."),
        (Outer(count=10), "outer.count=10: expected a number at least 1 and at most 9."),
        (Outer(inner=Inner(share=1.0)), "outer.inner.share=1.0: expected a number at least 0 and below 1."),
        (Outer(named={"a": Inner(share=-1)}), "outer.named.a.share=-1: expected a number at least 0 and below 1."),
        (Outer(listed=[1.0, 0.0]), "outer.listed[1]=0.0: expected a number above 0."),
        (Outer(inner=Inner(share=math.nan)), "outer.inner.share=nan: expected a number at least 0 and below 1."),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_full_key(config: Outer, message: str):
    with pytest.raises(ConfigError) as caught:
        check(config, "outer")
    assert str(caught.value) == message


def test_values_at_inclusive_bounds_pass():
    check(Outer(count=9, inner=Inner(share=0.0), listed=[1e-9]))
