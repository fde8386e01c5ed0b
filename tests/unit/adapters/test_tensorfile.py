"""Safetensors files as the streaming reader and writer have them, against the safetensors library."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.errors import ModelError
from qlora_dist.model.tensorfile import TensorFile, TensorWriter, lay_out, whole

TENSORS = {
    "float": torch.randn(3, 5),
    "bfloat": torch.randn(4, 2).bfloat16(),
    "half": torch.randn(7).half(),
    "whole": torch.arange(6),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "näme": torch.randint(0, 255, (9,), dtype=torch.uint8),
}


def test_what_is_written_the_library_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, TENSORS) as writer:
        for name, values in TENSORS.items():
            writer.add(name, values)
    found = load_file(path)
    assert all(torch.equal(found[name], values) for name, values in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_the_library_writes_is_read_whole_and_by_rows(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert all(torch.equal(file.read(name), values) for name, values in TENSORS.items())
        assert torch.equal(file.read_rows("bfloat", 1, 3), TENSORS["bfloat"][1:3])
        assert torch.equal(file.read_rows("scalar", 0, 1), TENSORS["scalar"][None])


def test_a_laid_out_header_is_one_the_library_reads(tmp_path):
    header, entries = lay_out({"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (4,))}, {"format": "pt"})
    end = max(e.start + e.num_bytes for e in entries.values())
    (tmp_path / "a.safetensors").write_bytes(header.ljust(end, b"\0"))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in load_file(tmp_path / "a.safetensors").items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.bfloat16, (4,)),
    }


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path / "a.safetensors", ["a"]) as writer:
        writer.add("a", torch.ones(3))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_copied_between_files(tmp_path):
    save_file({"a": torch.arange(1000)}, tmp_path / "a.safetensors")
    with TensorFile(tmp_path / "a.safetensors") as file, (tmp_path / "b").open("wb") as target:
        entry = file.entries["a"]
        file.copy_bytes(entry.start, entry.num_bytes, target.fileno(), 5)
    assert (tmp_path / "b").read_bytes()[5:] == bytes(TENSORS["whole"].new_tensor(range(1000)).numpy().data)


def headed(fields: object) -> bytes:
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header


def test_two_who_write_to_one_place_do_not_meet(tmp_path):
    out, mine = tmp_path / "out", tmp_path / ".out.partial"
    mine.mkdir()
    (mine / "file").write_text("the user's")
    with whole(out) as first:
        first.mkdir()
        (first / "file").write_text("first")
        with pytest.raises(ModelError, match="is there already"), whole(out) as second:
            second.mkdir()
            (first / "more").write_text("first")
            first.rename(out)
        shutil.copytree(out, first)
        shutil.rmtree(out)
    assert sorted(p.name for p in out.iterdir()) == ["file", "more"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out"]
    assert (mine / "file").read_text() == "the user's"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\x10\0\0\0\0\0\0\0not json at all!", "the header is no JSON"),
        ((2**40).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (headed([1]), "the header is a list, no object"),
        (headed({"__metadata__": [1]}), "__metadata__ is no object"),
        (headed({"a": {"dtype": "F32"}}), "doesn't say of a its dtype, shape and two data_offsets"),
        (headed({"a": 1}), "doesn't say of a its dtype"),
        (headed({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1]}}), "doesn't say of a its dtype"),
        (headed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"1234", "not the bytes of its shape"),
        (headed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}), "not the bytes of its shape"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        TensorFile(tmp_path / "a")


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ModelError, match="a has dtype F4"):
        TensorFile(tmp_path / "a")
