"""Every failure a user can cause has one class, one sentence and one repair.

A message names the thing (config key, or file and line), its value, what was wanted, and how to mend it.
The command line prints the message alone: a traceback is for a programmer's mistake.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class QloraDistError(Exception):
    """Base of all errors that are reported as one message, with `exit_code` as the process's exit status."""

    exit_code = 1


class ConfigError(QloraDistError):
    """A config key has no such name, the wrong type, or a value that can't be used."""

    exit_code = 2


class DataError(QloraDistError):
    """A corpus, record, template or row can't be used."""


class ArtifactError(QloraDistError):
    """An artifact is absent, torn, foreign, or owned by another process."""


class ModelError(QloraDistError):
    """A base model or an adapter can't be loaded, or doesn't belong to the other."""


class TrainError(QloraDistError):
    """Training can't start, or a check of the certificate failed."""


class Preempted(QloraDistError):  # noqa: N818 - nothing went wrong: the work continues when it is run again
    """Training stopped on request, its checkpoint written: run the same command to continue."""

    exit_code = 75


class PeerLost(TrainError):  # noqa: N818 - nothing went wrong here
    """Another process of the same job is gone: run again, the job goes on from its checkpoint."""

    exit_code = 76


class LaunchError(QloraDistError):
    """A launcher can't run the plan, or a node of the plan failed."""


def disk_error(error: OSError, folder: object) -> ArtifactError | None:
    """Says what to do about a disk that is full or can't be written; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        repair = f"Free some space, or set root= to a larger disk; then run the same command again. ({folder})"
        return ArtifactError(f"The disk is full. {repair}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        where = error.filename or folder
        return ArtifactError(f"{where} can't be written ({error.strerror}). Set root= to a folder of yours.")
    return None


def bad_value(key: str, value: object, wanted: str, repair: str = "") -> ConfigError:
    """Builds a config complaint in its one form, `key=value: expected wanted. Repair`."""
    shown = value if isinstance(value, str) and value else repr(value)
    return ConfigError(f"{key}={shown}: expected {wanted}." + (f" {repair}" if repair else ""))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns "did you mean ...?" for the closest valid name, else the list of all of them."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Valid names: {', '.join(names)}."
