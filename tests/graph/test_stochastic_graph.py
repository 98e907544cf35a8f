"""A program on a stochastic graph: its draws, credits and shapes."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import scorefn as sf
from scorefn.graph.credit import GraphCredit
from tests.graph.programs import logits, two_sites


def test_draws_are_those_of_the_core():
    a, b = logits(5), logits(5, seed=1)
    with sf.StochasticGraph(7) as g:
        two_sites(g, a, b)
    draws = g.draws()
    assert draws.log_prob.shape == (7, 2)
    assert draws.fx.shape == (7, 2)
    assert draws.x["z"].shape == (7, 5)
    assert draws.credit.mask.tolist() == [[1, 1], [0, 1]]
    for ours, core in ((g.surrogate(), sf.surrogate), (g.dice(), sf.dice)):
        gradient = torch.autograd.grad(ours.mean(), (a, b), retain_graph=True)
        other = torch.autograd.grad(core(draws, baseline=sf.LeaveOneOut()).mean(), (a, b), retain_graph=True)
        for mine, its in zip(gradient, other, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_the_credit_is_the_dense_influence():
    mask = torch.tensor([[1.0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]])
    ours, dense = GraphCredit(mask), sf.Influence(mask.bool())
    v, u = torch.randn(6, 2, 4), torch.randn(6, 2, 3)
    torch.testing.assert_close(ours.influence(v), dense.influence(v))
    torch.testing.assert_close(ours.influence_adjoint(u), dense.influence_adjoint(u))
    torch.testing.assert_close(ours.predecessors(u), dense.predecessors(u))
    with pytest.raises(sf.ShapeError, match="belongs to the draws"):
        ours.check(2, 4)


def test_a_site_that_knows_all_costs_has_total_credit():
    with sf.StochasticGraph(3) as g:
        z = g.sample("z", Bernoulli(logits=logits(2)))
        g.cost("c", z.sum(-1))
        g.cost("d", z.prod(-1))
    assert type(g.draws().credit) is sf.Total


def test_nested_draws_and_their_siblings():
    with sf.StochasticGraph(3) as g:
        z = g.sample("z", Bernoulli(logits=logits(5, 2)))
        h = g.sample("h", Bernoulli(logits=z + logits(5, 2, seed=1)), num_samples=4)
        k = g.sample("k", Bernoulli(logits=h - logits(5, 2, seed=2)), num_samples=2)
        assert [part.shape for part in (z, h, k)] == [(3, 5, 2), (3, 4, 5, 2), (3, 4, 2, 5, 2)]
        assert g.log_prob("k").shape == (3, 4, 2, 5, 2)
        g.cost("c", k.sum(-1))
    draws = g.draws()
    assert draws.log_prob.shape == (3, 5, 1 + 4 + 8)
    assert draws.fx.shape == (3, 5, 8)
    torch.testing.assert_close(g.surrogate(), k.sum(-1).mean((1, 2)))
    # h[m] is compared with the other h of the same z, k[m, l] with the other k of the same h
    signal = draws.signal()
    baseline = g._assembled().baseline(signal, draws)
    of_h, of_k = signal[..., 1:5], signal[..., 5:].unflatten(-1, (4, 2))
    torch.testing.assert_close(baseline[..., 0], sf.LeaveOneOut()(signal, draws)[..., 0])
    torch.testing.assert_close(baseline[..., 1:5], (of_h.sum(-1, keepdim=True) - of_h) / 3)
    torch.testing.assert_close(baseline[..., 5:], of_k.flip(-1).flatten(-2))


def test_only_pathwise_sites():
    loc = logits(2)
    with sf.StochasticGraph(4) as g:
        g.cost("c", g.sample("x", Normal(loc, 1.0), pathwise=True).sum(-1))
    for value in (g.surrogate(), g.dice()):
        assert torch.autograd.grad(value.mean(), loc, retain_graph=True)[0].tolist() == [1, 1]
    assert g.expectation().shape == ()
    with pytest.raises(sf.ScorefnError, match="No site of this graph is scored"):
        g.draws()


def test_value_alone_without_grad():
    with torch.no_grad(), sf.StochasticGraph(4) as g:
        two_sites(g, logits(3), logits(3, seed=1))
    with torch.no_grad():
        assert g.surrogate().shape == (4,)


def test_the_estimate_may_be_read_inside_the_block_without_an_escape():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sf.StochasticGraph(4) as g:
            two_sites(g, logits(3), logits(3, seed=1), baseline=sf.Constant(1.0))
            g.surrogate().mean().backward()
            with pytest.raises(sf.ScorefnError, match="its estimate was read"):
                g.cost("late", torch.zeros(4))


def test_reduced_integers_are_costs():
    a = logits(3)
    with sf.StochasticGraph(4) as g:
        z = g.sample("z", Categorical(logits=a))
        g.cost("is 2", z == 2)
        g.cost("level", z)
    torch.testing.assert_close(g.surrogate(), (z + (z == 2)).to(a.dtype))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"num_samples": 2, "audit_every": 0}, "audit_every must be"),
        ({"num_samples": 2, "baseline": "loo"}, "baseline must be a baseline object"),
        ({"num_samples": 2, "baseline": sf.LeaveOneOut}, "LeaveOneOut is a class"),
        ({"num_samples": 2, "dependencies": {"h": "z"}}, "dependencies must map"),
        ({"num_samples": 2, "dependencies": "order"}, "dependencies must map"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(sf.ScorefnError, match=message):
        sf.StochasticGraph(**kwargs)


def test_the_import_is_lazy():
    code = "import sys, scorefn; assert 'scorefn.graph' not in sys.modules; scorefn.StochasticGraph(2)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{"num_samples": 4}, {"estimator": sf.DisARM(2)}], ids=str)
def test_as_many_draws_as_the_axis_before_are_refused(options):
    with sf.StochasticGraph(4) as g:
        g.sample("z", Bernoulli(logits=logits(3)))
        with pytest.raises(sf.ShapeError, match="Site 'h' has 4 draws of its own for each of 4 draws"):
            g.sample("h", Bernoulli(logits=logits(3, seed=1)), **options)


@pytest.mark.parametrize("estimator", [sf.Enumerate(), sf.LocalExpectation(), sf.SumAndSample(2), sf.UnorderedSet(2)])
def test_the_draws_of_parents_are_problems_of_an_estimator(estimator):
    a, b = logits(2), logits(2, seed=1)
    with sf.StochasticGraph(32) as g:
        z = g.sample("z", Bernoulli(logits=a))
        y = g.sample("y", Bernoulli(logits=z * b), estimator=estimator)
        g.cost("c", (y - 0.3).square().sum(-1).square())
    assert y.shape[0] == g.surrogate().shape[0] == 32
    if isinstance(estimator, sf.Enumerate):
        assert y.shape == (32, 4, 2)
        p = Bernoulli(logits=(z * b).detach().requires_grad_())
        inner = sf.Enumerate(batch_ndim=1)(p, lambda y: (y - 0.3).square().sum(-1).square())
        torch.testing.assert_close(g.surrogate(), inner)
