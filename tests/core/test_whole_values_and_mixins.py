"""Whole numbers in a list, the order of base classes, and draws without another one in their group."""

import pytest
import torch
from torch.distributions import Bernoulli, Distribution, Normal

import scorefn as sf
from scorefn.core.draws import drawn


@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
def test_large_whole_numbers_are_ranked_before_they_are_rounded(make):
    p = Bernoulli(logits=torch.zeros((), requires_grad=True))
    values = [2**24 + 1, 2**24, 2**24 + 3, 2**24 + 2]  # float32 has every second one
    shaped = drawn(p, lambda x: make(values), 4, None, sf.CenteredRank()).fx
    assert shaped.dtype == torch.float32
    torch.testing.assert_close(shaped[:, 0], torch.tensor([-1 / 6, -1 / 2, 1 / 2, 1 / 6]), rtol=0, atol=1e-7)


def test_whole_numbers_in_a_list_are_real_ones_where_nothing_ranks_them():
    p = Bernoulli(logits=torch.zeros((), requires_grad=True, dtype=torch.float64))
    draws = sf.draw(p, lambda x: [3, -1, 2, 5], 4)
    assert torch.equal(draws.fx, torch.tensor([[3.0], [-1.0], [2.0], [5.0]], dtype=torch.float64))


def test_what_stands_behind_distribution_among_the_bases_overrides_nothing():
    class Sampler:
        def sample(self, shape=torch.Size()):  # noqa: B008 - as torch has it
            return torch.zeros(shape)

    class Behind(Distribution, Sampler):
        pass

    class Before(Sampler, Distribution):
        pass

    assert sf.core.nearest(Behind, set(), ["sample"]) == (None, "")
    assert sf.core.nearest(Before, set(), ["sample"]) == (Sampler, "sample")
    assert sf.core.nearest(type("Named", (Normal, Sampler), {}), {Normal}, ["sample"]) == (Normal, "")


@pytest.mark.usefixtures("float64")
def test_a_draw_without_another_one_in_its_group_keeps_its_signal():
    theta = torch.zeros(2, requires_grad=True)
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    signal = torch.tensor([[3.0, 4.0], [5.0, 8.0], [7.0, -2.0]])
    draws = sf.Draws(x, Bernoulli(logits=theta).log_prob(x), signal, group=torch.tensor([0, 0, 1]))
    baseline = sf.LeaveOneOut()
    assert torch.equal(baseline(signal, draws), torch.tensor([[5.0, 8.0], [3.0, 4.0], [0.0, 0.0]]))
    assert baseline.singletons(draws) == 1
