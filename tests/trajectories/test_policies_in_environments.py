"""Each policy in an environment with its kind of action: one gradient, and what the environment was given."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import scorefn as sf
from scorefn.trajectories import (
    BernoulliPolicy,
    CategoricalPolicy,
    Clip,
    GaussianPolicy,
    MultiCategoricalPolicy,
    ObservationNormalization,
    RecurrentPolicy,
    Tanh,
    TrajectoryDistribution,
    rewards,
)

BOX = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32))


class Walk(gymnasium.Env):
    """Five steps, each worth the sum of the action; actions outside the space are an error."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, space):
        self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self._observation(), float(np.sum(action)), self.time == 5, False, {}

    def _observation(self):
        return self.np_random.normal(size=3).astype(np.float32)


CASES = {
    "categorical": (spaces.Discrete(4), lambda: CategoricalPolicy(nn.Linear(3, 4))),
    "multicategorical": (spaces.MultiDiscrete([3, 2]), lambda: MultiCategoricalPolicy(nn.Linear(3, 5), [3, 2])),
    "bernoulli": (spaces.MultiBinary(2), lambda: BernoulliPolicy(nn.Linear(3, 2))),
    "clipped": (
        BOX,
        lambda: GaussianPolicy(nn.Linear(3, 2), torch.full((2,), 2.0), bounds=Clip.from_space(BOX)),
    ),
    "squashed": (BOX, lambda: GaussianPolicy(nn.Linear(3, 2), nn.Linear(3, 2), bounds=Tanh.from_space(BOX))),
    "normalised": (
        spaces.Discrete(4),
        lambda: CategoricalPolicy(nn.Sequential(ObservationNormalization(3), nn.Linear(3, 4))),
    ),
    "recurrent": (
        BOX,
        lambda: RecurrentPolicy(
            nn.LSTMCell(6, 8),
            GaussianPolicy(nn.Linear(8, 2), torch.zeros(2), bounds=Tanh.from_space(BOX)),
            encoder=nn.Sequential(ObservationNormalization(3), nn.Linear(3, 6), nn.Tanh()),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_policy_learns_from_its_environment(name):
    space, make = CASES[name]
    env = gymnasium.vector.SyncVectorEnv([lambda: Walk(space)] * 4)
    policy = make()
    draws = sf.draw(TrajectoryDistribution(env, policy), rewards, 6)
    assert draws.log_prob.shape == (6, 5)
    sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in policy.parameters())
    actions = draws.x.actions
    if isinstance(space, spaces.Box):
        given = policy.executed(actions)
        assert (given - actions).abs().max() > 0.01
        assert (given.sum(-1) - draws.x.rewards).abs().max() < 1e-5
    else:
        assert torch.equal(actions.double().reshape(6, 5, -1).sum(-1), draws.x.rewards.double())
