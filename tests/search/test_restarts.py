"""Restarts: the row of runs is the published one, and a search with restarts counts all of them."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import BIPOP, CSANES, IPOP, SNES, Arm, Restarts, SmoothBounds, minimize


def followed(policy, popsize, spent, uniform=lambda: 0.5):
    """The arms of a policy, when a run of N points spends ``spent(arm)``."""
    arms = policy.runs(popsize, uniform)
    found = [next(arms)]
    while True:
        try:
            found.append(arms.send(spent(found[-1])))
        except StopIteration:
            return found


def test_ipop_doubles():
    assert [arm.popsize for arm in followed(IPOP(4), 7, lambda arm: 100)] == [7, 14, 28, 56, 112]


@pytest.mark.parametrize("maximum", [0, 1, 3])
@pytest.mark.parametrize("policy", [IPOP, BIPOP])
def test_maximum_counts_the_restarts(policy, maximum):
    assert len(followed(policy(maximum), 10, lambda arm: 100 * arm.popsize)) == maximum + 1


def test_bipop_is_its_formula():
    draws = iter([0.0, 0.0, 1.0, 0.5, 0.8, 1.0] + [0.5] * 100)
    found = followed(BIPOP(5), 10, lambda arm: min(arm.budget, 100 * arm.popsize), lambda: next(draws))
    # first; large 20 spends 2000; small of 10 (U = 0, sigma0 1) spends 1000; small (U = 1) of 10 spends 1000 more;
    # large 40 spends 4000; small: 10 (40/20)^(0.64) = 15.58 -> 16, sigma0 10^-2, may spend 2000
    assert found == [
        Arm(10),
        Arm(20),
        Arm(10, 1.0, 1000.0),
        Arm(10, 10**-1.0, 1000.0),
        Arm(40),
        Arm(16, 10**-2.0, 2000.0),
    ]


def test_a_small_run_has_fifty_generations_at_least():
    found = followed(BIPOP(2), 10, lambda arm: 30)
    assert found[2].budget == 500


def test_the_small_runs_of_bipop_spend_about_as_much_as_the_large_ones():
    generator = torch.Generator().manual_seed(0)
    sums = {True: 0, False: 0}

    def spent(arm):
        cost = min(arm.budget, 80 * arm.popsize)
        sums[math.isinf(arm.budget)] += cost
        return cost

    followed(BIPOP(60), 10, spent, lambda: float(torch.rand((), generator=generator)))
    assert 0.5 < sums[False] / sums[True] < 1.1


# ------------------------------------------------------------------------------------------------------ whole searches


def rastrigin(x):
    return float(10 * len(x) + (x * x - 10 * np.cos(2 * np.pi * x)).sum())


def test_restarts_reach_what_one_run_does_not():
    start = [3.3, -4.1, 2.2]
    single = minimize(rastrigin, start, 2.0, ftarget=1e-8, maxfevals=30_000, restarts=0, seed=1)
    assert not single.success
    assert single.restarts == 0
    several = minimize(rastrigin, start, 2.0, ftarget=1e-8, maxfevals=30_000, seed=1)
    assert several.success
    assert several.restarts >= 1
    assert several.stop == {"ftarget": 1e-8}
    assert several.status == 0


def test_all_runs_are_counted_and_stand_in_the_history():
    calls = []
    result = minimize(lambda x: calls.append(x) or rastrigin(x), [3.3, -4.1], 1.0, restarts=IPOP(3), seed=2)
    assert result.restarts == 3
    assert result.nfev == len(calls)
    history = result.history
    assert result.nit == len(history)
    assert history.run.tolist() == sorted(history.run.tolist())
    assert set(history.run) == {0, 1, 2, 3}
    sizes = np.diff(history.nfev, prepend=0)
    means = np.diff(history.run, prepend=0)  # the mean of the run before was evaluated in between
    assert {run: set((sizes - means)[history.run == run]) for run in range(4)} == {
        run: {2**run * CSANES([0.0, 0.0], 1.0).popsize} for run in range(4)
    }
    assert history.best.min() == result.best_fun
    assert result.fun == rastrigin(result.x)


@pytest.mark.parametrize("maxfevals", [100, 2000, 5003])
def test_the_budget_holds_over_all_runs(maxfevals):
    calls = []
    result = minimize(
        lambda x: calls.append(x) or rastrigin(x), [3.3, -4.1], 1.0, ftarget=-1.0, maxfevals=maxfevals, seed=2
    )
    assert len(calls) == result.nfev <= maxfevals
    assert "maxfevals" in result.stop
    assert result.status == 1
    assert maxfevals < 2000 or result.restarts > 0


def test_restarts_happen_by_default_only_where_a_target_and_a_budget_are_given():
    options = {"seed": 0, "tolx": 1e-3}
    assert minimize(rastrigin, [3.3], 0.5, **options).restarts == 0
    assert minimize(rastrigin, [3.3], 0.5, ftarget=-1.0, **options).restarts == 0
    assert minimize(rastrigin, [3.3], 0.5, maxfevals=3000, **options).restarts == 0
    assert minimize(rastrigin, [3.3], 0.5, ftarget=-1.0, maxfevals=3000, **options).restarts > 0
    assert minimize(rastrigin, [3.3], 0.5, ftarget=-1.0, timeout=0.5, **options).restarts > 0
    assert minimize(rastrigin, [3.3], 0.5, ftarget=-1.0, maxfevals=3000, restarts=0, **options).restarts == 0


def test_fresh_starts_are_uniform_in_the_box_or_four_sigma_wide():
    box = SmoothBounds([0.0, None, 0.0], [8.0, None, None])
    center = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    box.fit(center)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.full((3,), 0.5, dtype=torch.float64)
    starts = torch.stack([box.fresh(center, sigma, generator) for _ in range(4000)])
    low, high = starts.min(0).values, starts.max(0).values
    assert 0 <= low[0] < 0.02
    assert 7.98 < high[0] <= 8
    assert 4 <= low[1] < 4.01
    assert 5.99 < high[1] <= 6
    assert low[2] == 0  # clipped
    assert 1.49 < high[2] <= 1.5
    deciles = torch.histc(starts[:, 0], bins=10, min=0, max=8)
    assert float(((deciles - 400) ** 2 / 400).sum()) < 27.9  # chi-square, 9 degrees of freedom, 1 in 1000


def test_runs_with_the_same_seed_are_the_same_and_restarts_differ_from_one_another():
    first, second = (minimize(rastrigin, [3.3, -4.1], 1.0, restarts=2, seed=5) for _ in range(2))
    assert np.array_equal(first.history.best, second.history.best)
    assert np.array_equal(first.x, second.x)
    ends = [first.history.best[first.history.run == run][0] for run in range(3)]
    assert len(set(ends)) == 3


def test_a_first_run_is_the_same_with_and_without_restarts():
    alone = minimize(rastrigin, [3.3, -4.1], 1.0, seed=5)
    followed_up = minimize(rastrigin, [3.3, -4.1], 1.0, seed=5, restarts=1)
    assert np.array_equal(alone.history.best, followed_up.history.best[followed_up.history.run == 0])


def test_maxiter_is_that_of_all_runs():
    result = minimize(rastrigin, [3.3], 0.5, restarts=5, maxiter=150, seed=0)
    assert result.nit <= 150
    assert result.restarts > 0 or result.nit == 150


def test_a_policy_of_ones_own_may_change_the_method():
    seen = []

    class Both(Restarts):
        def arms(self, popsize, uniform):
            yield Arm(popsize)
            yield Arm(12, 0.5, math.inf, "snes")

    minimize(rastrigin, [3.3, 1.0], 0.5, restarts=Both(1), seed=0, callback=lambda s: seen.append((type(s), s.popsize)))
    assert set(seen) == {(CSANES, CSANES([0.0, 0.0], 1.0).popsize), (SNES, 12)}


def test_a_restart_by_another_method_gets_the_limits_but_not_the_options_of_the_first():
    class Both(Restarts):
        def arms(self, popsize, uniform):
            yield Arm(popsize)
            yield Arm(8, method="csanes")

    result = minimize(rastrigin, [3.3, 1.0], 0.5, method="snes", eta_mean=0.9, tolx=1e-3, restarts=Both(), seed=0)
    assert result.restarts == 1  # the policy ends by itself
    assert "tolx" in result.stop
    assert result.method == "snes"


def test_a_restart_without_any_value_ends_and_the_first_run_counts():
    first = minimize(lambda x: float(x @ x), [0.5, 0.5], 0.2, seed=0)
    calls = []

    def fun(x):
        calls.append(x)
        return float(x @ x) if len(calls) <= first.nfev else math.nan

    result = minimize(fun, [0.5, 0.5], 0.2, restarts=2, seed=0)
    assert result.restarts == 2
    assert result.stop == {"tolfailed": 10}
    assert result.fun == first.fun
    assert result.success  # the run that x is from converged


def test_numbers_of_restarts_that_make_no_sense():
    for restarts in (-1, 1.5, "many", True):
        with pytest.raises(sf.ScorefnError, match="number of restarts must be a non-negative integer"):
            minimize(rastrigin, [0.0], 1.0, restarts=restarts)


def test_a_function_gives_the_start_of_each_run():
    given, asked = iter([[3.0, 3.0], [-2.0, 1.0], [4.0, 0.5], [0.0, 0.0]]), []

    def fun(x):
        asked.append(x)
        return rastrigin(x)

    result = minimize(fun, lambda: next(given), 1e-9, method="snes", restarts=IPOP(2), maxiter=3, tolx=1e-8, seed=0)
    assert result.restarts == 2
    new = np.flatnonzero(np.diff(result.history.run))  # the last generation of a run; its mean was evaluated after it
    starts = [asked[0], *(asked[nfev + 1] for nfev in result.history.nfev[new])]
    assert np.allclose(starts, [[3.0, 3.0], [-2.0, 1.0], [4.0, 0.5]], atol=1e-7)
    assert next(given) == [0.0, 0.0]  # one call a run


def test_starts_of_a_function_are_checked():
    with pytest.raises(sf.ShapeError, match="one point of shape"):
        minimize(rastrigin, lambda: [[1.0, 2.0]], 1.0)
