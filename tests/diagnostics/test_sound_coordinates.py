"""Coordinates that are too skewed to be judged do not keep the others from deciding "biased", nor decide it."""

import math

import pytest
import torch

from scorefn.diagnostics import FixedSample, Hotelling, Sequential, check_unbiased
from scorefn.diagnostics.tails import student_quantile

RARE = 1e-4  # times 2000 repeats: some runs see it, most do not
EXACT = torch.tensor([1.0, 0.5, 0.5 * RARE, 0.01], dtype=torch.float64)


def rows(seed, count=2000, bias=0.0):
    """Two normal coordinates, one of a state that is hardly ever visited, one of a state that is visited now and then.

    Args:
        seed: of the draws.
        count: n.
        bias: of the first coordinate.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    visits = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    hardly = 0.5 * (visits[:, 0] < RARE)
    rarely = 2.0 * (visits[:, 1] < 0.005)
    return torch.stack((1 + bias + normal[:, 0], 0.5 + normal[:, 1], hardly, rarely), 1)


def test_a_sound_coordinate_decides_and_is_named():
    found = FixedSample().judge(rows(0, bias=0.7), EXACT)
    assert (found.verdict, found.worst) == ("biased", 0)
    assert found.reason.startswith(f"coordinate 0 is {float(found.z[0]):.3g} standard errors off; ")
    assert "too skewed to be judged, and were left out" in found.reason
    assert found.critical_z == pytest.approx(student_quantile(1e-6 / 8, 1999))  # of all four coordinates
    assert "worst: coordinate 0" in str(found)


def test_without_a_bias_nothing_is_decided():
    found = FixedSample().judge(rows(0), EXACT)
    assert found.verdict == "inconclusive"
    assert "too skewed for this test: it needs about" in found.reason
    assert "2000 were made (1 of 4 coordinates)" in found.reason or "(2 of 4 coordinates)" in found.reason
    assert "where p can be enumerated" in str(found)
    assert "share a few parameters" in str(found)


def test_a_skewed_coordinate_does_not_decide_however_far_it_is_off():
    wrong = EXACT.clone()
    wrong[3] = 1.0
    found = FixedSample().judge(rows(0), wrong)
    assert float(found.z[3].abs()) > 50 * found.critical_z
    assert found.verdict == "inconclusive"


def test_a_state_that_was_never_visited_does_not_decide():
    """It never varies, and its mean of 0 is not the exact one: chance, not a bias."""
    data = next(data for seed in range(20) if not (data := rows(seed))[:, 2].any())
    found = FixedSample().judge(data, EXACT)
    assert float(found.z[2].abs()) > found.critical_z
    assert found.verdict == "inconclusive"
    biased = FixedSample().judge(rows(0, bias=0.7), EXACT)
    assert biased.worst == 0  # and is not the one that is named


def test_what_draws_that_were_never_met_could_make_up_for():
    """One row in 2000 deviates by 1000: an event as large and as rare may be missing from another coordinate."""
    data = rows(0, bias=0.7)
    data[:, 3] = 0.0
    data[7, 3] = 1000.0
    exact = EXACT.clone()
    exact[3] = 0.5
    assert 1000 * math.log(8 / 1e-6) / 2000 > 0.7
    assert FixedSample().judge(data, exact).verdict == "inconclusive"
    data[7, 3] = 20.0
    assert FixedSample().judge(data, exact).verdict == "biased"


def test_the_false_alarm_is_kept():
    """At 5 %, 400 runs without a bias: 41 alarms and fewer have probability 1 - 5e-6 under a test of exactly 5 %."""
    verdicts = [FixedSample().judge(rows(seed, 1000), EXACT, false_alarm=0.05).verdict for seed in range(400)]
    assert verdicts.count("biased") <= 41
    assert "unbiased" not in verdicts


def test_other_tests_and_rarest_keep_their_guard():
    data = rows(0, bias=0.7)
    assert Hotelling().judge(data, EXACT).verdict == "inconclusive"
    assert Sequential(most_repeats=2000).judge(data, EXACT).verdict == "inconclusive"
    assert FixedSample(rarest=1e-4).judge(data, EXACT).verdict == "inconclusive"


def test_a_table_policy_of_which_one_state_is_rare():
    """A bandit with a context of probability 1/1000 that is scored in full, and the usual one scored by half."""
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.999, 0.001], dtype=torch.float64)
    # the reward is the action and noise, so that dE/dlogit_a is P(state) pi_a (a - 1/2)
    exact = weight[:, None] * torch.tensor([-0.25, 0.25], dtype=torch.float64)
    torch.manual_seed(0)

    def estimate(share):
        state = int(torch.rand(()) < 0.001)
        policy = torch.distributions.Categorical(logits=logits[state])
        action = policy.sample()
        return (share if state == 0 else 1.0) * (action + torch.randn(())) * policy.log_prob(action)

    half = check_unbiased(lambda: estimate(0.5), [exact], logits, repeats=2000)
    assert (half.verdict, half.where[:15]) == ("biased", "parameter 0 at ")
    assert half.where[15:] in ("(0, 0)", "(0, 1)")
    assert check_unbiased(lambda: estimate(1.0), [exact], logits, repeats=2000).verdict == "inconclusive"
