"""Adaptive Rao-Blackwellisation: exact whatever the coefficient, and worth its coefficient."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.reducers import adaptive as adaptive_module
from tests.oracles.expectations import deviation
from tests.oracles.settings import CREDITS, settings
from tests.oracles.tolerances import EXACT, near
from tests.oracles.toys import TOYS, values

APPLICABLE = [(toy, name) for toy in TOYS for name, row in CREDITS.items() if row.applies(TOYS[toy])]


def learned(given, credit, decisions, scale=1.0):
    """A reducer whose coefficients are some numbers that have nothing to do with the draws it will meet."""
    draws = given.draws
    width = draws.signal(credit).shape[-1] if decisions is None else decisions
    shape = (*draws.log_prob.shape[1:-1], width)
    adaptive = sf.AdaptiveRaoBlackwell()
    adaptive.variance = torch.ones(shape, dtype=torch.float64)
    adaptive.covariance = scale * values((width,), 21).expand(shape)
    return adaptive


@pytest.mark.parametrize("entry", ["surrogate", "dice", "expectation"])
@pytest.mark.parametrize(("toy", "name"), APPLICABLE)
def test_the_expected_gradient_is_exact(toy, name, entry):
    row, largest = CREDITS[name], 0.0
    for given in settings([toy]):
        credit = row.make(given)
        if given.draws.num_blocks < 2 or not credit.unbiased:
            continue
        adaptive = learned(given, credit, None)
        state = adaptive.covariance.clone()
        largest = max(largest, deviation(given, name, adaptive, entry))
        if entry != "expectation":
            assert torch.equal(adaptive.covariance, state)
    assert largest < EXACT


def test_a_coefficient_that_looks_at_its_own_draws_is_biased():
    """Why the averages are of past steps: updated before the read, they are not fixed beforehand any more."""

    class Hasty(sf.AdaptiveRaoBlackwell):
        def __call__(self, signal, draws):
            self.covariance = self.variance = None
            self.update(signal, draws)
            return super().__call__(signal, draws)

    assert max(deviation(given, "RewardToGo(1)", Hasty(), "surrogate") for given in settings(["chain"], ["N=3"])) > 1e-3


def correlated_chain(n):
    """Two coins; the first pays 5 (a + noise), the second -5 (the same noise): only together they are quiet."""
    logits = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    x = Bernoulli(logits=logits).sample((n,))
    noise = torch.randn(n, dtype=torch.float64)
    fx = torch.stack([5 * noise + x[:, 0], x[:, 1] - 5 * noise], -1)
    return logits, sf.Draws(x, Bernoulli(logits=logits).log_prob(x), fx, credit=sf.RewardToGo())


def test_it_learns_the_coefficient_and_lowers_the_variance():
    adaptive = sf.AdaptiveRaoBlackwell(decay=0.9)
    for _ in range(60):
        _, draws = correlated_chain(64)
        adaptive.update(draws.signal(), draws)
    c = adaptive.coefficient(draws.signal())
    assert c[0] == 0  # the first coin influences everything
    assert 0.95 < c[1] < 1.05  # the past value takes the noise out of the second coin's
    spread = {}
    for name, baseline in {"plain": sf.LeaveOneOut(), "adaptive": adaptive}.items():
        gradients = []
        torch.manual_seed(1)  # the same draws for both
        for _ in range(300):
            logits, draws = correlated_chain(16)
            gradients.append(torch.autograd.grad(sf.surrogate(draws, baseline=baseline).mean(), logits)[0])
        spread[name] = torch.stack(gradients).var(0)
    assert spread["adaptive"][1] < 0.05 * spread["plain"][1]
    torch.testing.assert_close(spread["adaptive"][0], spread["plain"][0])


def test_before_the_first_update_it_is_leave_one_out():
    _, draws = correlated_chain(5)
    signal = draws.signal()
    assert torch.equal(sf.AdaptiveRaoBlackwell()(signal, draws), sf.LeaveOneOut()(signal, draws))


def test_where_everything_is_influenced_it_is_leave_one_out():
    adaptive = sf.AdaptiveRaoBlackwell()
    logits = torch.zeros(3, requires_grad=True)
    for _ in range(3):
        loss = sf.expectation(Bernoulli(logits=logits), lambda x: x.sum(-1), 8, baseline=adaptive)
    assert loss.requires_grad
    assert torch.equal(adaptive.coefficient(torch.ones(8, 1)), torch.zeros(1))


def test_the_credit_in_use_decides_what_is_not_influenced():
    """With a discount the past values are weighed as the return weighs them."""
    _, draws = correlated_chain(6)
    credit = sf.RewardToGo(0.5)
    adaptive = sf.AdaptiveRaoBlackwell()
    adaptive.covariance, adaptive.variance = -torch.ones(2).double(), torch.ones(2).double()
    assert draws.uninfluenced.shape == (6, 2)  # remembered, but not for another credit
    found = adaptive(draws.signal(credit), draws.bound(credit))
    rest = torch.stack([torch.zeros(6, dtype=torch.float64), draws.fx[:, 0]], -1)
    expected = sf.LeaveOneOut()(draws.signal(credit) + rest, draws) - rest
    torch.testing.assert_close(found, expected)


def test_longer_and_shorter_episodes():
    adaptive = sf.AdaptiveRaoBlackwell(0.5)
    for steps in (3, 5, 2):
        log_prob = torch.zeros(4, steps, requires_grad=True)
        draws = sf.Draws(torch.zeros(4), log_prob, torch.randn(4, steps), credit=sf.RewardToGo())
        adaptive.update(draws.signal(), draws)
        assert adaptive(draws.signal(), draws).shape == (4, steps)
    assert adaptive.covariance.shape == (5,)


def test_refusals():
    with pytest.raises(sf.ScorefnError, match=r"decay must lie in \[0, 1\), but it is 1"):
        sf.AdaptiveRaoBlackwell(1.0)
    log_prob = torch.zeros(4, 2, 3, requires_grad=True)
    draws = sf.Draws(torch.zeros(4), log_prob, torch.randn(4, 2, 3), credit=sf.RewardToGo())
    adaptive = sf.AdaptiveRaoBlackwell()
    adaptive.update(draws.signal(), draws)
    other = sf.Draws(torch.zeros(4), log_prob[:, 0], torch.randn(4, 3), credit=sf.RewardToGo())
    with pytest.raises(sf.ShapeError, match=r"\(2,\) but meets \(\)"):
        adaptive(other.signal(), other)
    with pytest.raises(sf.ScorefnError, match="two blocks"):
        sf.AdaptiveRaoBlackwell()(draws[:1].signal(), draws[:1])
    with pytest.raises(sf.ScorefnError, match="keeps a state"):
        torch.func.grad(lambda t: sf.expectation(Bernoulli(logits=t), lambda x: x.sum(-1), 4, baseline=adaptive))(
            torch.zeros(2)
        )


def test_rounding_is_not_mistaken_for_values_that_are_not_influenced():
    """In single precision the sum of all values less all of them is not 0, and it depends on the decision itself."""
    adaptive = sf.AdaptiveRaoBlackwell()
    influence = torch.ones(2, 300, dtype=torch.bool)
    influence[1, :200] = False
    for _ in range(5):
        log_prob = torch.zeros(8, 2, requires_grad=True)
        draws = sf.Draws(torch.zeros(8), log_prob, torch.randn(8, 300), credit=sf.Influence(influence))
        assert (draws.fx.sum(-1, keepdim=True) - draws.credit.influence(draws.fx))[:, 0].abs().max() > 0
        adaptive.update(draws.signal(), draws)
    c = adaptive.coefficient(draws.signal())
    assert c[0] == 0
    assert c[1] != 0


@pytest.mark.parametrize(("toy", "name"), APPLICABLE)
def test_what_is_left_out_is_what_the_draws_say(toy, name):
    """Taken from the signal where nothing is weighed, and from the draws elsewhere."""
    for given in settings([toy], ["N=2", "N=2 B=(2, 3)"]):
        bound = given.draws.bound(CREDITS[name].make(given))
        found = adaptive_module._uninfluenced(bound.signal(), bound)
        assert near(found.expand_as(bound.uninfluenced), bound.uninfluenced)


def test_the_averages_against_the_formula():
    """Two batches, one of them with absent decisions."""
    adaptive, covariance, variance = sf.AdaptiveRaoBlackwell(0.6), 0.0, 0.0
    for masked in (False, True):
        _, draws = correlated_chain(6)
        mask = torch.ones(6, 2, dtype=torch.bool)
        if masked:
            mask[:2, 1] = False
            draws = replace(draws, mask=mask)
        adaptive.update(draws.signal(), draws)
        d, n = draws.fx[:, 1], draws.fx[:, 0]
        d, n, count = d[mask[:, 1]], n[mask[:, 1]], int(mask[:, 1].sum())
        d, n = ((v - v.mean()) * count / (count - 1) for v in (d, n))
        covariance = 0.6 * covariance + 0.4 * (d * n).mean()
        variance = 0.6 * variance + 0.4 * n.square().mean()
    assert near(adaptive.covariance[1], covariance)
    assert near(adaptive.variance[1], variance)


HUGE = {"squares": 1e25, "sum": 3e38}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", HUGE.values(), ids=HUGE)
def test_a_batch_whose_moments_overflow_leaves_them_as_they_were(size, masked):
    torch.manual_seed(0)
    mask = torch.ones(8, 2, dtype=torch.bool) if masked else None
    log_prob = torch.zeros(8, 2, requires_grad=True)
    draws = sf.Draws(
        x=torch.zeros(8),
        log_prob=log_prob,
        fx=torch.randn(8, 2),
        mask=mask,
        credit=sf.Influence(torch.tensor([[True, True], [False, True]])),
    )
    large = replace(draws, fx=torch.full((8, 2), size) * torch.tensor([[1.0], [-1.0]] * 4))
    baseline = sf.AdaptiveRaoBlackwell()
    baseline.update(draws.signal(), draws)
    before = baseline.covariance.clone(), baseline.variance.clone()
    signal = torch.nan_to_num(large.signal())
    with pytest.raises(sf.NonFiniteError, match=r"AdaptiveRaoBlackwell.*overflows.*nothing was updated"):
        baseline.update(signal, large)
    assert torch.equal(baseline.covariance, before[0])
    assert torch.equal(baseline.variance, before[1])
    baseline.update(draws.signal(), draws)
    assert baseline(draws.signal(), draws).isfinite().all()


def test_other_reducers_refuse_a_batch_whose_moments_overflow():
    log_scale = torch.zeros((), requires_grad=True)
    p = torch.distributions.Normal(0.0, log_scale.exp())
    draws, large = sf.draw(p, torch.square, 8), sf.draw(p, lambda x: 1e38 * (2 + x.sign()), 8)
    for reducer in (sf.MovingAverage(), sf.BlockConstants([log_scale]), sf.NaturalControlVariate(p)):
        given = (draws.signal(), draws) if isinstance(reducer, sf.MovingAverage) else (draws,)
        reducer.update(*given)
        before = {name: value.clone() for name, value in vars(reducer).items() if isinstance(value, torch.Tensor)}
        assert before
        given = (large.signal(), large) if isinstance(reducer, sf.MovingAverage) else (large,)
        with pytest.raises(sf.NonFiniteError, match="nothing was updated"):
            reducer.update(*given)
        for name, value in before.items():
            assert torch.equal(vars(reducer)[name], value)


@pytest.mark.parametrize("lonely", ["the only one with this step", "the only one of its group"])
def test_what_no_other_draw_can_centre_teaches_nothing(lonely):
    """Uncentred values vary together with whatever their mean is."""
    generator = torch.Generator().manual_seed(0)
    fx = 10 + torch.randn(5, 2, dtype=torch.float64, generator=generator)
    log_prob = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    fields = {"credit": sf.RewardToGo()}
    if lonely == "the only one with this step":
        fields["mask"] = torch.tensor([[True, True]] + [[True, False]] * 4)
    else:
        fields["group"] = torch.tensor([0, 1, 1, 1, 1])
    reducer, without = sf.AdaptiveRaoBlackwell(), sf.AdaptiveRaoBlackwell()
    draws = sf.Draws(torch.zeros(5), log_prob, fx, **fields)
    reducer.update(draws.signal(), draws)
    if lonely == "the only one with this step":
        assert reducer.variance[1] == 0
    else:
        rest = sf.Draws(torch.zeros(4), log_prob[1:], fx[1:], credit=sf.RewardToGo())
        without.update(rest.signal(), rest)
        near(reducer.coefficient(draws.signal())[1], without.coefficient(rest.signal())[1])
