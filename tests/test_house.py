"""The rules of the house: arrows point down only; the model has no I/O."""

from __future__ import annotations

import ast
from pathlib import Path

import dedup

PACKAGE = Path(dedup.__file__).parent

LEVELS = {
    "pages": 0, "errors": 0, "_core": 0,
    "kernel": 1, "model": 1,
    "sources": 2, "grouping": 2, "schema": 2,
    "calibration": 2,
    "scanning": 3, "estimate": 3,
    "tuning": 4, "sampling": 4, "report": 4, "change": 4, "budget": 5, "selftest": 5, "merging": 5,
    "observe": 6,
    "cli": 7, "__main__": 8, "__init__": 8,
}  # fmt: skip
"""What stands on what: a module imports from its own room and from lower levels.

Not at run time, but for the type checker, reports name the types of what they show.
"""


def imports(path: Path) -> set[str]:
    """Rooms of the package that a module imports at run time."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "dedup":
                found |= {a.name for a in node.names}
            elif node.module.startswith("dedup."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dedup.")}
    return found & set(LEVELS)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_arrows_point_down_only() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imports(path)
            if other != here and LEVELS[other] >= LEVELS[here]
        ]
    assert not wrong


def test_the_model_imports_numpy_pages_and_errors_alone() -> None:
    allowed = {"numpy", "dedup.pages", "dedup.errors", "dedup.model", "typing", "dataclasses",
               "__future__", "math", "collections", "enum", "functools"}  # fmt: skip
    for path in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                assert any(name == a or name.startswith(a + ".") for a in allowed), (path, name)


def test_only_the_rooms_below_use_the_core() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "_core" in imports(path):
            assert room(path) in {"kernel", "sources", "grouping"}, path
