"""Arguments of a wrong type or without sense are refused by name, with what was seen, before anything is spent."""

import functools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import (
    BIPOP,
    CSANES,
    IPOP,
    PGPE,
    SNES,
    BernoulliSearch,
    CategoricalSearch,
    ClipUp,
    CoordinateSearch,
    DistributionSearch,
    IntegerSearch,
    OpenAIES,
    PenalizedBounds,
    Portfolio,
    ResampledBounds,
    SignalToNoise,
    SmoothBounds,
    chosen,
    minimize,
    run,
)


def sphere(x):
    return float((x * x).sum())


def never(x):
    raise AssertionError("fun was called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maxfevals": "a"}, "maxfevals must be a number, but it is 'a'.*None for no limit"),
        ({"maxfevals": math.nan}, "maxfevals must be a number, but it is nan.*None for no limit"),
        ({"maxfevals": True}, "maxfevals must be a number, but it is True"),
        ({"maxfevals": -3}, "maxfevals must be at least 1.0, but it is -3"),
        ({"timeout": "a"}, "timeout must be a positive number of seconds, but it is 'a'"),
        ({"timeout": math.nan}, "timeout must be a positive number of seconds, but it is nan"),
        ({"callback": 3}, "callback must be a function of the strategy, or None, but it is 3"),
        ({"maximize": "no"}, "maximize must be True or False, but it is 'no'"),
        ({"maximize": None}, "maximize must be True or False, but it is None"),
        ({"vectorized": 1}, "vectorized must be True or False, but it is 1"),
        ({"progress": "x"}, "progress must be True, False or a function of a line of text, but it is 'x'"),
        ({"progress": 1}, "progress must be True, False or a function of a line of text, but it is 1"),
    ],
)
def test_arguments_of_both_loops(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(never, [0.0, 0.0], 1.0, **options)
    with pytest.raises(sf.ScorefnError, match=message):
        run(SNES([0.0, 0.0], 1.0), never, **options)


@pytest.mark.parametrize("fun", [None, 3, "f"])
def test_a_function_that_is_none(fun):
    with pytest.raises(sf.ScorefnError, match=f"fun must be a function of a point, but it is {fun!r}"):
        minimize(fun, [0.0, 0.0], 1.0)
    with pytest.raises(sf.ScorefnError, match=f"fun must be a function of a point, but it is {fun!r}"):
        run(SNES([0.0], 1.0), fun)


@pytest.mark.parametrize("strategy", [None, 3, SNES, sphere])
def test_a_strategy_that_is_none(strategy):
    with pytest.raises(sf.ScorefnError, match="strategy must have ask, tell, stop and result"):
        run(strategy, sphere)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": int}, "method must be a name or make a strategy of x0 and sigma0, but it is .*int"),
        ({"method": BernoulliSearch}, r"x0 and sigma0, but it is .*BernoulliSearch.*run\(strategy, fun\)"),
        ({"method": IntegerSearch}, r"x0 and sigma0, but it is .*IntegerSearch"),
        ({"method": functools.partial(CategoricalSearch, popsize=8)}, "x0 and sigma0, but it is .*CategoricalSearch"),
        ({"method": 3}, "method must be a name .* but it is 3"),
        ({"method": ["snes"]}, "method must be a name .* but it is"),
        ({"method": None}, "method must be a name .* but it is None"),
        ({"method": lambda x0, sigma0, **options: None}, "method must make a strategy, but it made NoneType"),
        ({"restarts": "a"}, "number of restarts must be a non-negative integer, but it is 'a'"),
        ({"seed": True}, "seed must be an integer, a torch.Generator or None, but it is True"),
        ({"seed": 2**70}, "seed must fit into 64 bits, but it is 1180591620717411303424"),
        ({"seed": "a"}, "seed must be an integer, .* but it is 'a'"),
        ({"popsize": "a"}, "popsize must be an integer of at least 4, but it is 'a'"),
        ({"maxiter": "a"}, "maxiter must be a number, but it is 'a'.*None for the default"),
        ({"ftarget": "a"}, "ftarget must be a number, but it is 'a'.*None for no target"),
        ({"tolstagnation": "a"}, "tolstagnation must be a number, but it is 'a'.*None for the default"),
        ({"tolx": "a"}, "tolx must be a number, but it is 'a'.*0 to switch a tolerance off"),
    ],
)
def test_arguments_of_minimize(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(never, [0.0, 0.0], 1.0, **options)


@pytest.mark.parametrize(
    ("x0", "sigma0", "message"),
    [
        (["a", "b"], 1.0, r"x0 must hold real numbers, but it holds <U1, namely \['a', 'b'\].*by float"),
        (None, 1.0, "x0 must hold real numbers, but it holds object, namely None"),
        ([Fraction(1, 2)], 1.0, "x0 must hold real numbers, but it holds object"),
        ([0.0], "wide", "sigma0 must hold real numbers, but it holds <U4, namely 'wide'"),
        ([0.0], None, "sigma0 must hold real numbers, but it holds object, namely None"),
        ([1e305], 1.0, r"may be as large as 1e\+150"),
        ([0.0], 1e305, r"may be as large as 1e\+150"),
    ],
)
def test_starts(x0, sigma0, message):
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(never, x0, sigma0)


@pytest.mark.parametrize("value", [10**400, Decimal(1), Fraction(1, 2), np.array(Decimal(1))], ids=repr)
def test_values_beyond_float64(value):
    with pytest.raises(sf.ScorefnError, match=f"fun must return a real number, .* returned {type(value).__name__}"):
        minimize(lambda x: value, [0.0, 0.0], 1.0)
    with pytest.raises(sf.ScorefnError, match="f must hold real numbers, but it holds object"):
        minimize(lambda x: np.array([value] * len(x), dtype=object), [0.0, 0.0], 1.0, vectorized=True)


def test_numbers_of_numpy_are_numbers():
    plain = minimize(sphere, [1.0, 1.0], 1.0, seed=3, maxfevals=300, ftarget=1e-3, restarts=1)
    other = minimize(
        sphere,
        np.ones(2, dtype=np.float32),
        np.float32(1.0),
        seed=np.int64(3),
        maxfevals=np.int64(300),
        ftarget=np.float64(1e-3),
        restarts=1,
        maximize=np.bool_(False),
    )
    assert np.array_equal(plain.x, other.x)
    assert plain.nfev == other.nfev


def test_restarts_of_seeds_of_numpy_are_those_of_python():
    def far(x):
        return 1.0 + sphere(x)

    plain, other = (minimize(far, [1.0, 1.0], 1.0, seed=seed, restarts=3) for seed in (3, np.int64(3)))
    assert plain.restarts == 3
    assert np.array_equal(plain.history.best, other.history.best)


@pytest.mark.parametrize("dimension", [0, -1, 2.5, "a", True])
def test_chosen_needs_a_dimension(dimension):
    with pytest.raises(sf.ScorefnError, match=f"dimension must be an integer of at least 1, but it is {dimension!r}"):
        chosen(dimension)


def test_chosen_needs_a_budget():
    with pytest.raises(sf.ScorefnError, match="maxfevals must be a number, but it is 'a'"):
        chosen(3, "a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothBounds(0.0, 1.0, margin="a"), "margin must be positive .* but it is 'a'"),
        (lambda: SmoothBounds(0.0, 1.0, margin=math.nan), "margin must be positive .* but it is nan"),
        (lambda: SmoothBounds({}, 1.0), "lower bounds must be numbers"),
        (lambda: PenalizedBounds(1j, 2.0), "lower bounds must be numbers"),
        (lambda: SignalToNoise(alpha="a"), "alpha must be positive, but it is 'a'"),
        (lambda: ClipUp([torch.zeros(1)], "a"), "max_speed must be a positive number, but it is 'a'"),
        (lambda: ClipUp([torch.zeros(1)], 1.0, momentum="a"), "momentum must be .* but it is 'a'"),
        (lambda: PGPE([0.0], 1.0, max_change="a"), "max_change must lie between 0 and 1, but it is 'a'"),
        (lambda: PGPE([0.0], 1.0, eta_sigma="a"), "eta_sigma must be a positive number, but it is 'a'"),
        (lambda: PGPE([0.0], 1.0, optimizer=3), "optimizer=3 cannot be called with a list of parameters"),
        (lambda: PGPE([0.0], 1.0, optimizer=ClipUp), "ClipUp.* cannot be called with a list of parameters"),
        (
            lambda: PGPE([0.0], 1.0, optimizer=lambda p: None),
            "must return a torch.optim.Optimizer .* returned NoneType",
        ),
        (
            lambda: OpenAIES([0.0], 1.0, optimizer=lambda p: ClipUp([torch.zeros(1)], 1.0)),
            "returned a ClipUp of other parameters",
        ),
        (lambda: CSANES([0.0], 1.0, learning_rate=0.5), "learning_rate=0.5 is no learning rate"),
        (lambda: CSANES([0.0], 1.0, learning_rate=SignalToNoise), "write SignalToNoise\\(\\) with parentheses"),
        (lambda: OpenAIES([0.0], 1.0, learning_rate="a"), "learning_rate must be a positive number, but it is 'a'"),
        (lambda: OpenAIES([0.0], 1.0, weight_decay="a"), "weight_decay must be 0 or positive, but it is 'a'"),
        (lambda: CoordinateSearch([0.0], 1.0, tolwidth="a"), "tolwidth must lie between 0 and 1, but it is 'a'"),
        (lambda: BernoulliSearch(3, p0="a"), "p0 must hold real numbers"),
        (lambda: BernoulliSearch(3, margin="a"), "margin must lie between 0 and 0.5, .* but it is 'a'"),
        (lambda: CategoricalSearch("33"), "categories must be integers of at least 2, .* but they are '33'"),
        (lambda: CategoricalSearch(None), "categories must be integers of at least 2, .* but they are None"),
        (lambda: CategoricalSearch([True, True]), "categories must be integers of at least 2"),
        (lambda: CategoricalSearch([3], q0=["abc"]), "q0 must hold real numbers"),
        (lambda: CategoricalSearch([3], q0=3), "q0 must be a row of probabilities for each choice, but it is 3"),
        (lambda: CategoricalSearch([2], q0=[[math.nan, 1.0]]), "give 2 probabilities that sum to 1"),
        (lambda: IntegerSearch(None, None), "lower must hold real numbers, but it holds object, namely None"),
        (lambda: IntegerSearch([0], ["9"]), "upper must hold real numbers"),
        (lambda: IntegerSearch([0], [9], margin="a"), "margin must lie between 0 and 1, but it is 'a'"),
        (lambda: IntegerSearch([0], [2**60]), r"upper is .* 2\^53"),
        (lambda: IntegerSearch([0], [2**53]), r"A coordinate may have 1,048,576 values, but .* 9,007,199,254,740,993"),
        (lambda: IntegerSearch([-(2**60)], [0]), r"lower is .* 2\^53"),
    ],
)
def test_arguments_of_strategies(make, message):
    with pytest.raises(sf.ScorefnError, match=message):
        make()


