"""Several adapters on one base: what RegMean and learned weights need of a real model."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.adapters.algebra import concat
from qlora_dist.adapters.methods import learned, regmean
from qlora_dist.adapters.mixture import collect_grams, mixture
from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import Factors

WIDTH, VOCAB = 32, 50


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def parts(model):
    draw = torch.Generator().manual_seed(1)
    return {
        name: [
            Factors(
                torch.randn(4, m.in_features, generator=draw) / 6, torch.randn(m.out_features, 4, generator=draw) / 6
            )
            for _ in range(3)
        ]
        for name, m in model.named_modules()
        if name.endswith(("q_proj", "down_proj"))
    }


def batches(num=3):
    draw = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, VOCAB, (2, 9), generator=draw)} for _ in range(num)]


def added(model, parts, merge):
    """Returns logits with merged updates written into copies of the weights."""
    import copy

    whole = copy.deepcopy(model)
    layers = dict(whole.named_modules())
    for name, factors in parts.items():
        layers[name].weight.data += merge(name, factors).dense().float()
    return lambda batch: whole(**batch).logits


def test_a_mixture_is_the_weighted_sum_and_leaves_nothing_behind(model, parts):
    weights, batch = [0.5, 0.3, -0.2], batches(1)[0]
    before = model(**batch).logits
    with mixture(model, parts, torch.tensor(weights)):
        found = model(**batch).logits
    assert torch.allclose(found, added(model, parts, lambda _, f: concat(f, weights))(batch), atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(model(**batch).logits, before)


def test_weights_of_each_module_go_to_their_module(model, parts):
    weights, batch = torch.randn(len(parts), 3), batches(1)[0]
    rows = dict(zip(parts, weights.tolist(), strict=True))
    with mixture(model, parts, weights):
        found = model(**batch).logits
    assert torch.allclose(found, added(model, parts, lambda name, f: concat(f, rows[name]))(batch), atol=1e-5)


def test_learned_weights_lower_the_loss_on_the_rows_they_see(model, parts):
    wanted = added(model, parts, lambda _, f: concat(f, [0.9, 0.0, 0.4]))
    targets = [(batch, wanted(batch).log_softmax(-1)) for batch in batches()]

    def loss(weights: torch.Tensor) -> torch.Tensor:
        with mixture(model, parts, weights):
            found = [(model(**batch).logits.log_softmax(-1), target) for batch, target in targets]
        return sum(torch.nn.functional.kl_div(f, t, log_target=True, reduction="sum") for f, t in found)

    assert learned(3, loss, steps=80, learning_rate=0.05, start=1 / 3) == pytest.approx([0.9, 0.0, 0.4], abs=0.05)


def test_grams_are_the_mean_of_the_inputs_outer_products(model, parts):
    grams = collect_grams(model, parts, 1, batches())
    assert set(grams) == set(parts)
    seen = []
    name = "model.layers.0.self_attn.q_proj"
    hook = dict(model.named_modules())[name].register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    for batch in batches():
        model(**batch)
    hook.remove()
    x_NI = torch.cat(seen)
    assert torch.allclose(grams[name], x_NI.T @ x_NI / len(x_NI), atol=1e-5)


def test_slots_that_do_not_count_are_left_out(model, parts):
    whole = batches(1)[0]["input_ids"]
    kept = torch.zeros(2, 9, dtype=torch.bool)
    kept[:, :5] = True
    found = collect_grams(model, parts, 0, [{"input_ids": whole, "kept": kept}])
    wanted = collect_grams(model, parts, 0, [{"input_ids": whole[:, :5]}])
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_regmean_is_nearer_to_each_adapter_on_its_inputs_than_the_mean(model, parts):
    weights = [1 / 3] * 3
    grams = [collect_grams(model, parts, i, batches()) for i in range(3)]

    def cost(merge) -> float:
        total = 0.0
        for name, factors in parts.items():
            for factor, gram in zip(factors, grams, strict=True):
                gap = merge(name, factors).dense() - factor.dense()
                total += float(((gap @ gram[name].double()) * gap).sum())
        return total

    assert cost(lambda name, f: regmean(f, weights, [g[name] for g in grams], 0.95)) < cost(
        lambda _, f: concat(f, weights)
    )


def test_an_adapter_of_a_layer_that_is_not_there_is_refused(model, parts):
    with pytest.raises(ModelError, match="no layer other"), mixture(model, {"other": []}, torch.ones(1)):
        pass
