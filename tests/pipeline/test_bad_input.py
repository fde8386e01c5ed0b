"""What a user gets for each mistake: one clear error, a non-zero exit, and nothing half-written taken as finished."""

import json
import os
import subprocess

import pytest


def finished_stages(workplace) -> set[str]:
    return {p.parent.parent.name for p in (workplace.folder / "runs" / "artifacts").glob("*/*/manifest.json")}


def test_a_missing_corpus(workplace):
    code, output = workplace.launch("domain.files.sources=[{path: nowhere/*.jsonl}]")
    assert code == 2
    assert output.startswith("error: domain.files.sources[0].path=")
    assert "nowhere/*.jsonl" in output
    assert "Traceback" not in output
    assert not (workplace.folder / "runs").exists()


def test_an_empty_corpus(workplace):
    (workplace.folder / "legal" / "corpus.jsonl").write_text("")
    code, output = workplace.launch()
    assert code == 1
    assert "empty" in output
    assert "Traceback" not in output


def test_an_unknown_key(workplace):
    code, output = workplace.launch("lora.lora_rnk=4")
    assert (code, output) == (2, "error: lora.lora_rnk: there is no such key. Did you mean lora_rank?\n")


def test_too_many_broken_lines_stop_the_run_and_are_named(workplace):
    path = workplace.folder / "legal" / "corpus.jsonl"
    lines = path.read_text().splitlines()
    lines[10:25] = ["{broken"] * 15
    path.write_text("\n".join(lines) + "\n")
    (workplace.run_folder / "adapter").mkdir(parents=True)  # as an earlier run shipped one
    code, output = workplace.launch()
    assert code == 1
    assert "max_reject_share" in output
    assert "corpus.jsonl:11" in output
    assert "Traceback" not in output
    assert "adapter" not in finished_stages(workplace)
    states = workplace.states()
    assert states["merged/all"] == "skipped"
    assert states["splits/general"] == "done", "what does not depend on it runs"
    assert workplace.summary["state"] == "failed"
    assert workplace.summary["adapter"] is None
    assert not (workplace.run_folder / "adapter").exists(), "what an earlier run shipped is not this one's"
    assert (workplace.run_folder / "report.html").exists()


def test_a_base_folder_without_weights(workplace):
    base = workplace.folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code, output = workplace.launch(f"model.path={base}")
    assert code in (1, 2)
    assert str(base) in output
    assert "weights" in output or "safetensors" in output
    assert "Traceback" not in output
    assert "adapter" not in finished_stages(workplace)


def test_a_root_that_can_not_be_written(workplace):
    (workplace.folder / "file").write_text("")
    code, output = workplace.launch(f"root={workplace.folder / 'file' / 'below'}")
    assert code == 1
    assert "Set root=" in output
    assert "Traceback" not in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(workplace):
    small = workplace.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], check=True)
    try:
        code, output = workplace.launch(f"root={small}")
        finished = [p.parent for p in small.glob("artifacts/*/*/manifest.json")]
        sizes = {p: json.loads((p / "manifest.json").read_text())["files"] for p in finished}
        whole = all((p / n).stat().st_size == e["bytes"] for p, files in sizes.items() for n, e in files.items())
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert code == 1
    assert "full" in output
    assert "Traceback" not in output
    assert whole
