"""Stage `export`: a run's base and adapter become what was asked for, checked as on the command line."""

from __future__ import annotations

import pytest

from qlora_dist.config.export import ExportConfig, ExportDtype, ExportFormat
from qlora_dist.config.fields import check
from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import BaseConfig, ExportedConfig
from qlora_dist.errors import ConfigError
from qlora_dist.export.stage import export_model
from qlora_dist.model.base import prepare_base

from .conftest import save_adapter, save_model


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (ExportFormat.hf, "model/model.safetensors"),
        (ExportFormat.gguf, "model.gguf"),
        (ExportFormat.gguf_lora, "model.gguf"),
    ],
)
def test_a_run_exports_what_it_ships(tmp_path, form, name):
    model = save_model(tmp_path / "model")
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, tmp_path / "base")
    inputs = {"base": tmp_path / "base", "adapter": save_adapter(tmp_path / "adapter", model)}
    (tmp_path / "out").mkdir()
    facts = export_model(ExportedConfig(export=ExportConfig(format=form)), inputs, tmp_path / "out")
    assert (tmp_path / "out" / name).stat().st_size > 1000
    assert facts["out"] == name.partition("/")[0]
    if form is not ExportFormat.gguf_lora:
        assert facts["drift"]["error"] < 1e-3
        assert facts["gain"] == pytest.approx(1.0, abs=1e-3)


def test_eight_bits_are_for_gguf_alone():
    with pytest.raises(ConfigError, match=r"export\.dtype=q8_0"):
        check(ExportConfig(format=ExportFormat.hf, dtype=ExportDtype.q8_0), "export")
