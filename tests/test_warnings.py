"""Warnings are of one tree, point at the user's line, and are given once for each object and cause."""

import ast
import contextlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.core import warnings as tree

LOGITS = torch.zeros(3, requires_grad=True)
OTHERS = torch.ones(3, requires_grad=True)


def line_of(text):
    """The first line of this file that begins with the text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


@contextlib.contextmanager
def recorded():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_every_warning_of_the_library_is_of_the_tree():
    """No call of `warnings.warn` but that of the one function, and no category that is not ours."""
    for path in Path(sf.__file__).parent.rglob("*.py"):
        if "warnings" not in (source := path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                assert path == Path(tree.__file__)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn_explicit":
                assert ast.unparse(node.args[1]) == "EscapeWarning"
    for category in (sf.DependencyWarning, sf.EvaluationWarning, sf.tracking.EscapeWarning):
        assert issubclass(category, sf.ScorefnWarning)
    assert issubclass(sf.ScorefnWarning, UserWarning)
    assert issubclass(sf.EvaluationWarning, RuntimeWarning)


def test_failed_evaluations_are_told_once_for_each_search_at_its_line():
    def fun(x):
        if x[0] < 0:
            raise OverflowError("too low")
        return float((x**2).sum())

    with recorded() as caught:
        for _ in range(2):
            workers = sf.scale.Workers(lambda: ThreadPoolExecutor(1), attempts=1)
            sf.search.minimize(fun, [0.1, 1.0], 0.5, seed=0, maxfevals=60, executor=workers)
    assert [warning.category for warning in caught] == [sf.EvaluationWarning] * 2
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line_of("sf.search.minimize(fun"))}
    assert "too low" in str(caught[0].message)


def test_a_graph_that_changes_says_so_once_at_the_line_that_asks():
    graph = sf.StochasticGraph(4, audit_every=1000)
    with recorded() as caught:
        for step in range(24):
            with graph:
                z, w = graph.sample("z", Bernoulli(logits=LOGITS)), graph.sample("w", Bernoulli(logits=OTHERS))
                graph.cost("c", (z if step < 3 else w).sum(-1))
            graph.surrogate()
    assert [warning.category for warning in caught] == [sf.DependencyWarning]
    assert (caught[0].filename, caught[0].lineno) == (__file__, line_of("graph.surrogate()"))


def test_a_decision_that_escapes_is_told_once_at_the_line_where_it_does():
    with recorded() as caught:
        for _ in range(3):
            with sf.StochasticGraph(1) as graph:
                escaped = graph.sample("z", Bernoulli(logits=LOGITS[0])).item()
                graph.cost("c", torch.tensor([escaped]))
    assert {warning.category for warning in caught} == {sf.tracking.EscapeWarning}
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line_of("escaped = "))}


def test_the_default_filter_shows_an_escape_once_for_each_line_however_many_graphs_follow():
    def escapes():
        with sf.StochasticGraph(1) as graph:
            return graph.sample("z", Bernoulli(logits=LOGITS[0])).item()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            escapes()
    assert [(warning.category, warning.lineno) for warning in caught] == [
        (sf.tracking.EscapeWarning, line_of('return graph.sample("z"'))
    ]


def test_a_loss_tells_each_cause_once():
    pyro = pytest.importorskip("pyro")

    class Escaping:
        def model(self):
            z = pyro.sample("z", pyro.distributions.Bernoulli(0.5))
            rate = 0.2 if z.item() else 0.8
            pyro.sample("x", pyro.distributions.Bernoulli(rate), obs=torch.tensor(1.0))

        def guide(self):
            pyro.sample("z", pyro.distributions.Bernoulli(logits=LOGITS[0]))

    program = Escaping()
    loss = sf.posteriors.ScoreFunctionELBO(num_particles=2, vectorize_particles=False, dependencies="tracked")
    with recorded() as caught:
        for _ in range(3):
            loss.loss_and_grads(program.model, program.guide)
    own = [warning for warning in caught if issubclass(warning.category, sf.ScorefnWarning)]
    assert [warning.category for warning in own] == [sf.tracking.EscapeWarning]
    assert (own[0].filename, own[0].lineno) == (__file__, line_of("loss.loss_and_grads("))


def test_one_filter_silences_the_library_and_nothing_else():
    with recorded() as caught:
        warnings.simplefilter("ignore", sf.ScorefnWarning)
        tree.warn("silent", sf.DependencyWarning)
        warnings.warn("heard", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["heard"]
