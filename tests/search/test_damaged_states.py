"""A state with numbers that no healthy search has is refused, and nothing changes."""

import copy
import math

import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, CoordinateSearch, PenalizedBounds
from tests.search.test_saved_state import each, same, values


def damaged(state, path=()):
    """The state with one number of each entry replaced by what cannot be there; where, and the state."""
    for key, value in state.items():
        here = (*path, key)
        if key in ("generator", "asked", "strategy"):
            continue
        if isinstance(value, dict):
            yield from ((where, {**state, key: part}) for where, part in damaged(value, here))
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            for bad in (math.nan, math.inf):
                broken = value.detach().clone()
                broken.view(-1)[-1] = bad
                yield here, {**state, key: broken}
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            yield here, {**state, key: -5}
        elif isinstance(value, float):
            yield here, {**state, key: math.nan}
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            yield here, {**state, key: [torch.full_like(value[0], math.nan), *value[1:]]}
        elif isinstance(value, list) and value:
            yield here, {**state, key: [math.nan, *value[1:]]}


def refused(strategy, state):
    try:
        strategy.load_state_dict(state)
    except sf.ScorefnError:
        return True
    return False


@each
@pytest.mark.parametrize("generations", [1, 3])
def test_numbers_that_no_search_has_are_refused(make, generations):
    strategy = make(0)
    for _ in range(generations):
        strategy.tell(x := strategy.ask(), values(x))
    x = strategy.ask()
    before = strategy.state_dict()
    tried = 0
    for where, state in damaged(copy.deepcopy(before)):
        if "optimizer" in where and isinstance(where[-1], str) and where[-1] not in ("velocity", "exp_avg"):
            continue  # rates and counters are the business of the optimiser
        if strategy.method == "distribution" and where == ("sigma0",):
            continue  # a family may have no variance
        tried += 1
        assert refused(strategy, state), f"{where} was accepted"
        assert same(before, strategy.state_dict())
    assert tried > 10
    strategy.tell(x, values(x))


def test_the_message_names_the_entry():
    strategy = SNES([0.0, 0.0], 1.0, seed=0)
    state = strategy.state_dict()
    with pytest.raises(sf.ScorefnError, match=r"state's location is not finite, as it holds nan.*an undamaged"):
        strategy.load_state_dict({**state, "location": torch.tensor([0.0, math.nan], dtype=torch.float64)})
    strategy = CSANES([0.0, 0.0], 1.0, seed=0)
    with pytest.raises(sf.ScorefnError, match="state's updates is -5, but it is a count"):
        strategy.load_state_dict({**strategy.state_dict(), "updates": -5})


@pytest.mark.parametrize("popsize", [1, 7])
def test_a_generation_that_the_strategy_cannot_have(popsize):
    strategy = CSANES([0.0, 0.0], 1.0, seed=0)
    before = strategy.state_dict()
    with pytest.raises(sf.ScorefnError, match=f"popsize .*{popsize}"):
        strategy.load_state_dict({**before, "popsize": popsize})
    assert same(before, strategy.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"coordinate": -5},
        {"coordinate": 4},
        {"looks": -1},
        {"spacing": 0.0},
        {"spacing": -1.0},
        {"places": ["a"] * 10},
        {"places": [0.0]},
        {"values": [0.0]},
        {"values": [math.nan] * 10},
        {"places": [], "values": []},
        {"popsize": 7},
    ],
    ids=str,
)
def test_a_sweep_that_is_none(change):
    strategy = CoordinateSearch([1.0, 2.0, 3.0], 1.0, seed=0)
    strategy.tell(x := strategy.ask(), values(x))
    before = strategy.state_dict()
    with pytest.raises(sf.ScorefnError):
        strategy.load_state_dict({**before, **change})
    assert same(before, strategy.state_dict())


def test_a_sweep_of_another_line_goes_on():
    strategy, other = (CoordinateSearch([1.0, 2.0], 1.0, seed=seed, popsize=size) for seed, size in [(0, 32), (1, 64)])
    other.load_state_dict(strategy.state_dict())
    assert torch.equal(strategy.ask(), other.ask())


def test_a_sweep_over_failures_goes_on():
    strategy, other = (CoordinateSearch([1.0, 2.0, 3.0], 1.0, seed=seed) for seed in (0, 1))
    f = torch.full((64,), math.nan)
    f[:3] = 0.0
    strategy.tell(strategy.ask(), f)
    assert math.inf in strategy.state_dict()["values"]
    other.load_state_dict(strategy.state_dict())
    assert torch.equal(strategy.ask(), other.ask())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state of PenalizedBounds"),
        (None, "no state of PenalizedBounds"),
        (3, "no state of PenalizedBounds"),
        ({"weights": None}, "no state of PenalizedBounds"),
        ({"weights": "a", "ranges": []}, "weights"),
        ({"weights": torch.ones(3, dtype=torch.float64), "ranges": [1.0]}, r"shape \(3,\).*2 coordinates"),
        ({"weights": torch.tensor([1.0, math.nan], dtype=torch.float64), "ranges": [1.0]}, "weights"),
        ({"weights": torch.tensor([1.0, -1.0], dtype=torch.float64), "ranges": [1.0]}, "weights"),
        ({"weights": None, "ranges": ["a"]}, "ranges"),
        ({"weights": None, "ranges": [math.nan]}, "ranges"),
        ({"weights": None, "ranges": 3}, "ranges"),
    ],
    ids=str,
)
def test_the_state_of_penalized_bounds(state, message):
    box = PenalizedBounds(0.0, 1.0)
    box.start(torch.full((2,), 0.5, dtype=torch.float64))
    good = {"weights": torch.ones(2, dtype=torch.float64), "ranges": [1.0]}
    box.load_state_dict(good)
    with pytest.raises(sf.ScorefnError, match=message):
        box.load_state_dict(state)
    assert same(box.state_dict(), good)
