"""Advantages with a value function: against a double loop, against `RewardToGo`, and their bias on a known problem."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

import scorefn as sf
from applications.rl.tabular_mdp import EpisodeDistribution, TabularMDP
from scorefn.trajectories import SegmentDistribution, TemporalDifference, Trajectories, gae, vtrace
from tests.oracles import near
from tests.trajectories.corridor import MODES, Scripted, corridors

DISCOUNT, LAMBDA = 0.9, 0.7


def doubles(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Steps(NamedTuple):
    rewards: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor
    terminated: torch.Tensor
    done: torch.Tensor
    mask: torch.Tensor
    log_ratio: torch.Tensor

    @property
    def arguments(self):
        return self[:5]


def flags(rows):
    return torch.tensor([list(row) for row in rows])


def steps(seed=0):
    """Four streams: terminated, truncated, both, cut by the segment; with a filler row (`-`) after an end, or none.

    What stands in absent rows, and in the next value of a terminated step, is NaN.
    """
    letters = flags([map(ord, row) for row in ("..T-..", ".U.T.U", "B-....", "T-U-..")])
    mask, terminated = letters != ord("-"), (letters == ord("T")) | (letters == ord("B"))
    done = terminated | (letters == ord("U")) | (letters == ord("B"))
    values = doubles(4, 6, seed=seed + 1)
    inside = torch.zeros_like(mask)
    inside[:, :-1] = ~done[:, :-1]
    following = torch.where(inside, values.roll(-1, 1), doubles(4, 6, seed=seed + 2))
    return Steps(
        doubles(4, 6, seed=seed).where(mask, torch.nan),
        values.where(mask, torch.nan),
        following.where(mask & ~terminated, torch.nan),
        terminated,
        done,
        mask,
        (0.7 * doubles(4, 6, seed=seed + 3)).where(mask, torch.nan),
    )


def brute_gae(s, discount, lambda_):
    """The double loop."""
    advantage = torch.zeros_like(s.rewards)
    for n in range(len(s.rewards)):
        for t in range(s.rewards.shape[1]):
            weight, j = 1.0, t
            while s.mask[n, t]:
                after = 0.0 if s.terminated[n, j] else discount * s.next_values[n, j]
                advantage[n, t] += weight * (s.rewards[n, j] + after - s.values[n, j])
                weight *= discount * lambda_
                if s.done[n, j] or j + 1 == s.rewards.shape[1]:
                    break
                j += 1
    return advantage


def brute_vtrace(s, discount, rho_bar, c_bar, lambda_):
    """Equation 1, written out; and the advantage with the target of the next step."""
    targets, advantages = torch.zeros_like(s.rewards), torch.zeros_like(s.rewards)
    T = s.rewards.shape[1]
    for n in range(len(s.rewards)):
        for t in range(T):
            if not s.mask[n, t]:
                continue
            targets[n, t], weight = s.values[n, t], 1.0
            for j in range(t, T):
                ratio = float(s.log_ratio[n, j].exp())
                after = 0.0 if s.terminated[n, j] else discount * s.next_values[n, j]
                targets[n, t] += weight * min(rho_bar, ratio) * (s.rewards[n, j] + after - s.values[n, j])
                weight *= discount * lambda_ * min(c_bar, ratio)
                if s.done[n, j]:
                    break
        for t in range(T):
            if s.mask[n, t]:
                last = s.done[n, t] or t + 1 == T
                after = s.next_values[n, t] if last else targets[n, t + 1]
                after = 0.0 if s.terminated[n, t] else discount * after
                ratio = min(rho_bar, float(s.log_ratio[n, t].exp()))
                advantages[n, t] = ratio * (s.rewards[n, t] + after - s.values[n, t])
    return targets, advantages


# ------------------------------------------------------------------------------------------------------------ values


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


# --------------------------------------------------------------------------------------------- temporal differences


class Counting(nn.Module):
    """`[*batch, 2] -> [*batch, 1]`; counts the observations it is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Dropout(0.5)).double()
        self.asked = 0

    def forward(self, observations):
        self.asked += len(observations)
        return self.network(observations)


def trajectories():
    """The streams of `steps`, with observations; NaN where absent."""
    s = steps()
    inside = torch.zeros_like(s.mask)
    inside[:, :-1] = ~s.done[:, :-1]
    observations = doubles(4, 6, 2, seed=9).where(s.mask[..., None], torch.nan)
    following = torch.where(inside[..., None], observations.roll(-1, 1), doubles(4, 6, 2, seed=10))
    starts = torch.ones_like(s.mask)
    starts[:, 1:] = s.done[:, :-1] | ~s.mask[:, :-1]
    return Trajectories(
        observations, torch.zeros(4, 6), s.rewards, s.terminated, s.done & ~s.terminated, s.mask, following, starts
    )


def evaluated(module, tau):
    module.eval()
    values = module(tau.observations).squeeze(-1).detach().where(tau.mask, 0.0)
    following = module(tau.next_observations).squeeze(-1).detach().where(tau.mask & ~tau.terminated, 0.0)
    module.train()
    return values, following


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


# -------------------------------------------------------------------------------------- the bias, on a known problem


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


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong", [-0.1, 1.01, math.nan, math.inf])
def test_fractions_outside_the_unit_interval(wrong):
    s = steps()
    for name, call in (
        ("discount", lambda: gae(*s.arguments, discount=wrong, lambda_=1.0)),
        ("lambda_", lambda: gae(*s.arguments, discount=1.0, lambda_=wrong)),
        ("discount", lambda: vtrace(*s.arguments, s.log_ratio, discount=wrong)),
        ("lambda_", lambda: vtrace(*s.arguments, s.log_ratio, discount=1.0, lambda_=wrong)),
        ("discount", lambda: TemporalDifference(Counting(), wrong)),
    ):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must lie in \[0, 1\], but it is {wrong}"):
            call()


