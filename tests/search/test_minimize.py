"""minimize: scipy's manners, a budget that holds, and results that say what they are."""

import dataclasses
import functools
import math
import time

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, chosen, minimize


def sphere(x):
    return ((x - 1.0) ** 2).sum()


N = CSANES([0.0, 0.0], 1.0).popsize


def test_the_documented_call():
    result = minimize(sphere, [0.0, 0.0, 0.0], sigma0=0.5, ftarget=1e-8, seed=0)
    assert result.success
    assert result.fun <= 1e-8
    assert result.method == "csanes"
    assert result.choice == "3 coordinates are few enough for a full covariance"
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
    assert {tuple(x.shape) for x in seen} == ({(N, 2), (1, 2)} if vectorized else {(2,)})
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
    strategy = CSANES([0.0, 0.0], 0.5, seed=3, ftarget=1e-6)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, [sphere(xi) for xi in x])
    result = minimize(sphere, [0.0, 0.0], 0.5, seed=3, ftarget=1e-6)
    assert np.array_equal(result.best_x, strategy.result.best_x.numpy())
    assert result.nfev == strategy.result.evaluations + 1
    assert result.nit == strategy.result.iterations


@pytest.mark.parametrize("maxfevals", [N + 1, 2 * N, 2 * N + 1, 100])
def test_the_budget_counts_every_call(maxfevals):
    calls = []
    result = minimize(lambda x: calls.append(x) or sphere(x), [0.0, 0.0], 0.5, maxfevals=maxfevals, seed=0)
    assert result.nfev == len(calls) <= maxfevals < result.nfev + N
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
    note = f"points of shape ({N}, 2)" if vectorized else f"point 0 of {N}: [0.2"
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
    with pytest.raises(sf.ShapeError, match=rf"must be \[N\] = \({N},\)"):
        minimize(fun, [0.0, 0.0], 0.5, vectorized=True)


def test_unknown_methods_and_options_are_refused_with_the_known_ones():
    with pytest.raises(sf.ScorefnError, match="no method 'cma': it is one of auto, csanes, rank_one, separable"):
        minimize(sphere, [0.0], 1.0, method="cma")
    with pytest.raises(sf.ScorefnError, match=r"no option 'max_evals'.*It knows popsize, .*tolx"):
        minimize(sphere, [0.0], 1.0, max_evals=100)
    with pytest.raises(sf.ScorefnError, match=f"maxfevals={N} must pay for one generation of {N} points and"):
        minimize(sphere, [0.0, 0.0], 1.0, maxfevals=N)
    with pytest.raises(sf.ScorefnError, match="maxfevals must be a number, but it is nan"):
        minimize(sphere, [0.0, 0.0], 1.0, maxfevals=math.nan)
    with pytest.raises(sf.ScorefnError, match="ftarget must be a number"):
        minimize(sphere, [0.0, 0.0], 1.0, ftarget=math.nan)


def test_the_result_is_frozen():
    result = minimize(sphere, [0.0], 1.0, maxfevals=20)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.fun = 0.0


def test_failures_are_counted():
    result = minimize(lambda x: math.nan if x[0] > 1.2 else sphere(x), [0.0, 0.0], 0.5, seed=0)
    assert result.success
    assert result.failed > 0


# -------------------------------------------------------------------------------------------------------- conventions


def test_maximize_is_the_mirror_image_and_reports_in_the_sign_of_fun():
    down = minimize(sphere, [0.0, 0.0], 0.5, ftarget=1e-6, seed=0)
    up = minimize(lambda x: -sphere(x), [0.0, 0.0], 0.5, ftarget=-1e-6, seed=0, maximize=True)
    assert up.success
    assert up.stop == {"ftarget": -1e-6}
    assert np.array_equal(up.x, down.x)
    assert (up.fun, up.best_fun, up.nfev) == (-down.fun, -down.best_fun, down.nfev)
    assert np.array_equal(up.history.best, -down.history.best)
    assert np.array_equal(up.history.median, -down.history.median)
    missed = minimize(lambda x: -sphere(x), [0.0, 0.0], 0.5, ftarget=1.0, seed=0, maximize=True)
    assert not missed.success


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("maximize", [False, True])
def test_failures_are_worst_in_both_senses(bad, maximize):
    sign = -1 if maximize else 1
    result = minimize(
        lambda x: bad if x[0] > 1.2 else sign * sphere(x),
        [0.0, 0.0],
        0.5,
        ftarget=sign * 1e-8,
        maximize=maximize,
        seed=0,
    )
    assert result.success
    assert result.failed > 0
    assert np.abs(result.best_x - 1).max() < 1e-3
    assert math.isfinite(result.best_fun)


def test_failures_that_persist_are_an_error_without_any_value_and_an_end_with_one():
    with pytest.raises(sf.NonFiniteError, match="10 generations in a row had no finite value"):
        minimize(lambda x: math.nan, [0.0, 0.0], 0.5)
    calls = []

    def fun(x):
        calls.append(x)
        return sphere(x) if len(calls) <= 60 else math.nan

    result = minimize(fun, [0.0, 0.0], 0.5, seed=0)
    assert result.stop == {"tolfailed": 10}
    assert result.status == 3
    assert result.fun == result.best_fun == sphere(result.x)
    assert np.isnan(result.history.best[-1])


def test_status_says_why():
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0).status == 0
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0, maxfevals=50).status == 1
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0, maxiter=5).status == 1
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0, callback=lambda s: True).status == 2
    assert minimize(lambda x: 1.0, [0.0, 0.0], 0.5, seed=0).status == 3


