"""The study of estimators on a belief net: its truth is exact, its variances are those of enumeration."""

import itertools
import json
from functools import partial

import pytest
import torch
from torch.distributions import Bernoulli, Independent

import scorefn as sf
from applications.vi import discrete_vae, gradient_estimators, gradient_variance, images
from applications.vi.belief_net import NETS, BeliefNet, frozen, states
from applications.vi.gradient_estimators import gradient, leave_one_out, problem
from applications.vi.gradient_variance import leave_one_out_variance, study, truth


def small_net(latents=4, layers=NETS["nonlinear"]):
    torch.manual_seed(0)
    net = BeliefNet(3, latents, 64, layers).double()
    with torch.no_grad():
        net.generator.prior.normal_()
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net, images.digits().train[:100].double()


@pytest.mark.parametrize("num_samples", [2, 3])
def test_the_formula_is_the_variance_over_all_tuples_of_draws(num_samples):
    """Each of the 16^n tuples through the library's own surrogate."""
    net, x = small_net()
    p, f = problem(net, x[:1])
    z = states(4).double()[:, None]
    index = torch.tensor(list(itertools.product(range(16), repeat=num_samples))).T  # [n, tuples]
    logits = p.base_dist.logits.detach().expand(index.shape[1], 4).requires_grad_()
    tuples, fx = z[index, 0], f(z)[index, 0]
    log_prob = Independent(Bernoulli(logits=logits), 1).log_prob(tuples)
    draws = sf.Draws(x=tuples, log_prob=log_prob.unsqueeze(-1), fx=fx.unsqueeze(-1))
    estimates = torch.autograd.grad(sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(0).sum(), logits)[0]
    weight = log_prob.detach().sum(0).exp()
    mean = (weight[:, None] * estimates).sum(0)
    variance = (weight[:, None] * (estimates - mean).square()).sum()
    torch.testing.assert_close(mean[None], truth(p, f)[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(leave_one_out_variance(p, f, num_samples), variance[None], atol=0, rtol=1e-10)


@pytest.mark.parametrize(("probability", "variance"), [(0.5, 0.0625), (0.3, 0.0609), (0.1, 0.0369)])
def test_the_formula_is_that_of_one_coin(probability, variance):
    p = Independent(Bernoulli(torch.tensor([[probability]], dtype=torch.float64)), 1)
    found = leave_one_out_variance(p, lambda z: z.sum(-1), 2)
    assert found.item() == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("latents", [2, 4])
def test_the_truth_is_the_gradient_of_the_bound(latents):
    net, x = small_net(latents)
    right, doubt = truth(*problem(net, x[:3]))
    assert doubt == 0
    logits = net.encoder(x[:3])
    parameters = list(net.encoder.parameters())
    through = torch.autograd.grad(logits, parameters, right)
    exact = torch.autograd.grad(net.exact_bound(x[:3]).sum(), parameters)
    for one, other in zip(through, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_the_black_box_has_a_slope_in_z_and_in_nothing_else():
    net, x = small_net()
    f = frozen(net, x[:3]).f
    z = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, z)
    f(z).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    before = f(z).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert torch.equal(f(z), before)


def test_the_fitted_alpha_of_a_linear_f_is_one():
    net, x = small_net(layers=NETS["linear"])
    with torch.no_grad():
        net.generator.decoder[0].weight.zero_()
    estimator = gradient_estimators.fitted(2, net, [x[:20]])
    assert estimator.alpha == pytest.approx(1, abs=1e-9)
    p, f = problem(net, x[:3])  # and so every estimate is the gradient
    torch.testing.assert_close(gradient(estimator, p, f), truth(p, f)[0], atol=1e-10, rtol=0)


def test_the_reference_of_many_latents_is_as_good_as_it_says():
    """Against the exact gradient: 8 latents, as if they were too many."""
    net, x = small_net(8)
    p, f = problem(net, x)
    right, _ = truth(p, f)
    _, estimate = leave_one_out(10)
    found = torch.stack([gradient(estimate, p, f) for _ in range(20)])
    expected = leave_one_out_variance(p, f, 10).sum() / 20
    missed = (found.mean(0) - right).square().sum()
    assert 0.8 < (missed / expected).item() < 1.25  # of 800 entries


def test_all_estimators_at_four_latents():
    """4.5 standard errors for each of 4 variances, once in 4e4; errors of 400 entries lie near 1."""
    net, x = small_net()
    told = []
    found = study(net, x, 60, minibatches=1, tuning=3, progress=lambda *where: told.append(where))
    assert told == [(15, 60), (30, 60), (45, 60), (60, 60)]
    assert not found.skipped
    rows = found.rows
    assert set(gradient_estimators.estimators()) < set(rows)
    assert {"REBAR", "RELAX", "DoubleControlVariate (3), fitted", "leave-one-out (5)"} < set(rows)
    for name, row in rows.items():
        assert 0.6 < row.error < 1.4, name
        assert row.variance.low < row.variance.estimate < row.variance.high
        assert (row.exact is not None) == name.startswith("leave-one-out")
        if row.exact is not None:
            squares = torch.tensor(row.squares)
            assert abs(squares.mean() - row.exact) < 4.5 * squares.std() / 60**0.5, name
    costs = {name: (rows[name].evaluations, rows[name].slopes) for name in ("REBAR", "RELAX", "LocalExpectation")}
    assert costs == {"REBAR": (3, 3), "RELAX": (3, 2), "LocalExpectation": (5, 0)}
    assert (rows["DisARM (2 pairs)"].evaluations, rows["DoubleControlVariate (3)"].slopes) == (4, 3)
    assert rows["DisARM (1 pair)"].over(rows["leave-one-out (2)"]).high < 1.1
    same = rows["ARMS (3)"].over(rows["ARMS (3)"])
    assert same.estimate == 1
    assert json.loads(json.dumps(found.record()))["rows"]["ARMS (3)"]["evaluations"] == 3
    assert str(found).count("\n| ") == len(rows) + 2 + 3  # two heads, the published order


def test_a_study_ends_after_a_round():
    net, x = small_net(2)
    assert study(net, x, 5, minibatches=1, tuning=1, should_stop=lambda: True) is None


def test_the_program_studies_its_net(tmp_path, capsys, monkeypatch):
    """21 latents, which are too many to enumerate for the estimators that do."""
    monkeypatch.setattr(gradient_variance, "study", partial(study, minibatches=1, tuning=2))
    monkeypatch.setattr(gradient_variance, "REFERENCE_DRAWS", (4, 3))
    arguments = ["--steps", "2", "--latents", "21", "--net", "linear", "--particles", "2", "--draws", "2"]
    assert discrete_vae.main([*arguments, "--study", "2", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["study"]
    assert list(told["skipped"]) == ["UnorderedSet (2)", "UnorderedSet (3)", "SumAndSample (2 + 1)"]
    assert all("2^21 joint values" in reason for reason in told["skipped"].values())
    assert told["rows"]["LocalExpectation"]["evaluations"] == 22
    assert told["rows"]["leave-one-out (22)"]["exact"] is None
    assert "scale=" in told["tuned"]["REBAR"]
    assert (tmp_path / "gradient_variance.png").stat().st_size > 10_000
    assert "ratio at equal evaluations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "1"], "--study is 1, but a variance takes 2 estimates"),
        (["--study", "5", "--latents", "1"], "--study needs 2 latents or more"),
        (["--study", "-1"], "it is -1, but must be 0 or more"),
    ],
)
def test_the_program_refuses_a_study_without_variance(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        discrete_vae.main([*arguments, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
