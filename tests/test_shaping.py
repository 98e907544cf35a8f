"""Transforms of a whole batch of values: definitions by hand, and the bias that they declare."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical

import scorefn as sf
from scorefn.shaping import nes_utilities
from tests.oracles.tolerances import VISIBLE, near
from tests.oracles.toys import coordinates

SHAPES = [sf.Standardize(), sf.CenteredRank(), sf.NESUtilities()]
RANKS = SHAPES[1:]

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, -math.inf, math.nan]), st.floats(-1e6, 1e6, allow_subnormal=False)
)
batches = st.lists(numbers, min_size=1, max_size=12)


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


# ------------------------------------------------------------------------------------------------ definitions


def ranks_by_hand(values):
    """Rank of each value, 1 the lowest, ties averaged, failures lowest and tied."""
    key = [v if math.isfinite(v) else -math.inf for v in values]
    ordered = sorted(key)
    return [sum(k + 1 for k, other in enumerate(ordered) if other == v) / ordered.count(v) for v in key]


@given(batches)
def test_centred_ranks_by_hand(values):
    found = sf.CenteredRank()(column(values)).squeeze(-1)
    n = len(values)
    right = [0.0 if n == 1 else (rank - 1) / (n - 1) - 0.5 for rank in ranks_by_hand(values)]
    assert near(found, torch.tensor(right, dtype=torch.float64))
    assert abs(float(found.sum())) < 1e-12


@given(batches)
def test_utilities_by_hand(values):
    n = len(values)
    height = [max(0.0, math.log(n / 2 + 1) - math.log(k)) for k in range(1, n + 1)]
    u = [h / sum(height) - 1 / n for h in height]
    key = [v if math.isfinite(v) else -math.inf for v in values]
    ordered = sorted(key, reverse=True)
    right = [sum(u[k] for k in range(n) if ordered[k] == v) / ordered.count(v) for v in key]
    if len(set(key)) == 1:
        right = [0.0] * n
    fx = column(values)
    assert near(nes_utilities(fx).squeeze(-1), torch.tensor(right, dtype=torch.float64))
    assert torch.equal(sf.NESUtilities()(fx), n * nes_utilities(fx))
    assert abs(float(nes_utilities(fx).sum())) < 1e-12


@given(batches.filter(lambda values: len(values) > 1))
def test_utilities_are_those_of_the_search_to_the_bit(values):
    """The search minimises: its lowest value is the best."""
    f = torch.tensor(values, dtype=torch.float64)
    strategy = sf.search.SNES([0.0, 0.0], 1.0, seed=0, popsize=len(f))
    assert torch.equal(sf.NESUtilities()(-f.unsqueeze(-1)), strategy.scored(strategy.ask(), f).fx)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12).filter(lambda v: max(v) - min(v) > 1e-3))
def test_standardize_by_hand(values):
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    right = torch.tensor([(v - mean) / std for v in values], dtype=torch.float64)
    assert near(sf.Standardize()(column(values)).squeeze(-1), right, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_problem_and_value_stands_apart(shape):
    fx = torch.randint(0, 4, (7, 3, 2)).double() + 10 * torch.arange(3).reshape(3, 1)
    together = shape(fx)
    assert together.shape == fx.shape
    for b in range(3):
        for j in range(2):
            assert near(together[:, b, j], shape(fx[:, b, j].reshape(7, 1)).squeeze(-1))
    assert together.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-40])
def test_a_constant_and_a_single_draw_give_zeros(shape, value, dtype):
    for n in (1, 2, 3, 7, 10):
        found = shape(torch.full((n, 2, 1), value, dtype=dtype))
        assert torch.equal(found, torch.zeros(n, 2, 1, dtype=dtype)), n
    assert sf.CenteredRank()(torch.full((5, 1), torch.nan)).tolist() == [[0.0]] * 5


@pytest.mark.parametrize("shape", SHAPES)
def test_larger_values_get_more(shape):
    fx = torch.randn(20, 1)
    order = fx.squeeze(-1).argsort()
    assert (shape(fx).squeeze(-1)[order].diff() >= 0).all()
    assert shape(fx)[order[-1]] > 0 > shape(fx)[order[0]]


@pytest.mark.parametrize("shape", RANKS)
def test_ranks_see_the_order_only_and_failures_are_lowest(shape):
    fx = torch.randn(9, 1, dtype=torch.float64)
    assert torch.equal(shape(fx), shape(fx.exp()))
    failed = fx.clone()
    failed[3], failed[5], failed[7] = torch.nan, torch.inf, -torch.inf
    lowest = fx.clone()
    lowest[[3, 5, 7]] = fx.min() - 1
    assert torch.equal(shape(failed), shape(lowest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_standardize_values_of_any_magnitude(size, dtype):
    fx = size * torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=dtype)
    found = sf.Standardize()(fx)
    torch.testing.assert_close(found.std(0), torch.ones(1, dtype=dtype))
    torch.testing.assert_close(found, sf.Standardize()(fx / size))


def test_standardize_divides_the_pathwise_part():
    psi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    base = torch.randn(6, 1, dtype=torch.float64)
    fx = psi.square() * base + psi
    found = torch.autograd.grad((torch.arange(6).unsqueeze(-1) * sf.Standardize()(fx)).sum(), psi)[0]
    right = (torch.arange(6).unsqueeze(-1) * (2 * psi * base + 1)).sum() / fx.std(0)
    assert near(found, right.detach().squeeze())


@pytest.mark.parametrize("shape", SHAPES)
def test_values_keep_their_dtype(shape):
    assert shape(torch.randn(5, 1)).dtype == torch.float32
    assert shape(torch.randn(5, 1).double()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ what they do


@pytest.mark.parametrize("shape", SHAPES)
def test_declared_biased_and_visibly_so(shape):
    """Enumerated over all pairs and triples of a Bernoulli."""
    assert shape.unbiased is False
    for N in (2, 3):
        eta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        choice = coordinates(*[2] * N).T.double()
        p = Bernoulli(logits=eta.expand(2**N))
        p.sample = lambda size, choice=choice: choice
        weight = torch.where(choice > 0, eta.sigmoid(), 1 - eta.sigmoid()).prod(0).detach()
        value = sf.expectation(p, lambda x: 3 * x, N, baseline=None, shape=shape)
        gradient = torch.autograd.grad((weight * value).sum(), eta)[0]
        truth = 3 * eta.sigmoid() * (1 - eta.sigmoid())
        assert abs(float((gradient - truth).detach())) > VISIBLE
        assert gradient > 0, "the direction survives"


@pytest.mark.parametrize(("N", "cosine"), [(2, 0.724), (4, 0.771), (8, 0.874)])
def test_standardize_in_the_whitened_bandit(N, cosine):
    """Three arms p = (.6, .3, .1) that pay 0, 1, 10: the printed cosine, and the wrong sign on the middle arm."""
    logits = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    pays = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)
    choice = coordinates(*[3] * N).T
    p = Categorical(logits=logits.expand(choice.shape[1], 3))
    p.sample = lambda size: choice
    weight = logits.softmax(-1).detach()[choice].prod(0)
    value = sf.expectation(p, lambda x: pays[x], N, baseline=None, shape=sf.Standardize())
    ours = torch.autograd.grad((weight * value).sum(), logits, retain_graph=True)[0]
    truth = torch.autograd.grad((logits.softmax(-1) * pays).sum(), logits)[0]
    assert float(torch.cosine_similarity(ours, truth, dim=0)) == pytest.approx(cosine, abs=6e-4)
    assert ours[1] * truth[1] < 0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("shape", SHAPES)
def test_no_draws_are_refused(shape):
    for fx in (torch.tensor(1.0), torch.zeros(0, 1)):
        with pytest.raises(sf.ShapeError, match="compares draws"):
            shape(fx)


@pytest.mark.parametrize("shape", RANKS)
def test_a_pathwise_part_is_refused_by_ranks(shape):
    with pytest.raises(sf.ScorefnError, match="pathwise"):
        shape(torch.randn(3, 1, requires_grad=True))
    with torch.no_grad():
        shape(torch.randn(3, 1, requires_grad=True))


def test_standardize_refuses_failures():
    for failure in (torch.nan, torch.inf):
        with pytest.raises(sf.NonFiniteError, match="failure is the lowest"):
            sf.Standardize()(torch.tensor([[1.0], [failure]]))


def test_integers_and_flags_are_numbers():
    ranks = torch.tensor([0.5, -0.5, 0.0])
    assert torch.equal(sf.CenteredRank()(torch.tensor([3, 1, 2])), ranks)
    assert sf.NESUtilities()(torch.tensor([3, 1, 2]))[0] > 0
    assert sf.Standardize()(torch.tensor([True, False])).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_large_integers_are_not_tied_by_rounding():
    for start, dtype in ((2**24, torch.int32), (2**62, torch.int64), (-(2**63), torch.int64), (0, torch.uint8)):
        fx = torch.tensor([start + 1, start, start + 2], dtype=dtype)
        assert sf.CenteredRank()(fx).tolist() == [0.0, -0.5, 0.5]
    x = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    p = Bernoulli(x)
    for f in (lambda x: x.long() + 2**60, lambda x: (x.long() + 2**60).tolist(), lambda x: (x.long() + 2**60).numpy()):
        torch.manual_seed(2)
        value = sf.expectation(p, f, 20, shape=sf.CenteredRank())
        torch.manual_seed(2)
        assert near(value, sf.expectation(p, lambda x: x, 20, shape=sf.CenteredRank()), 1e-7)


@pytest.mark.parametrize("shape", [sf.Standardize(), sf.CenteredRank(), sf.NESUtilities()], ids=repr)
def test_what_is_no_real_tensor_is_refused(shape):
    with pytest.raises(sf.ScorefnError, match=r"complex64.*fx\.real"):
        shape(torch.ones(3, 1, dtype=torch.complex64))
    with pytest.raises(sf.ScorefnError, match=r"a list.*torch\.as_tensor"):
        shape([1.0, 2.0])


@pytest.mark.parametrize("shape", [sf.CenteredRank(), sf.NESUtilities()], ids=repr)
@pytest.mark.parametrize("failure", [torch.nan, torch.inf, -torch.inf])
def test_failures_reach_ranks_through_the_front_door(shape, failure):
    """A failure ranks as what is lower than all others does, and the gradient is that, to the bit."""
    gradients = []
    for worst in (failure, -7.0):
        torch.manual_seed(0)
        logits = torch.zeros(2, 3, requires_grad=True)
        value = sf.expectation(
            Categorical(logits=logits),
            lambda x, worst=worst: torch.where(x == 0, worst, x.float()),
            50,
            baseline=sf.MovingAverage(),
            shape=shape,
        )
        value.sum().backward()
        gradients.append((value.detach(), logits.grad))
    assert all(map(torch.equal, *gradients))
    assert gradients[0][1].abs().sum() > 0


def test_failures_are_refused_where_a_shape_does_not_take_them():
    p = Bernoulli(logits=torch.zeros((), requires_grad=True))
    for shape in (sf.Standardize(), lambda fx: fx, None):
        with pytest.raises(sf.NonFiniteError, match="f is "):
            sf.expectation(p, lambda x: x / 0.0, 50, shape=shape)
    passing = lambda fx: fx  # noqa: E731
    broken = type("Broken", (), {"accepts_non_finite": True, "__call__": staticmethod(passing)})()
    with pytest.raises(sf.NonFiniteError, match="f is "):
        sf.expectation(p, lambda x: x / 0.0, 50, shape=broken)


@pytest.mark.parametrize("shape", [sf.CenteredRank(), sf.NESUtilities()], ids=repr)
def test_shaping_before_the_check_changes_nothing_else(shape):
    results = []
    for used in (shape, lambda fx: shape(fx)):
        torch.manual_seed(1)
        logits = torch.zeros(2, 3, requires_grad=True)
        value = sf.expectation(Categorical(logits=logits), lambda x: (x - 1.2).square(), 7, shape=used)
        value.sum().backward()
        results.append((value.detach(), logits.grad))
    assert all(map(torch.equal, *results))