def test_a_constant_function_stops_with_tolflatfitness_at_the_start():
    result = minimize(lambda x: 1.0, [0.25, -0.5], 0.5, seed=0)
    assert result.stop == {"tolflatfitness": 1}
    assert result.x.tolist() == [0.25, -0.5]
    assert result.sigma.tolist() == pytest.approx([0.5, 0.5], rel=1e-15)


def test_timeout_is_seconds_on_the_clock():
    start = time.monotonic()
    result = minimize(lambda x: time.sleep(0.002) or sphere(x), [0.0, 0.0], 0.5, timeout=0.1, seed=0)
    assert result.stop == {"timeout": 0.1}
    assert result.status == 1
    assert 0.1 <= time.monotonic() - start < 10  # other processes may have the core meanwhile
    with pytest.raises(sf.ScorefnError, match="timeout must be a positive number of seconds, but it is 0"):
        minimize(sphere, [0.0], 0.5, timeout=0)


def test_the_history_has_a_row_per_generation():
    values = []

    def fun(x):
        f = ((x - 1) ** 2).sum(1)
        values.append(f)
        return f

    sigmas = []
    result = minimize(
        fun, [0.0] * 4, 0.5, seed=0, maxiter=7, vectorized=True, callback=lambda s: sigmas.append(float(s.sigma.max()))
    )
    history, popsize = result.history, len(values[0])
    assert len(history) == result.nit == 7
    assert history.nfev.tolist() == [popsize * (k + 1) for k in range(7)]
    assert history.best.tolist() == [float(f.min()) for f in values[:7]]
    assert history.median.tolist() == [float(np.sort(f)[(popsize - 1) // 2]) for f in values[:7]]
    assert history.sigma.tolist() == sigmas
    assert history.run.tolist() == [0] * 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.best = None


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("method", ["auto", "csanes", "rank_one", "separable", "snes", "xnes"])
def test_every_method_finds_the_bottom_also_in_one_dimension(method, dimension):
    result = minimize(sphere, [0.0] * dimension, 0.5, method=method, seed=0, ftarget=1e-10)
    assert result.success
    assert result.method == {"auto": "csanes"}.get(method, method)
    assert (result.choice == "") == (method != "auto")


def test_auto_chooses_by_dimension_and_budget():
    assert chosen(300)[0] == "csanes"
    assert chosen(301)[0] == chosen(10_000)[0] == "rank_one"
    assert chosen(10_001)[0] == "separable"
    assert chosen(30, maxfevals=1799)[0] == "separable"
    assert chosen(30, maxfevals=1800)[0] == "csanes"
    assert chosen(50, maxfevals=7499)[0] == "separable"
    assert chosen(50, maxfevals=7500)[0] == chosen(50, maxfevals=19_999)[0] == "rank_one"
    assert chosen(50, maxfevals=20_000)[0] == "csanes"
    result = minimize(sphere, np.zeros(50), 0.5, maxfevals=300, seed=0)
    assert result.method == "separable"
    assert result.choice == "300 evaluations are too few to learn a full covariance (below 8 D^2)"


def test_a_strategy_class_is_a_method_too():
    result = minimize(sphere, [0.0, 0.0], 0.5, method=functools.partial(SNES, eta_mean=0.9), seed=0, ftarget=1e-8)
    assert result.method == "snes"
    assert result.success


def test_options_reach_the_strategy_and_none_is_the_default():
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0, tolx=1e-2).stop == {"tolx": 1e-2}
    assert minimize(sphere, [0.0, 0.0], 0.5, seed=0, popsize=20, maxiter=3).nfev == 61
    assert minimize(sphere, [1e3, 0.0], 1e-3, seed=0, tolfacupx=10.0).stop == {"tolfacupx": 10.0}


def test_progress_is_a_line_now_and_then(capsys):
    lines = []
    minimize(sphere, [0.0, 0.0], 0.5, seed=0, progress=lines.append)
    assert "evaluations" in lines[0]
    assert "best" in lines[0]
    assert capsys.readouterr().err == ""
    minimize(sphere, [0.0, 0.0], 0.5, seed=0, progress=True)
    written = capsys.readouterr().err
    assert written.startswith("\r")
    assert written.endswith("\n")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.complex128(1.0), "complex128"),
        (np.complex64(1.0), "complex64"),
        (torch.tensor(1j), "Tensor"),
        ("1.5", "str"),
        (object(), "object"),
        ([1.0], "list"),
    ],
)
def test_single_values_that_are_no_real_numbers(value, shown):
    with pytest.raises(sf.ScorefnError, match=f"fun must return a real number, but it returned {shown}"):
        minimize(lambda x: value, [0.0, 0.0], 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda x: x[:, 0] + 1j, "f must hold real numbers, but it holds complex128"),
        (lambda x: np.array([None] * len(x)), "f must hold real numbers, but it holds object"),
        (lambda x: x.sum(1)[:-1], r"must be \[N\]"),
        (lambda x: None, "f must hold real numbers, but it holds object"),
    ],
)
def test_batched_values_that_are_no_real_numbers(values, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(values, [0.0, 0.0], 0.5, vectorized=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 0.0], 0.0), "sigma0 must be positive"),
        (([0.0, 0.0], -1.0), "sigma0 must be positive"),
        (([0.0, 0.0], [1.0, 0.0]), "sigma0 must be positive"),
        (([[0.0, 0.0]], 1.0), r"x0 must be one point of shape \[D\]"),
        ((3.0, 1.0), r"x0 must be one point of shape \[D\]"),
        (([], 1.0), r"x0 must be one point of shape \[D\]"),
    ],
)
def test_starts_that_make_no_sense(arguments, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(sphere, *arguments)


def test_populations_too_small_are_refused():
    with pytest.raises(sf.ScorefnError, match="popsize must be an integer of at least 4, but it is 2"):
        minimize(sphere, [0.0, 0.0], 1.0, popsize=2)
