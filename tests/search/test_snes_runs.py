"""Runs of SNES: randomness, resuming, refusals."""

import io
import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import SNES
from tests.search.snes_cases import parameters

# --- randomness and resuming -----------------------------------------------------------------------------------------


def sphere(x):
    return x.square().sum(-1)


def run(strategy, generations):
    for _ in range(generations):
        x = strategy.ask()
        strategy.tell(x, sphere(x))
    return strategy


def test_one_seed_reproduces_the_run():
    first, second, third = (run(SNES([1.0, 2.0], 0.5, seed=seed), 5).location for seed in (7, np.int64(7), 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_without_a_seed_the_global_generator_decides_and_with_one_it_is_left_alone():
    torch.manual_seed(5)
    first = SNES([1.0, 2.0], 0.5).ask()
    torch.manual_seed(5)
    assert torch.equal(first, SNES([1.0, 2.0], 0.5).ask())
    state = torch.get_rng_state()
    run(SNES([1.0, 2.0], 0.5, seed=0), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_as_seed_gives_each_strategy_its_own_stream():
    generator = torch.Generator().manual_seed(0)
    first, second = SNES([0.0], 1.0, seed=generator).ask(), SNES([0.0], 1.0, seed=generator).ask()
    assert not torch.equal(first, second)
    assert torch.equal(first, SNES([0.0], 1.0, seed=torch.Generator().manual_seed(0)).ask())


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit():
    limits = {"ftarget": 1e-8, "popsize": 9, "eta_mean": 0.9}
    whole = SNES([1.0, 2.0, 3.0], 0.5, seed=0, **limits)
    run(whole, 15).ask()  # also between ask and tell
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    run(whole, 30)
    resumed = SNES([0.0, 0.0, 0.0], 9.0, seed=99, ftarget=1e-8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.result.iterations == 15
    run(resumed, 30)
    while not whole.stop:
        run(whole, 1)
        run(resumed, 1)
    assert all(map(torch.equal, parameters(whole), parameters(resumed)))
    assert torch.equal(whole.ask(), resumed.ask())
    assert (whole.stop, whole.result.evaluations, whole.result.best_f) == (
        resumed.stop,
        resumed.result.evaluations,
        resumed.result.best_f,
    )
    assert torch.equal(whole.result.best_x, resumed.result.best_x)


def test_a_state_dict_is_a_copy_and_a_stopped_search_loads_as_stopped():
    strategy = run(SNES([1.0, 2.0], 0.5, seed=0, ftarget=1e3), 1)
    state = strategy.state_dict()
    kept = state["location"].clone()
    run(strategy, 3)
    assert torch.equal(state["location"], kept)
    resumed = SNES([0.0, 0.0], 1.0, ftarget=1e3)
    resumed.load_state_dict(state)
    assert resumed.stop == {"ftarget": 1e3}


def test_a_resumed_search_knows_how_wide_it_began():
    def slope(strategy):
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, x.sum(-1))
        return strategy

    state = run(SNES([1.0, 2.0], 1e-3, seed=0), 1).state_dict()
    resumed = SNES([0.0, 0.0], 1.0)
    resumed.load_state_dict(state)
    assert slope(resumed).stop == {"tolfacupx": 1e3}
    assert resumed.result.sigma.max() < 100


def test_a_foreign_state_is_refused_and_nothing_changes():
    strategy = SNES([1.0, 2.0], 0.5, seed=0)
    before = parameters(strategy)
    with pytest.raises(sf.ScorefnError, match=r"location has shape \(3,\), but this search has shape \(2,\)"):
        strategy.load_state_dict(SNES([0.0] * 3, 1.0).state_dict())
    with pytest.raises(sf.ScorefnError, match=r"no state of SNES.*'XNES'.*SNES\.state_dict\(\)"):
        strategy.load_state_dict({**strategy.state_dict(), "strategy": "XNES"})
    with pytest.raises(sf.ScorefnError, match="no state of SNES"):
        strategy.load_state_dict({"strategy": "SNES"})
    assert all(map(torch.equal, before, parameters(strategy)))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0, 1.0]], 1.0), sf.ShapeError, r"one point of shape \[D\], but it has shape \(1, 2\).*Flatten it"),
        ((torch.zeros(2, 2), 1.0), sf.ShapeError, r"\(2, 2\)"),
        ((3.0, 1.0), sf.ShapeError, r"shape \(\)"),
        (([], 1.0), sf.ShapeError, r"shape \(0,\)"),
        (([[1.0], [1.0, 2.0]], 1.0), sf.ShapeError, "ragged"),
        (([0.0, math.nan], 1.0), sf.NonFiniteError, r"not finite at coordinates \[1\]"),
        (([math.inf], 1.0), sf.NonFiniteError, r"\[0\]"),
        ((["a"], 1.0), sf.ScorefnError, "x0 must hold real numbers"),
        (([1j], 1.0), sf.ScorefnError, "x0 must hold real numbers"),
        ((torch.zeros(2, dtype=torch.cfloat), 1.0), sf.ScorefnError, "x0 is complex"),
        (([0.0], 0.0), sf.ScorefnError, "sigma0 must be positive and finite, but it is 0.0.*quarter"),
        (([0.0], -1.0), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0], math.nan), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0, 0.0], [1.0, 0.0]), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0, 0.0], [1.0, 1.0, 1.0]), sf.ShapeError, r"sigma0 has shape \(3,\), but x0 has shape \(2,\)"),
    ],
)
def test_starts_and_step_sizes_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        SNES(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"popsize": 1}, "popsize must be an integer of at least 2, but it is 1: fewer points cannot be ranked"),
        ({"popsize": 4.0}, "popsize must be an integer"),
        ({"popsize": True}, "popsize must be an integer"),
        ({"seed": 1.5}, r"seed must be an integer, a torch\.Generator or None, but it is 1\.5"),
        ({"seed": np.random.default_rng(0)}, "seed must be an integer"),
        ({"eta_mean": 0.0}, "eta_mean must be a positive number"),
        ({"eta_sigma": math.nan}, "eta_sigma must be a positive number"),
        ({"ftarget": math.nan}, "ftarget must be a number, but it is nan.*None for no target"),
        ({"tolx": math.nan}, "tolx must be a number.*0 to switch"),
        ({"tolx": None}, "tolx must be a number"),
        ({"tolfun": -1.0}, "tolfun must be at least 0"),
        ({"maxiter": 0}, "maxiter must be at least 1"),
        ({"maxfevals": 5}, "maxfevals=5 does not pay for one generation of 6 points: raise it, or lower popsize"),
        (
            {"pop_size": 8},
            r"SNES has no option 'pop_size'.*It knows popsize, eta_mean, .*, ftarget, maxfevals, .*tolfailed\.",
        ),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        SNES([0.0, 0.0], 1.0, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, f: (x, f[:-1]),
            sf.ShapeError,
            r"must be \[N\] = \(6,\), but they have shape \(5,\)\. Give one value",
        ),
        (
            lambda x, f: (x, f[:, None]),
            sf.ShapeError,
            r"shape \(6, 1\)\. The trailing 1 would broadcast.*squeeze\(-1\)",
        ),
        (lambda x, f: (x, f.numpy()[:, None].tolist()), sf.ShapeError, r"\(6, 1\)"),
        (lambda x, f: (x, f.sum()), sf.ShapeError, r"shape \(\)"),
        (lambda x, f: (x, None), sf.ScorefnError, "f must hold real numbers, but it holds object.*Tell NaN"),
        (lambda x, f: (x, [None] * 6), sf.ScorefnError, "f must hold real numbers"),
        (lambda x, f: (x, f.to(torch.cfloat)), sf.ScorefnError, "f is complex"),
        (lambda x, f: (x[:-1], f[:-1]), sf.ShapeError, r"whole generation, \[N, D\] = \(6, 2\).*has shape \(5, 2\)"),
        (lambda x, f: (x[:, 0], f), sf.ShapeError, r"has shape \(6,\)"),
        (lambda x, f: (x.T, f), sf.ShapeError, r"has shape \(2, 6\)"),
        (lambda x, f: ([*list(x)[:-1], x[0, :1]], f), sf.ShapeError, "list of tensors of different shapes"),
        (lambda x, f: (x.where(x != x[3], torch.nan), f), sf.NonFiniteError, r"points are not finite in rows \[3\]"),
        (lambda x, f: (x * 1e200, f), sf.NonFiniteError, "mean or sigma infinite.*too many standard deviations away"),
        (lambda x, f: (x.abs() * -1e200, f), sf.NonFiniteError, r"deviations away \(up to \d\.\de\+(199|20\d)\)"),
    ],
)
def test_a_generation_that_does_not_fit_is_refused_and_nothing_changes(change, error, message):
    strategy = run(SNES([0.0, 0.0], 1.0, seed=0), 2)
    x, state = strategy.ask(), strategy.state_dict()
    with pytest.raises(error, match=message):
        strategy.tell(*change(x, sphere(x)))
    for name, value in strategy.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name
    assert strategy.result.evaluations == 12


