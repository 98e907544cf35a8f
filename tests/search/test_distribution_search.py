"""Searches by any distribution."""

import io
import itertools

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import SNES, DistributionSearch
from scorefn.search.parameter_fisher import root_fisher
from tests.search.states import same

# --- any distribution ------------------------------------------------------------------------------------------------


def normal(seed=0, **options):
    loc = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)
    options = {"popsize": 8, "seed": seed, **options}
    return DistributionSearch(lambda: td.Normal(loc, log_scale.exp()), [loc, log_scale], **options), (loc, log_scale)


def mixture(seed=0, **options):
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loc = torch.tensor([[-2.0, 0], [0, 0], [2, 0]], dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)

    def make():
        parts = td.Independent(td.Normal(loc, log_scale.exp()), 1)
        return td.MixtureSameFamily(td.Categorical(logits=logits), parts)

    return DistributionSearch(make, [logits, loc, log_scale], popsize=16, seed=seed, **options)


def test_the_plain_step_is_the_surrogates_gradient():
    strategy, (loc, log_scale) = normal()
    strategy._optimizer = torch.optim.SGD([loc, log_scale], lr=0.1)
    x = strategy.ask()
    f = x.square().sum(1)
    gradient = torch.autograd.grad(sf.surrogate(strategy.scored(x, f)).mean(), [loc, log_scale])
    before = [loc.detach().clone(), log_scale.detach().clone()]
    strategy.tell(x, f)
    for old, g, new in zip(before, gradient, (loc, log_scale), strict=True):
        torch.testing.assert_close(new.detach(), old + 0.1 * g, rtol=0, atol=1e-12)


def test_the_natural_step_is_that_of_snes_with_the_shared_utilities():
    """In (m, log s) F is diag(1/s^2, 2): F^-1 g is the direction of SNES, whatever the parameters are called."""
    optimizer = torch.optim.SGD
    strategy, (loc, log_scale) = normal(natural=True)
    strategy._optimizer = optimizer([loc, log_scale], lr=1.0)
    snes = SNES(loc.detach(), log_scale.detach().exp(), popsize=8, eta_sigma=1.0)
    x = strategy.ask()
    f = (x - 3).square().sum(1)
    snes.tell(x, f)
    strategy.tell(x, f)
    torch.testing.assert_close(loc.detach(), snes.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_scale.detach(), snes.sigma.log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bernoulli", "categorical", "beta", "low rank"])
def test_the_fisher_information_of_the_parameters_is_the_covariance_of_scores(family):
    """By enumeration or, where there is none, by KL's second derivative."""
    theta = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    makes = {
        "bernoulli": lambda t: td.Independent(td.Bernoulli(probs=(t * 2).sigmoid()), 1),
        "categorical": lambda t: td.Categorical(logits=torch.cat([t, t[:1] * t[1:2]])),
        "beta": lambda t: td.Independent(td.Beta(t[:2].exp(), t[2:].exp()), 1),
        "low rank": lambda t: td.LowRankMultivariateNormal(t[:2], t[2:].unsqueeze(1), (t[:2] + t[2:]).exp()),
    }
    make = makes[family]
    roots, axes = root_fisher(make(theta), [theta])
    got = axes @ (roots.square().unsqueeze(1) * axes.T)
    if family in ("bernoulli", "categorical"):
        points = (
            torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
            if family == "bernoulli"
            else torch.arange(5)
        )
        log_p = make(theta).log_prob(points)
        scores = torch.stack([torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in log_p])
        expected = torch.einsum("n,na,nb->ab", log_p.detach().exp(), scores, scores)
    else:
        fixed = make(theta.detach())
        multivariate = isinstance(fixed, td.LowRankMultivariateNormal)

        def divergence(t):
            p = make(t)
            if multivariate:
                p, q = (td.MultivariateNormal(d.mean, d.covariance_matrix) for d in (p, fixed))
                return td.kl_divergence(q, p)
            return td.kl_divergence(fixed, p)

        expected = torch.autograd.functional.hessian(divergence, theta.detach())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_unbiased_without_shape_by_enumeration_of_all_generations():
    """Two draws of three values, f itself and leave-one-out: the mean step is grad E f, exactly."""
    logits = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    strategy = DistributionSearch(
        lambda: td.Categorical(logits=logits), [logits], popsize=2, shape=None, baseline=sf.LeaveOneOut(), seed=0
    )
    chance = logits.softmax(0)
    expected = torch.autograd.grad(-(chance * f).sum(), logits)[0]
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        x = torch.tensor(pair)
        g = torch.autograd.grad(
            sf.surrogate(strategy.scored(x, f[x]), baseline=sf.LeaveOneOut()).mean(), logits, retain_graph=True
        )[0]
        total += chance.detach()[x].prod() * g
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)


def test_distributions_without_a_fisher_information_are_searched_plainly_and_refused_naturally():
    strategy = mixture(ftarget=0.05, maxfevals=5000)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, (x - 1).square().sum(1))
    assert "ftarget" in strategy.stop
    with pytest.raises(sf.ScorefnError, match="register_fisher"):
        mixture(natural=True)


def test_bounded_supports():
    raw = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    strategy = DistributionSearch(
        lambda: td.Beta(raw[:, 0].exp() + 1, raw[:, 1].exp() + 1),
        [raw],
        popsize=12,
        natural=True,
        seed=0,
        ftarget=1e-6,
        maxfevals=10_000,
    )
    while not strategy.stop:
        x = strategy.ask()
        assert ((x > 0) & (x < 1)).all()
        strategy.tell(x, (x - 0.7).square().sum(1))
    assert "ftarget" in strategy.stop


