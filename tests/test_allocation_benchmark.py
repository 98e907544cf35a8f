"""The benchmark of allocations: what it calls exact is exact, and the program runs."""

import itertools
import json

import pytest
import torch
from torch.distributions import Categorical

from applications.benchmarks.allocation import __main__ as program
from applications.benchmarks.allocation import bandits as sharing
from applications.benchmarks.allocation import chain as nested
from applications.benchmarks.allocation import coupled
from scorefn.diagnostics import SampleSize, expectation_per_problem, nested_variances
from scorefn.diagnostics.estimation import pinned


def test_the_noise_of_a_bandit_is_exact():
    """Two bandits of two arms, two and three draws: every outcome."""
    bandits = sharing.Bandits(2.0, B=2, K=2, seed=1)
    counts, p = torch.tensor([2, 3]), bandits.policy
    first, second = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for arms in itertools.product(range(2), repeat=6):
        x = torch.tensor(arms).reshape(3, 2)
        weight = p.log_prob(x).sum().exp().item()
        value = expectation_per_problem(pinned(p, lambda shape, x=x: x), bandits.f, counts).sum()
        g = torch.autograd.grad(value, bandits.logits, retain_graph=True)[0]
        first, second = first + weight * g, second + weight * g.square().sum(-1)
    exact = bandits.exact_noise().at(counts)
    torch.testing.assert_close(exact, second - first.square().sum(-1), rtol=1e-11, atol=1e-13)


def test_the_components_of_the_chain_add_up():
    """V_1 + V_2 + V_3 is the variance of one term; the terms' mean is the gradient of the exact mean."""
    chain = nested.Chain()
    first, second, third = chain.weights
    joint = first[:, None, None] * second.unsqueeze(-1) * third
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-12)
    mean = (joint.unsqueeze(-1) * chain.gradients).sum((0, 1, 2))
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(chain.exact_mean(), chain.params)])
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)
    variance = (joint * (chain.gradients - mean).square().sum(-1)).sum().item()
    assert sum(chain.exact_variances()) == pytest.approx(variance, rel=1e-11)


def test_the_terms_of_the_chain_are_those_of_its_graph():
    chain = nested.Chain()
    estimate, terms = chain.run((4, 3, 2))
    assert terms.shape == (4, 3, 2)
    ours = torch.autograd.grad(terms.mean(), chain.params, retain_graph=True)
    theirs = torch.autograd.grad(estimate, chain.params)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    assert len(nested_variances(chain.gradients)) == 3


def test_the_objective_of_the_training_is_exact():
    problem = coupled.Coupled(0, D=4)
    logits = torch.randn(4, dtype=torch.float64)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    weight = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1).exp()
    assert problem.exact(logits).item() == pytest.approx((weight * problem.f(x, logits)).sum().item(), rel=1e-12)


def test_training_counts_evaluations():
    problem = coupled.Coupled(0, D=4)
    best = coupled.optimum(problem, steps=200)
    found = coupled.train(problem, 8, 0, 80, best, gaps=(0.0,))
    assert found == coupled.Training((None,), 8, 10)
    size = SampleSize(1.0, least=8, most=32)
    assert coupled.train(problem, size, 0, 400, best, gaps=(0.5,)).evaluations[0] is not None


def test_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "problems", lambda spread, repeats: {})
    monkeypatch.setattr(coupled, "optimum", lambda problem: -9.0)
    monkeypatch.setattr(program, "meter_overhead", lambda: 1.0)
    assert program.main(["--seeds", "1", "--repeats", "100", "--budget", "512", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {"problems", "sites", "training", "overhead"} <= set(record)
    assert record["sites"]["rows"]["exact components"]["ratio"] <= record["sites"]["rows"]["four and three"]["ratio"]
    assert (tmp_path / "training.png").exists()
    assert "| exact components" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--seeds", "0"])
    assert "--seeds: it is 0, but must be 1 or more" in capsys.readouterr().err


def test_a_bandit_that_is_decided_has_no_noise():
    bandits = sharing.Bandits(0.0, B=2, K=3)
    with torch.no_grad():
        bandits.logits[0, 0] = 60.0
    noise = bandits.exact_noise().at(torch.tensor([2, 2]))
    assert noise[0] < 1e-12 < noise[1]
    assert isinstance(bandits.policy, Categorical)