def test_generations_without_a_finite_value_are_counted_and_at_last_refused():
    strategy = SNES([0.0, 0.0], 1.0, seed=0)
    for _ in range(9):
        strategy.tell(strategy.ask(), [math.nan] * 6)
    assert strategy.result.failed == strategy.result.evaluations == 54
    assert strategy.result.best_x is None
    with pytest.raises(sf.NonFiniteError, match=r"10 generations in a row had no finite value.*lower sigma0"):
        strategy.tell(strategy.ask(), [math.nan] * 6)
    assert strategy.result.failed == 54
    run(strategy, 1)  # one good generation, and the count starts afresh
    for _ in range(9):
        strategy.tell(strategy.ask(), [math.inf] * 6)
    assert strategy.result.failed == 108


def test_repr_says_where_the_search_stands():
    assert repr(run(SNES([1.0, 1.0], 1.0, seed=0), 3)).startswith(
        "SNES(dimension=2, popsize=6, generation=3, evaluations=18, best_f="
    )


@pytest.mark.parametrize("name", ["log_scale", "sigma0", "generator"])
def test_a_state_that_does_not_fit_changes_nothing(name):
    strategy = SNES([1.0, -1.0], 0.5, seed=0)
    x = strategy.ask()
    strategy.tell(x, x.square().sum(-1))
    bad = strategy.state_dict()
    bad["location"] = bad["location"] + 1.0
    bad[name] = torch.zeros(3, dtype=torch.uint8 if name == "generator" else torch.float64)
    before, generator = parameters(strategy), strategy.state_dict()["generator"]
    with pytest.raises(sf.ScorefnError, match="generator" if name == "generator" else r"shape \(3,\)"):
        strategy.load_state_dict(bad)
    assert all(map(torch.equal, before, parameters(strategy)))
    assert torch.equal(strategy.state_dict()["generator"], generator)
