"""Three corpora lie on every machine that runs Python: licence texts, docstrings, the language reference."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

Example = tuple[str, int, dict[str, Any]]
"""File, line, and the raw example."""

LICENCE_NAMES = ("licen", "notice", "copying", "patent")
LICENCE_FOLDER = Path("/usr/share/common-licenses")
NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def licences() -> Iterator[Example]:
    """Yields the licence and notice texts of the installed distributions and of the system, each text once."""
    seen: set[str] = set()
    for path in _licence_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):  # not readable, or in no encoding of today: not this corpus's matter
            continue
        squeezed = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
        if text.strip() and squeezed not in seen:
            seen.add(squeezed)
            yield path.parent.name + "/" + path.name, 1, {"text": text}


def docstrings() -> Iterator[Example]:
    """Yields a question and an answer for each documented name of the standard library."""
    for name, path in _library_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
        yield from _documented(tree, name, name)


def reference() -> Iterator[Example]:
    """Yields the chapters of the Python language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", 1, {"text": topics[name]}


CORPORA: dict[str, Callable[[], Iterator[Example]]] = {
    "licenses": licences,
    "docstrings": docstrings,
    "reference": reference,
}


def corpus_digest(name: str) -> str:
    """Names what a corpus reads: the bytes of its licence texts, else the exact Python version they belong to."""
    if name == "licenses":
        texts = sorted(hashlib.sha256(raw["text"].encode()).hexdigest() for _, _, raw in licences())
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return f"{sys.implementation.name}-{sys.version}"


def _licence_files() -> list[Path]:
    """Returns the files of that kind in the metadata folders of all distributions, and those of the system first."""
    files = [path for path in sorted(LICENCE_FOLDER.iterdir()) if path.is_file()] if LICENCE_FOLDER.is_dir() else []
    roots = sorted({Path(str(distribution.locate_file(""))).resolve() for distribution in metadata.distributions()})
    for folder in (folder for root in roots for folder in sorted(root.glob("*.dist-info"))):
        names = sorted(path for path in folder.rglob("*") if any(word in path.name.lower() for word in LICENCE_NAMES))
        files += [path for path in names if path.is_file()]
    return files


def _library_files() -> list[tuple[str, Path]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(folder.rglob("*.py")) if not NOT_LIBRARY & set(p.relative_to(folder).parts)]
    return [(".".join(p.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"), p) for p in files]


def _documented(node: ast.AST, module: str, name: str) -> Iterator[Example]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and text.strip():
            line = getattr(node, "lineno", 1)
            yield module, line, {"instruction": _question(node, module, name), "response": text.strip()}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documented(child, module, f"{name}.{child.name}")


def _question(node: ast.AST, module: str, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"What is the Python module {module} for?"
    if isinstance(node, ast.ClassDef):
        return f"What is the class {name} in Python?"
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"What does {name}({', '.join(a for a in arguments if a not in ('self', 'cls'))}) do in Python?"
