"""Any strategy, saved at any moment, goes on to the bit; what is no state of it is refused and changes nothing."""

import copy
import io

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import (
    CSANES,
    PGPE,
    SNES,
    XNES,
    BernoulliSearch,
    CategoricalSearch,
    ClipUp,
    CoordinateSearch,
    DistributionSearch,
    IntegerSearch,
    OpenAIES,
    ProductSearch,
    RankOneCSANES,
    SeparableCSANES,
    SignalToNoise,
)

X0 = [1.0, -2.0, 0.5]


def distribution(seed, **options):
    loc = torch.tensor(X0, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    return DistributionSearch(
        lambda: td.Normal(loc, log_scale.exp()), [loc, log_scale], popsize=8, seed=seed, **options
    )


def product(seed):
    return ProductSearch(
        {
            "x": CSANES(X0, 1.0, popsize=10, seed=seed),
            "y": SeparableCSANES(X0, 1.0, popsize=10, seed=seed + 1),
            "kind": CategoricalSearch([3, 5], popsize=10, seed=seed + 2),
        }
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


MAKES = {
    "csanes": lambda seed: CSANES(X0, 1.0, seed=seed),
    "careful csanes": lambda seed: CSANES(X0, 1.0, learning_rate=SignalToNoise(), seed=seed),
    "rank one": lambda seed: RankOneCSANES(X0, 1.0, seed=seed),
    "rank one float32": lambda seed: RankOneCSANES(X0, 1.0, dtype=torch.float32, seed=seed),
    "separable": lambda seed: SeparableCSANES(X0, 1.0, seed=seed),
    "wide separable": lambda seed: SeparableCSANES([0.5] * 1100, 1.0, seed=seed),
    "snes": lambda seed: SNES(X0, 1.0, seed=seed),
    "xnes": lambda seed: XNES(X0, 1.0, seed=seed),
    "pgpe": lambda seed: PGPE(X0, 1.0, seed=seed),
    "pgpe by adam": lambda seed: PGPE(X0, 1.0, optimizer=adam, seed=seed),
    "openai_es": lambda seed: OpenAIES(X0, 1.0, seed=seed),
    "coordinates": lambda seed: CoordinateSearch(X0, 1.0, seed=seed),
    "bernoulli": lambda seed: BernoulliSearch(5, seed=seed),
    "categorical": lambda seed: CategoricalSearch([3, 5, 2], seed=seed),
    "integer": lambda seed: IntegerSearch([0, -5], [9, 5], seed=seed),
    "product": product,
    "distribution": distribution,
    "natural distribution": lambda seed: distribution(seed, natural=True),
    "antithetic distribution": lambda seed: distribution(seed, coupling=sf.Antithetic()),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def values(x):
    parts = x.values() if isinstance(x, dict) else [x]
    return sum((part.double() - 0.3).square().sum(-1) for part in parts)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(strategy):
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each
def test_a_search_saved_between_ask_and_tell_goes_on_to_the_bit(make):
    whole = make(5)
    for generation in range(8):
        x = whole.ask()
        if generation == 4:
            x = whole.ask()  # the last points asked are the ones that count
        resumed = make(9)
        resumed.ask()
        resumed.load_state_dict(saved(whole))
        assert same(whole.state_dict(), resumed.state_dict())
        for strategy in (whole, resumed):
            strategy.tell(copy.deepcopy(x), torch.zeros(len(values(x))) if generation == 2 else values(x))
        assert same(whole.state_dict(), resumed.state_dict())
        assert same(whole.ask(), resumed.ask())
        assert same(whole.result.best_x, resumed.result.best_x)


@each
def test_loading_leaves_the_state_alone_and_shares_no_memory_with_it(make):
    strategy = make(0)
    strategy.tell(x := strategy.ask(), values(x))
    strategy.ask()
    state = strategy.state_dict()
    before = copy.deepcopy(state)
    resumed = make(1)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.tell(x := resumed.ask(), values(x))
    assert same(state, before)


@each
@pytest.mark.parametrize("state", [None, 3, "state", [], {}, {"strategy": "Other"}], ids=str)
def test_what_is_no_state_is_refused(make, state):
    strategy = make(0)
    before = strategy.state_dict()
    with pytest.raises(sf.ScorefnError, match="no state of"):
        strategy.load_state_dict(state)
    assert same(before, strategy.state_dict())


def broken(state):
    """The state with one entry of each kind replaced by what cannot be there."""
    for key, value in state.items():
        if isinstance(value, dict) and key not in ("optimizer",):
            yield from ({**state, key: part} for part in broken(value))
        for bad in (None, "a", {}, torch.zeros(7, 7, 7), -1.5):
            if bad is None and (value is None or key in ("best_x", "asked")):
                continue
            if isinstance(value, float) and isinstance(bad, float):
                continue
            yield {**state, key: bad}


@each
def test_a_broken_state_is_refused_and_nothing_changes(make):
    strategy = make(0)
    strategy.tell(x := strategy.ask(), values(x))
    x = strategy.ask()
    before = strategy.state_dict()
    for state in broken(copy.deepcopy(before)):
        with pytest.raises(sf.ScorefnError):
            strategy.load_state_dict(state)
        assert same(before, strategy.state_dict())
    strategy.tell(x, values(x))


FOREIGN = [
    (PGPE(X0, 1.0, optimizer=adam), lambda: PGPE(X0, 1.0), "optimizer.*'Adam'.*'ClipUp'"),
    (OpenAIES(X0, 1.0), lambda: OpenAIES(X0, 1.0, optimizer=lambda p: ClipUp(p, 1.0)), "optimizer.*'Adam'.*'ClipUp'"),
    (PGPE(X0, 1.0), lambda: PGPE(X0, 1.0, dtype=torch.float32), "dtype.*'torch.float64'.*'torch.float32'"),
    (
        CategoricalSearch([3, 5], popsize=8),
        lambda: CategoricalSearch([5, 3], popsize=8),
        r"categories.*\[3, 5\].*\[5, 3\]",
    ),
    (IntegerSearch([0, 0], [9, 9]), lambda: IntegerSearch([-1, 0], [8, 9]), r"lower.*\[0.0, 0.0\].*\[-1.0, 0.0\]"),
    (distribution(0), lambda: distribution(0, natural=True), "optimizer"),
    (distribution(0, coupling=sf.Antithetic()), lambda: distribution(0), "coupling.*'Antithetic'.*'NoneType'"),
]


@pytest.mark.parametrize(("foreign", "make", "message"), FOREIGN)
@pytest.mark.parametrize("generations", [0, 2])
def test_the_state_of_another_setting_is_refused_by_its_name(foreign, make, message, generations):
    for _ in range(generations):
        foreign.tell(x := foreign.ask(), values(x))
    strategy = make()
    before = strategy.state_dict()
    with pytest.raises(sf.ScorefnError, match=message):
        strategy.load_state_dict(foreign.state_dict())
    assert same(before, strategy.state_dict())
    strategy.tell(x := strategy.ask(), values(x))


def test_the_settings_of_an_optimizer_are_those_of_the_state_also_before_the_first_step():
    one, other = PGPE(X0, 1.0, max_speed=0.5, seed=0), PGPE(X0, 1.0, max_speed=0.1, seed=1)
    other.load_state_dict(one.state_dict())
    for strategy in (one, other):
        strategy.tell(x := strategy.ask(), values(x))
    assert same(one.state_dict(), other.state_dict())
