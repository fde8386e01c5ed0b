"""An export holds a few blocks of rows (a folder), or two tensors (GGUF), whatever the model's size."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import save_adapter, save_model

MEASURED = """
import sys
from pathlib import Path
import gguf, numpy, torch, transformers
from qlora_dist.export.gguf_file import write_gguf
from qlora_dist.export.huggingface import DTYPES, write_model
from qlora_dist.export.weights import MergedWeights
from qlora_dist.model.peft_folder import PeftFolder

def held(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

base, adapter, out, dtype = sys.argv[1:]
out = Path(out)
with PeftFolder(Path(adapter)) as own, MergedWeights(Path(base), own) as weights:
    weights.tensor(weights.names[0])
    transformers.AutoTokenizer.from_pretrained(base)
    torch.randn(512, 512) @ torch.randn(512, 512)  # all is imported now
    Path("/proc/self/clear_refs").write_text("5")
    start = held("VmRSS:")
    if out.suffix == ".gguf":
        write_gguf(weights, out, dtype)
    else:
        out.mkdir()
        write_model(weights, out, DTYPES[dtype])
    print(held("VmHWM:") - start)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 130 MB, the largest tensor of 4 MB, and an adapter of all its layers."""
    top = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    base = save_model(top / "base", **shape, num_key_value_heads=8, head_dim=64)
    return base, save_adapter(top / "adapter", base)


@pytest.mark.parametrize(
    ("name", "dtype", "limit_mb"), [("merged", "bf16", 40), ("merged", "f32", 40), ("merged.gguf", "q8_0", 60)]
)
def test_an_export_holds_a_fraction_of_the_model(large, tmp_path, name, dtype, limit_mb):
    base, adapter = large
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    assert size > 120e6
    command = [sys.executable, "-c", MEASURED, str(base), str(adapter), str(tmp_path / name), dtype]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert grown < limit_mb * 1e6 < size / 2
