"""Attention is one that the architecture has; kernels of GPUs are refused where there is none, before any work."""

import logging

import pytest
import torch
import transformers

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model import kernels
from qlora_dist.model.kernels import attention_of, check_kernels
from qlora_dist.train import train_adapter

OF_GPUS = [{"attention": "flash_attention_2"}, {"attention": "flex_attention"}, {"liger": True}]


@pytest.mark.parametrize("asked", OF_GPUS)
def test_refused_without_a_gpu_before_anything_is_read(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: torch.device("cpu"))
    config = AdapterConfig(model=ModelConfig(**asked))
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(asked))}=.*GPU"):
        train_adapter(config, {}, tmp_path)


@pytest.mark.parametrize("asked", [OF_GPUS[0], OF_GPUS[2]])
def test_names_the_package_that_is_missing_on_a_gpu(asked, monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        check_kernels(ModelConfig(**asked))


def test_what_runs_everywhere_passes():
    check_kernels(ModelConfig())
    check_kernels(ModelConfig(attention="eager"))


def test_auto_is_torchs_own_attention_where_there_is_one(caplog):
    caplog.set_level(logging.INFO, logger="qlora_dist")
    assert attention_of(ModelConfig(), transformers.LlamaConfig()) == "sdpa"
    assert not caplog.messages
    assert attention_of(ModelConfig(), transformers.Gemma2Config()) == "eager"
    assert "eager, since Gemma2ForCausalLM" in caplog.text


def test_attention_that_the_architecture_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"model.attention=sdpa.*Gemma2ForCausalLM.*model.attention=eager"):
        attention_of(ModelConfig(attention="sdpa"), transformers.Gemma2Config())


def test_unknown_attention_is_refused_with_the_names():
    with pytest.raises(ConfigError, match=r"model.attention=foo.*sdpa"):
        ModelConfig(attention="foo").check("model")
    with pytest.raises(ConfigError, match=r"Did you mean flex_attention"):
        ModelConfig(attention="flex_atention").check("model")
