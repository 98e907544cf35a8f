"""The bias of an advantage, enumerated on a known problem."""

import math

import pytest
import torch

import scorefn as sf
from applications.rl.tabular_mdp import EpisodeDistribution, TabularMDP
from scorefn.trajectories import gae, vtrace
from tests.oracles.tolerances import near
from tests.trajectories.advantage_cases import DISCOUNT, LAMBDA, doubles


def endless(seed=0, states=3, actions=2):
    """Dynamics, rewards, policy and behaviour of a process that goes on for ever."""
    return (
        doubles(states, actions, states, seed=seed).softmax(-1),
        doubles(states, actions, seed=seed + 1),
        doubles(states, actions, seed=seed + 2).softmax(-1),
        doubles(states, actions, seed=seed + 3).softmax(-1),
    )


def value_of(policy, transition, reward, discount):
    """`(I - discount P) V = r`."""
    chain = torch.einsum("sa,saz->sz", policy, transition)
    return torch.linalg.solve(torch.eye(len(chain), dtype=chain.dtype) - discount * chain, (policy * reward).sum(-1))


def walks(policy, transition, start, length):
    """Every walk: states `[P, T + 1]`, actions `[P, T]` and probabilities `[P]`."""
    states, actions, probability = (
        torch.tensor([[start]]),
        torch.zeros(1, 0, dtype=torch.long),
        doubles(1).exp() * 0 + 1,
    )
    S, A = policy.shape
    for _ in range(length):
        here, n = states[:, -1], len(states)
        step = policy[here][:, :, None] * transition[here]  # [P, A, S]
        probability = (probability[:, None, None] * step).reshape(-1)
        a = torch.arange(A)[None, :, None].expand(n, A, S).reshape(-1)
        z = torch.arange(S)[None, None, :].expand(n, A, S).reshape(-1)
        states = torch.cat([states.repeat_interleave(A * S, 0), z[:, None]], 1)
        actions = torch.cat([actions.repeat_interleave(A * S, 0), a[:, None]], 1)
    return states, actions, probability


def expected_first_advantage(value, lambda_, start, action, length=4):
    """`E[A_0 | s_0, a_0]` over all segments of some length."""
    transition, reward, policy, _ = endless()
    first = torch.zeros_like(policy)
    first[:, action] = 1.0
    total = 0.0
    for middle in range(len(transition)):
        states, actions, probability = walks(policy, transition, middle, length - 1)
        states = torch.cat([torch.full((len(states), 1), start), states], 1)
        actions = torch.cat([torch.full((len(actions), 1), action), actions], 1)
        no = torch.zeros_like(actions, dtype=torch.bool)
        advantage = gae(
            reward[states[:, :-1], actions], value[states[:, :-1]], value[states[:, 1:]], no, no,
            discount=DISCOUNT, lambda_=lambda_,
        )  # fmt: skip
        total = total + transition[start, action, middle] * (probability @ advantage[:, 0])
    return float(total)


@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
def test_gae_has_no_bias_with_the_true_value_function_and_some_with_another(lambda_):
    transition, reward, policy, _ = endless()
    true = value_of(policy, transition, reward, DISCOUNT)
    advantage = reward + DISCOUNT * transition @ true - true[:, None]
    wrong = true + doubles(3, seed=30)
    gaps = []
    for start in range(3):
        for action in range(2):
            assert abs(expected_first_advantage(true, lambda_, start, action) - float(advantage[start, action])) < 1e-12
            # beside a constant of the state, which no gradient sees
            gaps.append(expected_first_advantage(wrong, lambda_, start, action) - float(advantage[start, action]))
    between = max(abs(gaps[2 * s] - gaps[2 * s + 1]) for s in range(3))
    assert between > 1e-3


def test_with_whole_episodes_and_lambda_one_any_value_function_is_a_baseline():
    """Temporal differences charged by `RewardToGo(discount)` give the exact gradient; with lambda below 1 not."""
    mdp = TabularMDP.random(2, states=2, actions=2, payments=1, horizon=3)
    logits = doubles(2, 2, seed=3).requires_grad_()
    p = EpisodeDistribution(mdp, logits)
    episodes = mdp.enumerate()
    weight = p.log_prob(episodes).exp()
    table = 3 * doubles(2, seed=4)
    values = table[episodes.states]
    terminated = torch.zeros_like(episodes.states, dtype=torch.bool)
    terminated[:, -1] = True
    following = values.roll(-1, 1)
    delta = gae(episodes.rewards, values, following, terminated, terminated, discount=DISCOUNT, lambda_=0.0)
    draws = p.score(lambda _: delta, episodes)
    exact = torch.autograd.grad(weight @ (episodes.rewards * DISCOUNT ** torch.arange(3).double()).sum(-1), logits)[0]

    def gradient(credit):
        return torch.autograd.grad(weight.detach() @ sf.surrogate(draws, credit=credit), logits, retain_graph=True)[0]

    assert near(gradient(sf.RewardToGo(DISCOUNT)), exact)
    dropped = gradient(sf.RewardToGo(DISCOUNT, visitation_discount=False))
    assert (dropped - exact).abs().max() > 1e-3  # discount^t dropped
    assert (gradient(sf.RewardToGo(DISCOUNT * LAMBDA)) - exact).abs().max() > 1e-3


def expected_correction(value, rho_bar, c_bar, start, length=4):
    """`E[v_0 - V(s_0)]` of V-trace under the behaviour, over all segments."""
    transition, reward, policy, behaviour = endless()
    states, actions, probability = walks(behaviour, transition, start, length)
    no = torch.zeros_like(actions, dtype=torch.bool)
    log_ratio = (policy / behaviour).log()[states[:, :-1], actions]
    found = vtrace(
        reward[states[:, :-1], actions], value[states[:, :-1]], value[states[:, 1:]], no, no, log_ratio,
        discount=DISCOUNT, rho_bar=rho_bar, c_bar=c_bar,
    )  # fmt: skip
    return float(probability @ found.targets[:, 0] - value[start])


@pytest.mark.parametrize("rho_bar", [0.6, 1.0, 1.3, math.inf])
@pytest.mark.parametrize("c_bar", [0.5, 1.0, math.inf])
def test_the_fixed_point_of_vtrace_is_the_value_of_the_truncated_policy(rho_bar, c_bar):
    transition, reward, policy, behaviour = endless()
    truncated = torch.minimum(rho_bar * behaviour, policy) if rho_bar < math.inf else policy
    truncated = truncated / truncated.sum(-1, keepdim=True)
    value = value_of(truncated, transition, reward, DISCOUNT)
    assert all(abs(expected_correction(value, rho_bar, c_bar, start)) < 1e-12 for start in range(3))
    other = value + doubles(3, seed=31)
    assert max(abs(expected_correction(other, rho_bar, c_bar, start)) for start in range(3)) > 1e-3
