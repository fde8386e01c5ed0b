"""The share of a GPU's arithmetic that a training gets, by the formula and the data sheets."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from qlora_dist.train.speed import operations_per_token, peak_per_s, utilization


def test_counts_the_operations_of_a_token(make_lane, make_engine):
    lane = make_lane()
    stepper = make_engine(lane).stepper
    h, inner, key, layers, vocab, rank = 64, 128, 32, 2, 259, 4
    a_layer = {
        "q": (h, h),
        "k": (h, key),
        "v": (h, key),
        "o": (h, h),
        "g": (h, inner),
        "u": (h, inner),
        "d": (inner, h),
    }
    frozen = layers * sum(i * o for i, o in a_layer.values()) + h * vocab
    factors = layers * rank * sum(i + o for i, o in a_layer.values())
    wanted = 4 * frozen + 6 * factors + 3.5 * 2 * 32 * h * layers
    assert operations_per_token(stepper, lane) == wanted


def test_is_told_on_known_gpus_alone(make_lane, make_engine, monkeypatch):
    lane = make_lane()
    stepper = make_engine(lane).stepper
    assert utilization(stepper, [lane], 100.0) == {}
    strategy = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    there = dataclasses.replace(stepper, strategy=strategy)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    share = utilization(there, [lane, lane], 1e6)["mfu"]
    assert share == pytest.approx(1e6 * operations_per_token(stepper, lane) / (2 * 989e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of tomorrow")
    assert utilization(there, [lane], 1e6) == {}


def test_knows_gpus_by_the_longest_name():
    assert peak_per_s("NVIDIA H100 PCIe") < peak_per_s("NVIDIA H100 80GB HBM3")
    assert peak_per_s("NVIDIA A10G") < peak_per_s("NVIDIA A10") < peak_per_s("NVIDIA A100-SXM4-80GB")
    assert peak_per_s("NVIDIA L40S") != peak_per_s("NVIDIA L4")
    assert peak_per_s("Radeon") == 0


def test_knows_gpus_by_whole_words():
    assert peak_per_s("NVIDIA GB200") > peak_per_s("NVIDIA B200")
    assert peak_per_s("NVIDIA H100 NVL") < peak_per_s("NVIDIA H100 80GB HBM3")
    assert peak_per_s("NVIDIA L4") < peak_per_s("NVIDIA L40") < peak_per_s("NVIDIA L40S")
    for other in ("NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert peak_per_s(other) == 0, other
