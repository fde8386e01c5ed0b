"""What a site would refuse is found before anything is submitted, within seconds, with the repair."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.artifacts.objects import is_url
from qlora_dist.config.launch import LauncherConfig
from qlora_dist.config.slurm import seconds_of, slurm_time
from qlora_dist.errors import LaunchError, bad_value, nearest
from qlora_dist.launch.base import Job
from qlora_dist.launch.slurm.client import ask
from qlora_dist.launch.slurm.shape import Shape, shape_of
from qlora_dist.pipeline.plan import Plan
from qlora_dist.runtime import log

OWN_TO_A_MACHINE = {"tmpfs", "ramfs", "devtmpfs"}
"""File systems that no other machine sees."""
NOT_NOW = "Requested node configuration is not available"
TAKE_JOBS = ("idle", "mix", "alloc", "comp", "plnd", "resv")
"""States of nodes, as sinfo shortens them, that take jobs now or once those before are done."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Some like nodes of a partition: how many, and what each has."""

    partition: str
    is_default: bool
    is_up: bool
    limit: str
    number: int
    cpus: int
    gpus: dict[str, int]


def lint(plan: Plan, jobs: Sequence[Job], config: LauncherConfig) -> None:
    """Passes if Slurm answers and would take jobs of every shape, and if the root is a folder for all nodes.

    Raises:
        LaunchError, ConfigError: naming the key and the repair.
    """
    check_root(plan, config.slurm.shared_root)
    answer_s = config.slurm.answer_s
    found = parse_nodes(ask(["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%c|%G"], answer_s))
    for tool in ("sbatch", "squeue", "scancel"):
        ask([tool, "--version"], answer_s)
    for shape in {shape_of(job, config) for job in jobs}:
        _ask_site(shape, check_shape(shape, found, config), config)


def check_root(plan: Plan, shared: str) -> None:
    """Refuses a root that can't be written, or that other machines don't see.

    Raises:
        LaunchError: naming the repair.
    """
    if is_url(plan.root):
        raise LaunchError(f"root={plan.root}: launcher=slurm wants a folder that all nodes share. Set root to one.")
    root = Path(plan.root)
    if shared and not root.is_relative_to(Path(shared).resolve()):
        raise bad_value("root", root, f"a folder below launcher.slurm.shared_root = {shared}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise LaunchError(
            f"root={root}: it can't be written ({error.strerror}). Set root= to a folder of yours."
        ) from None
    kind = _file_system(root)
    if kind in OWN_TO_A_MACHINE and not shared:
        repair = "Set root to a folder that all nodes share (or launcher.slurm.shared_root, if they do see it)."
        raise LaunchError(f"root={root}: it lies on {kind}, which no other machine sees. {repair}")


def _file_system(folder: Path) -> str:
    """Returns the type of the file system that a folder lies on, empty where the system doesn't say."""
    best, kind = "", ""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mount, found, *_ = line.split()
        if folder.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def parse_nodes(said: str) -> list[Nodes]:
    """Reads what sinfo says: `main*|up|1-00:00:00|2|4|gpu:a100:2(S:0)`."""
    found = []
    for line in said.splitlines():
        name, up, limit, number, cpus, gres = (cell.strip() for cell in line.split("|"))
        gpus: dict[str, int] = {}
        for kind, count in re.findall(r"gpu(?::([A-Za-z]\w*))?:(\d+)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        cores = int(re.match(r"\d+", cpus)[0])  # type: ignore[index]
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), up == "up", limit, int(number), cores, gpus))
    return found


def check_shape(shape: Shape, found: Sequence[Nodes], config: LauncherConfig) -> str:
    """Refuses a partition that isn't there, a time above its limit, GPUs and CPUs that no node of it has.

    Returns:
        The partition's name.

    Raises:
        ConfigError: naming the key and the repair.
    """
    light = shape.is_light and config.slurm.light_partition
    key = "launcher.slurm.light_partition" if light else "launcher.slurm.partition"
    name = shape.partition(config)
    nodes = [one for one in found if (one.partition == name if name else one.is_default)]
    if not nodes:
        wanted = "a partition of this site" if name else "a partition, since this site has no default one"
        raise bad_value(key, name, wanted, nearest(name, {one.partition for one in found}))
    name = nodes[0].partition
    if not nodes[0].is_up:
        raise bad_value(key, name, "a partition that is up", nearest("", {one.partition for one in found if one.is_up}))
    seconds, limit = shape.seconds(config), seconds_of(nodes[0].limit, key)
    if seconds > limit:
        by_stage = shape.stage in config.timeout_s
        own = f"launcher.timeout_s.{shape.stage}" if by_stage else "launcher.slurm.time"
        value = f"{seconds:.0f}" if by_stage else config.slurm.time
        raise bad_value(own, value, f"at most {nodes[0].limit}, the limit of partition {name}")
    _check_size(shape, nodes, config, name)
    return name


