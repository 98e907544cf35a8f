"""The policy gradient of CartPole at three stages of training."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import scorefn as sf
from applications.benchmarks.reducers.closed_forms import flat_gradient
from applications.benchmarks.reducers.programs import Scaled
from applications.benchmarks.reducers.variances import Estimate, Problem
from applications.rl import cartpole


def policies(seed: int, config: cartpole.Config) -> dict[str, sf.trajectories.CategoricalPolicy]:
    """The policy when fresh, half-way and near the end of training."""
    states: list[dict[str, Tensor]] = []

    def remember(run: cartpole.Run) -> None:
        states.append({name: value.clone() for name, value in run.policy.state_dict().items()})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = cartpole.new_run(seed, config).policy.state_dict()
    cartpole.train(seed, config, progress=remember)
    stages = {
        "fresh": fresh,
        f"half-way, after {len(states) // 2} updates": states[len(states) // 2 - 1],
        f"near the end, after {len(states) - 1} updates": states[-2],
    }
    found = {}
    for name, state in stages.items():
        found[name] = cartpole.new_run(seed, config).policy
        found[name].load_state_dict(state)
    return found


def time_and_observations(draws: sf.Draws) -> Tensor:
    """What a value function of CartPole needs to know: the episode ends after 500 steps, ``[N, T, 5]``."""
    observations = draws.context
    steps = torch.arange(observations.shape[1]) / 500.0
    return torch.cat([observations, steps.expand(observations.shape[:2]).unsqueeze(-1)], -1)


def polynomial(draws: sf.Draws) -> Tensor:
    """First and second powers, ``[N, T, 10]``."""
    features = time_and_observations(draws)
    return torch.cat([features, features.square()], -1)


def pole(policy: sf.trajectories.CategoricalPolicy, title: str, episodes: int = 32) -> Problem:
    """The policy gradient; the estimators of a round share its episodes, which are the dearest part."""
    tau = sf.trajectories.TrajectoryDistribution(cartpole.make_env(episodes), policy)
    parameters = list(policy.parameters())
    shared: list[sf.Draws] = []

    def prepare() -> tuple[None, float]:
        begin = time.process_time()
        shared[:] = [sf.draw(tau, sf.trajectories.rewards, episodes)]
        return None, time.process_time() - begin

    def estimate(baseline: Any, credit: Any = None, fit: int = 1) -> Estimate:
        def gradient() -> Tensor:
            draws = shared[0]
            value = sf.surrogate(draws, credit=credit, baseline=baseline).mean()
            if hasattr(baseline, "update"):
                for _ in range(fit):
                    baseline.update(draws.signal(credit), draws)
            return flat_gradient(value, parameters, keep=True)

        return gradient

    def value() -> sf.ValueFunction:
        module = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1), Scaled(100.0))
        return sf.ValueFunction(module, time_and_observations, optimizer=torch.optim.Adam(module.parameters(), lr=1e-2))

    total = sf.Total()
    return Problem(
        f"CartPole, {title}",
        f"Policy of `applications/rl/cartpole.py`, {episodes} episodes an update, all parameters; the estimators of a "
        "round share its episodes, and the time of drawing and scoring them is counted for each.",
        {
            "reward-to-go, leave-one-out": estimate(sf.LeaveOneOut()),
            "reward-to-go, no baseline": estimate(None),
            "reward-to-go, MovingAverage": estimate(sf.MovingAverage(0.9)),
            "reward-to-go, ValueFunction, 4 steps": estimate(value(), fit=4),
            "reward-to-go, RegressionBaseline": estimate(sf.RegressionBaseline(polynomial)),
            "reward-to-go, OptimalConstant": estimate(sf.OptimalConstant()),
            "reward-to-go, AdaptiveRaoBlackwell": estimate(sf.AdaptiveRaoBlackwell()),
            "total, leave-one-out": estimate(sf.LeaveOneOut(), total),
            "total, no baseline": estimate(None, total),
            "total, MovingAverage": estimate(sf.MovingAverage(0.9), total),
            "total, ValueFunction, 4 steps": estimate(value(), total, fit=4),
            "total, OptimalConstant": estimate(sf.OptimalConstant(), total),
        },
        {"the policy": slice(None)},
        prepare,
        repeats=0.5,
        warm_up=80,
    )
