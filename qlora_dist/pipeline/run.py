"""Running one node: own its folder, do its work, commit what it made, and leave word if it fails."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from qlora_dist.artifacts.owner import OwnedError, describe
from qlora_dist.artifacts.store import Manifest
from qlora_dist.errors import Preempted, QloraDistError, disk_error
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.sealed import note_reading
from qlora_dist.pipeline.stages import STAGES
from qlora_dist.pipeline.tracked import say_made, say_trials, tracked
from qlora_dist.runtime import PROGRESS_VARIABLE, Facts, clear, log, peak_resident_bytes, rank, world_size, write_json

SEEN_S = 60.0
LAUNCHED = ("QLORA_DIST_LAUNCHER", "SLURM_JOB_ID")
"""Variables that say that a launcher started this process."""


def run_node(plan: Plan, node: Node) -> None:
    """Makes a node's artifact, unless it is finished or another process finishes it meanwhile.

    Raises:
        QloraDistError: whatever the stage found wrong, or a full disk.
    """
    store = plan.store
    with ownership(plan, node) as is_mine:
        if not is_mine or store.is_finished(node.id):
            log.info("%s is finished: nothing to do", node.name)
            return
        out = begin(plan, node)
        started = time.monotonic()
        sees_inputs(plan, node)
        try:
            with tracked(plan, node):
                with still_mine(plan, node):
                    facts = STAGES[node.stage].load()(node.told(), plan.inputs(node), out)
                    if rank() == 0:
                        finish(plan, node, facts, time.monotonic() - started)
                if rank() == 0:
                    say_made(plan, node, facts)
            if rank() == 0:
                say_trials(plan, node, facts)
        except OSError as error:
            raise disk_error(error, out) or error from error


@contextmanager
def still_mine(plan: Plan, node: Node) -> Iterator[None]:
    """Turns whatever goes wrong inside the `with` block, once another process has taken the node over, into that.

    Raises:
        OwnedError: if this process was silent for so long that another took over: its files were moved away.
    """
    try:
        yield
    except Exception as error:
        owner = plan.store.lost_to(node.id) if rank() == 0 and not isinstance(error, OwnedError) else None
        if owner is None:
            raise
        raise OwnedError(owner) from error


def begin(plan: Plan, node: Node) -> Path:
    """Readies the folder in which a node is made, and where it says how far it is."""
    out, progress = plan.store.partial(node.id), plan.progress_path(node)
    out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        progress.parent.mkdir(parents=True, exist_ok=True)  # a node that is run by hand has no launcher before it
        progress.unlink(missing_ok=True)
        if not STAGES[node.stage].resumes:
            clear(out)
        note_reading(plan, node)
    os.environ[PROGRESS_VARIABLE] = str(progress)
    return out


def sees_inputs(plan: Plan, node: Node) -> bool:
    """Says that all that a node reads is finished.

    What another machine finished a moment ago may not be seen here yet (shared file systems remember for up to a
    minute that a folder was absent), so one that a launcher started waits for that long, unless it is hopeless.
    """
    end = time.monotonic() + (SEEN_S if any(os.environ.get(name) for name in LAUNCHED) else 0.0)
    while not plan.has_inputs(node):
        if time.monotonic() >= end or _is_hopeless(plan, node):
            return False
        time.sleep(1.0)
    return True


def _is_hopeless(plan: Plan, node: Node) -> bool:
    """Says that something that a node needs has failed."""
    absent = [plan.node(artifact_id) for artifact_id in node.inputs.values() if not plan.store.has(artifact_id)]
    return any(plan.failure_path(other).exists() or _is_hopeless(plan, other) for other in absent)


@contextmanager
def ownership(plan: Plan, node: Node, poll_s: float = 1.0) -> Iterator[bool]:
    """Owns the node's `.partial` folder, on rank 0; waits while another live process makes the same artifact."""
    store, resumes = plan.store, STAGES[node.stage].resumes
    job = f"{plan.experiment}: {node.name}{_torchrun()}"
    told = False
    while not store.is_finished(node.id):
        if rank() != 0:
            owner = store.living_owner(node.id)
            if owner and owner["job"] == job:
                yield True
                _until_rank_0_ends(plan, node, job, poll_s)
                return
            time.sleep(poll_s / 10)
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(store.owned(node.id, job, resumes=resumes))
            except OwnedError as error:
                if not told:
                    log.info("%s is being made by %s; waiting", node.name, describe(error.owner))
                told = True
            else:
                yield True
                return
        time.sleep(poll_s)
    yield False


