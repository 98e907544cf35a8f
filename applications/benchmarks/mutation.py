"""How many small faults in the core and the reducers the tests notice, by the operators of cosmic-ray.

    pip install cosmic-ray coverage
    python -m applications.benchmarks.mutation --budget 20 [--only core/draws] [--sample 200] [--out mutants.json]

The repository is copied to a temporary folder. One run of the tests under coverage tells which tests reach each line;
then each mutant is written into the copy and tested in a forked child, which imports scorefn afresh and runs the tests
that reach the mutated line, the quick ones first, until one fails. A mutant is killed by a failure, by an error while
it is imported, or by the time-out. Needs `os.fork`.

Left out: docstrings and messages (everything inside `raise` and f-strings), annotations, `if TYPE_CHECKING`, `__all__`,
protocols, whose bodies do nothing, and the modules that only import. Beside the operators of cosmic-ray there are four
of our own: a `raise` or a bare call becomes `pass`, a method call without arguments (`.detach()`) is dropped, and `in`
becomes `not in`. The list below leaves out replacements that nearly every test notices, such as `+` by `<<`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Name

SUITE = ["tests/core", "tests/reducers", "tests/contract", "tests/messages", "tests/test_anchors.py"]
SUITE += ["tests/scale/test_process_groups.py", "tests/test_representations.py", "tests/test_warnings.py"]
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul BitAnd_BitOr BitOr_BitAnd"
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OTHERS = (
    "ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Invert ReplaceUnaryOperator_Delete_Not AddNot "
    "ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak ExceptionReplacer NumberReplacer RemoveDecorator ZeroIterationForLoop"
)
QUIET = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
Span = tuple[tuple[int, int], tuple[int, int]]


class Replacement(Operator):
    """An operator of our own: what it finds in a node becomes other code."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        for part in self.parts(node):
            yield part[0].start_pos, part[-1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        part = list(self.parts(node))[index]
        at = node.children.index(part[0])
        new = Name(self.code, part[0].start_pos, prefix=part[0].get_first_leaf().prefix)
        node.children[at : at + len(part)] = [new] if self.code else []
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropRaise(Replacement):
    code = "pass"

    def parts(self, node: Any) -> Iterator[list[Any]]:
        if node.type == "simple_stmt" and node.children[0].type == "raise_stmt":
            yield node.children[:1]


class DropCall(Replacement):
    code = "pass"

    def parts(self, node: Any) -> Iterator[list[Any]]:
        first = node.children[0] if node.type == "simple_stmt" else None
        if first is not None and first.type == "atom_expr" and first.children[-1].children[0] == "(":
            yield node.children[:1]


class DropMethodCall(Replacement):
    code = ""

    def parts(self, node: Any) -> Iterator[list[Any]]:
        if node.type in ("atom_expr", "power"):
            for pair in zip(node.children, node.children[1:], strict=False):
                name, call = (child.get_code(include_prefix=False) for child in pair)
                if name.startswith(".") and call == "()":
                    yield list(pair)


class ReplaceIn(Replacement):
    code = "not in"

    def parts(self, node: Any) -> Iterator[list[Any]]:
        if node.type == "comparison":
            yield from ([child] for child in node.children if child.type == "keyword" and child.value == "in")


def operators() -> dict[str, Operator]:
    names = [f"ReplaceBinaryOperator_{name}" for name in BINARY.split()]
    names += [f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()]
    public = {name: get_operator(f"core/{name}")() for name in [*names, *OTHERS.split()]}
    return public | {own.__name__: own() for own in (DropRaise, DropCall, DropMethodCall, ReplaceIn)}


def left_out(source: str) -> list[Span]:
    """Where no mutant is made."""
    lines = source.splitlines()
    spans = []

    def add(node: Any) -> None:
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        spans.append(tuple((r, len(lines[r - 1].encode()[:c].decode())) for r, c in (start, end)))

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Raise(exc=ast.AST() as message):
                add(message)
            case ast.JoinedStr() | ast.If(test=ast.Name("TYPE_CHECKING")) | ast.Assign(targets=[ast.Name("__all__")]):
                add(node)
            case ast.ClassDef(bases=[ast.Name("Protocol")]):
                add(node)
        for note in ("annotation", "returns"):
            if isinstance(getattr(node, note, None), ast.AST):
                add(getattr(node, note))
    return spans


def compiles(source: str) -> bool:
    with contextlib.suppress(SyntaxError):
        return bool(compile(source, "mutant", "exec"))
    return False


def mutants(root: Path, only: str) -> Iterator[dict[str, Any]]:
    """Every mutant of the files whose path contains ``only``, with its new source."""
    for path in sorted([*root.glob("scorefn/core/*.py"), *root.glob("scorefn/reducers/*.py")]):
        if only not in str(path.relative_to(root)):
            continue
        source = path.read_text()
        banned = left_out(source)
        seen = {source}
        for name, operator in operators().items():
            nodes = ast_nodes(get_ast(source))
            places = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, (start, end) in enumerate(places):
                if any(first <= start and end <= last for first, last in banned):
                    continue
                if source.splitlines()[start[0] - 1][start[1] :].startswith("*,"):  # before parameters given by keyword
                    continue
                changed = mutate_code(source, operator, occurrence)
                if changed is None or changed in seen or not compiles(changed):
                    continue
                seen.add(changed)
                pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
                before, after = next((old.strip(), new.strip()) for old, new in pairs if old != new)
                yield {
                    "file": str(path.relative_to(root)),
                    "lines": list(range(start[0], end[0] + 1)),
                    "operator": name,
                    "occurrence": occurrence,
                    "before": before,
                    "after": after,
                    "source": changed,
                }


def name_of(mutant: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(mutant[part] for part in ("file", "operator", "occurrence"))


class Chosen:
    """A pytest plugin: run these tests only, in this order; note how long each takes and, under coverage, its lines."""

    def __init__(self, order: list[str] | None, coverage: Any = None) -> None:
        self.order, self.coverage = order, coverage
        self.seconds: dict[str, float] = {}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            rank = {name: place for place, name in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in rank), key=lambda item: rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = report.nodeid


def forked(work: Any, limit: float) -> Any:
    """What a function returns in a child of its own; None where it did not return in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        with open(os.devnull, "r+") as null:
            for stream in (0, 1, 2):
                os.dup2(null.fileno(), stream)
        with contextlib.suppress(BaseException), os.fdopen(writer, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writer)
    os.set_blocking(reader, False)
    text, end = b"", time.monotonic() + limit
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(reader, 1 << 20)
            text += piece
            if not piece:
                break
            continue
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return json.loads(text) if text else None


def covered(suite: list[str]) -> dict[str, Any]:
    """The seconds of each test, and the tests that reach each line."""
    from coverage import Coverage

    cover = Coverage(data_file=None, source=["scorefn"])
    cover.start()
    plugin = Chosen(None, cover)
    code = pytest.main([*QUIET, *suite], plugins=[plugin])
    cover.stop()
    data = cover.get_data()
    lines = {
        str(Path(name).relative_to(Path.cwd())): {str(n): tests for n, tests in data.contexts_by_lineno(name).items()}
        for name in data.measured_files()
    }
    foreign = [name for name in sys.modules if name.split(".")[0] not in ("scorefn", "tests", "__main__")]
    return {"code": int(code), "foreign": foreign, "seconds": plugin.seconds, "lines": lines}


def verdict(order: list[str]) -> str:
    """The first test that fails, "import" where nothing could be run, or "" where all pass."""
    plugin = Chosen(order)
    files = list(dict.fromkeys(name.split("::")[0] for name in order))
    code = pytest.main([*QUIET, "-x", *files], plugins=[plugin])
    return plugin.failed if plugin.failed else "" if code == 0 else "import"


def tests_of(mutant: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """The tests that reach the mutated lines, quick ones first; all where the lines run at import."""
    seconds, lines = baseline["seconds"], baseline["lines"].get(mutant["file"], {})
    known = [n for n in mutant["lines"] if str(n) in lines]
    known = known or [max((n for n in map(int, lines) if n < mutant["lines"][0]), default=0)]  # a line that goes on
    reached = {test for n in known for test in lines.get(str(n), [""])}
    return sorted(seconds if "" in reached else reached & set(seconds), key=lambda test: seconds[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutate only files whose path contains this")
    parser.add_argument("--sample", type=int, help="a random sample of so many mutants")
    parser.add_argument("--tests", nargs="+", default=SUITE, help="the test files and folders")
    parser.add_argument("--again", type=Path, help="only the survivors of this JSON file")
    parser.add_argument("--seconds", type=float, default=120.0, help="the time-out of a mutant")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of tests per mutant")
    parser.add_argument("--baseline", type=Path, help="read or keep the coverage of the tests here")
    parser.add_argument("--out", type=Path, help="write every mutant and its verdict to this JSON file")
    arguments = parser.parse_args()
    here = Path.cwd()
    out = here / arguments.out if arguments.out else None
    kept = here / arguments.baseline if arguments.baseline else None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "scorefn"
        shutil.copytree(here, root, ignore=shutil.ignore_patterns(".*", "runs", "dist", "build", "__pycache__"))
        os.chdir(root)
        sys.path.insert(0, str(root))
        if kept and kept.exists():
            baseline = json.loads(kept.read_text())
        else:
            baseline = forked(lambda: covered(arguments.tests), 3600)
            if kept:
                kept.write_text(json.dumps(baseline))
        assert baseline["code"] == 0, "the tests fail without any mutation"
        found = list(mutants(root, arguments.only))
        if arguments.again is not None:
            before = json.loads((here / arguments.again).read_text())
            again = {name_of(mutant) for mutant in before if not mutant["killer"]}
            found = [mutant for mutant in found if name_of(mutant) in again]
        if arguments.sample is not None:
            random.seed(0)
            found = sorted(random.sample(found, arguments.sample), key=lambda mutant: mutant["file"])
        for name in baseline["foreign"]:  # imported here, so that no child need do it
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        assert "scorefn" not in sys.modules
        forked(lambda: pytest.main([*QUIET, "--collect-only", *arguments.tests]), 300)  # keeps their byte code
        for cache in root.glob("scorefn/**/__pycache__"):
            shutil.rmtree(cache)
        sys.dont_write_bytecode = True  # a mutant of the same size and second would be taken for its original
        gc.collect()
        gc.freeze()  # the children collect garbage often, and would look through all of torch
        quick = sorted(baseline["seconds"], key=lambda test: baseline["seconds"][test])[:1000]
        assert forked(lambda: verdict(quick), 600) == "", "the tests fail without any mutation"
        results = []
        for number, mutant in enumerate(found):
            path = root / mutant["file"]
            original = path.read_text()
            order, total = [], 0.0
            for test in tests_of(mutant, baseline):
                total += baseline["seconds"][test]
                if total < arguments.budget:
                    order.append(test)
            path.write_text(mutant.pop("source"))
            start = time.monotonic()
            killer = forked(lambda order=order: verdict(order), arguments.seconds) if order else ""
            path.write_text(original)
            mutant |= {"killer": "no answer" if killer is None else killer, "seconds": time.monotonic() - start}
            mutant["tests"] = len(order)
            results.append(mutant)
            print(
                f"{number + 1}/{len(found)} {mutant['file']}:{mutant['lines'][0]} {mutant['operator']} "
                f"{mutant['seconds']:.1f} s {mutant['killer'] or 'SURVIVED: ' + mutant['after']}",
                flush=True,
            )
            if out:
                out.write_text(json.dumps(results, indent=1))
        for file in sorted({mutant["file"] for mutant in results}):
            of_file = [mutant for mutant in results if mutant["file"] == file]
            killed = sum(bool(mutant["killer"]) for mutant in of_file)
            print(f"| `{file}` | {len(of_file)} | {killed} | {len(of_file) - killed} |")


if __name__ == "__main__":
    main()
