"""Generalised advantages and V-trace, against the double loop."""

import math

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import TemporalDifference, gae, vtrace
from tests.oracles.tolerances import near
from tests.trajectories.advantage_cases import DISCOUNT, LAMBDA, Steps, brute_gae, brute_vtrace, steps


@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
@pytest.mark.parametrize("discount", [0.0, DISCOUNT, 1.0])
def test_gae_is_the_double_loop(discount, lambda_):
    s = steps()
    ours = gae(*s.arguments, discount=discount, lambda_=lambda_, mask=s.mask)
    assert near(ours, brute_gae(s, discount, lambda_), 1e-12)
    assert (ours[~s.mask] == 0).all()


def test_gae_is_reward_to_go_on_temporal_differences():
    s = steps()
    delta = gae(*s.arguments, discount=DISCOUNT, lambda_=0.0, mask=s.mask)
    credit = sf.RewardToGo(DISCOUNT * LAMBDA, visitation_discount=False, done=s.done)
    ours = gae(*s.arguments, discount=DISCOUNT, lambda_=LAMBDA, mask=s.mask)
    assert near(ours, credit(delta).where(s.mask, 0.0), 1e-12)


def test_lambda_of_one_is_the_return_minus_the_value():
    s = steps()
    to_go = torch.zeros_like(s.rewards)
    for n in range(4):
        for t in reversed(range(6)):
            if s.mask[n, t]:
                after = to_go[n, t + 1] if t < 5 and not s.done[n, t] else s.next_values[n, t]
                to_go[n, t] = s.rewards[n, t] + (0.0 if s.terminated[n, t] else DISCOUNT * after)
    ours = gae(*s.arguments, discount=DISCOUNT, lambda_=1.0, mask=s.mask)
    assert near(ours, (to_go - s.values).where(s.mask, 0.0), 1e-12)


def test_without_a_mask_all_steps_are_present_and_nothing_is_differentiated():
    s = [torch.nan_to_num(v) if v.is_floating_point() else v for v in steps()]
    plain = Steps(*s)._replace(mask=torch.ones(4, 6, dtype=torch.bool))
    plain.values.requires_grad_()
    ours = gae(*plain.arguments, discount=DISCOUNT, lambda_=LAMBDA)
    assert not ours.requires_grad
    assert near(ours, brute_gae(plain, DISCOUNT, LAMBDA).detach(), 1e-12)
    found = vtrace(*plain.arguments, plain.log_ratio, discount=DISCOUNT)
    assert not found.targets.requires_grad
    assert near(found.targets, brute_vtrace(plain, DISCOUNT, 1.0, 1.0, 1.0)[0].detach(), 1e-12)


def test_a_truncated_episode_keeps_its_bootstrap_and_a_terminated_one_has_none():
    s = steps()
    truncated = s.done & ~s.terminated
    wrong = gae(*s[:3], s.done, s.done, discount=DISCOUNT, lambda_=LAMBDA, mask=s.mask)
    right = gae(*s.arguments, discount=DISCOUNT, lambda_=LAMBDA, mask=s.mask)
    assert near((right - wrong)[truncated], DISCOUNT * s.next_values[truncated], 1e-12)
    assert near((right - wrong)[s.terminated], torch.zeros(int(s.terminated.sum()), dtype=torch.float64))


@pytest.mark.parametrize(("rho_bar", "c_bar", "lambda_"), [(1, 1, 1), (1.5, 0.8, 1), (math.inf, 1.2, 0.6), (0.7, 2, 0)])
@pytest.mark.parametrize("discount", [DISCOUNT, 1.0])
def test_vtrace_is_equation_1(discount, rho_bar, c_bar, lambda_):
    s = steps()
    ours = vtrace(
        *s.arguments, s.log_ratio, discount=discount, rho_bar=rho_bar, c_bar=c_bar, lambda_=lambda_, mask=s.mask
    )
    for mine, true in zip(ours, brute_vtrace(s, discount, rho_bar, c_bar, lambda_), strict=True):
        assert near(mine, true, 1e-12)
        assert (mine[~s.mask] == 0).all()


def test_vtrace_on_policy_is_the_n_step_return():
    s = steps()
    found = vtrace(*s.arguments, torch.zeros_like(s.rewards), discount=DISCOUNT, mask=s.mask)
    returns = gae(*s.arguments, discount=DISCOUNT, lambda_=1.0, mask=s.mask) + s.values
    assert near(found.targets, returns.where(s.mask, 0.0), 1e-12)
    assert near(found.advantages, (returns - s.values).where(s.mask, 0.0), 1e-12)


def test_float32_stays_float32():
    s = [v.float() if v.is_floating_point() else v for v in steps()]
    assert gae(*s[:5], discount=DISCOUNT, lambda_=LAMBDA, mask=s[5]).dtype == torch.float32
    assert vtrace(*s[:5], s[6], discount=DISCOUNT, mask=s[5]).targets.dtype == torch.float32


def test_it_shows_how_it_was_called():
    assert repr(TemporalDifference(len, 0.5)) == "TemporalDifference(<built-in function len>, 0.5)"
