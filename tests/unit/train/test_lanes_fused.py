"""Fused lanes: batched products over lanes of unequal shape give each lane what its own run gives it."""

import math

import pytest
import torch

from qlora_dist.config.train import Checkpointing
from qlora_dist.testing import save_rows
from qlora_dist.train.bank import Bank, Shape
from qlora_dist.train.step import Stepper
from tests.unit.train.conftest import distance

RANKS = (4, 8, 12, 16, 24, 32, 48, 64)


def eight_recipes():
    """Eight recipes: ranks 4 to 64, mixed alpha, learning rate, seed and step."""
    return {
        f"rank-{rank}": {
            "lora": {"lora_rank": rank, "lora_alpha": (8.0, 16.0, 32.0)[k % 3], "use_rslora": k == 5},
            "seed": k % 5,
            "learning_rate": (1e-3, 2e-3, 5e-3)[k % 3],
            "adam_beta2": (0.999, 0.95)[k % 2],
            "weight_decay": (0.0, 0.1)[k % 2],
            "max_grad_norm": (1.0, 0.1)[k % 2],
            "tokens_per_step": (128, 256)[k % 2],
            "max_steps": 3 + k % 3,
        }
        for k, rank in enumerate(RANKS)
    }


def test_eight_lanes_are_their_solo_runs(run, make_lane):
    together = [make_lane(name, **recipe) for name, recipe in eight_recipes().items()]
    run(*together)
    for lane in together:
        alone = make_lane(lane.name, **eight_recipes()[lane.name])
        run(alone)
        assert distance(lane, alone) < 1e-5, lane.name
        assert lane.optimizer_state()["#step"] == lane.budget.num_steps


@pytest.mark.parametrize("recompute", [Checkpointing.off, Checkpointing.on])
def test_dropout_draws_the_masks_of_the_solo_run(run, make_lane, recompute):
    def lanes():
        for k, share in enumerate((0.3, 0.0, 0.1)):
            lora = {"lora_dropout": share, "target_modules": ["v_proj", "down_proj"] if k == 2 else []}
            yield make_lane(f"{k}", lora=lora, seed=k, activation_checkpointing=recompute)

    together = list(lanes())
    run(*together)
    for lane, alone in zip(together, lanes(), strict=True):
        run(alone)
        assert distance(lane, alone) < 1e-5


def test_dropout_does_not_depend_on_the_micro_batch(run, make_lane):
    whole, split = (make_lane(f"{size}", lora={"lora_dropout": 0.3}, micro_batch_tokens=size) for size in (128, 32))
    run(whole)
    run(split)
    assert distance(whole, split) < 1e-5


@pytest.mark.parametrize("where", ["values", "gradient"])
def test_lane_of_no_numbers_touches_no_neighbour(make_engine, make_lane, where, monkeypatch):
    def three():
        return [make_lane(f"{k}", seed=k, lora={"lora_rank": (4, 8, 16)[k]}) for k in range(3)]

    clean, hurt = three(), three()
    made = make_engine(*clean).stepper
    for step in range(3):
        made.take(dict.fromkeys(range(3), step))
    stepper = make_engine(*hurt).stepper
    stepper.take(dict.fromkeys(range(3), 0))
    name = next(iter(hurt[1].parameters))
    if where == "values":
        hurt[1].parameters[name].data[0, 0] = torch.nan
    else:
        plain = Stepper.reduce
        spoil = hurt[1].values_P.grad.fill_
        monkeypatch.setattr(Stepper, "reduce", lambda self, *args: (spoil(torch.inf), plain(self, *args)))
    kept = hurt[1].values_P.detach().clone()
    results = stepper.take(dict.fromkeys(range(3), 1))
    assert not math.isfinite(results[1].loss + results[1].grad_norm)
    assert torch.equal(hurt[1].values_P.nan_to_num(), kept.nan_to_num())
    monkeypatch.undo()
    stepper.take(dict.fromkeys((0, 2), 2))
    for k in (0, 2):
        assert math.isfinite(results[k].loss + results[k].grad_norm)
        assert distance(hurt[k], clean[k]) < 1e-6


def test_lanes_of_like_shape_share_a_product(make_engine, make_lane):
    lanes = [make_lane(f"{k}", lora={"lora_rank": rank}) for k, rank in enumerate((4, 32, 16, 8, 32))]
    seating = make_engine(*lanes).stepper.seating
    assert seating.order == [0, 2, 3, 1, 4]
    seating.rows = {lane: slice(2 * place, 2 * place + 2) for place, lane in enumerate(seating.order)}
    assert [run.rows for run in seating.runs] == [slice(0, 6), slice(6, 10)]
    seating.rows = {0: slice(0, 2), 3: slice(2, 4), 1: slice(4, 6)}
    assert [run.rows for run in seating.runs] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    seating.rows = {2: slice(None)}
    assert [run.rows for run in seating.runs] == [slice(None)]


def test_padding_stays_zero(run, make_lane):
    narrow, wide = (
        make_lane("narrow", lora={"lora_rank": 2}, weight_decay=0.1),
        make_lane("wide", lora={"lora_rank": 16}),
    )
    run(narrow, wide)
    group, row = narrow._group, 0
    own = sum(p.numel() for p in narrow.parameters.values())
    assert own < group.values_GP.shape[1]
    assert int((group.values_GP[row] != 0).sum()) <= own


def test_group_lays_out_factors_as_views():
    layers = (("a", (5, 7)), ("b", (3, 5)))
    bank = Bank([Shape(layers, 2), Shape(layers, 4)], [1.0, 2.0], torch.bfloat16)
    group, row = bank.group_of(1)
    assert (len(bank.groups), row, group.rank) == (1, 1, 4)
    group.values_GP.data.copy_(torch.arange(group.values_GP.numel()).view_as(group.values_GP))
    views = group.named_views(group.values_GP.detach()[row], 4)
    assert sum(view.numel() for view in views.values()) == group.values_GP.shape[1] == 4 * (5 + 7 + 3 + 5)
    assert {tuple(v.shape) for v in views.values()} == {(4, 5), (7, 4), (4, 3), (5, 4)}
    group.refresh()
    assert torch.equal(group.factors(1, 2)["b"].A_GRI[0], views["b.lora_A.weight"].bfloat16())


def test_scale_is_not_rounded_to_the_dtype_of_products():
    bank = Bank([Shape((("a", (4, 4)),), 12)], [16 / 12], torch.bfloat16)
    group, row = bank.group_of(0)
    scale_G11 = group.factors(row, row + 1)["a"].scale_G11
    assert scale_G11.item() == pytest.approx(16 / 12, rel=1e-7)
    assert torch.full((1, 1, 1), 3.0, dtype=torch.bfloat16).mul_(scale_G11).item() == 4.0


def test_other_row_count_is_a_run_of_its_own(run, make_lane, tmp_path_factory):
    from qlora_dist.data.rows import Rows

    more = Rows.open(save_rows(tmp_path_factory.mktemp("more"), 40, seed=7))
    sizes = {"a": 32, "b": 32, "c": 128}
    together = [make_lane(n, micro_batch_tokens=size, rows=more, seed=k) for k, (n, size) in enumerate(sizes.items())]
    run(*together)
    for k, lane in enumerate(together):
        alone = make_lane(lane.name, micro_batch_tokens=sizes[lane.name], rows=more, seed=k)
        run(alone)
        assert distance(lane, alone) < 1e-5
