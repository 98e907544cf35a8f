"""What any strategy hands out is the caller's: changing it changes nothing inside, and it has the shape of a point."""

import pytest
import torch
from torch import distributions as td

from scorefn.search import (
    CSANES,
    PGPE,
    XNES,
    BernoulliSearch,
    CategoricalSearch,
    CoordinateSearch,
    DistributionSearch,
    IntegerSearch,
    OpenAIES,
    ProductSearch,
    RankOneCSANES,
    SeparableCSANES,
    run,
)

X0 = [1.0, -2.0, 0.5]


def distribution():
    loc = torch.tensor(X0, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    return DistributionSearch(lambda: td.Normal(loc, scale), [loc, scale], popsize=8, seed=0)


MAKES = {
    "csanes": lambda: CSANES(X0, 1.0, seed=0),
    "xnes": lambda: XNES(X0, 1.0, seed=0),
    "rank one": lambda: RankOneCSANES(X0, 1.0, seed=0),
    "separable": lambda: SeparableCSANES(X0, 1.0, seed=0),
    "pgpe": lambda: PGPE(X0, 1.0, seed=0),
    "openai_es": lambda: OpenAIES(X0, 1.0, seed=0),
    "coordinates": lambda: CoordinateSearch(X0, 1.0, seed=0),
    "bernoulli": lambda: BernoulliSearch(5, seed=0),
    "categorical": lambda: CategoricalSearch([3, 5, 2], seed=0),
    "integer": lambda: IntegerSearch([0, -5], [9, 5], seed=0),
    "distribution": distribution,
    "product": lambda: ProductSearch(
        {"x": PGPE(X0, 1.0, popsize=8, seed=0), "kind": CategoricalSearch([3, 4], popsize=8, seed=1)}
    ),
}


def tensors(value):
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in tensors(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def values(x):
    return sum(part.double().square().sum(-1) for part in tensors({"x": x}))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_changing_what_was_handed_out_changes_nothing_inside(make):
    strategy, untouched = make(), make()
    for _ in range(3):
        for name in ("mean", "sigma", "factor", "location", "probabilities", "result", "stop"):
            found = getattr(strategy, name, None)
            for leaf in tensors(vars(found) if name == "result" else found):
                leaf.zero_()
        x, y = strategy.ask(), untouched.ask()
        assert all(map(torch.equal, tensors({"x": x}), tensors({"x": y})))
        strategy.tell(x, values(x))
        untouched.tell(y, values(y))
    assert all(map(torch.equal, tensors(strategy.state_dict()), tensors(untouched.state_dict())))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_learnt_changes_nothing_until_it_is_adopted(make):
    strategy = make()
    if isinstance(strategy, ProductSearch):
        return  # its blocks are seen here one by one
    from scorefn.search.ranking import Ranking

    x = strategy.ask()
    before = tensors(strategy.state_dict())
    state = strategy.learnt(strategy.told(x), Ranking(values(x)))
    assert all(map(torch.equal, before, tensors(strategy.state_dict())))
    strategy.adopt(state)
    twin = make()
    twin.tell(y := twin.ask(), values(y))
    assert torch.equal(strategy.mean, twin.mean)
    assert torch.equal(strategy.sigma, twin.sigma)


@pytest.mark.parametrize("event", [(), (3,), (2, 3)])
def test_the_best_point_of_a_distribution_has_its_shape_and_dtype(event):
    loc = torch.zeros(event, requires_grad=True)
    strategy = DistributionSearch(lambda: td.Normal(loc, 1.0), [loc], popsize=8, seed=0)
    x = strategy.ask()
    f = (x - 1).square().reshape(8, -1).sum(1)
    strategy.tell(x, f)
    best = strategy.result.best_x
    assert best.shape == strategy.result.mean.shape == event
    assert torch.equal(best, x[f.argmin()])
    result = run(strategy, lambda x: float((x - 1).square().sum()), maxfevals=100)
    assert result.best_x.shape == result.x.shape == event


def test_the_best_point_of_integers_is_of_integers():
    logits = torch.zeros(4, requires_grad=True)
    strategy = DistributionSearch(lambda: td.Categorical(logits=logits), [logits], popsize=8, seed=0)
    strategy.tell(x := strategy.ask(), x)
    assert strategy.result.best_x.dtype == torch.int64
    assert strategy.result.best_x == x.min()
