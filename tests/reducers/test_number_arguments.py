"""Whole numbers given for real ones, decays at and beyond their ends, and finite numbers whose sum alone overflows."""

import pytest
import torch
from torch.distributions import Categorical

import scorefn as sf
from scorefn.reducers.baselines import check_moments


@pytest.mark.usefixtures("float64")
def test_a_function_of_whole_values_is_the_control_variate_of_real_ones():
    logits = torch.tensor([0.3, -0.6, 1.1], requires_grad=True)
    p = Categorical(logits=logits)
    draws = sf.draw(p, lambda x: (x - 1.5) ** 2, 7)
    expected = lambda: (p.probs * torch.arange(3.0)).sum()  # noqa: E731
    whole, real = (sf.LinearControlVariate(h, expected, coefficient=0.7) for h in (lambda x: x, lambda x: x.double()))
    assert torch.equal(whole(draws).fx, real(draws).fx)
    assert whole(draws).fx.dtype == torch.float64


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), torch.tensor([1.0, -torch.inf])])
def test_a_coefficient_that_is_not_finite_is_refused(coefficient):
    with pytest.raises(sf.NonFiniteError, match=r"^coefficient=.* must be finite\.$"):
        sf.LinearControlVariate(lambda x: x, 0.0, coefficient=coefficient)


def test_averages_that_are_finite_may_overflow_in_sum():
    check_moments("MovingAverage", torch.tensor([3e38, 3e38]), torch.tensor([3e38]))
    with pytest.raises(sf.NonFiniteError, match="^MovingAverage met values so large that their average"):
        check_moments("MovingAverage", torch.tensor([3e38, 3e38]), torch.tensor([torch.inf]))


def test_credit_that_is_none_of_them_is_refused_where_it_is_bound():
    draws = sf.draw(Categorical(logits=torch.zeros(3, requires_grad=True)), lambda x: x.float(), 4)
    with pytest.raises(sf.ScorefnError, match=r"credit=0\.9.*use Total\(\), RewardToGo\(\) or Influence\(mask\)"):
        draws.bound(0.9)


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, -1.0, 1.5, float("nan")])
def test_a_decay_outside_of_its_range_is_refused_and_0_is_in_it(decay):
    with pytest.raises(sf.ScorefnError, match=r"^decay must lie in \[0, 1\), but it is .*: at 1 nothing would"):
        sf.MovingAverage(decay)
    assert sf.MovingAverage(0.0).decay == 0.0


@pytest.mark.usefixtures("float64")
def test_a_function_of_another_precision_than_f_is_refused():
    p = Categorical(logits=torch.zeros(3, requires_grad=True))
    draws = sf.draw(p, lambda x: x.double(), 5)
    cv = sf.LinearControlVariate(lambda x: x.float(), torch.tensor(1.0))
    with pytest.raises(
        sf.ScorefnError, match=r"^h is torch\.float32 on cpu beside values of f that are torch\.float64"
    ):
        cv(draws)


def test_a_score_at_the_edge_of_the_support_is_not_learned_from():
    theta = torch.zeros(2, requires_grad=True)
    log_prob = theta.sqrt().expand(3, 2)  # an infinite slope
    draws = sf.Draws(torch.ones(3, 2), log_prob, torch.tensor([[1.0], [2.0], [4.0]]))
    cv = sf.BlockConstants([theta])
    with pytest.raises(sf.NonFiniteError, match="^BlockConstants met a score that is NaN or infinite, or whose square"):
        cv.update(draws)
    assert cv.product is None
    assert cv.square is None
