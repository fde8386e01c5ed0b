"""Hub datasets, read from a hub on this machine: a server that speaks the part of its protocol that is needed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

COMMITS = {
    letter * 40: {
        "README.md": b"---\nlicense: mit\n---\n",
        "train.jsonl": "".join(
            json.dumps({"question": f"{letter}{i}", "answer": "x"}) + "\n" for i in range(3)
        ).encode(),
        "test.jsonl": b'{"question": "held out", "answer": "y"}\n',
    }
    for letter in "ab"
}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, raw: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def entries(self, commit: str, names: Any = None) -> bytes:
        files = {name: raw for name, raw in COMMITS[commit].items() if names is None or name in names}
        oid = {name: hashlib.sha1(raw).hexdigest() for name, raw in files.items()}
        return json.dumps(
            [{"type": "file", "path": name, "size": len(raw), "oid": oid[name]} for name, raw in files.items()]
        ).encode()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        words = path.split("/")
        commit = next((word for word in words if word in COMMITS), None)
        if not path.startswith(("/api/datasets/some/set", "/datasets/some/set")):
            self.answer(b"", 404, X_Error_Code="RepoNotFound")
        elif commit is None:
            self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        elif "tree" in words:
            self.answer(self.entries(commit))
        elif "resolve" not in words:
            files = [{"rfilename": name} for name in COMMITS[commit]]
            self.answer(json.dumps({"id": "some/set", "sha": commit, "siblings": files}).encode())
        elif words[-1] not in COMMITS[commit]:
            self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            raw = COMMITS[commit][words[-1]]
            told = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if not first or self.command == "HEAD":
                self.answer(raw, **told)
                return
            piece = raw[int(first) : int(last or len(raw)) + 1]
            told["Content_Range"] = f"bytes {first}-{int(first) + len(piece) - 1}/{len(raw)}"
            self.answer(piece, 206, **told)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        names = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer(self.entries(next(word for word in self.path.split("/") if word in COMMITS), names))


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


READ = """
import json, sys
from qlora_dist.config.data import SourceConfig
from qlora_dist.data.hub import read_hub
from qlora_dist.errors import DataError
for told in json.loads(sys.argv[1]):
    try:
        print(json.dumps([row["question"] for _, _, row in read_hub(SourceConfig(path="some/set", **told))]))
    except DataError as error:
        print(json.dumps(str(error)))
"""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("some/set", repo_type="dataset", revision=sys.argv[1])
"""


def run(code: str, argument: str, home: Path, **environment: str) -> list[Any]:
    """Runs code in a process of its own, since the hub's client reads its environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    told = kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, argument], env=told, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_pinned_commit_is_streamed_and_what_is_wrong_is_one_clear_error(hub: str, tmp_path: Path) -> None:
    told = [
        {"revision": "a" * 40}, {"revision": "b" * 40}, {"revision": "a" * 40, "split": "test"},
        {"revision": "c" * 40}, {"revision": "a" * 40, "split": "nowhere"},
    ]  # fmt: skip
    a, b, test, no_commit, no_split = run(READ, json.dumps(told), tmp_path, HF_ENDPOINT=hub)
    assert (a, b, test) == (["a0", "a1", "a2"], ["b0", "b1", "b2"], ["held out"])
    for says in (no_commit, no_split):
        assert "Check path, subset, split and revision" in says
        assert "hf download --repo-type dataset some/set --revision" in says
        assert "\n" not in says
    assert not list(tmp_path.rglob("train.jsonl"))  # streamed, not downloaded


def test_offline_a_downloaded_commit_is_read_and_another_is_one_clear_error(hub: str, tmp_path: Path) -> None:
    run(DOWNLOAD, "a" * 40, tmp_path, HF_ENDPOINT=hub)
    told = json.dumps([{"revision": "a" * 40}, {"revision": "b" * 40}])
    here, absent = run(READ, told, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert here == ["a0", "a1", "a2"]
    assert absent.startswith("hub dataset some/set: HF_HUB_OFFLINE is set, and commit bbb")
    assert absent.endswith(f"hf download --repo-type dataset some/set --revision {'b' * 40}.")