def _check_size(shape: Shape, nodes: Sequence[Nodes], config: LauncherConfig, name: str) -> None:
    slurm = config.slurm
    kinds = {kind for one in nodes for kind in one.gpus}
    if shape.gpus_per_node and slurm.gpu_type and slurm.gpu_type not in kinds:
        raise bad_value("launcher.slurm.gpu_type", slurm.gpu_type, f"a type of partition {name}", nearest("", kinds))
    most = max(one.gpus.get(slurm.gpu_type, 0) if slurm.gpu_type else sum(one.gpus.values()) for one in nodes)
    if shape.gpus_per_node > most:
        wanted = f"at most {most} GPUs a node in partition {name}; {shape.stage} asks for {shape.gpus_per_node}"
        repair = "Lower it (0 where there are none), or lower launcher.slurm.ranks_per_node."
        raise bad_value("launcher.slurm.gpus_per_rank", slurm.gpus_per_rank, wanted, repair)
    cpus = max(one.cpus for one in nodes)
    if shape.cpus_per_node > cpus:
        wanted = f"at most {cpus} CPUs a node in partition {name}; {shape.stage} asks for {shape.cpus_per_node}"
        repair = "Lower it, or lower launcher.slurm.ranks_per_node."
        raise bad_value("launcher.slurm.cpus_per_rank", slurm.cpus_per_rank, wanted, repair)
    number = sum(one.number for one in nodes)
    if shape.nodes > number:
        wanted = f"so many that {shape.nodes} nodes are not needed: partition {name} has {number}"
        raise bad_value("launcher.slurm.ranks_per_node", slurm.ranks_per_node, wanted)


def _ask_site(shape: Shape, partition: str, config: LauncherConfig) -> None:
    """Lets sbatch itself say whether it would take such a job: account, QOS, constraint, memory, options.

    A test doesn't see nodes that are down or don't answer, and calls them "not available"; a job would wait for them.
    """
    slurm, seconds = config.slurm, shape.seconds(config)
    told = {
        "partition": shape.partition(config),
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": "" if shape.is_light else slurm.constraint,
        "exclude": slurm.exclude,
        "mem": slurm.light_memory if shape.is_light else slurm.memory,
        "time": slurm_time(seconds) if seconds else "",
        "nodes": str(shape.nodes),
        "cpus-per-task": str(shape.cpus_per_node),
        "output": "/dev/null",
    }
    options: Iterable[str] = [f"--{name}={value}" for name, value in told.items() if value]
    try:
        ask(["sbatch", "--test-only", *options, *slurm.options, "--wrap=true"], slurm.answer_s)
    except LaunchError as error:
        if NOT_NOW in str(error) and (absent := nodes_absent(_states(partition, slurm.answer_s))):
            log.warning(
                "%d nodes of partition %s are down or don't answer: jobs of stage %s may have to wait for them",
                absent,
                partition,
                shape.stage,
            )
            return
        repair = "Look at launcher.slurm.account, qos, constraint, exclude, memory and options."
        raise LaunchError(f"This site would not take jobs of stage {shape.stage}: {error} {repair}") from error


def _states(partition: str, answer_s: float) -> str:
    return ask(["sinfo", "--noheader", f"--partition={partition}", "--format=%D|%t"], answer_s)


def nodes_absent(said: str) -> int:
    """Counts nodes that take no job now, from what sinfo says: `2|idle*`, with a star where a node doesn't answer."""
    rows = (line.strip().split("|") for line in said.splitlines())
    return sum(int(number) for number, state in rows if state.endswith("*") or not state.startswith(TAKE_JOBS))


def most_tasks(answer_s: float) -> int:
    """Returns how many tasks an array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"], answer_s))
    return max(1, int(found.group(1)) - 1) if found else 1000