def test_a_flat_generation_moves_no_parameter_and_no_moment():
    strategy, _ = normal()
    strategy.tell(x := strategy.ask(), x.square().sum(1))
    x = strategy.ask()
    before = strategy.state_dict()
    strategy.tell(x, torch.ones(8))
    after = strategy.state_dict()
    assert same(before["parameters"], after["parameters"])
    assert same(before["optimizer"], after["optimizer"])


@pytest.mark.parametrize("options", [{}, {"natural": True}, {"coupling": sf.Antithetic()}], ids=str)
def test_a_resumed_distribution_search_equals_an_uninterrupted_one_to_the_bit(options):
    strategy, _ = normal(**options)
    for _ in range(3):
        strategy.tell(x := strategy.ask(), x.square().sum(1))
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    resumed, parameters = normal(seed=9, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(parameters[0], strategy.state_dict()["parameters"][0])
    for _ in range(3):
        x, y = strategy.ask(), resumed.ask()
        assert torch.equal(x, y)
        strategy.tell(x, x.square().sum(1))
        resumed.tell(y, y.square().sum(1))
    assert same(strategy.state_dict(), resumed.state_dict())


def test_the_global_generator_is_left_alone():
    strategy, _ = normal()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    strategy.tell(x := strategy.ask(), x.square().sum(1))
    assert torch.equal(before, torch.get_rng_state())


def test_failures_rank_last_and_are_refused_where_there_are_no_ranks():
    one, (loc, _) = normal()
    other, (loc2, _) = normal()
    x = one.ask()
    f = x.square().sum(1)
    f[2] = torch.nan
    one.tell(x, f)
    other.tell(x, f.nan_to_num(1e9))
    assert torch.equal(loc, loc2)
    raw, parameters = normal(shape=None, baseline=sf.LeaveOneOut())
    before = raw.state_dict()
    with pytest.raises(sf.NonFiniteError):
        raw.tell(x, f)
    assert same(before, raw.state_dict())
    assert all(entry.grad is None for entry in parameters)


def test_a_step_out_of_the_domain_is_taken_back():
    scale = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scale], lr=100.0, momentum=0.9)
    strategy = DistributionSearch(lambda: td.Normal(0.0, scale), [scale], popsize=6, optimizer=optimizer, seed=0)
    x = strategy.ask()
    before = strategy.state_dict()
    with pytest.raises(sf.ScorefnError, match="left the domain"):
        strategy.tell(x, x.abs().sum(1))
    assert same(before, strategy.state_dict())


def test_bad_distribution_searches_are_refused():
    loc = torch.zeros(2, requires_grad=True)

    def make():
        return td.Normal(loc, 1.0)

    for build, message in (
        (lambda: DistributionSearch(make, [], popsize=4), "at least one"),
        (lambda: DistributionSearch(make, [torch.zeros(2)], popsize=4), "require grad"),
        (lambda: DistributionSearch(make, [loc * 2], popsize=4), "leaf"),
        (lambda: DistributionSearch(lambda: 3, [loc], popsize=4), "returned int"),
        (lambda: DistributionSearch(make, [loc], popsize=1), "popsize"),
        (
            lambda: DistributionSearch(
                make, [loc], popsize=4, optimizer=torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
            ),
            "not the 1 of parameters",
        ),
        (lambda: DistributionSearch(make, [loc], popsize=4, tolerance=1), "no option"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            build()
    strategy = DistributionSearch(make, [loc], popsize=4, seed=0)
    x = strategy.ask()
    before = strategy.state_dict()
    for bad in (x[:2], x.unsqueeze(-1), x * torch.inf):
        with pytest.raises(sf.ScorefnError):
            strategy.tell(bad, torch.arange(4.0))
    with pytest.raises(sf.ScorefnError, match="no state of"):
        strategy.load_state_dict({"strategy": "SNES", "optimizer": {}})
    assert same(before, strategy.state_dict())


def test_a_distribution_of_single_numbers_is_searched():
    """Points of shape ``[N]``: both modes of a mixture are kept, each at an optimum of ``(x^2 - 4)^2``."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([-1.0, 1.5], dtype=torch.float64, requires_grad=True)

    def mixture():
        return td.MixtureSameFamily(td.Categorical(logits=logits), td.Normal(places, 0.3))

    strategy = DistributionSearch(mixture, [logits, places], popsize=50, seed=0, maxiter=60)
    while not strategy.stop:
        x = strategy.ask()
        assert x.shape == (50,)
        strategy.tell(x, (x.square() - 4).square())
    assert strategy.result.best_f < 1e-2


def test_a_single_number_may_be_followed_by_its_natural_gradient():
    location = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    strategy = DistributionSearch(
        lambda: td.Normal(location, 1.0), [location], popsize=20, natural=True, seed=0, maxiter=40
    )
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, x.square())
    assert abs(location.item()) < 1.0


def test_complex_points_are_refused():
    location = torch.zeros(2, requires_grad=True)
    strategy = DistributionSearch(lambda: td.Normal(location, 1.0), [location], popsize=4, seed=0)
    x = strategy.ask()
    with pytest.raises(sf.ScorefnError, match="x is complex"):
        strategy.tell(x + 0j, x.square().sum(-1))
