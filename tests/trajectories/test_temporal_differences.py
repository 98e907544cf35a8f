"""Temporal differences: where the value function is asked."""

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import SegmentDistribution, TemporalDifference, gae
from tests.oracles.tolerances import near
from tests.trajectories.advantage_cases import DISCOUNT, LAMBDA, Counting, Steps, brute_gae, evaluated, trajectories
from tests.trajectories.corridor import MODES, Scripted, corridors


def test_temporal_differences_look_beyond_only_where_they_must():
    tau, module = trajectories(), Counting()
    values, following = evaluated(module, tau)
    module.asked = 0
    ours = TemporalDifference(module, DISCOUNT)(tau)
    ends = int((tau.truncated & ~tau.terminated).sum()) + 3  # three streams go on beyond the segment
    assert module.asked == int(tau.mask.sum()) + ends
    assert module.training  # evaluated without dropout, and put back
    assert near(ours, (tau.rewards + DISCOUNT * following - values).where(tau.mask, 0.0), 1e-12)
    assert not ours.requires_grad
    read = TemporalDifference(module, DISCOUNT).values(tau)
    assert near(read[0], values)
    assert near(read[1], following)
    assert near(ours, gae(tau.rewards, *read, tau.terminated, tau.done, discount=DISCOUNT, lambda_=0.0, mask=tau.mask))


def test_the_value_may_be_a_baseline_or_a_function_and_observations_may_be_structured():
    tau, module = trajectories(), Counting()
    right = TemporalDifference(module, DISCOUNT)(tau)
    assert torch.equal(TemporalDifference(sf.ValueFunction(module), DISCOUNT)(tau), right)

    def value(observations):
        return module.network[:3](observations["place"]).squeeze(-1)

    nested = tau._replace(observations={"place": tau.observations}, next_observations={"place": tau.next_observations})
    assert torch.equal(TemporalDifference(value, DISCOUNT)(nested), right)


def test_a_stream_that_ends_in_the_last_column_asks_for_nothing_more():
    tau, module = trajectories(), Counting()
    tau = tau._replace(terminated=tau.terminated | tau.mask)
    TemporalDifference(module, DISCOUNT)(tau)
    assert module.asked == int(tau.mask.sum())


@pytest.mark.parametrize("mode", MODES)
def test_charged_as_reward_to_go_on_segments_it_is_gae(mode):
    """Rewards, ends and filler rows of a real stream; the value of what lies beyond the segment included."""
    script = torch.randint(2, (6, 11), generator=torch.Generator().manual_seed(2))
    module, p = Counting(), SegmentDistribution(corridors(6, mode, poison=False), Scripted(script), 11)
    critic = TemporalDifference(module, DISCOUNT)
    draws = sf.draw(p, critic, 6)
    tau = draws.x
    assert tau.truncated.any()
    assert tau.terminated.any()
    values, following = evaluated(module, tau)
    right = brute_gae(
        Steps(tau.rewards, values, following, tau.terminated, tau.done, tau.mask, tau.rewards), DISCOUNT, LAMBDA
    )
    ours = draws.signal(sf.RewardToGo(DISCOUNT * LAMBDA, visitation_discount=False)).where(tau.mask, 0.0)
    assert near(ours, right, 1e-12)
    read = critic.values(tau)
    direct = gae(tau.rewards, *read, tau.terminated, tau.done, discount=DISCOUNT, lambda_=LAMBDA, mask=tau.mask)
    assert near(direct, right, 1e-12)
