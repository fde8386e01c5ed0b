"""The sbatch text of a shape: readable, and run by hand as it is run by the launcher."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.config.slurm import Container, SlurmConfig, slurm_time
from qlora_dist.launch.base import Job
from qlora_dist.launch.lives import MOST_LIVES
from qlora_dist.launch.slurm.arrays import Array
from qlora_dist.launch.slurm.shape import CLOSE, Shape

PRESETS = "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
"""What a site or an image may have set, and torchrun would believe."""
SPARE_S = 30
"""Of the time between the signal and the end, this much is left for what comes after a checkpoint."""
WAIT_S = 30
"""Once a process of a job has ended the others follow within seconds: after so long srun ends what is left."""
PATIENCE = 60
"""How often a controller that does not answer is asked again, every ten seconds or more."""
LINGER_S = 60
"""Once all that a job makes is there, its processes may still run for so long."""


def sbatch_text(shape: Shape, plan: Path, submission: Path, config: LauncherConfig, workdir: Path) -> str:
    """Renders the text that runs any job of a shape: `sbatch --array=0-3 adapter.sbatch adapter_0.tasks`.

    Args:
        shape: the shape.
        plan: the frozen plan.
        submission: the folder of this text and of the lists of tasks.
        config: the launcher's config.
        workdir: where the jobs start, so that relative paths mean the same to them.
    """
    parts = [
        "#!/bin/bash",
        f"# {_title(shape)} By hand: sbatch --array=0 {shape.name}.sbatch {shape.name.replace('-', '_')}_0.tasks",
        *_directives(shape, plan.parent, submission, config, workdir),
        _TASK.format(submission=shlex.quote(str(submission)), logs=shlex.quote(str(plan.parent / "logs"))),
        *_environment(shape, config.slurm),
        *(_RENDEZVOUS if shape.processes > 1 else []),
        _command(shape, plan, config.slurm),
        _WATCH.format(artifacts=shlex.quote(str(plan.parent.parent / "artifacts")), linger=LINGER_S),
        _ENDING.format(
            lost="true" if shape.processes > 1 else "[ $code -gt 128 ]",
            retries=config.retries,
            most_lives=MOST_LIVES,
            patience=PATIENCE,
        ),
    ]
    return "\n".join(parts)


def _title(shape: Shape) -> str:
    if shape.stage == CLOSE:
        return "Closes the run: summary, report, and what is shipped."
    where = f" on {shape.nodes} nodes" if shape.nodes > 1 else ""
    return f"Jobs of stage {shape.stage}" + (f", {shape.processes} processes{where}." if shape.processes > 1 else ".")


def _directives(shape: Shape, folder: Path, submission: Path, config: LauncherConfig, workdir: Path) -> Iterable[str]:
    slurm = config.slurm
    seconds = shape.seconds(config)
    options = {
        "--job-name": f"{folder.name}:{shape.name}",
        "--chdir": str(workdir),
        "--output": f"{submission}/%x-%a.out",
        "--open-mode": "append",
        "--partition": shape.partition(config),
        "--account": slurm.account,
        "--qos": slurm.qos,
        "--constraint": "" if shape.is_light else slurm.constraint,
        "--exclude": slurm.exclude,
        "--time": slurm_time(seconds) if seconds else "",
        "--nodes": str(shape.nodes),
        "--ntasks-per-node": "1",
        "--cpus-per-task": str(shape.cpus_per_node),
        "--mem": slurm.light_memory if shape.is_light else slurm.memory,
        "--gres": _gres(shape, slurm),
        "--signal": f"TERM@{slurm.signal_s}" if slurm.signal_s else "",
        "--kill-on-invalid-dep": "yes",
    }
    for name, value in options.items():
        if value:
            yield f"#SBATCH {name}={value}"
    yield "#SBATCH --requeue"
    yield from (f"#SBATCH {option}" for option in slurm.options)


def _gres(shape: Shape, slurm: SlurmConfig) -> str:
    return ":".join(filter(None, ["gpu", slurm.gpu_type, str(shape.gpus_per_node)])) if shape.gpus_per_node else ""


_TASK = """
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
submission={submission} logs={logs}
if [ ! -r "$submission/$1" ]; then
    echo "$submission/$1 can't be read on $(hostname): set root to a folder that all nodes share"
    exit 2
