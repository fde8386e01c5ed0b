"""FlashAttention and packed rows: what transformers calls it with, its kernels replaced by plain attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_flash_attention_utils

from qlora_dist.model.packing import keep_segments_apart, segment_starts

POSITIONS_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]])


def causal(q, k, v, **_):
    """Takes and returns [B, T, heads, dim], as FlashAttention does."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).bfloat16()


def by_segment(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, **_):
    """Takes and returns [B x T, heads, dim]: segments one after another."""
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) <= max_seqlen_q
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([causal(*(x[None] for x in part))[0] for part in parts])


def length(**options):
    return {name: options[name] for name in ("max_seqlen_q",) if name in options}


@pytest.fixture
def flash(monkeypatch):
    """Makes the same small model for each attention."""
    kernels = (causal, by_segment, None, None, None), (length, length)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: kernels)

    def make(attention):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
        config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model.config._attn_implementation = attention
        return model

    return make


def logits(model, position_BT=POSITIONS_BT):
    tokens_BT = torch.arange(position_BT.numel()).view_as(position_BT) % 64
    with torch.no_grad():
        return model(input_ids=tokens_BT, position_ids=position_BT, use_cache=False).logits


def test_starts_are_where_positions_begin_again_and_where_rows_do():
    assert segment_starts(POSITIONS_BT).tolist() == [0, 3, 8, 14, 15, 16]
    assert segment_starts(torch.tensor([[5, 6], [7, 0]])).tolist() == [0, 2, 3, 4]
    assert segment_starts(POSITIONS_BT).dtype == torch.int32


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_several_segments_give_what_a_mask_gives(flash, rows):
    wanted = logits(flash("sdpa"), POSITIONS_BT[:rows])
    found = logits(keep_segments_apart(flash("flash_attention_2")), POSITIONS_BT[:rows])
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_without_it_rows_of_a_batch_are_mixed(flash):
    wanted, found = logits(flash("sdpa")), logits(flash("flash_attention_2"))
    assert (found - wanted).norm() > 0.1 * wanted.norm()


def test_another_attention_is_left_alone(flash):
    model = keep_segments_apart(flash("sdpa"))
    assert not model.model._forward_pre_hooks
