"""Leave-one-out and constants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scorefn as sf
from tests.reducers.baseline_draws import draws_of, read


@st.composite
def crowds(draw):
    """Draws with any groups, blocks and absent decisions, of at least two blocks."""
    n = draw(st.integers(2, 7))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    k = draw(st.integers(1, 3))
    labels = st.one_of(st.none(), st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    group, block = draw(labels), draw(labels.filter(lambda b: b is None or len(set(b)) > 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    signal = torch.randn(n, *batch, k, generator=generator, dtype=torch.float64)
    mask = draw(st.one_of(st.none(), st.just(torch.rand(n, *batch, k, generator=generator) < 0.6)))
    return signal, {
        "group": None if group is None else torch.tensor(group),
        "block": None if block is None else torch.tensor(block),
        "mask": mask,
    }


def by_a_double_loop(signal, group, block, mask):
    """The definition: the mean over the others of i's group outside i's block, where the decision is present."""
    n, right, alone = len(signal), torch.zeros_like(signal), 0
    for i in range(n):
        others = [
            j
            for j in range(n)
            if (group is None or group[j] == group[i]) and (j != i if block is None else block[j] != block[i])
        ]
        alone += not others
        for place in torch.cartesian_prod(*[torch.arange(s) for s in signal.shape[1:]]).reshape(-1, signal.ndim - 1):
            at = tuple(place.tolist())
            seen = [signal[j][at] for j in others if mask is None or mask[j][at]]
            right[i][at] = torch.stack(seen).mean() if seen else 0.0
    return right, alone


@settings(max_examples=60)
@given(crowds())
def test_leave_one_out_is_the_double_loop(crowd):
    signal, fields = crowd
    draws = draws_of(signal, **fields)
    right, alone = by_a_double_loop(signal, fields["group"], fields["block"], fields["mask"])
    torch.testing.assert_close(sf.LeaveOneOut()(signal, draws), right, rtol=1e-12, atol=1e-12)
    assert sf.LeaveOneOut().singletons(draws) == alone


def test_leave_one_out_of_total_credit_is_shared_by_the_decisions():
    log_prob, fx = torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 3)
    draws = sf.Draws(torch.zeros(5), log_prob, fx)
    b = sf.LeaveOneOut()(draws.signal(), draws)
    right, _ = by_a_double_loop(fx.sum(-1, keepdim=True), None, None, None)
    torch.testing.assert_close(b.expand(5, 2, 3), right.expand(5, 2, 3))


def test_leave_one_out_never_sees_its_own_block():
    signal = torch.randn(6, 1, dtype=torch.float64)
    block = torch.tensor([0, 0, 1, 1, 2, 2])
    before = read(sf.LeaveOneOut(), signal, block=block)
    signal[2:4] += 100.0
    after = read(sf.LeaveOneOut(), signal, block=block)
    torch.testing.assert_close(before[2:4], after[2:4], rtol=0.0, atol=1e-12)
    assert (after - before)[[0, 1, 4, 5]].min() > 49


def test_a_singleton_group_reads_zero_and_is_counted():
    signal = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    draws = draws_of(signal, group=torch.tensor([0, 1, 1, 5]))
    assert sf.LeaveOneOut()(signal, draws).flatten().tolist() == [0.0, 4.0, 2.0, 0.0]
    assert sf.LeaveOneOut().singletons(draws) == 2
    assert sf.LeaveOneOut().singletons(draws_of(signal)) == 0


# ------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 3), (2, 1), (5, 2, 3), (5, 1, 1), (1, 2, 3)])
def test_a_constant_broadcasts_from_the_right(shape):
    signal, b = torch.randn(5, 2, 3), torch.randn(shape)
    assert torch.equal(read(sf.Constant(b), signal), b.expand(5, 2, 3))


def test_a_constant_per_decision_meets_a_signal_without_size():
    draws = sf.Draws(torch.zeros(5), torch.randn(5, 3, requires_grad=True), torch.randn(5, 1))
    b = torch.randn(3)
    found = torch.autograd.grad(sf.surrogate(draws, baseline=sf.Constant(b)).sum(), draws.log_prob)[0]
    torch.testing.assert_close(found, draws.fx - b)


@pytest.mark.parametrize("b", [2, 2.0, True, torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)])
def test_a_constant_takes_the_dtype_of_the_signal(b):
    signal = torch.randn(5, 2)
    assert read(sf.Constant(b), signal).dtype == torch.float32
    assert (read(sf.Constant(b), signal) == float(b)).all()


def test_a_constant_is_detached():
    b = torch.randn(2, requires_grad=True)
    assert not read(sf.Constant(b), torch.randn(5, 2)).requires_grad


@pytest.mark.parametrize("b", [torch.nan, -torch.inf, torch.tensor([0.0, torch.inf])])
def test_a_constant_that_is_not_finite_is_refused(b):
    with pytest.raises(sf.NonFiniteError, match="b, which would make"):
        sf.Constant(b)


def test_a_constant_is_a_number_or_a_tensor():
    with pytest.raises(sf.ScorefnError, match="b is a list"):
        sf.Constant([1.0])


def test_a_constant_may_be_made_inside_a_transform():
    """Values cannot be read there, so that they are not looked at."""
    signal = torch.zeros(2, 1)
    draws = draws_of(signal)
    value = torch.vmap(lambda b: sf.Constant(b)(signal, draws))(torch.ones(3))
    assert torch.equal(value, torch.ones(3, 2, 1))