loc = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, [loc]), {}, "make must be a function without arguments, but it is 3"),
        ((None, 3), {}, "parameters must be leaf tensors"),
        ((None, "ab"), {}, "parameters must be leaf tensors"),
        ((None, [loc, loc]), {}, "parameters holds one tensor twice"),
        ((None, [loc]), {"optimizer": 3}, "optimizer must be a torch.optim.Optimizer, but it is 3"),
        ((None, [loc]), {"optimizer": torch.optim.Adam}, "optimizer must be a torch.optim.Optimizer, but it is .*Adam"),
        ((None, [loc]), {"coupling": 3}, "coupling=3 is no coupling"),
        ((None, [loc]), {"coupling": sf.Antithetic}, "coupling=Antithetic is a class"),
        ((None, [loc]), {"shape": 3}, "shape=3 is no shape"),
        ((None, [loc]), {"shape": sf.shaping.NESUtilities}, "shape=NESUtilities is a class"),
        ((None, [loc]), {"baseline": 3}, "baseline=3 is no baseline"),
        ((None, [loc]), {"baseline": sf.LeaveOneOut}, "baseline=LeaveOneOut is a class"),
        ((None, [loc]), {"natural": "yes"}, "natural must be True or False, but it is 'yes'"),
        ((None, [loc]), {"popsize": None}, "popsize must be an integer of at least 2, but it is None.*Give 20"),
    ],
)
def test_arguments_of_a_distribution_search(arguments, options, message):
    make, parameters = arguments
    make = (lambda: td.Normal(loc, 1.0)) if make is None else make
    with pytest.raises(sf.ScorefnError, match=message):
        DistributionSearch(make, parameters, **{"popsize": 8, **options})


