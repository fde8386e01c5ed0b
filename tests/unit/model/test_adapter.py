"""An adapter folder knows its base, and is refused on another."""

import json

import pytest
import torch
from peft import PeftModel

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.config.train import LoraConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.adapter import Provenance, check_adapter, load_adapter, save_adapter, write_provenance
from qlora_dist.model.base import describe_base, load_model
from qlora_dist.model.lora import attach_lora
from qlora_dist.testing import save_tiny_model

WHOLE = ModelConfig(quantization=Quantization.none)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return describe_base(folder, str(folder), "")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    model = attach_lora(load_model(base, WHOLE), LoraConfig(lora_rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(model, folder, base)
    write_provenance(folder, Provenance(base.path, "", base.digest, "t", "none", "bfloat16", 1))
    return folder


def test_adapter_loads_on_its_own_base(base, adapter):
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        plain = load_model(base, WHOLE)(input_ids=tokens).logits
        ours = load_adapter(load_model(base, WHOLE), adapter, base)(input_ids=tokens).logits
        peft = PeftModel.from_pretrained(load_model(base, WHOLE), str(adapter))(input_ids=tokens).logits
    assert torch.equal(ours, peft)
    assert not torch.equal(ours, plain)


def test_adapter_of_another_base_is_refused(adapter, tmp_path):
    folder = save_tiny_model(tmp_path / "other", seed=1)
    other = describe_base(folder, str(folder), "")
    with pytest.raises(ModelError, match=rf"trained on .*, not on {folder}"):
        load_adapter(None, adapter, other)


def test_folder_without_weights_is_no_adapter(base, adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors"):
        check_adapter(tmp_path, base)


def test_config_has_sorted_modules_and_names_its_base(base, adapter):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert fields["base_model_name_or_path"] == base.path
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "qlora_dist.json",
    ]


def test_unknown_target_module_is_refused_with_the_nearest(base):
    with pytest.raises(ConfigError, match=r"lora.target_modules=q_prj.*q_proj"):
        attach_lora(load_model(base, WHOLE), LoraConfig(target_modules=["q_prj"]))
