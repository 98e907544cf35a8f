"""Every example can be pasted: what it uses is imported or defined in it; doctest supplies the names of the module."""

import ast
import builtins
import doctest
import inspect
from collections.abc import Iterator

import pytest

import scorefn
from tests.test_docs import EVERYWHERE, each_once

PARSER = doctest.DocTestParser()


def bound(tree: ast.AST) -> Iterator[str]:
    """The names that a statement binds, in whatever scope."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name.partition(".")[0]


def undefined(docstring: str) -> list[str]:
    """The names that the lines of an example use and neither they nor the lines before bind."""
    known, found = set(dir(builtins)), []
    for line in PARSER.get_examples(docstring):
        tree = ast.parse(line.source)
        known.update(bound(tree))
        used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        found += [name for name in used if name not in known and name not in found]
    return found


def docstrings(name: str, thing: object) -> Iterator[tuple[str, str]]:
    """Those of a public object and of its own public methods and properties."""
    yield name, thing.__doc__ or ""
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not member.startswith("_"):
            yield f"{name}.{member}", getattr(value, "__doc__", None) or ""


def private(docstring: str) -> list[str]:
    """The modules below a room, and the private names, that an example imports from this library."""
    trees = [ast.parse(line.source) for line in PARSER.get_examples(docstring)]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in imports if node.module.partition(".")[0] == scorefn.__name__]
    deep = [node.module for node in ours if node.module.count(".") > 1]
    return deep + [alias.name for node in ours for alias in node.names if alias.name.startswith("_")]


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_example_can_be_pasted(room):
    said = {where: text for name, thing in each_once(room).items() for where, text in docstrings(name, thing)}
    wanting = {where: names for where, text in said.items() if (names := undefined(text))}
    assert not wanting, wanting
    inner = {where: names for where, text in said.items() if (names := private(text))}
    assert not inner, inner


def test_the_checks_can_fail():
    assert undefined(">>> x = torch.ones(2)\n>>> import torch\n>>> [y for y in x], x.sum()") == ["torch"]
    assert undefined(">>> def f(x):\n...     return g(x) + x\n>>> f(1)\n") == ["g"]
    assert undefined(">>> import os.path as where, sys\n>>> where.sep, sys.path, print\n") == []
    assert private(">>> from scorefn.core.draws import Draws\n>>> from scorefn import _draw\n") == [
        "scorefn.core.draws",
        "_draw",
    ]
