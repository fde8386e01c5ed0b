"""Kernels of GPUs are refused where there is none, with the reason, before any work."""

import pytest
import torch

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model import kernels
from qlora_dist.model.kernels import check_kernels
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
