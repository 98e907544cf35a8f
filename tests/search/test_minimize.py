"""minimize: scipy's manners, a budget that holds, and results that say what they are."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import SNES, minimize


def sphere(x):
    return ((x - 1.0) ** 2).sum()


def test_the_documented_call():
    result = minimize(sphere, [0.0, 0.0, 0.0], sigma0=0.5, ftarget=1e-8, seed=0)
    assert result.success
    assert result.fun <= 1e-8
    assert result.method == "snes"
    assert result.stop == {"ftarget": 1e-8}
    assert result.message == "ftarget: a value reached ftarget"
    assert np.abs(result.x - 1).max() < 1e-3


@pytest.mark.parametrize(
    ("x0", "kind"), [([0.0, 0.5], np.ndarray), (np.zeros(2), np.ndarray), (torch.zeros(2), torch.Tensor)]
)
@pytest.mark.parametrize("vectorized", [False, True])
def test_fun_sees_the_kind_of_x0_in_float64(x0, kind, vectorized):
    seen = []

    def fun(x):
        seen.append(x)
        return ((x - 1) ** 2).sum(-1)

    result = minimize(fun, x0, 0.5, maxfevals=100, seed=0, vectorized=vectorized)
    assert all(isinstance(x, kind) and str(x.dtype).endswith("float64") for x in seen)
    assert {tuple(x.shape) for x in seen} == ({(6, 2), (1, 2)} if vectorized else {(2,)})
    assert all(isinstance(x, kind) and tuple(x.shape) == (2,) for x in (result.x, result.best_x, result.sigma))
    assert isinstance(result.fun, float)


def test_vectorized_and_single_calls_are_the_same_search():
    single = minimize(lambda x: ((x - 1.0) ** 2).sum(), [0.0, 0.0], 0.5, seed=0)
    batched = minimize(lambda x: ((x - 1.0) ** 2).sum(-1), [0.0, 0.0], 0.5, seed=0, vectorized=True)
    tensors = minimize(lambda x: ((x - 1.0) ** 2).sum(), torch.zeros(2), 0.5, seed=0)
    assert single.nfev == batched.nfev == tensors.nfev
    assert np.array_equal(single.x, batched.x)
    assert np.array_equal(single.x, tensors.x.numpy())


def test_it_is_the_ask_and_tell_loop():
    strategy = SNES([0.0, 0.0], 0.5, seed=3, ftarget=1e-6)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, [sphere(xi) for xi in x])
    result = minimize(sphere, [0.0, 0.0], 0.5, seed=3, ftarget=1e-6)
    assert np.array_equal(result.best_x, strategy.result.best_x.numpy())
    assert result.nfev == strategy.result.evaluations + 1
    assert result.nit == strategy.result.iterations


@pytest.mark.parametrize("maxfevals", [7, 12, 13, 100])
def test_the_budget_counts_every_call(maxfevals):
    calls = []
    result = minimize(lambda x: calls.append(x) or sphere(x), [0.0, 0.0], 0.5, maxfevals=maxfevals, seed=0)
    assert result.nfev == len(calls) <= maxfevals < result.nfev + 6
    assert result.stop == {"maxfevals": maxfevals}
    assert not result.success


def test_success_means_the_target_where_there_is_one_and_convergence_otherwise():
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0).success
    missed = minimize(lambda x: sphere(x) + 1, [0.0, 0.0], 0.5, ftarget=0.5, seed=0)
    assert not missed.success
    assert "tolfun" in missed.stop
    assert not minimize(lambda x: 1.0, [0.0, 0.0], 0.5, seed=0).success


def test_the_mean_is_recommended_and_evaluated():
    generator = np.random.default_rng(0)
    result = minimize(lambda x: sphere(x) + generator.normal(), np.zeros(4), 0.5, maxfevals=3000, seed=0)
    assert result.best_fun < -1.5  # the luckiest of 3000 noisy values
    assert abs(result.fun - sphere(result.x)) < 5
    assert sphere(result.x) < sphere(result.best_x)


def test_the_best_point_is_recommended_where_the_mean_has_no_value_or_misses_the_target():
    two_valleys = minimize(lambda x: math.nan if abs(x[0]) < 50 else abs(x[0]), [0.0], 60.0, maxiter=1, seed=0)
    assert abs(two_valleys.x[0]) >= 50
    assert two_valleys.fun == two_valleys.best_fun == abs(two_valleys.x[0])
    lucky = minimize(lambda x: float(abs(x[0]) > 50), [100.0], 60.0, ftarget=0.0, seed=0)
    assert lucky.success
    assert lucky.fun == 0.0
    assert abs(lucky.x[0]) < 50


def test_the_callback_sees_the_strategy_and_can_stop_it():
    seen = []

    def callback(strategy):
        seen.append(strategy.result.iterations)
        return len(seen) == 4

    result = minimize(sphere, [0.0, 0.0], 0.5, callback=callback, seed=0)
    assert seen == [1, 2, 3, 4]
    assert result.nit == 4
    assert result.stop == {"callback": 1}
    assert not result.success


def test_a_function_that_changes_its_argument_does_no_harm():
    def fun(x):
        value = sphere(x)
        x[:] = 0.0
        return value

    for x0 in ([0.0, 0.0], torch.zeros(2)):
        assert minimize(fun, x0, 0.5, seed=0).best_fun == minimize(sphere, x0, 0.5, seed=0).best_fun


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_error_inside_fun_is_raised_as_it_is_with_the_point_as_a_note(vectorized):
    def fun(x):
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside") as caught:
        minimize(fun, [0.25, 0.0], 1e-3, seed=0, vectorized=vectorized)
    note = "points of shape (6, 2)" if vectorized else "point 0 of 6: [0.2"
    assert note in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda x: None, "fun must return a real number, but it returned NoneType.*float\\('nan'\\)"),
        (lambda x: 1j, "returned complex"),
        (lambda x: "high", "returned str"),
        (lambda x: x, r"one number for one point, but it returned shape \(2,\).*vectorized=True"),
        (lambda x: x[:1], r"shape \(1,\)"),
    ],
)
def test_values_that_cannot_be_minimised(fun, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(fun, [0.0, 0.0], 0.5)


@pytest.mark.parametrize("fun", [lambda x: x, lambda x: x[:, :1], lambda x: 0.0])
def test_vectorized_values_must_be_one_per_point(fun):
    with pytest.raises(sf.ShapeError, match=r"must be \[N\] = \(6,\)"):
        minimize(fun, [0.0, 0.0], 0.5, vectorized=True)


def test_unknown_methods_and_options_are_refused_with_the_known_ones():
    with pytest.raises(sf.ScorefnError, match="no method 'cma': it is one of auto, csanes, snes, xnes"):
        minimize(sphere, [0.0], 1.0, method="cma")
    with pytest.raises(sf.ScorefnError, match=r"no option 'max_evals'.*It knows popsize, .*tolx"):
        minimize(sphere, [0.0], 1.0, max_evals=100)
    with pytest.raises(sf.ScorefnError, match="maxfevals=6 must pay for one generation of 6 points and"):
        minimize(sphere, [0.0, 0.0], 1.0, maxfevals=6)
    with pytest.raises(sf.ScorefnError, match="maxfevals=nan"):
        minimize(sphere, [0.0, 0.0], 1.0, maxfevals=math.nan)
    with pytest.raises(sf.ScorefnError, match="ftarget must be a number"):
        minimize(sphere, [0.0, 0.0], 1.0, ftarget=math.nan)


def test_the_result_is_frozen():
    result = minimize(sphere, [0.0], 1.0, maxfevals=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.fun = 0.0


def test_failures_are_counted():
    result = minimize(lambda x: math.nan if x[0] > 1.2 else sphere(x), [0.0, 0.0], 0.5, seed=0)
    assert result.success
    assert result.failed > 0
