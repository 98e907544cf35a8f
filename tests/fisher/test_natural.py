"""Natural gradients are what they are called."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

import scorefn as sf
from scorefn.search import SNES
from tests.fisher.cases import CASES, TRIL, Walk, exact_draws, network, refused
from tests.oracles.toys import coordinates

pytestmark = pytest.mark.usefixtures("float64")


def test_the_natural_gradient_of_a_covariance():
    """V L^T + L V^T = 2 S G S, with G the gradient in the covariance: CMA's rank-mu update."""
    L = torch.tensor(TRIL)
    covariance, x = (L @ L.mT).requires_grad_(), torch.randn(6, 3)
    fx = torch.randn(6)
    (G,) = torch.autograd.grad((fx * MultivariateNormal(torch.zeros(3), covariance).log_prob(x)).mean(), covariance)
    S = covariance.detach()
    p = MultivariateNormal(torch.zeros(3), covariance)
    V = sf.natural_gradient(p, sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx.unsqueeze(-1)))["scale_tril"]
    truth = 2 * S @ G @ S
    assert torch.allclose(V @ L.mT + L @ V.mT, truth, atol=1e-12)
    weighted = torch.einsum("n,ni,nj->ij", fx, x, x) / 6 - fx.mean() * S
    assert torch.allclose(truth, weighted, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["LogNormal", "Laplace", "Geometric logits", "Geometric probs", "NegativeBinomial logits",
             "NegativeBinomial probs", "Dirichlet"],
)  # fmt: skip
def test_a_natural_gradient_is_the_closed_form_times_the_gradient(name):
    case = next(case for case in CASES if case.name == name)
    p = case.make(**{
        key: torch.stack([value, 1.1 * value]).requires_grad_() for key, value in case.parameters.items()
    })  # fmt: skip
    draws = sf.draw(p, lambda x: x.reshape(*x.shape[:2], -1).sin().sum(-1), 6)
    fisher = sf.fisher_information(p)
    leaves = {name: value.clone().requires_grad_() for name, value in fisher.parameters.items()}
    objective = (draws.fx.squeeze(-1) * fisher.rebuild(**leaves).log_prob(draws.x)).mean(0).sum()
    gradient = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
    ours = sf.natural_gradient(p, draws)
    for index in range(2):
        own = torch.cat([gradient[name][index].flatten() for name in leaves])
        truth = torch.linalg.solve(fisher.dense()[index], own)
        found = torch.cat([ours[name][index].flatten() for name in leaves])
        assert torch.allclose(found, truth, rtol=1e-9, atol=1e-12)


def test_of_a_normal_it_is_the_step_of_snes():
    strategy = SNES(torch.randn(5), sigma0=torch.rand(5) + 0.5, seed=0)
    x = strategy.ask()
    f = (x - 1).square().sum(-1)
    natural = sf.natural_gradient(strategy.distribution, strategy.scored(x, f))
    location, log_scale = strategy.location.detach().clone(), strategy.log_scale.detach().clone()
    sigma = log_scale.exp()
    z, u = (x - location) / sigma, strategy.scored(x, f).fx[:, 0] / len(x)
    assert (natural["loc"] - sigma * (u @ z)).abs().max() < 1e-12
    assert (natural["scale"] / sigma - (u @ (z.square() - 1)) / 2).abs().max() < 1e-12
    strategy.tell(x, f)
    assert (strategy.location - location - natural["loc"]).abs().max() < 1e-12
    rate = (3 + np.log(5)) / (5 * np.sqrt(5))
    assert (strategy.log_scale - log_scale - rate * natural["scale"] / sigma).abs().max() < 1e-12


def test_of_a_bernoulli_it_is_the_step_of_pbil():
    """In the mean parameter: sum_k w_k (x_k - p)."""
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 2).square(), 12)
    probs, w = logits.detach().sigmoid(), draws.fx[:, 0] / 12
    step = (w[:, None] * (draws.x - probs)).sum(0)
    in_logits = sf.natural_gradient(p, draws)["logits"]
    assert (in_logits * probs * (1 - probs) - step).abs().max() < 1e-13
    mean = Independent(Bernoulli(probs=probs.clone().requires_grad_()), 1)
    in_probs = sf.natural_gradient(mean, replace(draws, log_prob=mean.log_prob(draws.x).unsqueeze(-1)))["probs"]
    assert (in_probs - step).abs().max() < 1e-13


