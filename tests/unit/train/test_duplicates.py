"""Which recipes are the same training, and which only look like it: held by training both."""

import pytest
import torch

from qlora_dist.config.sweep import TrialConfig, duplicates_of


def factors(lane) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lane.parameters.items()}


def test_what_the_rule_calls_a_duplicate_is_one_to_the_bit(run, make_lane):
    """alpha / r and alpha / sqrt(r) with rsLoRA write one scale; the order of target_modules says nothing."""
    plain = {"lora_rank": 4, "lora_alpha": 16.0, "target_modules": ["q_proj", "down_proj"]}
    same = {"lora_rank": 4, "lora_alpha": 8.0, "use_rslora": True, "target_modules": ["down_proj", "q_proj"]}
    one, other = make_lane("one", lora=plain), make_lane("other", lora=same)
    trials = [TrialConfig(name=lane.name, lora=lane.lora, train=lane.train, seed=lane.seed) for lane in (one, other)]
    assert duplicates_of(trials) == {"other": "one"}
    run(one)
    run(other)
    assert all(torch.equal(value, other.parameters[name]) for name, value in one.parameters.items())


@pytest.mark.parametrize("halved", [0.005, 0.01])
def test_alpha_is_no_learning_rate_of_the_whole_adapter(run, make_lane, halved):
    """Twice the alpha at half the rate, or at the same rate, is another training: A's rate counts too."""
    one = make_lane("one", lora={"lora_alpha": 16.0}, learning_rate=0.01)
    other = make_lane("other", lora={"lora_alpha": 32.0}, learning_rate=halved)
    trials = [TrialConfig(name=lane.name, lora=lane.lora, train=lane.train, seed=lane.seed) for lane in (one, other)]
    assert duplicates_of(trials) == {}
    run(one)
    run(other)
    name = next(n for n in one.parameters if "lora_A" in n)
    both = name.replace("lora_A", "lora_B")
    mine, theirs = (
        4.0 * one.parameters[both] @ one.parameters[name],
        8.0 * other.parameters[both] @ other.parameters[name],
    )
    assert (mine - theirs).norm() > 0.05 * mine.norm(), "the updates that the adapters stand for differ"


def product(
    scale: float, rate_a: float, rate_b: float, *, eps: float = 1e-30, decay: float = 0.0, clip: float = 0.0
) -> torch.Tensor:
    """Trains s B A on a small regression by AdamW with a rate each for A and B; returns the update that came out."""
    torch.manual_seed(0)
    x_NI, y_NO = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    A_RI = torch.randn(3, 12, dtype=torch.float64).mul_(0.3).requires_grad_()
    B_OR = torch.zeros(7, 3, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [A_RI], "lr": rate_a}, {"params": [B_OR], "lr": rate_b}]
    optimizer = torch.optim.AdamW(groups, eps=eps, weight_decay=decay)
    for _ in range(60):
        optimizer.zero_grad()
        (x_NI @ (scale * B_OR @ A_RI).T - y_NO).square().mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([A_RI, B_OR], clip)
        optimizer.step()
    return (scale * B_OR @ A_RI).detach()


def test_alpha_is_exactly_a_learning_rate_of_b_alone():
    """With B = 0 at the start, no decay, no clip and eps towards 0, s and B's own rate count by their product."""
    known = product(1.0, 0.02, 0.02)
    torch.testing.assert_close(product(2.0, 0.02, 0.01), known, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(product(0.25, 0.02, 0.08), known, rtol=1e-9, atol=1e-12)
    for other in (product(2.0, 0.01, 0.01), product(2.0, 0.02, 0.02), product(1.0, 0.01, 0.02)):
        assert (other - known).norm() > 0.01 * known.norm()


@pytest.mark.parametrize("limit", [{"decay": 0.3}, {"clip": 0.02}, {"eps": 1e-2}])
def test_decay_clipping_and_eps_end_even_that(limit):
    one, other = product(1.0, 0.02, 0.02, **limit), product(2.0, 0.02, 0.01, **limit)
    assert (one - other).norm() > 1e-3 * one.norm()
