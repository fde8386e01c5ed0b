"""Lanes: adapters trained together are the adapters trained alone."""

import pytest
import torch

from qlora_dist.data.rows import Rows
from qlora_dist.testing import save_rows


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory):
    return Rows.open(save_rows(tmp_path_factory.mktemp("other"), 12, seed=9))


def recipes(other_rows):
    """Three recipes that have nothing in common but the base and the size of a step."""
    return {
        "a": {"lora": {"lora_rank": 4}, "seed": 1},
        "b": {"lora": {"lora_rank": 8, "lora_alpha": 4.0, "lora_dropout": 0.3, "use_rslora": True}, "seed": 2},
        "c": {
            "lora": {"lora_rank": 2, "target_modules": ["q_proj", "down_proj"]},
            "seed": 3,
            "rows": other_rows,
            "learning_rate": 0.03,
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "epochs": 2,
        },
    }


def test_lanes_do_not_see_each_other(run, make_lane, other_rows):
    together = [make_lane(name, **recipe) for name, recipe in recipes(other_rows).items()]
    run(*together)
    for lane, recipe in zip(together, recipes(other_rows).values(), strict=True):
        alone = make_lane(lane.name, **recipe)
        run(alone)
        assert alone.parameters.keys() == lane.parameters.keys()
        for name, value in alone.parameters.items():
            torch.testing.assert_close(lane.parameters[name], value, rtol=1e-4, atol=1e-6, msg=f"{lane.name} {name}")


def test_lane_that_is_done_stays_as_it_is(run, make_lane):
    short, long = make_lane("short", max_steps=2), make_lane("long", seed=5, epochs=2)
    run(short, long)
    alone = make_lane("alone", max_steps=2)
    run(alone)
    assert long.budget.num_steps > 2
    for name, value in alone.parameters.items():
        torch.testing.assert_close(short.parameters[name], value, rtol=1e-4, atol=1e-6)


def test_factors_are_drawn_from_the_lanes_own_seed(make_engine, make_lane):
    same, again, other = make_lane("x", seed=1), make_lane("y", seed=1), make_lane("z", seed=2)
    make_engine(same, again, other)
    name = next(n for n in same.parameters if "lora_A" in n)
    assert torch.equal(same.parameters[name], again.parameters[name])
    assert not torch.equal(same.parameters[name], other.parameters[name])


def test_dropout_mask_is_a_function_of_its_place(make_engine, make_lane):
    lane = make_lane(lora={"lora_dropout": 0.5})
    engine = make_engine(lane)
    first = engine.stepper.accumulate({0: 0}, {0: 10}).clone()
    again = engine.stepper.accumulate({0: 0}, {0: 10}).clone()
    gradients = [p.grad.clone() for p in lane.parameters.values()]
    engine.stepper.accumulate({0: 0}, {0: 10})
    assert torch.equal(first, again)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, lane.parameters.values(), strict=True))
    engine.stepper.accumulate({0: 1}, {0: 10})
    assert any(not torch.equal(a, p.grad) for a, p in zip(gradients, lane.parameters.values(), strict=True))


def test_loss_in_chunks_is_the_loss_of_whole_logits(monkeypatch):
    from torch.nn.functional import cross_entropy, linear

    from qlora_dist.train import loss

    monkeypatch.setattr(loss, "CHUNK_VALUES", 7 * 50)
    torch.manual_seed(0)
    hidden_NH = torch.randn(33, 16, requires_grad=True)
    head = torch.nn.Linear(16, 50).requires_grad_(False)
    targets_N, weights_N = torch.randint(0, 50, (33,)), torch.rand(33)
    (loss.chunked_nll(hidden_NH, head, targets_N) * weights_N).sum().backward()
    ours, hidden_NH.grad = hidden_NH.grad, None
    nll_N = cross_entropy(linear(hidden_NH, head.weight, head.bias), targets_N, reduction="none")
    (nll_N * weights_N).sum().backward()
    torch.testing.assert_close(loss.chunked_nll(hidden_NH, head, targets_N), nll_N)
    torch.testing.assert_close(ours, hidden_NH.grad)


def test_cache_of_dense_weights_changes_no_bit(run, make_lane):
    cached, plain = make_lane("cached", dense_cache_share=0.25), make_lane("plain", dense_cache_share=0.0)
    assert run(cached).dense_cache_bytes > 0
    assert run(plain).dense_cache_bytes == 0
    assert all(torch.equal(p, plain.parameters[name]) for name, p in cached.parameters.items())
