"""Draws by hand, and reducers of them."""

import re

import numpy as np
import pytest
import torch

import scorefn as sf
from tests.messages.draws_by_hand import made
from tests.messages.world import says

FIELDS = [
    ("flat log_prob", {"log_prob": torch.zeros(4, requires_grad=True)}, sf.ShapeError, [r"\(4,\)", r"\[N, \*B, K\]"]),
    ("no draws", {"log_prob": torch.zeros(0, 2, 3, requires_grad=True)}, sf.ShapeError, [r"\(0, 2, 3\)"]),
    ("no decisions", {"log_prob": torch.zeros(4, 2, 0, requires_grad=True)}, sf.ShapeError, [r"\(4, 2, 0\)"]),
    ("fx without J", {"fx": torch.zeros(4, 2)}, sf.ShapeError, [r"\(4, 2\)", r"\(4, 2, 3\)"]),
    ("fx of other problems", {"fx": torch.zeros(4, 1, 5)}, sf.ShapeError, [r"\(4, 1, 5\)", r"\(4, 2, 3\)"]),
    ("fx of other draws", {"fx": torch.zeros(1, 2, 5)}, sf.ShapeError, [r"\(1, 2, 5\)", r"\(4, 2, 3\)"]),
    ("no values", {"fx": torch.zeros(4, 2, 0)}, sf.ShapeError, [r"\(4, 2, 0\)"]),
    ("fx of other precision", {"fx": torch.zeros(4, 2, 5).double()}, sf.ScorefnError, ["float64", "float32"]),
    ("x of other draws", {"x": torch.zeros(3, 2)}, sf.ShapeError, ["N = 4", r"\(3, 2\)"]),
    ("x with grad", {"x": torch.zeros(4, 2, requires_grad=True)}, sf.ScorefnError, ["require grad", "detach"]),
    ("x leaf with grad", {"x": {"a": [torch.zeros(4, requires_grad=True)]}}, sf.ScorefnError, ["require grad"]),
    (
        "log_prob without grad",
        {"log_prob": torch.zeros(4, 2, 3)},
        sf.ScorefnError,
        ["does not require grad", "no_grad"],
    ),
    (
        "behaviour with grad",
        {"behaviour_log_prob": torch.zeros(4, 2, 3, requires_grad=True)},
        sf.ScorefnError,
        ["behaviour_log_prob requires grad", "detach"],
    ),
    (
        "behaviour of other decisions",
        {"behaviour_log_prob": torch.zeros(4, 2, 1)},
        sf.ShapeError,
        ["behaviour_log_prob", r"\(4, 2, 1\)", r"\(4, 2, 3\)"],
    ),
    (
        "behaviour of other precision",
        {"behaviour_log_prob": torch.zeros(4, 2, 3).double()},
        sf.ScorefnError,
        ["behaviour_log_prob", "float64", "float32"],
    ),
    (
        "impossible behaviour",
        {"behaviour_log_prob": torch.full((4, 2, 3), -torch.inf)},
        sf.NonFiniteError,
        ["behaviour_log_prob", "-inf", "4 of 4", "density"],
    ),
    ("float mask", {"mask": torch.ones(4, 2, 3)}, sf.ScorefnError, ["mask", "float32", "bool"]),
    ("int mask", {"mask": torch.ones(4, 2, 3, dtype=torch.int64)}, sf.ScorefnError, ["mask", "int64", "bool"]),
    (
        "flat mask",
        {"mask": torch.ones(4, 2, dtype=torch.bool)},
        sf.ShapeError,
        ["mask", r"\(4, 2\)", r"\(4, 2, 3\)"],
    ),
    ("float block", {"block": torch.zeros(4)}, sf.ScorefnError, ["block", "float32", "int"]),
    ("short block", {"block": torch.zeros(3, dtype=torch.long)}, sf.ShapeError, ["block", r"\(3,\)", r"\(4,\)"]),
    ("wide block", {"block": torch.zeros(4, 2, dtype=torch.long)}, sf.ShapeError, ["block", r"\(4, 2\)", r"\(4,\)"]),
    ("float group", {"group": torch.zeros(4)}, sf.ScorefnError, ["group", "float32", "int"]),
    ("short group", {"group": torch.zeros(3, dtype=torch.long)}, sf.ShapeError, ["group", r"\(3,\)", r"\(4,\)"]),
    ("NaN fx", {"fx": torch.full((4, 2, 5), torch.nan)}, sf.NonFiniteError, ["nan", "4 of 4"]),
    (
        "NaN log_prob",
        {"log_prob": torch.full((4, 2, 3), torch.nan, requires_grad=True)},
        sf.NonFiniteError,
        ["log_prob", "nan", "4 of 4"],
    ),
]


@pytest.mark.parametrize(("fields", "error", "patterns"), [c[1:] for c in FIELDS], ids=[c[0] for c in FIELDS])
def test_draws(fields, error, patterns):
    with pytest.raises(error) as caught:
        made(**fields)
    assert type(caught.value) is error
    says(str(caught.value), *patterns)


