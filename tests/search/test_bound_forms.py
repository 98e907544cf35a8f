"""Bounds in all the forms that users have: the same box, or a refusal that says what a form must be."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import SmoothBounds, minimize


def never(x):
    raise AssertionError("fun was called")


class ScipyBounds:
    lb, ub = np.array([0.0, -1.0, 0.0]), np.array([1.0, np.inf, 1.0])


@pytest.mark.parametrize(
    "bounds",
    [
        ([0.0, -1.0, 0.0], [1.0, None, 1.0]),
        (np.array([0.0, -1.0, 0.0]), np.array([1.0, np.inf, 1.0])),
        (torch.tensor([0.0, -1.0, 0.0]), [1.0, math.inf, 1.0]),
        [(0.0, 1.0), (-1.0, None), (0.0, 1.0)],
        np.array([(0.0, 1.0), (-1.0, np.inf), (0.0, 1.0)]),
        ScipyBounds(),
        SmoothBounds([0.0, -1.0, 0.0], [1.0, math.inf, 1.0]),
    ],
)
def test_all_forms_of_bounds_are_the_same_search(bounds):
    def fun(x):
        return float(((x - [2.0, 5.0, -1.0]) ** 2).sum())

    result = minimize(fun, [0.5, 0.5, 0.5], 0.3, bounds=bounds, seed=0, maxfevals=300)
    wanted = minimize(fun, [0.5, 0.5, 0.5], 0.3, bounds=SmoothBounds([0, -1, 0], [1, None, 1]), seed=0, maxfevals=300)
    assert np.array_equal(result.x, wanted.x)


def test_a_pair_of_numbers_and_one_coordinate():
    def fun(x):
        return float(x @ x + x.sum())

    for bounds in [(0.0, 1.0), [(0.0, 1.0)], ([0.0], [1.0]), (0, None)]:
        assert minimize(fun, [0.5], 0.2, bounds=bounds, seed=0).x[0] == pytest.approx(0, abs=1e-9)
    assert minimize(fun, [0.5, 0.5], 0.2, bounds=(0.0, 1.0), seed=0).x == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, 0.0), "lower bound must be below its upper bound, but it is not: lower 1.0, upper 0.0"),
        ((0.5, 0.5), "Leave a coordinate that is fixed out of x0"),
        (([0.0, 2.0, 0.0], [1.0, 1.0, 1.0]), r"coordinates \[1\]"),
        ((0.6, 1.0), r"x0 lies outside the bounds at coordinates \[0, 1, 2\]: x0 is \[0.5, 0.5, 0.5\]"),
        ([(0.0, 1.0), (0.6, 1.0), (0.0, 1.0)], r"outside the bounds at coordinates \[1\]"),
        (([0.0, 0.0], [1.0, 1.0]), r"each one number or 3 of them, or 3 pairs \(low, high\)"),
        (0.5, "bounds must be"),
        ("ab", "bounds must be"),
        ((math.nan, 1.0), "none of them NaN"),
        (SmoothBounds([0.0, 0.0], 1.0), r"bounds have shape \(2,\), but x0 has shape \(3,\)"),
    ],
)
def test_bounds_that_make_no_sense(bounds, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(lambda x: 0.0, [0.5, 0.5, 0.5], 0.1, bounds=bounds)


def linear(x):
    return float(x.sum())


@pytest.mark.parametrize(
    "pairs", [[(0.0, 5.0), (1.0, 6.0)], ([0.0, 5.0], [1.0, 6.0]), np.array([[0.0, 5.0], [1.0, 6.0]])], ids=repr
)
def test_two_pairs_are_a_pair_for_each_of_two_coordinates(pairs):
    options = {"seed": 0, "maxfevals": 200}
    result = minimize(linear, [3.0, 3.0], 0.1, bounds=pairs, **options)
    wanted = minimize(linear, [3.0, 3.0], 0.1, bounds=SmoothBounds([0.0, 1.0], [5.0, 6.0]), **options)
    assert np.array_equal(result.x, wanted.x)


@pytest.mark.parametrize(
    "bounds", [([0.0, 5.0], [10.0, 5.0]), [(0.0, 1.0), (10.0, 5.0)], ([-1.0, -1.0], [1.0, 1.0])], ids=repr
)
def test_two_crossed_pairs_are_not_read_in_another_way(bounds):
    with pytest.raises(
        sf.ScorefnError, match=r"below its upper bound.*pairs \(low, high\), one for each.*SmoothBounds\(lower, upper\)"
    ):
        minimize(never, [0.5, 0.5], 0.1, bounds=bounds)


def test_a_box_that_only_the_other_reading_would_have():
    with pytest.raises(sf.ScorefnError, match="below its upper bound"):
        minimize(never, [0.5, 2.0], 0.1, bounds=([5.0, 0.0], [1.0, 3.0]))
    result = minimize(linear, [0.5, 2.0], 0.1, bounds=(None, [1.0, 3.0]), seed=0, maxfevals=100)
    assert result.x[0] <= 1


class Scalars:
    def __init__(self, lb, ub):
        self.lb, self.ub = np.atleast_1d(lb), np.atleast_1d(ub)  # as SciPy keeps them


@pytest.mark.parametrize("bounds", [Scalars(0, 1), Scalars([0, 0, 0], 1), Scalars(0, [1, 1, 1])])
def test_scipy_bounds_are_broadcast(bounds):
    options = {"seed": 0, "maxfevals": 300}
    result = minimize(linear, [0.5] * 3, 0.1, bounds=bounds, **options)
    assert np.array_equal(result.x, minimize(linear, [0.5] * 3, 0.1, bounds=(0, 1), **options).x)


def test_scipy_itself():
    optimize = pytest.importorskip("scipy.optimize")
    result = minimize(linear, [0.5] * 3, 0.1, bounds=optimize.Bounds(0, 1), seed=0, maxfevals=300)
    assert np.array_equal(result.x, minimize(linear, [0.5] * 3, 0.1, bounds=(0, 1), seed=0, maxfevals=300).x)


@pytest.mark.parametrize(
    "bounds",
    [
        [(0.0, 1.0, 2.0), (0.0, 1.0)],
        [(0.0,), (1.0,)],
        [(0.0, 1.0), 3],
        [[0.0, "b"], [0.0, 1.0]],
        [("a", "b"), ("c", "d")],
        [([0.0], 1.0), ([0.0], 1.0)],
        [(0.0, 1.0), ([0.0], [1.0])],
        [[[0.0, 0.0], [1.0, 1.0]], None],
        {"lower": 0.0},
        {0.0, 1.0},
        np.zeros((2, 2, 2)),
        torch.zeros(2, 2, 2),
        np.array(["a", "b"]),
        object(),
        3,
        "01",
        (math.sin, math.sin),
        (None, "b"),
    ],
)
def test_bounds_of_odd_forms(bounds):
    with pytest.raises(sf.ScorefnError, match="bounds"):
        minimize(never, [0.5, 0.5], 0.1, bounds=bounds)


def test_attributes_that_look_like_bounds():
    class Box:
        lb, ub = "a", None

    with pytest.raises(sf.ScorefnError, match="lower bounds must be numbers"):
        minimize(never, [0.5, 0.5], 0.1, bounds=Box())
