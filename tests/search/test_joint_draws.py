"""A search whose points are drawn together by a joint estimator."""

import copy

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import DistributionSearch, run


def search(popsize=8, estimator=None, seed=0, **options):
    logits = torch.linspace(-0.5, 0.5, 6).requires_grad_()
    return logits, DistributionSearch(
        lambda: td.Bernoulli(logits=logits), [logits], popsize=popsize, estimator=estimator, seed=seed, **options
    )


def zeros(x):
    return (1 - x).sum(-1)


@pytest.mark.parametrize("estimator", [sf.DisARM(num_pairs=4), sf.ARMS(8)], ids=repr)
def test_the_step_follows_the_gradient_of_the_estimator(estimator):
    logits, strategy = search(estimator=estimator, optimizer=None, shape=None)
    x = strategy.ask()
    f = zeros(x) ** 2
    reference = logits.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=0.05)
    (-estimator.surrogate(td.Bernoulli(logits=reference), x, -f)).backward()
    optimizer.step()
    strategy.tell(x, f)
    assert torch.equal(logits, reference)
    assert not torch.equal(logits, torch.linspace(-0.5, 0.5, 6))


def test_enumerated_points_follow_the_exact_gradient():
    logits, strategy = search(popsize=64, estimator=sf.Enumerate(), shape=None)
    x = strategy.ask()
    reference = logits.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=0.05)
    (gradient,) = sf.diagnostics.exact_gradient(td.Bernoulli(logits=reference), lambda x: zeros(x) ** 2, [reference])
    reference.grad = gradient
    optimizer.step()
    strategy.tell(x, zeros(x) ** 2)
    torch.testing.assert_close(logits, reference, rtol=1e-6, atol=0)


def test_a_state_between_ask_and_tell_goes_on_to_the_bit():
    _, one = search(estimator=sf.DisARM(4))
    for _ in range(3):
        one.tell(x := one.ask(), zeros(x))
    x = one.ask()
    _, two = search(estimator=sf.DisARM(4), seed=9)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        for strategy in (one, two):
            strategy.tell(x, zeros(x))
        x, y = one.ask(), two.ask()
        assert torch.equal(x, y)


def test_it_solves_onemax():
    logits = torch.zeros(30, requires_grad=True)
    strategy = DistributionSearch(
        lambda: td.Bernoulli(logits=logits), [logits], popsize=10, estimator=sf.ARMS(10), seed=0, ftarget=0, maxiter=500
    )
    assert run(strategy, zeros).fun == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [None, sf.NESUtilities()], ids=str)
def test_natural_steps_of_an_exact_gradient_end_where_every_bit_is_right(dtype, shape):
    weights = torch.tensor([1.0, -2, 0.5, 3, -0.1, 0.2, -1, 0.7], dtype=dtype)
    logits = torch.zeros(8, dtype=dtype, requires_grad=True)
    strategy = DistributionSearch(
        lambda: td.Bernoulli(logits=logits),
        [logits],
        popsize=256,
        estimator=sf.Enumerate(),
        natural=True,
        shape=shape,
        seed=0,
    )
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, ((x - 0.3) * weights).sum(-1))
    assert torch.equal(logits > 0, weights < 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": sf.DisARM}, r"DisARM is a class, .* write DisARM\(\)"),
        ({"estimator": 3}, "estimator=3 is no estimator"),
        ({"estimator": sf.ARMS(8), "baseline": sf.LeaveOneOut()}, "baseline=.* has no place beside it"),
        ({"estimator": sf.ARMS(8), "coupling": sf.Antithetic()}, "coupling=.* has no place beside it"),
    ],
)
def test_parts_that_cannot_be_put_together(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        search(**options)


def test_another_number_of_draws_than_the_generation_has():
    _, strategy = search(popsize=6, estimator=sf.DisARM(4))
    with pytest.raises(sf.ScorefnError, match="draws 8 points of this distribution, but popsize is 6"):
        strategy.ask()


def test_another_order_or_other_points_are_refused():
    logits, strategy = search(estimator=sf.DisARM(4))
    with pytest.raises(sf.ScorefnError, match="not those that ask returned last"):
        strategy.tell(torch.bernoulli(torch.full((8, 6), 0.5)), range(8))
    x = strategy.ask()
    before = logits.detach().clone()
    with pytest.raises(sf.ScorefnError, match="compares the points of one joint draw by their places"):
        strategy.tell(x.flip(0), zeros(x.flip(0)))
    assert torch.equal(logits, before)
    strategy.tell(x, zeros(x))
    assert not torch.equal(logits, before)


def test_a_state_of_another_estimator_is_refused():
    _, one = search(estimator=sf.DisARM(4))
    _, two = search(estimator=sf.ARMS(8))
    with pytest.raises(sf.ScorefnError, match="estimator"):
        two.load_state_dict(one.state_dict())