@pytest.mark.parametrize("x", [None, "a", [None] * 8, [["a", "b"]] * 8], ids=str)
def test_points_of_a_distribution_search(x):
    strategy = DistributionSearch(lambda: td.Normal(loc, 1.0), [loc], popsize=8)
    with pytest.raises(sf.ScorefnError, match="x must hold real numbers"):
        strategy.tell(x, range(8))


def test_a_support_that_moves_is_refused_by_the_check_of_draw():
    width = torch.ones(2, requires_grad=True)
    with pytest.raises(sf.SupportError, match="support of Uniform moves with a parameter"):
        DistributionSearch(lambda: td.Uniform(0.0, width), [width], popsize=8)
    with torch.no_grad(), pytest.raises(sf.SupportError, match="support of Uniform moves"):
        DistributionSearch(lambda: td.Uniform(0.0, width), [width], popsize=8)
    DistributionSearch(lambda: td.Normal(width, 1.0), [width], popsize=8)


def test_noise_constants_reach_the_strategy():
    assert "mean_rate" in CSANES([0.0], 1.0, learning_rate=SignalToNoise(alpha=2)).state_dict()


# ------------------------------------------------------------------------------------------------- integers of any kind


class Whole:
    """An integer by __index__ alone."""

    def __index__(self):
        return 8


