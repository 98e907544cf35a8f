"""The reducers on episodes of unequal length: the exact expectation over all tuples of episodes, and mutations.

Each tuple of N episodes of the corridor is a problem of its own, so that one call sees all of its own randomness; an
estimate is weighed with the probability of its tuple.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.trajectories import TemporalDifference, TrajectoryDistribution, rewards
from tests.oracles.tolerances import near
from tests.oracles.toys import coordinates
from tests.trajectories import (
    advantage_cases,
    test_advantage_bias,
    test_advantages,
    test_ratios,
    test_temporal_differences,
)
from tests.trajectories.corridor import SEQUENCES, Scripted, corridors, expected_return


def episodes(policy):
    """Every episode once, `[12]` of up to four steps."""
    policy.script, policy.time = SEQUENCES, 0
    draws = sf.draw(TrajectoryDistribution(corridors(len(SEQUENCES)), policy), rewards, len(SEQUENCES))
    kept = torch.where(draws.mask, draws.x.actions, -1)
    first = [i for i in range(len(kept)) if not (kept[:i] == kept[i]).all(1).any()]
    return draws[torch.tensor(first)]


@cache
def choices(N, count):
    return coordinates(*[count] * N).T  # [N, P^N]


def tuples(policy, N):
    """All N-tuples of episodes `[N, P^N, 4]`, and the probability of each tuple."""
    one = episodes(policy)
    chosen = choices(N, len(one))
    draws = sf.Draws(
        None,
        one.log_prob[chosen],
        one.fx[chosen],
        credit=sf.RewardToGo(),
        mask=one.mask[chosen],
        context=one.context[chosen],
    )
    return draws, one.log_prob.detach().sum(-1).exp()[chosen].prod(0)


def gradient(value, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)])


def truth(policy):
    def logits(position, time):
        return policy.network(torch.tensor([position, time], dtype=torch.float64))

    return gradient(expected_return(logits), policy)


def bias(policy, draws, weight, baseline, credit=None):
    ours = gradient((weight * sf.surrogate(draws, credit=credit, baseline=baseline).mean(0)).sum(), policy)
    return float((ours - truth(policy)).abs().max())


def some_policy():
    return Scripted(SEQUENCES)


def value_function(seed=3, rate=None):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = None if rate is None else torch.optim.SGD(module.parameters(), lr=rate)
    return sf.ValueFunction(module, optimizer=optimizer)


def learned(baseline, draws):
    """After three updates with other episodes, of unequal length, the same for every tuple."""
    one, (_, problems, _) = episodes(some_policy()), draws.log_prob.shape
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(one), (4, 1), generator=generator).expand(4, problems)
        past = sf.Draws(
            None,
            one.log_prob[chosen],
            torch.randn(4, 1, draws.fx.shape[-1], generator=generator, dtype=torch.float64).expand(4, problems, -1),
            credit=draws.credit,
            mask=one.mask[chosen],
            context=one.context[chosen],
        )
        baseline.update(past.signal(), past)
    return baseline


def time_features(draws):
    return torch.cat([draws.context, draws.context.prod(-1, keepdim=True)], -1)


BASELINES = {
    "leave-one-out per step": lambda draws: sf.LeaveOneOut(),
    "optimal constant per step": lambda draws: sf.OptimalConstant(),
    "shared optimal constant": lambda draws: sf.OptimalConstant(shared=True),
    "regression on observations": lambda draws: sf.RegressionBaseline(),
    "regression on features": lambda draws: sf.RegressionBaseline(time_features),
    "moving average, new": lambda draws: sf.MovingAverage(),
    "moving average, learned": lambda draws: learned(sf.MovingAverage(), draws),
    "past rewards, new": lambda draws: sf.AdaptiveRaoBlackwell(),
    "past rewards, learned": lambda draws: learned(sf.AdaptiveRaoBlackwell(), draws),
    "value function": lambda draws: value_function(),
    "value function, learned": lambda draws: learned(value_function(rate=0.1), draws),
}


def check_exact(name, N):
    policy = some_policy()
    draws, weight = tuples(policy, N)
    assert abs(float(weight.sum()) - 1) < 1e-12
    assert not draws.mask.all()  # ragged
    assert bias(policy, draws, weight, BASELINES[name](draws)) < 1e-10


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("name", BASELINES)
def test_every_reducer_keeps_the_exact_gradient(name, N):
    check_exact(name, N)


@pytest.mark.parametrize("name", [name for name in BASELINES if "past" not in name])  # Total leaves no past rewards
def test_also_with_the_return_of_the_whole_episode(name):
    policy = some_policy()
    draws, weight = tuples(policy, 2)
    whole = replace(draws, fx=draws.fx.sum(-1, keepdim=True), credit=sf.Total())
    assert bias(policy, whole, weight, BASELINES[name](whole)) < 1e-10


def test_leave_one_out_across_streams_is_the_mean_of_the_others_that_are_still_there():
    draws, _ = tuples(some_policy(), 3)
    signal = draws.signal()
    baseline = sf.LeaveOneOut()(signal, draws)
    for i in range(3):
        others = torch.tensor([j for j in range(3) if j != i])
        count = draws.mask[others].sum(0)
        right = torch.where(draws.mask[others], signal[others], 0.0).sum(0) / count.clamp(min=1)
        assert near(baseline[i].where(draws.mask[i], 0.0), right.where(draws.mask[i], 0.0))


def test_the_rewards_of_the_past_are_what_is_regressed_on():
    draws, _ = tuples(some_policy(), 2)
    past = draws.fx.cumsum(-1) - draws.fx
    assert near(draws.uninfluenced, past)
    assert learned(sf.AdaptiveRaoBlackwell(), draws).coefficient(draws.signal()).abs().max() > 1e-3


def test_a_value_function_is_fitted_after_the_advantages_are_taken():
    policy = some_policy()
    torch.manual_seed(0)
    p = TrajectoryDistribution(corridors(16), policy)
    results = []
    for rate in (None, 0.1):
        policy.time = 0
        baseline = value_function(rate=rate)
        before = [q.clone() for q in baseline.module.parameters()]
        results.append(gradient(sf.expectation(p, rewards, 16, baseline=baseline), policy))
        moved = any(not torch.equal(a, b) for a, b in zip(before, baseline.module.parameters(), strict=True))
        assert moved == (rate is not None)
    assert torch.equal(*results)


class FittedFirst(sf.MovingAverage):
    """Learns from the draws it is about to be subtracted from."""

    def __call__(self, signal, draws):
        self.update(signal, draws)
        return super().__call__(signal, draws)


def test_a_baseline_fitted_first_is_biased():
    policy = some_policy()
    draws, weight = tuples(policy, 2)
    assert bias(policy, draws, weight, FittedFirst()) > 1e-3


def test_a_critic_on_whole_episodes_is_exact_where_they_terminate_and_declared_where_they_do_not():
    """Truncated episodes have lost their future: what V says of it is not what the undiscounted return counts."""
    policy = some_policy()
    one = episodes(policy)
    weight = one.log_prob.detach().sum(-1).exp()
    critic = TemporalDifference(value_function().module, 1.0)
    ended = one.x._replace(terminated=one.x.done)  # an episode of four steps at most, and time is observed
    for tau, exact in ((ended, True), (one.x, False)):
        draws = replace(one, fx=critic(tau))
        gap = gradient(weight @ sf.surrogate(draws, credit=sf.RewardToGo()), policy) - truth(policy)
        assert (gap.abs().max() < 1e-10) == exact


# ---------------------------------------------------------------------------------------------------------- mutations

A = test_advantages


def doubled_loop():
    A.test_gae_is_the_double_loop(advantage_cases.DISCOUNT, advantage_cases.LAMBDA)


def equation_1():
    A.test_vtrace_is_equation_1(advantage_cases.DISCOUNT, 1.5, 0.8, 1)


def truncated_as_terminated(estimate):
    return lambda r, v, following, terminated, done, *rest, **options: estimate(
        r, v, following, done, done, *rest, **options
    )


def uncut(estimate):
    return lambda r, v, following, terminated, done, *rest, **options: estimate(
        r, v, following, terminated, terminated, *rest, **options
    )


def exchanged(estimate):
    return lambda *steps, rho_bar=1.0, c_bar=1.0, **options: estimate(*steps, rho_bar=c_bar, c_bar=rho_bar, **options)


def without_visitation(original):
    return lambda self, v: original(replace(self, visitation_discount=False), v)


MUTATIONS = {
    "gae: a truncated episode taken as terminal": (A, "gae", truncated_as_terminated, doubled_loop),
    "gae: truncation, told by name": (
        A, "gae", truncated_as_terminated,
        A.test_a_truncated_episode_keeps_its_bootstrap_and_a_terminated_one_has_none,
    ),
    "gae: the scan not cut": (A, "gae", uncut, doubled_loop),
    "gae: lambda left out": (
        A, "gae", lambda original: lambda *s, lambda_, **o: original(*s, lambda_=1.0, **o), doubled_loop,
    ),
    "vtrace: a truncated episode taken as terminal": (A, "vtrace", truncated_as_terminated, equation_1),
    "vtrace: the scan not cut": (A, "vtrace", uncut, equation_1),
    "vtrace: bounds exchanged": (A, "vtrace", exchanged, equation_1),
    "vtrace: bounds exchanged, fixed point": (
        test_advantage_bias, "vtrace", exchanged,
        lambda: test_advantage_bias.test_the_fixed_point_of_vtrace_is_the_value_of_the_truncated_policy(1.3, 0.5),
    ),
    "a critic that takes truncated episodes as terminal": (
        TemporalDifference, "values",
        lambda original: lambda self, tau: original(self, tau._replace(terminated=tau.done)),
        test_temporal_differences.test_temporal_differences_look_beyond_only_where_they_must,
    ),
    "gamma^t dropped": (
        sf.RewardToGo, "__call__", without_visitation,
        test_advantage_bias.test_with_whole_episodes_and_lambda_one_any_value_function_is_a_baseline,
    ),
    "the optimistic clip": (
        torch, "minimum", lambda original: torch.maximum, lambda: test_ratios.test_the_clip_case_by_case(2.0, -1.0),
    ),
    "leave-one-out with absent steps": (
        sf.LeaveOneOut, "__call__",
        lambda original: lambda self, signal, draws: original(self, signal, replace(draws, mask=None)),
        test_leave_one_out_across_streams_is_the_mean_of_the_others_that_are_still_there,
    ),
    "leave-one-out with the own episode": (
        sf.LeaveOneOut, "__call__",
        lambda original: lambda self, signal, draws: signal.mean(0, keepdim=True).expand(signal.shape),
        lambda: check_exact("leave-one-out per step", 2),
    ),
    "past rewards: learned before they are read": (
        sf.AdaptiveRaoBlackwell, "__call__",
        lambda original: lambda self, signal, draws: (self.update(signal, draws), original(self, signal, draws))[1],
        lambda: check_exact("past rewards, new", 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_turns_a_test_red(name, monkeypatch):
    owner, attribute, change, check = MUTATIONS[name]
    check()
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check()
