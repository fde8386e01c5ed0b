"""What the README says is so."""

import importlib.util
import re
from pathlib import Path

from qlora_dist.launch.compose import compose_run

TOP = Path(__file__).resolve().parents[2]
README = (TOP / "README.md").read_text()


def test_the_tree_is_the_tree():
    spec = importlib.util.spec_from_file_location("tree", TOP / "docs" / "tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    assert tree.rendered(README) == README, "run: python docs/tree.py"


def test_the_first_two_commands_are_demo_and_test():
    assert re.findall(r"^make (\w+)", README, flags=re.MULTILINE) == ["demo", "test"]


def test_every_override_in_the_table_composes():
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)`", README, flags=re.MULTILINE)
    plain = [row for row in rows if not row.startswith(("python", "-m"))]
    assert len(plain) >= 6
    for row in plain:
        compose_run([*row.split(), "train.tokens_per_step=8192", "train.micro_batch_tokens=2048"])


def test_every_folder_and_file_named_is_there():
    for name in re.findall(r"`((?:docs|conf|tests)/[\w./-]+|[A-Z]+\.md)`", README):
        assert (TOP / name).exists(), name
