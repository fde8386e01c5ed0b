"""Writes the tree in README.md from each module's first docstring line: `python docs/tree.py` (a test compares)."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree -->", "<!-- end of tree -->"
FOLDERS = {
    "conf": "the defaults and the named options of every group, one file an option",
    "launch": "files for people and clusters; no Python",
    "slurm": "site files and examples for people",
    "tests": "unit/<room>, dist (real processes), pipeline (the real command), launch, cluster, browser, gpu",
    "benchmarks": "bench_*.py, and what they measured under results/",
    "docs": "design.md (the plan of the house), clusters.md, strategies.md, failures.md, log.md, decisions/",
}


def first_line(path: Path) -> str:
    """Returns the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def lines() -> Iterator[str]:
    """Yields the lines of the tree."""
    for name in ("conf", "launch", "slurm"):
        if (TOP / name).is_dir():
            yield f"{name + '/':<28} {FOLDERS[name]}"
    package = TOP / "qlora_dist"
    yield "qlora_dist/"
    for path in sorted(package.glob("*.py")):
        if path.name != "__init__.py":
            yield f"  {path.name:<26} {first_line(path)}"
    for room in sorted(p for p in package.iterdir() if (p / "__init__.py").exists()):
        yield f"  {room.name + '/':<26} {first_line(room / '__init__.py')}"
        for path in sorted(room.rglob("*.py")):
            name = path.relative_to(room)
            if name.name != "__init__.py":
                yield f"    {name.as_posix():<24} {first_line(path)}"
            elif name.parent != Path():
                yield f"    {name.parent.as_posix() + '/':<24} {first_line(path)}"
    for name in ("tests", "benchmarks", "docs"):
        yield f"{name + '/':<28} {FOLDERS[name]}"


def rendered(readme: str) -> str:
    """Returns the README's text with its tree made anew."""
    tree = "\n".join(line.rstrip() for line in lines())
    block = f"{BEGIN}\n```\n{tree}\n```\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    target = TOP / "README.md"
    target.write_text(rendered(target.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