@pytest.mark.parametrize("eight", [np.int64(8), np.uint8(8), Whole()], ids=["int64", "uint8", "__index__"])
def test_whatever_has_an_index_is_an_integer(eight):
    for kind in (CSANES, SNES, PGPE, CoordinateSearch):
        popsize = 2 * int(eight.__index__())
        assert kind([0.0, 0.0], 1.0, popsize=np.int64(popsize)).popsize == popsize
    assert type(SNES([0.0], 1.0, popsize=eight).popsize) is int
    assert BernoulliSearch(eight).dimension == 8
    assert CategoricalSearch([eight, 3], popsize=eight).popsize == 8
    assert DistributionSearch(lambda: td.Normal(loc, 1.0), [loc], popsize=eight).popsize == 8
    assert [IPOP(eight).maximum, BIPOP(eight).maximum, Portfolio(eight).maximum] == [8, 8, 8]
    assert ResampledBounds(0.0, 1.0, attempts=eight)
    result = minimize(sphere, [1.0, 1.0], 1.0, popsize=eight, restarts=np.int64(1), seed=0, tolx=1e-2)
    assert result.restarts == 1


@pytest.mark.parametrize("flag", [True, np.True_], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda flag: SNES([0.0], 1.0, popsize=flag),
        BernoulliSearch,
        IPOP,
        lambda flag: ResampledBounds(0.0, 1.0, attempts=flag),
        lambda flag: minimize(never, [0.0], 1.0, restarts=flag),
    ],
)
def test_a_flag_is_no_integer(make, flag):
    with pytest.raises(sf.ScorefnError, match="integer|number of bits"):
        make(flag)


# --------------------------------------------------------------------------------------------------------- out of range


@pytest.mark.parametrize("name", ["maxfevals", "timeout", "maxiter", "ftarget", "tolx"])
def test_numbers_beyond_float64(name):
    with pytest.raises(sf.ScorefnError, match=f"{name} must be a "):
        minimize(never, [0.0, 0.0], 1.0, **{name: 10**400})


@pytest.mark.parametrize("method", ["csanes", "snes", "separable", functools.partial(CSANES, popsize=10**9)])
def test_a_generation_that_the_budget_does_not_pay_for_is_refused_before_it_takes_memory(method):
    options = {} if callable(method) else {"popsize": 10**9}
    with pytest.raises(sf.ScorefnError, match="maxfevals=100 must pay for one generation of 1000000000 points"):
        minimize(never, [0.0, 0.0], 1.0, method=method, maxfevals=100, **options)


@pytest.mark.parametrize("popsize", [2**32, 10**400], ids=["many", "huge"])
def test_a_generation_that_no_memory_holds(popsize):
    for kind in (CSANES, SNES, PGPE):
        with pytest.raises(sf.ScorefnError, match="popsize may be as large as 2,147,483,648"):
            kind([0.0], 1.0, popsize=popsize)


@pytest.mark.parametrize("kind", [PGPE, OpenAIES])
def test_an_optimizer_that_needs_the_function_itself_is_refused(kind):
    with pytest.raises(sf.ScorefnError, match="LBFGS.* closure.*Adam"):
        kind([0.0], 1.0, optimizer=lambda p: torch.optim.LBFGS(p))


def test_so_it_is_by_the_search_of_any_distribution():
    with pytest.raises(sf.ScorefnError, match="LBFGS.* closure.*Adam"):
        DistributionSearch(lambda: td.Normal(loc, 1.0), [loc], popsize=8, optimizer=torch.optim.LBFGS([loc]))


# ------------------------------------------------------------------------------------------------ a method made in part


def test_the_seed_of_a_partial_method_is_its_seed():
    def found(method, **options):
        return minimize(sphere, [1.0, 1.0], 1.0, method=method, maxfevals=300, ftarget=0.0, **options).history.best

    first = found(functools.partial(SNES, seed=6))
    assert np.array_equal(first, found(functools.partial(SNES, seed=6)))
    assert np.array_equal(first, found(SNES, seed=6))
    assert np.array_equal(found(functools.partial(SNES, seed=6), seed=7), found(SNES, seed=7))


def test_so_are_its_popsize_and_maxiter():
    result = minimize(sphere, [1.0, 1.0], 1.0, method=functools.partial(SNES, popsize=30, maxiter=4), seed=0)
    assert (result.nit, result.nfev, result.stop) == (4, 121, {"maxiter": 4})
    result = minimize(
        sphere, [1.0, 1.0], 1.0, method=functools.partial(SNES, popsize=30, maxiter=4), seed=0, popsize=10, maxiter=6
    )
    assert (result.nit, result.nfev) == (6, 61)
