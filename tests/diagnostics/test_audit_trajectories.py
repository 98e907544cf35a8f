"""Audits of episodes and segments: f of a record, baselines of what was known before."""

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor, nn

import scorefn as sf
from scorefn.diagnostics import audit
from scorefn.reducers import MovingAverage, OptimalConstant, RegressionBaseline, ValueFunction
from scorefn.trajectories import (
    CategoricalPolicy,
    SegmentDistribution,
    Trajectories,
    TrajectoryDistribution,
    returns,
    rewards,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def episodes(policy: nn.Module) -> TrajectoryDistribution:
    return TrajectoryDistribution(gymnasium.make("CartPole-v1"), policy, max_steps=30)


def centred(x: Trajectories) -> Tensor:
    return x.rewards - x.rewards.sum(-1).mean()


BASELINES: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "moving average": MovingAverage,
    "value function": lambda: ValueFunction(nn.Linear(4, 1)),
    "regression": lambda: RegressionBaseline(lambda draws: draws.context),
    "optimal constant": OptimalConstant,
}


@pytest.mark.parametrize("kind", BASELINES)
def test_episodes_without_fault(kind: str) -> None:
    policy = CategoricalPolicy(network())
    f = returns if kind == "auto" else rewards
    report = audit(episodes(policy), f, policy.parameters(), baseline=BASELINES[kind](), repeats=64)
    assert report, report
    assert "exact replay" in report.checked["interacting draws"]
    assert "exact replay" in report.checked["baseline of its own draw"]


def test_episodes_whose_rewards_are_centred_in_f() -> None:
    policy = CategoricalPolicy(network())
    report = audit(episodes(policy), centred, policy.parameters(), repeats=64)
    assert [finding.name for finding in report.findings] == ["interacting draws"]


@pytest.mark.parametrize("kind", ["actions", "steps left", "observations"])
def test_baselines_that_read_their_record(kind: str) -> None:
    """A record has many parts, of which some are known before a decision: the others bias."""
    policy = CategoricalPolicy(network())

    def features(draws: sf.Draws) -> Tensor:
        if kind == "actions":
            return draws.x.actions.unsqueeze(-1).float() - 0.5
        if kind == "steps left":
            return draws.x.mask.float().flip(1).cumsum(1).flip(1).unsqueeze(-1)
        return draws.x.observations[..., :1]

    module = nn.Linear(1, 1, bias=False)
    baseline = ValueFunction(module, features)
    report = audit(episodes(policy), rewards, policy.parameters(), baseline=baseline, repeats=256)
    fault = [] if kind == "observations" else ["baseline of its own features"]
    assert [finding.name for finding in report.findings] == fault
    assert "baseline of its own features" not in {**report.checked, **report.unchecked}


def test_segments() -> None:
    policy = CategoricalPolicy(network())
    env = gymnasium.make_vec("CartPole-v1", num_envs=4, vectorization_mode="sync")
    report = audit(SegmentDistribution(env, policy, 6), rewards, policy.parameters(), num_samples=4, repeats=64)
    assert report, report
