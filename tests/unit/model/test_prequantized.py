"""The pre-quantized base: the bits that quantizing on the fly gives, read at once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_dist.config.model import Dtype, ModelConfig
from qlora_dist.config.stages import BaseConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.prequantized import build_skeleton, load_frozen, load_prequantized
from qlora_dist.model.quantize import keep_cpu_weights
from qlora_dist.testing import ARCHITECTURES, save_tiny_model


def prepare(folder, out, **fields):
    out.mkdir()
    config = ModelConfig(path=str(folder), **fields)
    prepare_base(BaseConfig(model=config), {}, out)
    return open_base(out), config


def bits(tensor):
    """Packed bytes viewed as floats may be NaN, which equals nothing."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_reader_gives_the_bits_of_transformers(architecture, double_quant, tie_word_embeddings, tmp_path):
    folder = save_tiny_model(tmp_path / "model", architecture, tie_word_embeddings=tie_word_embeddings)
    base, config = prepare(folder, tmp_path / "base", double_quant=double_quant)
    theirs, ours = load_model(base, config), load_prequantized(base, config)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(bits(a), bits(ours.state_dict()[n])) for n, a in theirs.state_dict().items())
    tokens = torch.arange(48)[None]
    assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie_word_embeddings


def test_folder_is_one_that_transformers_loads(tmp_path):
    base, config = prepare(save_tiny_model(tmp_path / "model"), tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(base.prequantized)
    keep_cpu_weights(theirs)
    tokens = torch.arange(48)[None]
    assert torch.equal(theirs(tokens).logits, load_prequantized(base, config)(tokens).logits)


def test_other_storage_is_refused_by_the_reader_and_quantized_anew_otherwise(tmp_path):
    base, _ = prepare(save_tiny_model(tmp_path / "model"), tmp_path / "base")
    other = ModelConfig(compute_dtype=Dtype.float32)
    with pytest.raises(ModelError, match="nf4 double float32"):
        build_skeleton(base, other)
    assert load_frozen(base, other).lm_head.weight.dtype == torch.float32


def test_unquantized_base_has_no_copy(tmp_path):
    from qlora_dist.config.model import Quantization

    base, _ = prepare(save_tiny_model(tmp_path / "model"), tmp_path / "base", quantization=Quantization.none)
    assert (base.storage, base.prequantized) == ("", "")
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["base.json"]
