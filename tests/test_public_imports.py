"""Applications and pages use what a user has: the public names, and no private path."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted(ROOT.glob("applications/**/*.py")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"]


def private_imports(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("scorefn.") and not is_public(*alias.name.rsplit(".", 1)):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "scorefn":
            for alias in node.names:
                if not is_public(node.module, alias.name):
                    yield f"{node.module}.{alias.name}"


def is_public(module: str, name: str) -> bool:
    """Whether name is in __all__ of scorefn itself or of one of the rooms that scorefn shows."""
    rooms = {"scorefn", *(f"scorefn.{room}" for room in importlib.import_module("scorefn").__all__)}
    return module in rooms and name in getattr(importlib.import_module(module), "__all__", ())


def code_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".py" else "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_imported(path):
    assert not list(private_imports(code_of(path)))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import scorefn as sf", []),
        ("from scorefn import Draws", []),
        ("import scorefn.search", []),
        ("from scorefn.search import SNES", []),
        ("from scorefn.core import Draws", ["scorefn.core.Draws"]),
        ("from scorefn.core.draws import Draws", ["scorefn.core.draws.Draws"]),
        ("import scorefn.search.snes", ["scorefn.search.snes"]),
        ("from scorefn.search import stopping", ["scorefn.search.stopping"]),
    ],
)
def test_the_check_can_fail(code, found):
    assert list(private_imports(code)) == found
