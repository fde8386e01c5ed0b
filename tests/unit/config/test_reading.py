"""A config tells which of its keys nothing has read."""

import dataclasses

from qlora_dist.config.fields import identity
from qlora_dist.config.reading import unread, watched
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import LoraConfig, TrainConfig


def made(**train):
    return AdapterConfig(lora=LoraConfig(lora_rank=2, target_modules=["q_proj"]), train=TrainConfig(**train), seed=3)


def test_names_what_was_set_and_not_read():
    config = watched(made(weight_decay=0.1, log_every_steps=5))
    assert unread(config) == ["lora.lora_rank", "lora.target_modules", "train.weight_decay", "seed"]
    assert unread(config, execution=True) == ["train.log_every_steps"]
    assert (config.lora.lora_rank, config.train.weight_decay, config.seed) == (2, 0.1, 3)
    assert unread(config) == ["lora.target_modules"]
    assert config.lora.target_modules == ["q_proj"]
    assert unread(config) == []


def test_defaults_need_no_reader():
    assert unread(watched(AdapterConfig())) == []


def test_a_copy_is_the_same_config():
    config = made(weight_decay=0.1)
    copy = watched(config)
    assert isinstance(copy, AdapterConfig)
    assert identity(copy) == identity(config)
    assert copy == watched(config)
    assert dataclasses.replace(watched(config).train, epochs=2.0).weight_decay == 0.1
    assert unread(watched(config)) != []
    assert config.lora is not copy.lora
