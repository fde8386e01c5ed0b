"""Runs the real command in a process of its own, as a user does, on a corpus small enough for a test."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = [
    "+experiment=smoke",
    "domain=files",
    "domain.files.split.validation_share=0.15",
    "domain.files.split.test_share=0.15",
    "general.split.validation_share=0.15",
    "general.split.test_share=0.15",
    "model.tiny.vocab_size=400",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=64",
    "model.tiny.pretrain_tokens=8192",
    "model.tiny.tokens_per_step=1024",
    "train.max_steps=4",
]
SYLLABLES = (
    "lic",
    "ens",
    "war",
    "ran",
    "ty",
    "cop",
    "yr",
    "ight",
    "no",
    "tice",
    "sub",
    "ject",
    "to",
    "the",
    "par",
    "ties",
)


def text(seed: int, num_words: int = 60) -> str:
    """Returns text that no other seed gives: words of one to three syllables, drawn by the seed."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(num_words))


@dataclass
class Workplace:
    """A folder with corpora in which the command is run."""

    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "smoke"

    @property
    def summary(self) -> dict:
        return json.loads((self.run_folder / "summary.json").read_text())

    def command(self, *overrides: str) -> list[str]:
        sources = [
            f"domain.files.sources=[{{path: {self.folder / 'legal'}}}]",
            f"general.sources=[{{path: {self.folder / 'general'}}}]",
        ]
        return [sys.executable, "-m", "qlora_dist.launch", *SMALL, *sources, *overrides]

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*overrides),
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that runs the tests with & has them ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )

    def launch(self, *overrides: str, **environment: str) -> tuple[int, str]:
        process = self.start(*overrides, **environment)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def states(self) -> dict[str, str]:
        return {f"{node['stage']}/{node['label']}": node["state"] for node in self.summary["nodes"]}


def make_workplace(folder: Path) -> Workplace:
    for name, first in (("legal", 0), ("general", 1000)):
        (folder / name).mkdir(parents=True)
        lines = [json.dumps({"text": text(first + i)}) for i in range(60)]
        (folder / name / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return Workplace(folder)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Workplace, int, str]:
    """One finished run, shared by the tests of a file; one line of its corpus is broken."""
    workplace = make_workplace(tmp_path_factory.mktemp("finished"))
    broken = workplace.folder / "legal" / "corpus.jsonl"
    broken.write_text(broken.read_text() + '{"text": broken\n')
    code, output = workplace.launch()
    return workplace, code, output
