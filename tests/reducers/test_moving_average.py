"""The moving average."""

import copy
import pickle

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from tests.reducers.baseline_draws import read, update


def corrected(means, decay):
    """sum_s decay^(t-s) m_s / sum_s decay^(t-s), in closed form."""
    weight = decay ** torch.arange(len(means) - 1, -1, -1, dtype=means.dtype)
    if decay == 0.0:
        return means[-1]
    return (weight.reshape(-1, *[1] * (means.ndim - 1)) * means).sum(0) / weight.sum()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_moving_average_reads_zero_first_and_is_corrected_for_it(decay):
    baseline, signals = sf.MovingAverage(decay), torch.randn(6, 7, 2, 3, dtype=torch.float64)
    assert torch.equal(read(baseline, signals[0]), torch.zeros(7, 2, 3))
    for t in range(6):
        update(baseline, signals[t])
        right = corrected(signals[: t + 1].mean(1), decay).expand(7, 2, 3)
        torch.testing.assert_close(read(baseline, signals[0]), right, rtol=1e-11, atol=1e-12)


def test_a_constant_signal_is_read_as_it_is_from_the_first_update_on():
    """The trap of a debiased value that is stored and debiased again shows from the second step on."""
    baseline = sf.MovingAverage(0.98)
    for _ in range(100):
        update(baseline, torch.full((3, 1), 7.0))
        torch.testing.assert_close(read(baseline, torch.zeros(3, 1)), torch.full((3, 1), 7.0))


def test_reading_changes_nothing():
    baseline = sf.MovingAverage()
    update(baseline, torch.randn(3, 2))
    before = pickle.dumps(vars(baseline))
    for _ in range(3):
        read(baseline, torch.randn(3, 2))
        read(baseline, torch.randn(3, 5))
    assert pickle.dumps(vars(baseline)) == before


def test_moving_average_counts_each_decision_where_it_is_present():
    baseline = sf.MovingAverage(0.5)
    signal = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    update(baseline, signal, mask=torch.tensor([[True, True], [True, False]]))
    assert read(baseline, signal)[0].tolist() == [2.0, 10.0]
    update(baseline, signal + 1, mask=torch.tensor([[True, False], [True, False]]))  # the second one is absent
    right = [(0.5 * 2.0 + 3.0) / 1.5, 10.0]
    torch.testing.assert_close(read(baseline, signal)[0], torch.tensor(right))


def test_moving_average_grows_with_the_episodes():
    baseline = sf.MovingAverage(0.5)
    update(baseline, torch.tensor([[2.0]]))
    assert read(baseline, torch.zeros(1, 3)).tolist() == [[2.0, 0.0, 0.0]]
    update(baseline, torch.tensor([[4.0, 6.0, 8.0]]))
    right = torch.tensor([[(0.5 * 2.0 + 4.0) / 1.5, 6.0, 8.0]])
    torch.testing.assert_close(read(baseline, torch.zeros(1, 3)), right)


def test_moving_average_meets_shorter_episodes():
    """A batch may be shorter than the one before; the later decisions keep what they have learned."""
    baseline = sf.MovingAverage(0.5)
    update(baseline, torch.tensor([[2.0, 4.0, 6.0]]))
    assert read(baseline, torch.zeros(1, 2)).tolist() == [[2.0, 4.0]]
    update(baseline, torch.tensor([[8.0, 8.0]]))
    right = torch.tensor([[(1.0 + 8.0) / 1.5, (2.0 + 8.0) / 1.5, 6.0]])
    torch.testing.assert_close(read(baseline, torch.zeros(1, 3)), right)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1), (1, 2)])
def test_moving_average_refuses_another_batch_shape(batch):
    baseline = sf.MovingAverage()
    update(baseline, torch.randn(5, 2, 4))
    before = pickle.dumps(vars(baseline))
    with pytest.raises(sf.ShapeError, match=r"\(2,\)"):
        read(baseline, torch.randn(5, *batch, 4))
    with pytest.raises(sf.ShapeError, match=r"\(2,\)"):
        update(baseline, torch.randn(5, *batch, 4))
    assert pickle.dumps(vars(baseline)) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_continues_bit_for_bit_on_its_own(copied):
    baseline = sf.MovingAverage(0.7)
    for _ in range(3):
        update(baseline, torch.randn(5, 2))
    twin, signal = copied(baseline), torch.randn(5, 2)
    before = read(baseline, signal).clone()
    update(twin, signal)
    assert torch.equal(read(baseline, signal), before)
    update(baseline, signal)
    assert torch.equal(read(baseline, signal), read(twin, signal))
    assert twin.decay == 0.7


def test_moving_average_survives_an_update_that_follows_a_refusal():
    theta, baseline = torch.zeros(2, requires_grad=True), sf.MovingAverage()
    p = Bernoulli(logits=theta)
    sf.expectation(p, lambda x: x.sum(-1), 5, baseline=baseline)
    before = pickle.dumps(vars(baseline))
    with pytest.raises(sf.NonFiniteError):
        sf.expectation(p, lambda x: x.sum(-1) / 0, 5, baseline=baseline)
    assert pickle.dumps(vars(baseline)) == before