def test_tensors_that_do_not_fit():
    s = steps()
    with pytest.raises(sf.ShapeError, match=r"values has shape \(4, 6, 1\), but rewards .* \(4, 6\)"):
        gae(s.rewards, s.values.unsqueeze(-1), *s[2:5], discount=1.0, lambda_=1.0)
    with pytest.raises(sf.ShapeError, match=r"log_ratio has shape \(4, 5\)"):
        vtrace(*s.arguments, s.log_ratio[:, :5], discount=1.0)
    with pytest.raises(sf.ShapeError, match="T at least 1"):
        gae(*[v[:, :0] for v in s.arguments], discount=1.0, lambda_=1.0)
    with pytest.raises(sf.ScorefnError, match="done must be bool, but it is torch.float64"):
        gae(*s[:4], s.done.double(), discount=1.0, lambda_=1.0)


def test_bounds_of_vtrace():
    s = steps()
    for name in ("rho_bar", "c_bar"):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must be above 0, but it is 0.0"):
            vtrace(*s.arguments, s.log_ratio, discount=1.0, **{name: 0.0})
    far = torch.full_like(s.rewards, 800.0)
    with pytest.raises(sf.NonFiniteError, match=r"exp\(800\).*finite values"):
        vtrace(*s.arguments, far, discount=1.0, rho_bar=math.inf, mask=s.mask)
    found = vtrace(*s.arguments, far, discount=1.0, mask=s.mask)
    assert near(found.targets, brute_vtrace(s._replace(log_ratio=far / 10), 1.0, 1.0, 1.0, 1.0)[0])


def changed(s, **fields):
    """The steps with one entry of each of some fields replaced, in step 3 of the second stream."""
    for name, value in fields.items():
        tensor = getattr(s, name).clone()
        tensor[1, 3] = value
        s = s._replace(**{name: tensor})
    return s


def estimates(s, mask=None):
    return [
        lambda: gae(*s.arguments, discount=0.9, lambda_=0.5, mask=mask),
        lambda: vtrace(*s.arguments, s.log_ratio, discount=0.9, mask=mask),
    ]


def test_a_step_that_terminates_without_an_end_is_refused_with_its_place():
    s = changed(steps(), terminated=True, done=False, mask=True)
    for estimate in estimates(s, s.mask):
        with pytest.raises(sf.ScorefnError, match=r"terminated is True but done is False in step 3 of stream 1.*\|"):
            estimate()
    for estimate in estimates(s, s.mask.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(False))):
        estimate()  # where there is no step, nothing is read


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rewards", "values", "next_values"])
def test_what_is_not_finite_is_refused_with_its_place(name, value):
    s = changed(steps(), **{name: value}, terminated=False, done=False, mask=True)
    for estimate in estimates(s, s.mask):
        with pytest.raises(sf.NonFiniteError, match=rf"{name} are {value} in step 3 of stream 1"):
            estimate()


def test_a_log_ratio_may_be_infinite_but_not_nan():
    s = steps()
    assert s.mask[1, 2]
    vtrace(*s.arguments, s.log_ratio.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-math.inf).double()),
           discount=1.0, mask=s.mask)  # fmt: skip
    s = changed(s, log_ratio=math.nan, mask=True, rewards=0.0, values=0.0, next_values=0.0)
    with pytest.raises(sf.NonFiniteError, match="log_ratio is nan in step 3 of stream 1"):
        vtrace(*s.arguments, s.log_ratio, discount=1.0, mask=s.mask)


def test_differences_that_overflow_say_so():
    big = torch.full((1, 2), 3e38)
    flag = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(sf.NonFiniteError, match="temporal differences overflow"):
        gae(big, -big, big, flag, flag, discount=1.0, lambda_=1.0)


def test_what_is_no_number_and_no_tensor():
    s = steps()
    for name in ("discount", "lambda_"):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must be a number in \[0, 1\], but it is 'x'"):
            gae(*s.arguments, **{"discount": 1.0, "lambda_": 1.0, name: "x"})
    with pytest.raises(sf.ScorefnError, match="rho_bar must be above 0, but it is 'x'"):
        vtrace(*s.arguments, s.log_ratio, discount=1.0, rho_bar="x")
    with pytest.raises(sf.ShapeError, match=r"mask is a list, but it must be a tensor \[N, T\].*torch.as_tensor\(mask"):
        gae(*s.arguments, discount=1.0, lambda_=1.0, mask=s.mask.tolist())
    with pytest.raises(sf.ShapeError, match="rewards are a list"):
        gae(s.rewards.tolist(), *s.arguments[1:], discount=1.0, lambda_=1.0)


def test_value_functions_that_return_something_else():
    tau = trajectories()
    with pytest.raises(sf.ShapeError, match=r"shape \(20, 2\) for 20 observations.*\(20, 1\)"):
        TemporalDifference(lambda observations: observations, DISCOUNT)(tau)
    with pytest.raises(sf.ShapeError, match="a float for 20 observations"):
        TemporalDifference(lambda observations: 0.0, DISCOUNT)(tau)

    def broken(observations):
        return torch.where(torch.arange(len(observations)) == 4, torch.nan, observations[:, 0])

    with pytest.raises(sf.NonFiniteError, match="nan for step 5 of stream 0"):
        TemporalDifference(broken, DISCOUNT)(tau)


def test_it_shows_how_it_was_called():
    assert repr(TemporalDifference(len, 0.5)) == "TemporalDifference(<built-in function len>, 0.5)"