@pytest.mark.parametrize("family", [Bernoulli, partial(Binomial, 5), Categorical, OneHotCategorical])
def test_logits_and_probs_change_the_distribution_alike(family):
    """To first order: the derivative of log_prob along the natural gradient is one function of x."""
    logits = torch.tensor([0.4, -1.0, 0.3])
    probs = logits.softmax(-1) if family in (Categorical, OneHotCategorical) else logits.sigmoid()
    x = family(logits=logits).sample((20,))
    fx = torch.randn(20)
    changes = []
    for name, value in (("logits", logits), ("probs", probs)):
        leaf = value.clone().requires_grad_()
        p = family(**{name: leaf})
        draws = sf.Draws(x, p.log_prob(x).reshape(20, -1).sum(-1, keepdim=True), fx.unsqueeze(-1))
        direction = sf.natural_gradient(p, draws)[name]
        change = torch.autograd.functional.jvp(lambda v, name=name: family(**{name: v}).log_prob(x), value, direction)
        changes.append(change[1])
    assert changes[0].abs().max() > 0.1
    assert (changes[0] - changes[1]).abs().max() < 1e-11


def test_diagonal_normals_agree_with_multivariate_ones_where_both_can_go():
    loc, scale = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    x, fx = torch.randn(9, 2), torch.randn(9)
    parts = []
    for p in (Independent(Normal(loc, scale), 1), MultivariateNormal(loc, scale_tril=scale.diag_embed())):
        with torch.no_grad():
            draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx.unsqueeze(-1))
        parts.append(sf.natural_gradient(p, draws))
    assert torch.allclose(parts[0]["loc"], parts[1]["loc"], atol=1e-13)
    assert torch.allclose(parts[0]["scale"], parts[1]["scale_tril"].diagonal(), atol=1e-13)


def test_it_is_the_regression_on_the_sufficient_statistics():
    """Exactly: Cov[T]^-1 Cov[T, f], by weighted least squares on all points with an intercept."""
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    support = coordinates(2, 2, 2).double()
    draws = exact_draws(p, lambda x: (x.sum(-1) - 1.7).pow(3) + x[:, 0] * x[:, 2], support)
    root = p.log_prob(support).detach().mul(0.5).exp()
    design = torch.cat([support, torch.ones(8, 1)], 1)
    coefficients = torch.linalg.lstsq(root[:, None] * design, root[:, None] * draws.fx).solution[:3, 0]
    closed = sf.natural_gradient(p, draws)["logits"]
    assert (closed - coefficients).abs().max() < 1e-12
    for solver in (None, sf.DenseSolve(), sf.ConjugateGradients(tolerance=1e-13)):
        (estimated,) = sf.natural_gradient(p, draws, params=logits, solver=solver)
        assert (estimated - coefficients).abs().max() < 1e-11
    (damped,) = sf.natural_gradient(p, draws, params=logits, solver=sf.Woodbury(), damping=0.3)
    assert (damped - sf.natural_gradient(p, draws, damping=0.3)["logits"]).abs().max() < 1e-12


def test_of_a_sample_it_is_the_regression_on_the_scores():
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 1.7).pow(3), 50)
    scores = draws.x - logits.detach().sigmoid()
    (ours,) = sf.natural_gradient(p, draws, params=[logits], baseline=sf.Constant(0.4))
    assert (ours - torch.linalg.lstsq(scores, draws.fx - 0.4).solution[:, 0]).abs().max() < 1e-12


