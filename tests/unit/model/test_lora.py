"""What an adapter is put on: each linear layer of the decoder, by the names that PEFT finds; the rest is refused."""

import logging

import peft
import pytest
import transformers

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.config.train import LoraConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.footprint import shape_in
from qlora_dist.model.lora import attach_lora
from qlora_dist.testing import save_byte_tokenizer
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.strategies.fsdp import decoder_layers

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GPT2 = {"vocab_size": 259, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 256, "eos_token_id": 257}


def build(kind, **fields):
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **SPECIAL, **fields})
    return transformers.AutoModelForCausalLM.from_config(config)


def images_and_text():
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    places = {"boi_token_index": 250, "eoi_token_index": 251, "image_token_index": 252, "mm_tokens_per_image": 4}
    text = SHAPE | {"head_dim": 16}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, **places, **SPECIAL)


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def leaves(model):
    return {name.rpartition(".")[2] for name in adapted(model)}


def prepared(model, path, **fields):
    save_byte_tokenizer(path / "model")
    model.save_pretrained(path / "model")
    (path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(path / "model"), **fields)), {}, path / "base")
    return open_base(path / "base")


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma", "Phi", "Phi3", "Qwen2Moe"])
@pytest.mark.parametrize("layers", [1, 4])
def test_default_is_what_peft_calls_all_linear(kind, layers):
    theirs = peft.get_peft_model(
        build(kind, num_hidden_layers=layers),
        peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    ours = attach_lora(build(kind, num_hidden_layers=layers), LoraConfig())
    assert adapted(ours) == adapted(theirs)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


@pytest.mark.parametrize(
    ("kind", "fields", "wanted"),
    [
        ("Mixtral", {"num_local_experts": 4}, ATTENTION),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, ATTENTION),
        ("Glm4Moe", {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}, ATTENTION),
    ],
)
def test_experts_that_are_no_modules_are_left_out(kind, fields, wanted, tmp_path):
    model = attach_lora(build(kind, **fields), LoraConfig())
    assert leaves(model) == wanted
    model.save_pretrained(tmp_path)
    assert leaves(peft.PeftModel.from_pretrained(build(kind, **fields), tmp_path)) == wanted


def test_name_that_peft_takes_for_experts_is_refused():
    fields = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}
    with pytest.raises(ConfigError, match=r"lora.target_modules=gate_proj: expected a linear layer"):
        attach_lora(build("Glm4Moe", **fields), LoraConfig(target_modules=["gate_proj"]))


@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_image_tower_of_a_model_of_both_is_left_alone(targets):
    whole = transformers.AutoModelForCausalLM.from_config(images_and_text())
    model = attach_lora(whole, LoraConfig(target_modules=targets))
    assert len(adapted(model)) == (2 if targets else 14)
    assert all("language_model" in name for name in adapted(model))


def test_base_of_images_and_text_is_described_by_its_decoder(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(images_and_text())
    base = prepared(model, tmp_path, quantization=Quantization.none)
    assert (base.num_layers, base.hidden_size, base.max_position_embeddings) == (2, 64, 512)
    shape = shape_in(base.folder())
    assert (shape.num_layers, shape.hidden, shape.vocab) == (2, 64, 259)
    loaded = LaneModel(load_model(base, ModelConfig(quantization=Quantization.none)))
    assert decoder_layers(loaded) == list(loaded.model.model.language_model.layers)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_layers_that_lie_the_other_way_round_are_refused(quantization, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT2))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: its layers are Conv1D.*llama"):
        base = prepared(model, tmp_path, quantization=quantization)
        attach_lora(load_model(base, ModelConfig(quantization=quantization)), LoraConfig())


def test_layer_that_is_dense_in_a_base_of_four_bits_is_refused_by_name(tmp_path):
    fields = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**fields, **SPECIAL))
    base = prepared(model, tmp_path)
    with pytest.raises(ModelError, match=r"left dense, .*query_key_value in 16 bits.*model.quantization=none"):
        attach_lora(load_model(base, ModelConfig()), LoraConfig())


def test_base_has_no_dropout_of_its_own_beneath_adapters(caplog):
    def shares(model):
        names = ("p", "attention_dropout", "jitter_noise")
        return {value for m in model.modules() for name, value in vars(m).items() if name in names}

    caplog.set_level(logging.INFO, logger="qlora_dist")
    dropping = {"attention_dropout": 0.1, "resid_pdrop": 0.2}
    model = attach_lora(build("Phi", **dropping), LoraConfig(lora_dropout=0.3))
    assert shares(model) == {0.0, 0.3}, "the recipe's own stays"
    assert model.config.attention_dropout == model.config.resid_pdrop == 0.0
    told = [message for message in caplog.messages if "dropout" in message]
    assert len(told) == 1
    assert "attention_dropout=0.1" in told[0]
    assert shares(attach_lora(build("Mixtral", router_jitter_noise=0.1), LoraConfig())) == {0.0}


def test_base_without_dropout_is_told_nothing(caplog):
    caplog.set_level(logging.INFO, logger="qlora_dist")
    attach_lora(build("Llama"), LoraConfig())
    assert not caplog.messages
