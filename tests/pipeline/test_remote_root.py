"""The real command with a root that is a URL, on a local S3: every process is one of its own, as on machines apart."""

import json
import shutil
import uuid

import pytest

from qlora_dist.artifacts.objects import Objects


@pytest.mark.slow
def test_a_run_is_kept_at_its_url_and_gone_on_with_from_a_bare_machine(workplace, s3_server):
    root, staging = f"s3://bucket/{uuid.uuid4().hex}", workplace.folder / "staging"
    code, output = workplace.launch(f"root={root}", f"staging={staging}")
    assert code == 0, output[-3000:]
    assert f"kept at  {root}/smoke" in output
    objects = Objects(root)
    summary = json.loads(objects.read("smoke/summary.json") or b"{}")
    assert {node["state"] for node in summary["nodes"]} == {"done"}
    kept = objects.walk("smoke")
    assert {"plan.json", "report.html", "adapter/adapter_config.json", "logs/merged-all.log"} <= kept.keys()
    artifacts = objects.walk("artifacts")
    assert sum(name.endswith("/manifest.json") for name in artifacts) == len(summary["nodes"])
    assert not [name for name in artifacts if ".partial/" in name], "no lock and no half-made folder is left"

    shutil.rmtree(staging)  # another machine
    code, output = workplace.launch(f"root={root}", f"staging={staging}")
    assert code == 0, output[-3000:]
    assert f"0 of {len(summary['nodes'])} nodes to run" in output
    assert list(staging.rglob("report.html"))


def test_a_bucket_that_is_not_there_is_one_error(workplace, s3_server):
    code, output = workplace.launch("root=s3://no-such-bucket/runs")
    assert code == 1
    assert "root=s3://no-such-bucket/runs: it can't be read or written" in output
    assert "Traceback" not in output
