"""The files in launch/ are what Ray and KubeRay take, and the commands in them are commands of this project."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qlora_dist.config.launch import LauncherName
from qlora_dist.launch.compose import compose_run

TOP = Path(__file__).resolve().parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((TOP / "launch" / name).read_text())


def overrides(command: str) -> list[str]:
    """Returns what follows `python -m qlora_dist.launch` in a command line."""
    words = shlex.split(command.partition("qlora_dist.launch")[2])
    return words[: words.index("(after:")] if "(after:" in words else words


def test_the_rayjob_is_one():
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(read("rayjob.yaml"), schema)


@pytest.mark.parametrize("path", [("spec", "entryPoint"), ("spec", "rayClusterSpec", "workerGroups")])
def test_a_misspelt_field_of_a_rayjob_is_noticed(path: tuple[str, ...]):
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    job = read("rayjob.yaml")
    part = job
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_workers_ask_for_what_their_pods_have():
    for group in read("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_command_of_the_rayjob_composes():
    config = compose_run(overrides(read("rayjob.yaml")["spec"]["entrypoint"]))
    assert config.launcher.name is LauncherName.ray
    assert config.launcher.ray.address == "auto"
    assert config.launcher.ray.max_workers == config.strategy.world_size


def test_the_command_in_the_cluster_file_composes():
    text = (TOP / "launch" / "cluster.yaml").read_text()
    lines = re.search(r"-- (python -m qlora_dist.launch.*?)\n#   ray down", text, flags=re.DOTALL)
    assert lines
    command = re.sub(r"\\\n#", "", lines.group(1)).split("   (after")[0]
    assert compose_run(overrides(command)).launcher.name is LauncherName.ray


def test_ray_takes_the_cluster_file():
    pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    filled = fillout_defaults(read("cluster.yaml"))
    assert filled["head_node_type"] in filled["available_node_types"]
    validate_config(filled)
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(filled | {"idle_timeout": 5})
