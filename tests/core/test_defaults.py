"""The parts that stand in the core are values: equal, immutable, printed as they are called."""

from dataclasses import FrozenInstanceError

import pytest
import torch

import scorefn as sf
from scorefn.core import Credit

DEFAULTS = [sf.Independent, sf.Total, sf.LeaveOneOut]


@pytest.mark.parametrize("part", DEFAULTS)
def test_two_of_a_kind_are_equal(part):
    assert part() == part()
    assert hash(part()) == hash(part())
    assert repr(part()) == f"{part.__name__}()"


@pytest.mark.parametrize("part", DEFAULTS)
def test_no_attribute_can_be_set(part):
    with pytest.raises(FrozenInstanceError):
        part().unbiased = False


def test_independent_draws_declare_that_they_are_unbiased():
    assert sf.Independent().unbiased is True


def test_leave_one_out_tells_apart_many_groups_and_blocks():
    """Four draws each in two groups and two blocks, so often that no label fits into the fraction of a float32."""
    quads = 2**12
    place = torch.arange(4).repeat(quads)
    quad = torch.arange(quads).repeat_interleave(4)
    signal = torch.randn(4 * quads, 1)
    draws = sf.Draws(
        torch.zeros(len(signal)),
        torch.zeros(len(signal), 1, requires_grad=True),
        signal,
        group=2 * quad + place % 2,
        block=2 * quad + place // 2,
    )
    partner = signal.reshape(quads, 2, 2).flip(1).reshape(-1, 1)  # of the same group, in the other block
    torch.testing.assert_close(sf.LeaveOneOut()(signal, draws), partner)


# ------------------------------------------------------------------------------------------- a credit of the user's


class Weighted(Credit):
    """Two decisions and three values, with weights on both."""

    M = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])

    def value_weight(self, v):
        return torch.tensor([2.0, 3.0, 5.0])

    def decision_weight(self, v):
        return torch.tensor([7.0, 11.0])

    def influence(self, v):
        return v @ self.M.T

    def influence_adjoint(self, u):
        return u @ self.M

    def predecessors(self, log_prob):
        return log_prob.cumsum(-1) - log_prob


def test_a_credit_multiplies_by_its_weights():
    v = torch.tensor([[13.0, 17.0, 19.0]])
    wanted = torch.tensor([[7.0 * (2 * 13 + 3 * 17), 11.0 * (3 * 17 + 5 * 19)]])
    assert torch.equal(Weighted()(v), wanted)


PARTS = ["influence", "influence_adjoint", "predecessors"]


@pytest.mark.parametrize("name", PARTS)
def test_a_credit_without_one_of_its_parts_cannot_be_made(name):
    partial = type("Partial", (Credit,), {part: getattr(Weighted, part) for part in PARTS if part != name})
    with pytest.raises(TypeError, match=name):
        partial()
