"""Stage `base`: a model folder is checked before anything is trained on it, and known by its bytes."""

import json
import shutil

import pytest
import torch

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.quantize import linear4bit_modules
from qlora_dist.testing import ARCHITECTURES, save_tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def prepare(path, out, **fields):
    out.mkdir(exist_ok=True)
    prepare_base(BaseConfig(model=ModelConfig(path=str(path), **fields)), {}, out)
    return open_base(out)


def test_base_says_what_the_model_is(folder, tmp_path):
    base = prepare(folder, tmp_path / "out")
    assert (base.path, base.architecture, base.vocab_size) == (str(folder), "LlamaForCausalLM", 259)
    assert (base.num_layers, base.hidden_size, base.dtype) == (2, 64, "float32")
    model = load_model(base, ModelConfig(quantization=Quantization.none))
    assert base.num_parameters == sum(p.numel() for p in model.parameters())


def test_empty_path_means_the_embedded_base(folder, tmp_path):
    (tmp_path / "out").mkdir()
    facts = prepare_base(BaseConfig(), {"tiny": folder}, tmp_path / "out")
    assert facts["path"] == str(folder)


def test_digest_follows_the_bytes_not_the_place(folder, saved, tmp_path):
    here, there = prepare(folder, tmp_path / "a"), prepare(saved, tmp_path / "b")
    assert here.digest == there.digest
    other = prepare(save_tiny_model(tmp_path / "other", seed=1), tmp_path / "c")
    assert other.digest != here.digest


def test_folder_without_weights_is_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "base.json").exists()


def test_torn_weight_file_is_refused(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors: torn"):
        prepare(folder, tmp_path / "out")


def test_pickled_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        prepare(folder, tmp_path / "out")


def test_shard_that_the_index_names_but_nobody_downloaded_is_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        prepare(folder, tmp_path / "out")


def test_folder_without_config_is_refused(folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        prepare(folder, tmp_path / "out")


def test_unknown_architecture_is_refused(folder, tmp_path):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "novel"}))
    with pytest.raises(ModelError, match="model_type='novel'"):
        prepare(folder, tmp_path / "out")


def test_quantized_folder_is_refused(folder, tmp_path):
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="gptq"):
        prepare(folder, tmp_path / "out")


@pytest.mark.parametrize("revision", ["", "main", "abc123"])
def test_hub_id_needs_a_full_commit(revision):
    with pytest.raises(ConfigError, match=r"model.revision=.*40 hexadecimal digits"):
        ModelConfig(path="owner/model", revision=revision).check("model")


def test_folder_that_is_absent_is_refused():
    with pytest.raises(ConfigError, match=r"model.path=/no/such/folder"):
        ModelConfig(path="/no/such/folder").check("model")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_each_architecture_loads_in_four_bits(architecture, tmp_path):
    base = prepare(save_tiny_model(tmp_path / "model", architecture, dtype="bfloat16"), tmp_path / "out")
    model = load_model(base, ModelConfig())
    layers = dict(linear4bit_modules(model))
    assert len(layers) == 7 * base.num_layers
    assert {layer.weight.dtype for layer in layers.values()} == {torch.bfloat16}, "storage is the compute dtype"
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_gradients_stay_right_after_an_evaluation(saved, tmp_path):
    model = load_model(prepare(saved, tmp_path / "out"), ModelConfig(compute_dtype=Dtype.bfloat16))

    def gradient():
        inputs = model.get_input_embeddings()(torch.arange(16)[None]).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.float().logsumexp(-1).sum().backward()
        return inputs.grad

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])
    model.train()
    assert torch.equal(gradient(), before)