def _until_rank_0_ends(plan: Plan, node: Node, job: str, poll_s: float) -> None:
    """Waits until rank 0 has committed a node, or given it up: torchrun bears minutes of it, not any length."""
    while not plan.store.has(node.id):
        owner = plan.store.living_owner(node.id)
        if not owner or owner["job"] != job:
            return
        time.sleep(poll_s / 10)


def _torchrun() -> str:
    """Names the launch this process belongs to, so that its ranks know their own rank 0's mark."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return f" ({':'.join(os.environ.get(name, '') for name in names)})" if world_size() > 1 else ""


def finish(plan: Plan, node: Node, facts: Facts, seconds: float) -> None:
    """Commits what a node made.

    Raises:
        OwnedError: if another process has taken the node over meanwhile.
    """
    if owner := plan.store.lost_to(node.id):
        raise OwnedError(owner)
    plan.store.commit(manifest_of(plan, node, facts, seconds))


def manifest_of(plan: Plan, node: Node, facts: Facts, seconds: float) -> Manifest:
    """Writes down what a node made, from what and how."""
    return Manifest(
        stage=node.stage,
        label=node.subject or node.label,
        key=node.key,
        version=STAGES[node.stage].version,
        recipe=node.recipe,
        inputs=node.inputs,
        leaves=node.leaves,
        execution=node.config,
        facts=facts,
        seconds=round(seconds, 3),
        made=circumstances(),
    )


def circumstances() -> dict[str, Any]:
    """Says when, where and with which code and versions this process works."""
    packages = ("qlora_dist", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets")
    versions = {name: _version(name) for name in packages}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB",
        "gpus": _num_gpus(),
        "peak_memory_bytes": _peak_bytes(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": _commit(),
        "processes": world_size(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def _num_gpus() -> int:
    """Returns how many GPUs this process could use: 0 where nothing imported torch."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else 0


def _peak_bytes() -> int:
    """Returns the most memory that this process held so far: of its GPU where it has one, else its own."""
    if _num_gpus():
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    return peak_resident_bytes()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Returns the commit of the checkout this code runs from, with `+` if it was changed, or nothing."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_and_report(plan: Plan, node: Node) -> int:
    """Runs a node and returns its exit code; a failure is printed and left in `plan.failure_path`."""

    def work() -> int:
        run_node(plan, node)
        return 0

    return reporting(plan, [node], work)


def reporting(plan: Plan, nodes: Sequence[Node], work: Callable[[], int]) -> int:
    """Does the work of some nodes and returns its exit code; what it raises is printed and left for each of them."""
    for node in nodes:
        if world_size() == 1:
            plan.failure_path(node).unlink(missing_ok=True)
    try:
        return work()
    except OwnedError as error:  # the next life waits for the other's artifact
        message = f"It was taken over by {describe(error.owner)}: this process was silent for too long."
        code = Preempted.exit_code
    except QloraDistError as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. This is a fault of the program, not yours: see the log."
        code = 1
    print(f"error: {message}", file=sys.stderr)
    for node in nodes:
        leave_word(plan, node, message, code)
    return code


def leave_word(plan: Plan, node: Node, message: str, code: int) -> None:
    """Leaves word of a failure for the launcher; of several failing ranks the first one's stays."""
    final = plan.failure_path(node)
    aside = final.with_name(f"{final.name}.{rank()}")
    with contextlib.suppress(OSError):  # the disk may be what failed; the first rank's word may be there
        final.parent.mkdir(parents=True, exist_ok=True)
        write_json(aside, {"node": node.name, "message": message, "exit_code": code, "rank": rank()})
        final.hardlink_to(aside)
    aside.unlink(missing_ok=True)
