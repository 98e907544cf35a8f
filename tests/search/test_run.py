"""run: the same loop for any strategy, also where points are tuples or dictionaries, and nothing lost by an error."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, XNES, BernoulliSearch, CategoricalSearch, ProductSearch, minimize, run


def sphere(x):
    return (x - 1.0).square().sum(-1)


@pytest.mark.parametrize("kind", [CSANES, SNES, XNES])
@pytest.mark.parametrize("vectorized", [False, True])
def test_it_is_what_minimize_does(kind, vectorized):
    start = torch.zeros(3)
    result = run(kind(start, 0.5, seed=4), sphere, vectorized=vectorized)
    wanted = minimize(sphere, start, 0.5, method=kind.method, seed=4, vectorized=vectorized)
    assert torch.equal(result.x, wanted.x)
    assert (result.nfev, result.nit, result.fun, result.stop) == (wanted.nfev, wanted.nit, wanted.fun, wanted.stop)
    assert result.method == kind.method
    assert np.array_equal(result.history.sigma, wanted.history.sigma)


def test_the_limits_of_the_strategy_count_and_so_do_those_of_the_call():
    assert run(SNES([0.0, 0.0], 0.5, seed=0, ftarget=1e-4), sphere).stop == {"ftarget": 1e-4}
    assert run(SNES([0.0, 0.0], 0.5, seed=0), sphere, maxfevals=50).stop == {"maxfevals": 50}
    assert "timeout" in run(SNES([0.0, 0.0], 0.5, seed=0), sphere, timeout=1e-9).stop
    assert run(SNES([0.0, 0.0], 0.5, seed=0), sphere, callback=lambda strategy: 1).stop == {"callback": 1}


def test_maximize_has_the_sign_of_fun():
    up = run(SNES([0.0, 0.0], 0.5, seed=0), lambda x: -sphere(x), maximize=True)
    down = run(SNES([0.0, 0.0], 0.5, seed=0), sphere)
    assert torch.equal(up.x, down.x)
    assert up.fun == -down.fun


@pytest.mark.parametrize("kind", [CSANES, SNES, XNES])
def test_an_error_in_fun_leaves_the_state_after_the_last_whole_generation_and_the_search_goes_on(kind):
    strategy = kind([0.0, 0.0], 0.5, seed=0)
    calls = []

    def fun(x):
        calls.append(x)
        if len(calls) == 40:
            raise KeyError("broken")
        return sphere(x)

    with pytest.raises(KeyError, match="broken"):
        run(strategy, fun)
    told = strategy.result.evaluations
    assert told == 39 // strategy.popsize * strategy.popsize
    twin = kind([0.0, 0.0], 0.5, seed=0)
    for _ in range(39 // strategy.popsize):
        x = twin.ask()
        twin.tell(x, sphere(x))
    assert torch.equal(strategy.mean, twin.mean)
    assert torch.equal(strategy.sigma, twin.sigma)
    result = run(strategy, fun)
    assert result.success
    assert strategy.result.evaluations == told + result.nfev - 1


@pytest.mark.parametrize("kind", [CSANES, SNES, XNES])
def test_a_resumed_search_is_the_uninterrupted_one_to_the_bit(kind):
    whole, first, second = (kind([0.0, 0.0], 0.5, seed=seed, maxiter=num) for seed, num in ((0, 20), (0, 8), (1, 20)))
    run(whole, sphere)
    run(first, sphere)
    second.load_state_dict(first.state_dict())
    result = run(second, sphere)
    assert result.nit == 12
    assert torch.equal(second.mean, whole.mean)
    assert torch.equal(second.sigma, whole.sigma)
    assert result.best_fun == whole.result.best_f


def test_a_resumed_search_keeps_the_best_point_so_far():
    strategy = SNES([0.0, 0.0], 0.5, seed=0)
    first = run(strategy, sphere, maxfevals=200)
    second = run(strategy, lambda x: sphere(x) + 1, maxfevals=100)
    assert second.best_fun == first.best_fun
    assert torch.equal(second.best_x, first.best_x)
    assert second.nfev <= 100


def test_a_search_that_has_stopped_is_only_evaluated_once_more():
    strategy = SNES([0.0, 0.0], 0.5, seed=0)
    first = run(strategy, sphere)
    again = run(strategy, sphere)
    assert (again.nfev, again.nit, len(again.history)) == (1, 0, 0)
    assert again.stop == first.stop
    assert again.fun == first.fun


class Parts:
    """A stand-in for a mixed space: a real vector and a switch, asked as a dictionary or as a tuple."""

    def __init__(self, kind):
        self._kind = kind
        self._inner = SNES([0.0, 0.0, 0.0], 0.5, seed=0, maxiter=5)
        self.popsize = self._inner.popsize

    def _split(self, x):
        parts = {"place": x[..., :2], "on": (x[..., 2] > 0.5).long()}
        return parts if self._kind is dict else tuple(parts.values())

    def ask(self):
        self._x = self._inner.ask()
        return self._split(self._x)

    def tell(self, x, f):
        told = list(x.values()) if self._kind is dict else x
        assert torch.equal(told[0], self._x[:, :2])
        self._inner.tell(self._x, f)

    mean = property(lambda self: self._split(self._inner.mean))
    sigma = property(lambda self: None)
    stop = property(lambda self: self._inner.stop)

    @property
    def result(self):
        from types import SimpleNamespace

        return SimpleNamespace(mean=self.mean, sigma=(), best_x=None, best_f=math.inf)


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("vectorized", [False, True])
def test_points_of_several_parts(kind, vectorized):
    seen = []

    def fun(x):
        assert type(x) is kind
        place, on = x.values() if kind is dict else x
        seen.append(place.shape)
        return sphere(place) + (1.0 - on)

    strategy = Parts(kind)
    result = run(strategy, fun, vectorized=vectorized)
    place, on = result.best_x.values() if kind is dict else result.best_x
    assert float(sphere(place) + (1.0 - on)) == result.best_fun
    assert result.method == "Parts"
    assert result.stop == {"maxiter": 5}
    assert set(seen) == ({(strategy.popsize, 2), (1, 2)} if vectorized else {(2,)})
    assert np.isnan(result.history.sigma).all()


def test_values_that_are_none():
    with pytest.raises(sf.ScorefnError, match="fun must return a real number, but it returned NoneType"):
        run(SNES([0.0], 1.0), lambda x: None)
    with pytest.raises(sf.NonFiniteError, match="10 generations in a row"):
        run(SNES([0.0], 1.0), lambda x: math.nan)


def test_discrete_and_mixed_strategies():
    bits = run(BernoulliSearch(12, seed=0, ftarget=0.0), lambda x: float(12 - x.sum()), maxfevals=3000)
    assert bits.stop == {"ftarget": 0.0}
    assert bits.success
    assert bits.best_x.tolist() == [1.0] * 12
    blocks = {"x": SNES([2.0, 2.0], 1.0, popsize=12, seed=0), "c": CategoricalSearch([3, 4], popsize=12, seed=1)}
    mixed = run(
        ProductSearch(blocks, ftarget=1e-6), lambda p: p["x"].square().sum() + (p["c"] != 1).sum(), maxfevals=5000
    )
    assert mixed.stop == {"ftarget": 1e-6}
    assert mixed.best_x["c"].tolist() == [1, 1]
    assert float(mixed.best_x["x"].square().sum()) == mixed.best_fun <= 1e-6
    assert mixed.method == "product"


def test_a_failure_at_the_last_mean_counts():
    calls = []

    def fun(x):
        calls.append(x)
        return math.nan if len(calls) == 21 else float(x.square().sum())

    result = run(SNES([0.0, 0.0], 1.0, popsize=10, seed=0), fun, maxfevals=21)
    assert (result.nfev, result.failed) == (21, 1)