def test_the_problems_of_a_batch_do_not_see_each_other():
    logits = torch.randn(4, requires_grad=True)
    p = Bernoulli(logits=logits)
    draws = sf.draw(p, lambda x: (x - 0.45).square(), 30)
    loo = sf.LeaveOneOut()
    ours = sf.natural_gradient(p, draws, baseline=loo)["logits"]
    for b in range(4):
        single = Bernoulli(logits=logits[b])
        alone = sf.Draws(draws.x[:, b], draws.log_prob[:, b], draws.fx[:, b])
        assert torch.allclose(sf.natural_gradient(single, alone, baseline=loo)["logits"], ours[b], atol=1e-13)
    (estimated,) = sf.natural_gradient(p, draws, params=logits, baseline=loo)
    weight = logits.detach().sigmoid() * (-logits.detach()).sigmoid()
    empirical = (draws.x - logits.detach().sigmoid()).square().mean(0)
    assert torch.allclose(estimated * empirical, ours * weight, atol=1e-13)


def test_a_joint_decision_over_the_batch():
    logits = torch.randn(3, requires_grad=True)
    p = Bernoulli(logits=logits)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 1).square(), 30)
    joint = sf.natural_gradient(Independent(p, 1), draws)["logits"]
    assert torch.equal(sf.natural_gradient(p, draws)["logits"], joint)


def test_baseline_and_credit_are_those_of_the_surrogate():
    loc = torch.zeros(2, requires_grad=True)
    p = Independent(Normal(loc, torch.ones(2)), 1)
    draws = sf.draw(p, lambda x: x.square().sum(-1) + 3, 10)
    for baseline in (None, sf.LeaveOneOut(), sf.Constant(2.0)):
        (gradient,) = torch.autograd.grad(sf.surrogate(draws, baseline=baseline).mean(), loc, retain_graph=True)
        assert torch.allclose(sf.natural_gradient(p, draws, baseline=baseline)["loc"], gradient, atol=1e-14)
    moving = sf.MovingAverage(0.9)
    before = dict(vars(moving))
    sf.natural_gradient(p, draws, baseline=moving)
    assert vars(moving) == before


def test_it_works_without_grad_mode_and_leaves_the_graph_alone():
    loc = torch.zeros(2, requires_grad=True)
    p = Independent(Normal(loc, torch.ones(2)), 1)
    with torch.no_grad():
        blind = sf.draw(p, lambda x: x.square().sum(-1), 10)
        ours = sf.natural_gradient(p, blind)
    assert set(ours) == {"loc", "scale"}
    draws = sf.draw(p, lambda x: x.square().sum(-1), 10)
    for _ in range(2):
        (natural,) = sf.natural_gradient(p, draws, params=loc)
        assert natural.shape == loc.shape
        assert not natural.requires_grad
    sf.surrogate(draws).mean().backward()
    assert loc.grad is not None


@pytest.mark.parametrize("solver", [None, sf.ConjugateGradients(tolerance=1e-13)])
def test_the_score_of_a_structured_draw_is_the_sum_over_its_decisions(solver):
    logits = torch.tensor([1.0, 0.5, 0.2], requires_grad=True)
    walk = Walk(logits)
    draws = sf.draw(walk, lambda x: x + 1, 40)
    loo = sf.LeaveOneOut()
    (ours,) = sf.natural_gradient(walk, draws, params=logits, baseline=loo, solver=solver)
    S = torch.where(draws.mask, draws.x - logits.detach().sigmoid(), 0.0)
    (gradient,) = torch.autograd.grad(sf.surrogate(draws, baseline=loo).mean(), logits)
    assert torch.allclose(ours, torch.linalg.solve(S.mT @ S / 40, gradient), atol=1e-11)


def test_the_weight_of_a_structured_draw_is_the_product_over_its_decisions():
    logits = torch.tensor([1.0, 0.5, 0.2], requires_grad=True)
    behaviour = torch.tensor([0.0, 0.9, -0.3])
    draws = sf.draw(Walk(logits), lambda x: x + 1, 40)
    there = torch.where(draws.mask, Bernoulli(logits=behaviour).log_prob(draws.x), torch.nan)
    draws = replace(draws, behaviour_log_prob=there)
    (ours,) = sf.natural_gradient(Walk(logits), draws, params=logits)
    S = torch.where(draws.mask, draws.x - logits.detach().sigmoid(), 0.0)
    weight = (draws.log_prob.detach() - draws.behaviour_log_prob).sum(-1).exp()
    (gradient,) = torch.autograd.grad(sf.surrogate(draws).mean(), logits)
    assert torch.allclose(ours, torch.linalg.solve(S.mT @ (weight[:, None] * S) / 40, gradient), atol=1e-11)


