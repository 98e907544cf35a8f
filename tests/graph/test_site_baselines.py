"""Baselines of the sites of a graph."""

import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.graph.credit import SiteBaselines
from tests.graph.programs import logits, two_sites


def test_baselines_learn_in_expectation_only():
    average, shared = sf.MovingAverage(), sf.MovingAverage()
    a, b = logits(3), logits(3, seed=1)
    g = sf.StochasticGraph(4, baseline=shared)
    with g:
        z = g.sample("z", Bernoulli(logits=a), baseline=average)
        h = g.sample("h", Bernoulli(logits=b * z))
        k = g.sample("k", Bernoulli(logits=b * h))
        g.cost("c", z.sum(-1))
        g.cost("d", (h + k).sum(-1))
    g.surrogate()
    g.dice()
    assert average.mean is None
    assert g.expectation().shape == ()
    signal = g.draws().signal()
    torch.testing.assert_close(average.mean / average.weight, signal.mean(0)[:1])
    torch.testing.assert_close(shared.mean / shared.weight, signal.mean(0)[1:])
    before = shared.mean
    with torch.no_grad():
        g.expectation()
    assert shared.mean is before


def test_one_baseline_for_all_is_used_as_it_is():
    own = sf.MovingAverage()
    with sf.StochasticGraph(4, baseline=own) as g:
        two_sites(g, logits(3), logits(3, seed=1))
    assert g._assembled().baseline is own
    with sf.StochasticGraph(4, baseline=own) as g:
        two_sites(g, logits(3), logits(3, seed=1), baseline=None)
    assert isinstance(g._assembled().baseline, SiteBaselines)
    assert g._assembled().baseline.unbiased


def test_a_value_function_of_a_site_sees_its_own_decisions_only():
    seen = []

    class Spy:
        unbiased = True

        def __call__(self, signal, draws):
            seen.append((signal.shape, draws.log_prob.shape, draws.credit.mask.tolist()))
            return torch.zeros_like(signal)

    with sf.StochasticGraph(4) as g:
        z = g.sample("z", Bernoulli(logits=logits(3)))
        g.cost("c", z.sum(-1))
        g.cost("d", g.sample("h", Bernoulli(logits=z), baseline=Spy()).sum(-1) + logits(1)[0])
        g.cost("e", g.sample("w", Bernoulli(logits=logits(3)), baseline=Spy()).sum(-1))
    g.surrogate()
    assert seen == [((4, 1), (4, 1), [[0, 0, 1]])]  # h has no parameter that requires grad