fi
IFS=$'\\t' read -r _ name nodes words < <(awk -F'\\t' -v i="$SLURM_ARRAY_TASK_ID" '$1 == i' "$submission/$1")
exec >>"$logs/$name.log" 2>&1
echo "== $(date -Is) job $task on $SLURM_JOB_NODELIST, life $((${{SLURM_RESTART_COUNT:-0}} + 1)): $nodes"
(cd "$logs" && rm -f $words)
"""


def _environment(shape: Shape, slurm: SlurmConfig) -> Iterable[str]:
    yield from (f"module load {shlex.quote(module)}" for module in slurm.modules)
    yield from slurm.setup
    yield from (f"export {name}={shlex.quote(str(value))}" for name, value in slurm.environment.items())
    yield f"export OMP_NUM_THREADS={shape.threads} PYTHONUNBUFFERED=1"
    if shape.processes > 1:  # else torchrun kills its processes 30 s after the signal, in the middle of a checkpoint
        yield f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(SPARE_S, slurm.signal_s - SPARE_S)}"
    yield f"unset {PRESETS}"


_RENDEZVOUS = [
    "",
    "# The ranks stand in the order of the nodes; the first node is the master, on a port that is free there.",
    'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    "port=$((10000 + SLURM_JOB_ID % 20000))",
    'while (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do port=$((port + 1)); done',
    "export head port",
]


def _command(shape: Shape, plan: Path, slurm: SlurmConfig) -> str:
    """Writes the one call of srun: one process a node, python itself or the torchrun of that node's processes."""
    python = shlex.quote(slurm.python or sys.executable)
    options = f"--ntasks={shape.nodes} --ntasks-per-node=1 --cpus-per-task={shape.cpus_per_node}"
    srun = [f"srun {options} --kill-on-bad-exit=0 --wait={WAIT_S}"]
    inside = ""
    if slurm.container is Container.pyxis:
        mounts = ",".join(slurm.container_mounts)
        image = [f"--container-image={slurm.container_image}", f"--container-mounts={mounts}" if mounts else ""]
        srun.append("    " + " ".join(shlex.quote(o) for o in [*image, *slurm.container_options] if o))
    elif slurm.container is Container.apptainer:
        binds = [word for mount in slurm.container_mounts for word in ("--bind", mount)]
        nv = ["--nv"] if shape.gpus_per_node else []
        words = ["apptainer", "exec", *nv, *binds, *slurm.container_options, slurm.container_image]
        inside = " ".join(map(shlex.quote, words)) + " "
    module = "qlora_dist.launch.closing" if shape.stage == CLOSE else "qlora_dist.pipeline"
    work = f"-m {module} {shlex.quote(str(plan))}" + ("" if shape.stage == CLOSE else " $nodes")
    if shape.processes == 1:
        return "\n" + " \\\n".join([*srun, f"    {inside}{python} {work}"]) + " &"
    torchrun = f"-m torch.distributed.run --nnodes={shape.nodes} --nproc-per-node={shape.ranks_per_node}"
    place = "--node-rank=$SLURM_NODEID --master-addr=$head --master-port=$port"
    told = f"exec {inside}{python} {torchrun} {place} {work}"
    return "export nodes\n" + " \\\n".join([*srun, f"    bash -c {shlex.quote(told)}"]) + " &"


_WATCH = """\
step=$!
# What is made is done. What runs on then waits for a process whose node died, or can't part from its GPU: it is ended.
made() {{ for node in $nodes; do [ -e {artifacts}/$node/manifest.json ] || return 1; done; }}
(late=0; while [ $late -lt {linger} ]; do sleep 5; ! made || late=$((late + 5)); done; kill $step) & watch=$!
wait $step
code=$?
kill $watch 2>/dev/null
! made || code=0
"""

_ENDING = """\
# What follows. 75: it wrote a checkpoint, and goes on. Killed, or lost another process (76): again, {retries} times.
# An error of its own would be the same again.
cd "$logs" || exit $code
# A controller may be away for a while: it is asked again.
answer() {{ for _ in {{1..{patience}}}; do timeout 60 "$@" && return; sleep 10; done; return 1; }}
again() {{  # requeues this task and no other, unless somebody cancelled it meanwhile
    [ "$(answer squeue --noheader --jobs="$task" --format=%T)" = RUNNING ] || return
    echo "== $(date -Is) job $task: to be run again"
    answer scontrol requeue "$task" && sleep 60
}}
told=$(cat $words 2>/dev/null | grep -o '"exit_code": [0-9]*' | grep -o '[0-9]*$' | sort -u)
if [ $code -eq 0 ]; then
    exit 0
elif [ $code -eq 75 ] || grep -qx 75 <<<"$told"; then
    [ "${{SLURM_RESTART_COUNT:-0}}" -ge {most_lives} ] || again
elif [ -n "$told" ] && [ "$told" != 76 ]; then
    echo "== $(date -Is) job $task failed by itself (exit code $code)"
elif [ -n "$told" ] || {lost}; then
    echo "$(date -Is) $task exit code $code" >>"$submission/$name.lost"
    [ "$(wc -l <"$submission/$name.lost")" -gt {retries} ] || again
fi
exit $code
"""


def tasks_text(array: Array, node_ids: Mapping[str, str]) -> str:
    """Lists the tasks of an array, one a line: index, name of the log, what is run, where word of a failure is left."""
    return "".join("\t".join([str(i), *_cells(job, node_ids)]) + "\n" for i, job in sorted(array.tasks.items()))


def _cells(job: Job, node_ids: Mapping[str, str]) -> list[str]:
    nodes = " ".join(node_ids[name] for name in job.nodes) or "-"
    return [job.log.stem, nodes, " ".join(word.name for word in job.words) or "-"]


def submit_text(arrays: Iterable[Array]) -> str:
    """Writes the shell text that submits all arrays and notes their ids: run by the launcher, or by hand."""
    lines = []
    for array in arrays:
        waits = ",".join(wait.text() for wait in array.waits)
        words = [f"--array={array.indices()}", *([f'"--dependency={waits}"'] if waits else [])]
        lines.append(f"submit {array.name} {' '.join(words)} {array.shape}.sbatch {array.name}.tasks")
    return _SUBMIT + "\n".join(lines) + "\n"


_SUBMIT = """\
#!/bin/bash
# Submits the jobs of this folder, each array after what it waits for; their ids are noted in `ids`.
set -euo pipefail
cd "$(dirname "$0")"
submit() {
    local id
    id=$(sbatch --parsable "${@:2}")
    echo "$1 ${id%%;*}" >>ids
    printf -v "$1" %s "${id%%;*}"
}
"""