def test_opposite_infinities_do_not_cancel():
    fx = torch.zeros(4, 2, 5)
    fx[0, 0, 0], fx[3, 0, 0] = torch.inf, -torch.inf
    with pytest.raises(sf.NonFiniteError, match=r"2 of 4.*\[0, 3\]"):
        made(fx=fx)


def test_values_whose_sum_overflows_are_finite():
    fx = torch.full((4, 2, 5), 3e38)
    assert torch.equal(made(fx=fx).fx, fx)


REDUCERS = [
    (
        "flat influence",
        lambda: sf.Influence(torch.ones(3, dtype=torch.bool)),
        sf.ShapeError,
        [r"\[K, J\]", r"\(3,\)"],
    ),
    ("deep influence", lambda: sf.Influence(torch.ones(1, 3, 5, dtype=torch.bool)), sf.ShapeError, [r"\(1, 3, 5\)"]),
    ("float influence", lambda: sf.Influence(torch.ones(3, 5)), sf.ScorefnError, ["bool", "float32"]),
    *(
        (f"discount {d}", lambda d=d: sf.RewardToGo(d), sf.ScorefnError, ["discount", r"\[0, 1\]", str(d)])
        for d in (-0.1, 1.01, float("nan"), float("inf"))
    ),
    *(
        (f"decay {d}", lambda d=d: sf.MovingAverage(d), sf.ScorefnError, ["decay", r"\[0, 1\)", str(d)])
        for d in (-0.1, 1.0, 1.5, float("nan"))
    ),
    (
        "decay of a recurrence",
        lambda: sf.linear_recurrence(torch.zeros(3, 2), torch.zeros(3, 4)),
        sf.ShapeError,
        [r"\(3, 4\)", r"\(3, 2\)"],
    ),
    (
        "dice with decision weights",
        lambda: sf.dice(made(fx=torch.zeros(4, 2, 3)), credit=sf.RewardToGo(0.9, visitation_discount=False)),
        sf.ScorefnError,
        ["RewardToGo", "derivative", "visitation_discount=True"],
    ),
    ("one draw", lambda: made()[1], sf.ShapeError, [r"draws\[1\]", r"1:2"]),
]


@pytest.mark.parametrize(("call", "error", "patterns"), [c[1:] for c in REDUCERS], ids=[c[0] for c in REDUCERS])
def test_reducers(call, error, patterns):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("integer", [np.int64(1), torch.tensor(1), -1])
def test_any_integer_would_drop_the_axis_of_draws(integer):
    with pytest.raises(sf.ShapeError):
        made()[integer]


def influence(K, J):
    return sf.Influence(torch.ones(K, J, dtype=torch.bool))


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
@pytest.mark.parametrize(
    ("K", "J", "credit"),
    [
        (3, 5, sf.RewardToGo()),
        (3, 1, sf.RewardToGo()),
        (1, 3, sf.RewardToGo()),
        (3, 2, influence(3, 5)),
        (3, 1, influence(3, 2)),
        (4, 2, influence(3, 2)),
        (1, 2, influence(3, 2)),
        (3, 2, influence(1, 2)),
        (3, 3, sf.RewardToGo(done=torch.zeros(4, 2, 2, dtype=torch.bool))),
    ],
)
def test_a_credit_that_does_not_fit_is_refused_never_broadcast(K, J, credit, verb):
    draws = made(log_prob=torch.zeros(4, 2, K, requires_grad=True), fx=torch.ones(4, 2, J))
    with pytest.raises(sf.ShapeError):
        verb(draws, credit=credit)


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
@pytest.mark.parametrize("baseline", [None, sf.Constant(1.0)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_importance_weight_that_overflows(verb, baseline, value):
    draws = made(behaviour_log_prob=torch.full((4, 2, 3), -50.0), fx=torch.full((4, 2, 5), value))
    with pytest.raises(sf.NonFiniteError) as caught:
        verb(draws, baseline=baseline)
    says(str(caught.value), "importance weight", "overflows", "[Ss]ample")


def test_importance_weights_that_vanish_are_allowed():
    draws = made(behaviour_log_prob=torch.full((4, 2, 3), 50.0), fx=torch.ones(4, 2, 5))
    assert torch.equal(sf.surrogate(draws), torch.zeros(4, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["fx", "behaviour_log_prob", "mask", "block", "group"])
def test_devices_are_never_mixed(name):
    fields = {
        "fx": torch.zeros(4, 2, 5),
        "behaviour_log_prob": torch.zeros(4, 2, 3),
        "mask": torch.ones(4, 2, 3, dtype=torch.bool),
        "block": torch.arange(4),
        "group": torch.arange(4),
    }
    with pytest.raises(sf.ScorefnError, match=r"cuda.*cpu|cpu.*cuda"):
        made(**{name: fields[name].cuda()})