def test_off_policy_draws_enter_with_their_weights():
    logits = torch.tensor([0.4, -1.0, 0.3], requires_grad=True)
    p = OneHotCategorical(logits=logits)
    draws = exact_draws(p, lambda x: x @ torch.tensor([1.0, -2.0, 5.0]), torch.eye(3))
    closed = sf.natural_gradient(p, draws, damping=1e-3)["logits"]
    (estimated,) = sf.natural_gradient(p, draws, params=logits, damping=1e-3)
    assert (closed - estimated).abs().max() < 1e-12


def test_draws_of_another_measure():
    loc = torch.zeros(3, requires_grad=True)
    p = Normal(loc, 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    for params in (None, loc):
        natural = partial(sf.natural_gradient, draws=draws, params=params)
        refused(lambda natural=natural: natural(Normal(loc[:2], 1.0)), "cannot score", "Normal")
        refused(lambda natural=natural: natural(Normal(loc.expand(2, 5, 3), 1.0)), "(2, 5, 3)", error=sf.ShapeError)
        refused(lambda natural=natural: natural(Normal(loc + 1, 1.0)), "other log-probabilities")
        refused(lambda natural=natural: natural(Independent(p, 1)), "do not belong", error=sf.ShapeError)
    standard = sf.draw(Normal(torch.zeros((), requires_grad=True), 1.0), lambda x: x, 3)
    refused(lambda: sf.natural_gradient(p, standard), "(3,)", "batch shape", error=sf.ShapeError)  # N is no batch
    structured = sf.draw(Walk(loc), lambda x: x, 5)
    refused(lambda: sf.natural_gradient(Bernoulli(logits=loc), structured), "(5, 3)", error=sf.ShapeError)


def test_params_outside_the_graph():
    p, draws, params = network()
    other = torch.zeros(2, requires_grad=True)
    refused(lambda: sf.natural_gradient(p, draws, params=[*params, other]), "params[4]", "(2,)", "not in the graph")
    refused(lambda: sf.natural_gradient(p, draws, params=[torch.zeros(2)]), "require grad")
    refused(lambda: sf.natural_gradient(p, draws, params=[]), "at least one")
    with torch.no_grad():
        blind = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, blind, params=params), "no scores")


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf"), True, "auto"])
def test_a_damping_that_is_none(damping):
    p = Normal(torch.zeros(2, requires_grad=True), 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, draws, damping=damping), "damping must be", repr(damping))
    one = {"loc": torch.ones(2), "scale": torch.ones(2)}
    refused(lambda: sf.fisher_information(p).solve(one, damping=damping), "damping must be")


def test_other_refusals():
    loc = torch.zeros(2, requires_grad=True)
    p = Normal(loc, 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, draws, solver=sf.Woodbury()), "params is None")
    refused(lambda: sf.natural_gradient(p, draws, params=loc, solver="woodbury"), "no solver", "DenseSolve()")
    pathwise = sf.draw(p, lambda x: x * loc, 5)
    refused(lambda: sf.natural_gradient(p, pathwise), "requires grad", "params=")
    fisher = sf.fisher_information(p)
    refused(lambda: fisher.solve({"loc": loc}), "['loc', 'scale']", "['loc']")
    refused(lambda: fisher.solve(loc), "Tensor")
    refused(lambda: fisher.solve({"loc": loc, "scale": torch.ones(1)}), "(1,)", "(2,)", error=sf.ShapeError)
    refused(lambda: sf.ConjugateGradients(tolerance=0.0), "tolerance")
    refused(lambda: sf.ConjugateGradients(max_iterations=0), "max_iterations")
    far = replace(draws, behaviour_log_prob=draws.log_prob.detach() - 1000)
    refused(
        lambda: sf.natural_gradient(p, far, params=loc), "overflow", error=sf.NonFiniteError,
    )  # fmt: skip
