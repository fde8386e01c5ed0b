"""A dataset of the Hugging Face hub is read as a stream, at the pinned commit; offline, from the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_dist.config.data import SourceConfig
from qlora_dist.errors import DataError
from qlora_dist.runtime import log

Example = tuple[str, int, Any]
"""File, line, and the raw example."""


def read_hub(source: SourceConfig) -> Iterator[Example]:
    """Yields the rows of a hub dataset's subset and split, one by one; nothing is downloaded ahead.

    With `HF_HUB_OFFLINE=1`, as on compute nodes without a network, they come from the snapshot of that commit in the
    hub's cache (`HF_HOME`), which must have been downloaded whole.

    Raises:
        DataError: if it can't be read to its end.
    """
    import datasets
    from huggingface_hub import constants

    name = f"{source.path}@{source.revision[:12]}"
    try:
        place, pinned = (_snapshot(source), {}) if constants.HF_HUB_OFFLINE else (source.path, _pin(source))
        told: dict[str, Any] = {"split": source.split, "streaming": True, **pinned}
        for number, row in enumerate(datasets.load_dataset(place, source.subset or None, **told), start=1):
            yield name, number, row
    except DataError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        repair = "Check path, subset, split and revision, and that the hub can be reached"
        raise DataError(
            f"hub dataset {name}: {reason}. {repair}, or download it first: {_download(source)}."
        ) from error


def _pin(source: SourceConfig) -> dict[str, Any]:
    return {"revision": source.revision}


def _snapshot(source: SourceConfig) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        what = (
            f"hub dataset {source.path}: HF_HUB_OFFLINE is set, and commit {source.revision} isn't in the hub's cache"
        )
        raise DataError(f"{what}. Where there is a network: {_download(source)}.") from error
    log.info("%s is read from %s", source.path, folder)
    return folder


def _download(source: SourceConfig) -> str:
    return f"hf download --repo-type dataset {source.path} --revision {source.revision}"
