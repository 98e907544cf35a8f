"""A function that has no one value at each point is found where p lists its points."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical

from scorefn.diagnostics.guards import f_fault, random_at

P = Categorical(logits=torch.tensor([0.3, -0.6, 1.1, 0.0], dtype=torch.float64))
VALUES = torch.tensor([1.5, -0.5, 2.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "fault"),
    [
        (lambda x: VALUES[x], ""),
        (lambda x: VALUES[x] - VALUES[x].mean(), "f gives other values at the same points where it is given others"),
        (lambda x: VALUES[x].cumsum(0), "f gives other values at the same points where it is given others"),
        (lambda x: VALUES[x] + torch.rand(()), "f is random: it gives two values at the same point"),
    ],
    ids=["of its point", "less the mean", "of those before", "random"],
)
def test_one_value_at_each_point_or_the_reason_why_not(f, fault):
    assert f_fault(P, f).startswith(fault)
    assert bool(f_fault(P, f)) == bool(fault)


def test_without_a_list_of_points_nothing_is_said():
    class Unlisted(Bernoulli):
        has_enumerate_support = False

        def enumerate_support(self, expand=True):
            raise NotImplementedError

    assert f_fault(object(), lambda x: torch.rand(len(x))) == ""


def test_values_that_are_nan_twice_are_not_random():
    x, log_prob = torch.arange(4), P.log_prob(torch.arange(4))
    assert not random_at(lambda x: VALUES[x], x, log_prob)
    assert random_at(lambda x: torch.rand(len(x), dtype=torch.float64), x, log_prob)
