"""Sampling without replacement: the frequency of every order."""

import itertools

import pytest
import torch

import scorefn as sf
from tests.test_anchors import doubles


def test_every_order_has_its_plackett_luce_probability():
    """2 x 10^5 draws of 12 orders: false alarm 1e-6 (5.4 sigma)."""
    p, n = doubles([0.5, 0.3, 0.15, 0.05]), 200_000
    found = sf.sample_without_replacement(p.log().expand(n, 4), 2)
    assert found.shape == (2, n)
    for i, j in itertools.permutations(range(4), 2):
        right = float(p[i] * p[j] / (1 - p[i]))
        frequency = float(((found[0] == i) & (found[1] == j)).double().mean())
        assert abs(frequency - right) <= 5.4 * (right * (1 - right) / n) ** 0.5


def test_values_that_cannot_happen_come_last():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -300.0])
    found = sf.sample_without_replacement(logits.expand(100, 4), 4)
    assert (found[:2] == torch.tensor([[1], [3]])).all()
    assert (found.sort(0).values == torch.arange(4)[:, None]).all()


@pytest.mark.parametrize(("k", "message"), [(0, "at least 1"), (5, "num_samples=5.*there are 4"), (1.0, "integer")])
def test_a_number_out_of_range_is_refused(k, message):
    with pytest.raises(sf.ScorefnError, match=message):
        sf.sample_without_replacement(torch.zeros(4), k)
