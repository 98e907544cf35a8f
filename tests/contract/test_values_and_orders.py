"""Laws 2, 3 and 9: values, every order, microbatches, and baselines that are read before they learn."""

import pytest
import torch

import scorefn as sf
from tests.contract.failures import failures
from tests.oracles.baselines import BASELINES
from tests.oracles.expectations import Prepared
from tests.oracles.higher_orders import check_constant_cancels, check_orders
from tests.oracles.settings import CREDITS, setting, settings
from tests.oracles.tolerances import near
from tests.oracles.toys import TOYS
from tests.oracles.twins import check_microbatches, check_value


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("entry", ["surrogate", "dice"])
def test_the_value_is_the_weighted_f(entry, credit):
    if entry == "dice" and not CREDITS[credit].make(setting("chain", "N=2")).unbiased:
        return  # refused, as test_expected_gradient shows
    failures(
        (check_value, given, credit, baseline, entry)
        for given in settings(TOYS, ["N=2 B=(2, 3)", "groups", "copies"])
        if CREDITS[credit].applies(given.toy)
        for baseline in BASELINES
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("credit", ["Total()", "Influence", "RewardToGo(1)", "RewardToGo(.9)"])
def test_dice_to_third_order(credit, baseline):
    reads_others = baseline in ("LeaveOneOut()", "OptimalConstant()", "RegressionBaseline")
    layouts = ["N=2"] if reads_others else ["N=1", "N=2"]
    failures((check_orders, given, credit, baseline) for given in settings(["coins"], layouts))


@pytest.mark.parametrize("baseline", ["None", "LeaveOneOut()"])
@pytest.mark.parametrize(
    ("toy", "credit"),
    [("single", "Total()"), ("fork", "Influence"), ("ended", "RewardToGo(.9)"), ("episodes", "RewardToGo(1)")],
)
def test_dice_to_second_order_elsewhere(toy, credit, baseline):
    failures((check_orders, given, credit, baseline, 2) for given in settings([toy], ["N=2"]))


def test_dice_in_blocks_to_second_order():
    failures(
        (check_orders, given, credit, "LeaveOneOut()", 2)
        for given in settings(["coins"], ["copies", "antithetic"])
        for credit in ("Total()", "RewardToGo(1)")
    )


@pytest.mark.parametrize("credit", ["Total()", "Influence", "RewardToGo(1)", "RewardToGo(.9)"])
def test_a_constant_cancels_at_every_order(credit):
    check_constant_cancels(credit)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_microbatches(dtype, tolerance):
    check_microbatches(dtype, tolerance)


def test_a_moving_average_is_read_before_it_is_updated():
    """Three steps against the formula, on draws whose values grow."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    average, mean = sf.MovingAverage(0.8), 0.0
    for step in range(3):
        fx = torch.full((4, 1), 1.0 + step, dtype=torch.float64)
        log_prob = theta.log_softmax(-1)[torch.tensor([0, 1, 0, 0])].unsqueeze(-1)
        draws = sf.Draws(x=fx, log_prob=log_prob, fx=fx)
        expected = mean / (1 - 0.8**step) if step else 0.0
        read = average(draws.signal(), draws)
        assert near(read, torch.full_like(read, expected))
        sf.expectation(Prepared(draws), None, 4, baseline=average)
        mean = 0.8 * mean + 0.2 * (1.0 + step)
    with torch.no_grad():
        before = average(draws.signal(), draws)
        sf.expectation(Prepared(draws), None, 4, baseline=average)
        assert torch.equal(before, average(draws.signal(), draws))
